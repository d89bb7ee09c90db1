"""Where labelled images come from without any service: embedded digits, a folder, MNIST's files.

Every source gives encoded image files and never decodes what is already encoded: the bytes on disk are
the bytes that were given, so nothing is lost and a sample's hash does not depend on a codec's version.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from vitlab.config import UserError
from vitlab.data.tars import IMAGES, Sample

EXTENSIONS = {"PNG": "png", "JPEG": "jpg", "MPO": "jpg", "WEBP": "webp", "BMP": "bmp", "GIF": "gif"}
EXTENSIONS |= {"TIFF": "tif", "PPM": "ppm"}
KEY_LENGTH = 80  # a tar header has room for 100 characters


@dataclass(frozen=True)
class Source:
    """Labelled images, once. `classes` is asked for after the last sample: some sources learn it late."""

    name: str
    samples: Iterator[Sample]
    classes: Callable[[], list[str]]
    total: int | None = None


def digits() -> Source:
    """scikit-learn's 1797 handwritten digits, 8 by 8, 16 grey levels spread over 0..255."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = np.round(pixels.reshape(-1, 8, 8) * 255 / 16).astype(np.uint8)
    pairs = enumerate(zip(images, labels, strict=True))
    samples = (Sample(f"digits-{i:06d}", "png", png(image), int(label)) for i, (image, label) in pairs)
    return Source("digits", samples, lambda: [str(i) for i in range(10)], len(images))


# ---------------------------------------------------------------- MNIST's format


def idx(path: Path) -> Source:
    """`NAME-images-idx3-ubyte` beside `NAME-labels-idx1-ubyte`, or `….gz`: MNIST and its like.

    Every pair in the directory is read, in the order of their names reversed: `train` before `t10k`. What
    lies there packed and unpacked is read once.
    """
    packed, plain = (path.glob(f"*-images-idx3-ubyte{end}") for end in (".gz", ""))
    files = {file.name.removesuffix(".gz"): file for file in (*packed, *plain)}
    found = [files[name] for name in sorted(files, reverse=True)]
    if not found:
        raise UserError(f"data.source: {path}: no NAME-images-idx3-ubyte[.gz] in it; give their directory")
    pairs = [(_idx(file), _idx(_labels_of(file))) for file in found]
    for file, (images, labels) in zip(found, pairs, strict=True):
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
            raise UserError(f"{file}: {images.shape} images, {labels.shape} labels; copy both files again")
    classes = max(int(labels.max()) for _, labels in pairs) + 1
    rows = (row for images, labels in pairs for row in zip(images, labels, strict=True))
    samples = (Sample(f"idx-{i:07d}", "png", png(image), int(label)) for i, (image, label) in enumerate(rows))
    names = [str(i) for i in range(classes)]
    return Source(f"idx:{path}", samples, lambda: names, sum(len(images) for images, _ in pairs))


def _labels_of(images: Path) -> Path:
    labels = images.with_name(images.name.replace("-images-idx3-", "-labels-idx1-"))
    if not labels.is_file():
        raise UserError(f"data.source: {images}: its labels are missing; put {labels.name} beside it")
    return labels


def _idx(file: Path) -> np.ndarray:
    """LeCun's format: two zero bytes, the type (8: bytes), the number of sides, the sides, the numbers."""
    try:
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file}: cannot be unpacked: {error}; copy it again") from error
    whole = len(data) > 3 and len(data) >= 4 + 4 * data[3]
    sides = [int(n) for n in np.frombuffer(data, ">u4", data[3], 4)] if whole else []
    if data[:3] != b"\0\0\x08" or len(data) != 4 + 4 * len(sides) + math.prod(sides):
        raise UserError(f"{file}: {len(data)} bytes are not idx bytes of sides {sides}; copy it again")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * len(sides)).reshape(sides)


# ---------------------------------------------------------------- a folder


def folder(path: Path) -> Source:
    """One sub-folder a class, by name. The files come in the order of their names' hashes: mixed, yet
    the same every time, for a shard of one class would make batches of one class."""
    if not path.is_dir():
        raise UserError(f"data.source: {path}: no such directory; give one with a sub-folder for every class")
    classes = sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    files = [(file, label) for label, name in enumerate(classes) for file in sorted((path / name).rglob("*"))]
    files = [(file, label) for file, label in files if _is_image(file)]
    if not files:
        found = "its images lie flat in it" if any(map(_is_image, path.iterdir())) else "no images in it"
        raise UserError(f"data.source: {path}: {found}; move them into one sub-folder for every class")
    empty = sorted(set(classes) - {classes[label] for _, label in files})
    if empty:
        raise UserError(f"data.source: {path}: no images in the class folder {empty[0]}; fill or remove it")
    files.sort(key=lambda pair: hashlib.sha256(pair[0].relative_to(path).as_posix().encode()).digest())
    samples = (
        encoded(_key(i, file.relative_to(path).with_suffix("").as_posix()), file.read_bytes(), label)
        for i, (file, label) in enumerate(files)
    )
    return Source(f"folder:{path}", samples, lambda: classes, len(files))


def _is_image(file: Path) -> bool:
    hidden = file.name.startswith(".")
    return not hidden and file.is_file() and file.suffix.lower().removeprefix(".") in IMAGES


def _key(number: int, name: str) -> str:
    """A name that is unique and plain: a dot in it would start the extension."""
    return f"{number:07d}-{re.sub('[^A-Za-z0-9_-]', '_', name)}"[:KEY_LENGTH]


def encoded(key: str, data: bytes, label: int) -> Sample:
    """A sample of an image file's own bytes; the extension tells what they really are."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            kind = str(image.format)
    except UnidentifiedImageError:
        kind = "unknown"
    if kind not in EXTENSIONS:
        raise UserError(
            f"sample {key}: format {kind}; allowed: {', '.join(EXTENSIONS)}; convert or remove it"
        )
    return Sample(key, EXTENSIONS[kind], data, label)


def png(image: Any) -> bytes:
    """An array (H W, or H W C) or a Pillow image → the bytes of a lossless file."""
    out = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))).save(out, "PNG")
    return out.getvalue()

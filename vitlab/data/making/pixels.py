"""Images that are arrays: in memory, in NumPy's files, in MNIST's files. Each becomes a lossless PNG.

N images, H W their sides, C colours.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vitlab.config import UserError, digest
from vitlab.data.bad import BadInputError
from vitlab.data.making.sources import IMAGE_NAMES, LABEL_NAMES, Raw, Source, column, png

COLOURS = (1, 3, 4)  # C of an image: grey, RGB, RGB with transparency


def arrays(images: Any, labels: Any, classes: Sequence[str] | None = None) -> Source:
    """Arrays in memory: N H W or N H W C of bytes, and N class numbers (-1: none, which is bad).

    They come mixed, the same every time, for arrays are often sorted by class.
    """
    images, labels = np.asarray(images), np.asarray(labels)
    mark = hashlib.sha256(np.ascontiguousarray(labels).data).hexdigest()
    mark += hashlib.sha256(np.ascontiguousarray(images).data).hexdigest()
    return _rows("arrays", images, labels, classes, mark)


def npy(path: Path, image: str | None = None, label: str | None = None) -> Source:
    """A directory of `images.npy` and `labels.npy`, read where they lie, or an .npz of both, which is
    unpacked into memory. Nothing that is pickled is opened."""
    if path.is_dir():
        files = sorted(path.glob("*.npy"))
        found = {file.stem: _load(file) for file in files}
    else:
        if not path.is_file():
            raise UserError(f"data.source: npy:{path}: no such file; give an .npz or a directory of .npy")
        files, found = [path], _load(path)
    if not isinstance(found, dict):
        raise UserError(
            f"data.source: npy:{path}: holds a single array; give the directory of images.npy and labels.npy"
        )
    name = f"npy:{path}"
    labels = column(name, "label", label, [n for n, a in found.items() if a.ndim == 1], LABEL_NAMES)
    images = column(name, "image", image, [n for n, a in found.items() if a.ndim in (3, 4)], IMAGE_NAMES)
    stats = [file.stat() for file in files]
    mark = digest([[f.name for f in files], [[s.st_size, s.st_mtime_ns] for s in stats], images, labels])
    return _rows(name, found[images], found[labels], None, mark)


def _load(file: Path) -> Any:
    """An array that stays on disk, or a dict of arrays."""
    try:
        found = np.load(file, mmap_mode="r", allow_pickle=False)
        if isinstance(found, np.ndarray):
            return found
        with found:
            return {name: found[name] for name in found.files}
    except (ValueError, OSError, EOFError, zlib.error) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"data.source: npy:{file}: cannot be opened: {first}; "
            "save it again with numpy.save, or numpy.savez, of arrays of numbers"
        ) from None


def _rows(name: str, images: Any, labels: Any, classes: Sequence[str] | None, mark: str) -> Source:
    colours = images.shape[3:]
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or (colours and colours[0] not in COLOURS):
        raise UserError(
            f"{name}: images are {images.dtype} of shape {images.shape}; "
            "allowed: uint8 of N H W, or of N H W C with 1, 3 or 4 colours"
        )
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        raise UserError(
            f"{name}: labels are {labels.dtype} of shape {labels.shape}; "
            f"allowed: integers of shape ({len(images)},), one for every image"
        )
    if not len(images):
        raise UserError(f"{name}: no images in it; give at least one")
    order = np.random.default_rng(0).permutation(len(images))

    def samples(start: int) -> Iterator[Raw]:
        for row in order[start:].tolist():
            yield Raw(f"row-{row:07d}", int(labels[row]), partial(_picture, images, row), f"row {row}")

    return Source(name, samples, classes or (), len(images), mark)


def _picture(images: Any, row: int) -> bytes:
    pixels = images[row]
    if not pixels.size:
        raise BadInputError("no_image", f"it has the shape {pixels.shape}")
    return png(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels)


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
    classes = [str(i) for i in range(max(int(labels.max()) for _, labels in pairs) + 1)]
    rows = [(images, labels, row) for images, labels in pairs for row in range(len(labels))]

    def samples(start: int) -> Iterator[Raw]:
        for i in range(start, len(rows)):
            images, labels, row = rows[i]
            yield Raw(f"idx-{i:07d}", int(labels[row]), partial(_picture, images, row))

    mark = digest(
        [hashlib.sha256(np.ascontiguousarray(array).data).hexdigest() for pair in pairs for array in pair]
    )
    return Source(f"idx:{path}", samples, classes, len(rows), mark)


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

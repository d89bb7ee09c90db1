"""Where labelled images come from: what a source is, and the two simplest, a folder and embedded digits.

Every source gives encoded image files and never decodes what is already encoded: the bytes on disk are
the bytes that were given, so nothing is lost and a sample's hash does not depend on a codec's version.
A source can be entered at any position and gives the same images from there on every time: that is what
lets an interrupted writer go on.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from vitlab.batch import Bad
from vitlab.config import UserError, digest, nearest
from vitlab.data.bad import BadInputError
from vitlab.data.making.progress import shown
from vitlab.data.shards.tars import IMAGES

KEY_LENGTH = 80  # a tar header has room for 100 characters
IMAGE_NAMES = ("image", "images", "img", "path", "file", "filename", "file_name", "image_path", "filepath")
LABEL_NAMES = ("label", "labels", "cls", "class", "target", "fine_label")


class Raw(NamedTuple):
    """One image that is not read yet. `read` may run on any thread; it raises `BadInputError`."""

    key: str
    label: int  # -1: none
    read: Callable[[], bytes]
    origin: str = ""  # what a person knows it by, where that is not its key
    split: str | None = None  # where the source itself is split


@dataclass(frozen=True)
class Source:
    """Labelled images in an order that is always the same."""

    name: str
    samples: Callable[[int], Iterator[Raw]]  # those from a position on
    classes: Sequence[str] = ()  # none: labels are numbers, and the highest tells how many classes there are
    total: int | None = None
    fingerprint: str = ""  # changes when the images do
    labelled: bool = True  # else no image has a label
    split: bool = False  # every sample says its split
    bad: list[Bad] = field(default_factory=list)  # known before anything is read


def limited(source: Source, limit: int | None) -> Source:
    """No more than the first so many images."""
    if limit is None:
        return source
    total = limit if source.total is None else min(limit, source.total)
    mark = digest([source.fingerprint, limit])
    return replace(
        source,
        samples=lambda start: itertools.islice(source.samples(start), max(limit - start, 0)),
        total=total,
        fingerprint=mark,
    )


def digits() -> Source:
    """scikit-learn's 1797 handwritten digits, 8 by 8, 16 grey levels spread over 0..255."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = np.round(pixels.reshape(-1, 8, 8) * 255 / 16).astype(np.uint8)

    def samples(start: int) -> Iterator[Raw]:
        for i in range(start, len(images)):
            yield Raw(f"digits-{i:06d}", int(labels[i]), partial(png, images[i]))

    return Source("digits", samples, [str(i) for i in range(10)], len(images), "digits")


# ---------------------------------------------------------------- a folder


def folder(path: Path) -> Source:
    """One sub-folder a class, by name. The files come in the order of their names' hashes: mixed, yet
    the same every time, for a shard of one class would make batches of one class."""
    if not path.is_dir():
        raise UserError(f"data.source: {path}: no such directory; give one with a sub-folder for every class")
    classes = sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    inside = (
        (file, label) for label, name in enumerate(classes) for file in sorted((path / name).rglob("*"))
    )
    files = [(file, label) for file, label in shown(inside, "listing images", "files") if _is_image(file)]
    if not files:
        found = "its images lie flat in it" if any(map(_is_image, path.iterdir())) else "no images in it"
        raise UserError(f"data.source: {path}: {found}; move them into one sub-folder for every class")
    empty = sorted(set(classes) - {classes[label] for _, label in files})
    if empty:
        raise UserError(f"data.source: {path}: no images in the class folder {empty[0]}; fill or remove it")
    named = by_hash([(file.relative_to(path).as_posix(), label) for file, label in files])
    return of_files(f"folder:{path}", path, named, classes)


def _is_image(file: Path) -> bool:
    hidden = file.name.startswith(".")
    return not hidden and file.is_file() and file.suffix.lower().removeprefix(".") in IMAGES


def by_hash(named: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """In the order of their names' hashes."""
    return sorted(named, key=lambda pair: hashlib.sha256(pair[0].encode()).digest())


def of_files(name: str, root: Path, named: Sequence[tuple[str, int]], classes: Sequence[str]) -> Source:
    """Files by their paths below `root`, with their labels, in this order."""

    def samples(start: int) -> Iterator[Raw]:
        for i in range(start, len(named)):
            file, label = named[i]
            yield Raw(plain_key(i, os.path.splitext(file)[0]), label, partial(read_file, root, file), file)

    mark = _state(root, [file for file, _ in named])
    return Source(name, samples, classes, len(named), digest([mark, [label for _, label in named]]))


def read_file(root: Path, name: str) -> bytes:
    """The bytes of a file that lies below `root`."""
    if not name:
        raise BadInputError("no_image", "no file is named")
    place = os.path.normpath(name)
    if os.path.isabs(place) or place.split(os.sep)[0] == os.pardir:
        raise BadInputError("unsafe_name", f"it leads out of {root}")
    try:
        return (root / place).read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadInputError("no_image", f"the file cannot be read: {reason}") from None


def _state(root: Path, names: Iterable[str]) -> str:
    """Changes when a file comes, goes, or is written again."""
    state = hashlib.sha256()
    for name in shown(names, "looking at the files", "files"):
        try:
            stat = (root / name).stat()
            state.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
        except (OSError, ValueError):
            state.update(f"{name}\0missing\0".encode())
    return state.hexdigest()


# ---------------------------------------------------------------- for every source


def plain_key(number: int, name: str) -> str:
    """A name that is unique and plain: a dot in it would start the extension."""
    return f"{number:07d}-{re.sub('[^A-Za-z0-9_-]', '_', name)}"[:KEY_LENGTH]


def png(image: Any) -> bytes:
    """An array (H W, or H W C) or a Pillow image → the bytes of a lossless file."""
    out = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))).save(out, "PNG")
    return out.getvalue()


def column(name: str, what: str, given: str | None, fit: Sequence[str], usual: Sequence[str]) -> str:
    """The column that was asked for, else the only one that fits, else the one with a usual name."""
    if given is not None:
        if given in fit:
            return given
        allowed = ", ".join(fit) or "none"
        raise UserError(
            f"data.{what}_column: given '{given}'; columns that fit: {allowed}{nearest(given, fit)}"
        )
    if len(fit) == 1:
        return fit[0]
    known = [one for one in usual if one in fit]
    if not known:
        raise UserError(f"{name}: which column is the {what}? those that fit: {', '.join(fit) or 'none'}; "
                        f"name it in data.{what}_column")  # fmt: skip
    return known[0]

"""Tar files in WebDataset's layout: written the same for the same input, and read by offset.

The only module that imports `webdataset`: its writer makes the files and its rule splits a member's
name into key and extension, so any WebDataset tool reads what is written here and the reverse. Reading
does not go through its iterators: a sample's place is known from the index, and one `pread` fetches it.
Nothing is ever extracted to disk.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from webdataset import TarWriter
from webdataset.tariterators import base_plus_ext

from vitlab.batch import Bad
from vitlab.config import UserError

IMAGES = ("png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm")
LABEL = "cls"
BLOCK = 512
NO_LABEL = -1


class Sample(NamedTuple):
    """One image on its way to disk: the bytes of an image file and its class."""

    key: str
    extension: str
    data: bytes
    label: int


@dataclass(frozen=True)
class Columns:
    """Where the samples of one tar lie and what they are: one entry a sample in every column."""

    keys: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    extensions: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)

    def add(self, key: str, offset: int, size: int, extension: str, label: int) -> None:
        row = (key, offset, size, extension, label)
        for column, value in zip(self.data().values(), row, strict=True):
            column.append(value)

    def data(self) -> dict[str, list[Any]]:
        return dict(vars(self))

    def __len__(self) -> int:
        return len(self.keys)

    def plain(self) -> dict[str, Any]:
        return asdict(self)


def write_tar(path: Path, samples: Iterable[Sample]) -> None:
    """All samples in one tar; no date and no owner, so that equal input gives equal bytes."""
    part = path.with_name(path.name + ".partial")
    try:
        with part.open("wb") as file:
            with TarWriter(file, user="vitlab", group="vitlab", mode=0o444, mtime=0, encoder=False) as tar:
                for sample in samples:
                    label = str(sample.label).encode()
                    tar.write({"__key__": sample.key, sample.extension: sample.data, LABEL: label})
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def index_tar(path: Path) -> tuple[Columns, list[Bad]]:
    """Where the samples lie in a tar of WebDataset's layout, written by whomever, and what is bad in it."""
    columns = Columns()
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            end = 0
            group: dict[str, tarfile.TarInfo] = {}
            last: str | None = None
            for member, key, extension in _members(path, tar):
                end = member.offset_data + -(-member.size // BLOCK) * BLOCK
                if key != last and last is not None:
                    _add(columns, path, file.fileno(), last, group)
                    group = {}
                if extension in group:
                    raise UserError(f"{path}: the member {member.name} is there twice; write the tar again")
                last, group[extension] = key, member
            if last is not None:
                _add(columns, path, file.fileno(), last, group)
            if len(os.pread(file.fileno(), BLOCK, end)) < BLOCK:
                raise UserError(f"{path}: the tar ends early, after {len(columns)} samples; copy it again")
    except tarfile.TarError as error:
        raise UserError(
            f"{path}: not a whole, uncompressed tar ({error}); unpack .gz first or copy it again"
        ) from error
    if not columns.keys:
        raise UserError(f"{path}: no samples; expected members such as 000001.png and 000001.{LABEL}")
    return columns, []


def _members(path: Path, tar: tarfile.TarFile) -> Iterator[tuple[tarfile.TarInfo, str, str]]:
    """The files of a tar with their keys and extensions; names that lead elsewhere are refused."""
    for member in tar:
        if member.name.startswith("/") or ".." in member.name.split("/"):
            raise UserError(
                f"{path}: the member name {member.name!r} leads out of the tar; "
                "write the tar again with plain relative names"
            )
        if member.isdir():
            continue
        if not member.isreg() or member.issparse():
            raise UserError(
                f"{path}: the member {member.name} is a link or no plain file; write the tar with files"
            )
        key, extension = base_plus_ext(member.name)
        if key is not None:
            yield member, key, extension.lower()


def _add(columns: Columns, path: Path, fd: int, key: str, group: dict[str, tarfile.TarInfo]) -> None:
    extension = next((e for e in IMAGES if e in group), None)
    if extension is None:
        found = ", ".join(group)
        raise UserError(f"{path}: sample {key} has no image, only {found}; allowed: {', '.join(IMAGES)}")
    image, label = group[extension], NO_LABEL
    if LABEL in group:
        text = os.pread(fd, group[LABEL].size, group[LABEL].offset_data)
        if not text.strip().isdigit():
            raise UserError(
                f"{path}: {key}.{LABEL} holds {text[:20]!r}; expected a class number from 0, in ASCII"
            )
        label = int(text)
    columns.add(key, image.offset_data, image.size, extension, label)


def read_member(fd: int, offset: int, size: int) -> bytes:
    """The bytes of one member; fewer than `size` where the tar has been cut since it was indexed."""
    return os.pread(fd, size, offset)


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

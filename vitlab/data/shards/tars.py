"""Tar files in WebDataset's layout: written the same for the same input, and read by offset.

The only module that imports `webdataset`: its writer makes the files and its rule splits a member's
name into key and extension, so any WebDataset tool reads what is written here and the reverse. Reading
does not go through its iterators: a sample's place is known from the index, and one `pread` fetches it.
Nothing is ever extracted to disk.

Neighbours with one key are one sample, as for WebDataset. Where it stops or mixes things up, this goes on
and names what is bad: of a key that comes twice, the first sample that has a label stays.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from webdataset import TarWriter
from webdataset.tariterators import base_plus_ext

from vitlab.batch import Bad
from vitlab.config import UserError
from vitlab.data.shards.scan import Damage, Member, Read, compressed, sweep, walk

IMAGES = ("png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm")
OTHERS = ("jxl", "avif", "heic", "heif", "jp2", "jfif", "svg")  # images that nothing here reads
LABEL = "cls"
NO_LABEL = -1
LABEL_DIGITS = 9
LABEL_BYTES = 64  # digits and white space; a longer file is no label
KEY_SHOWN = 80
ABSOLUTE = re.compile(rb"[/\\]|[A-Za-z]:[/\\]")
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
META = re.compile(r"__[^/]*__($|/)")  # members that WebDataset keeps for itself


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
                    label = {LABEL: str(sample.label).encode()} if sample.label != NO_LABEL else {}
                    tar.write({"__key__": sample.key, sample.extension: sample.data, **label})
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@dataclass(frozen=True)
class Examined:
    """All that one reading of a tar tells."""

    columns: Columns
    bad: list[Bad]
    bytes: int
    sha256: str


def index_tar(path: Path) -> tuple[Columns, list[Bad]]:
    """Where the samples lie in a tar, written by whomever and however damaged, and all that is bad in it."""
    found = examine(path)
    return found.columns, found.bad


def examine(path: Path, seen: Callable[[int], object] = lambda count: None) -> Examined:
    """The samples, what is bad and the hash; `seen` is told of every chunk of bytes that was read."""
    try:
        with path.open("rb") as file:
            fd = file.fileno()
            return examine_bytes(lambda place, size: os.pread(fd, size, place), path, seen)
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"{path}: cannot be read ({why}); allow it, or copy the file again") from error


def examine_bytes(read: Read, path: Path, seen: Callable[[int], object] = lambda count: None) -> Examined:
    """The same of what `read` gives; `path` is its name."""
    swept = sweep(read, seen)
    program = None if swept.headers else compressed(read(0, 16))
    if program:
        raise UserError(
            f"{path}: compressed with {program}, so no sample has a place; unpack it to a plain .tar"
        )
    found = _Found(read, path.name)
    for item in walk(read, swept):
        found.add(item)
    found.finish()
    return Examined(found.columns(), found.named(), swept.size, swept.sha256)


class _Row(NamedTuple):
    place: int
    size: int
    extension: str
    label: int
    has_label: bool  # a label's file was there, whatever it holds


class _Found:
    """Samples and bad things of one tar while its members come by, in their order."""

    def __init__(self, read: Read, shard: str) -> None:
        self.read, self.shard = read, shard
        self.rows: dict[str, _Row] = {}
        self.bad: list[tuple[int, Bad]] = []
        self.torn: set[str] = set()  # keys that have lost a member, which has been named
        self.key: str | None = None
        self.group: dict[str, Member] = {}
        self.labelled = False
        self.without: list[tuple[int, str, list[str]]] = []  # place, key, extensions: no image
        self.beside = {LABEL}  # extensions that samples have

    def add(self, item: Member | Damage) -> None:
        name = text(item.name) if item.name is not None else None
        key, extension = base_plus_ext(name) if name is not None else (None, "")
        if isinstance(item, Damage):
            last = (self.key if item.kind == "broken_header" else "") if name is None else key or name
            self._name(item.kind, item.place, last or "", item.reason)
            if key is not None:
                self.torn.add(key)
            return
        assert name is not None
        if META.match(name):
            return
        wrong = _unsafe(item.name, name)
        if wrong or not item.plain:
            if (key or name) not in self.torn:  # of an image and its label, one is enough
                reason = (
                    f"the member {shown(name)} {wrong or 'is a link or something else that is no plain file'}"
                )
                self._name("unsafe_name" if wrong else "not_a_file", item.place, key or name, reason)
            self.torn.add(key or name)
        elif key is not None:
            self._join(key, extension.lower(), item)

    def _name(self, kind: str, place: int, key: str, reason: str) -> None:
        self.bad.append((place, Bad(kind, self.shard, shown(key), reason)))

    def _join(self, key: str, extension: str, member: Member) -> None:
        if key != self.key:
            self._close()
            self.key = key
        if extension in self.group:
            reason = f"byte {member.place}: a second {extension} of this key, the first stays"
            self._name("duplicate_key", member.place, key, reason)
        else:
            self.group[extension] = member

    def _close(self) -> None:
        """The members of one key are all there: a sample, or something bad."""
        key, group, self.group = self.key, self.group, {}
        if key is None or not group:
            return
        place = next(iter(group.values())).place
        extension = next((e for e in IMAGES if e in group), None)
        before = self.rows.get(key)
        if extension is None:
            if before is not None:
                self._name(
                    "duplicate_key", place, key, f"byte {place}: the key comes again, without an image"
                )
            elif key not in self.torn:
                self.without.append((place, key, list(group)))
            return
        self.beside.update(group)
        row = self._row(key, group, extension)
        if before is None or (before.label == NO_LABEL != row.label):
            self.rows.pop(key, None)  # so that the rows stay in the order of the file
            self.rows[key] = row
        if before is not None:
            stays = "this one has a label and" if self.rows[key] is row else "the first"
            self._name("duplicate_key", place, key, f"byte {place}: the key comes again, {stays} stays")

    def _row(self, key: str, group: dict[str, Member], extension: str) -> _Row:
        image, label = group[extension], NO_LABEL
        if LABEL in group:
            self.labelled = True
            member = group[LABEL]
            data = self.read(member.place, min(member.size, LABEL_BYTES + 1))
            digits = data.strip()
            if digits.isdigit() and len(digits) <= LABEL_DIGITS and len(data) <= LABEL_BYTES:
                label = int(digits)
            elif key not in self.rows:
                given = shown(ascii(data[:20])[1:])
                reason = f"its label is {given}; expected a class number from 0, in ASCII"
                self._name("wrong_label", member.place, key, reason)
        return _Row(image.place, image.size, extension, label, LABEL in group)

    def finish(self) -> None:
        self._close()
        for place, key, have in self.without:
            ends = {extension.rpartition(".")[2] for extension in have}
            if self.beside.intersection(have) or ends.intersection((*IMAGES, *OTHERS)):
                found = shown(", ".join(have))
                dotted = "; a dot in a name ends the key, rename it" if ends.intersection(IMAGES) else ""
                reason = f"byte {place}: no image, only {found}; allowed: {', '.join(IMAGES)}{dotted}"
                self._name("no_image", place, key, reason)
        for key, row in self.rows.items():
            if self.labelled and not row.has_label and key not in self.torn:
                self._name(
                    "no_label", row.place, key, f"no {LABEL} file, but other samples of the tar have one"
                )
        if not self.rows:
            reason = f"no samples; expected members such as 000001.png and 000001.{LABEL}"
            self.bad.append((sys.maxsize, Bad("empty_shard", self.shard, "", reason)))

    def columns(self) -> Columns:
        columns = Columns()
        for key, row in self.rows.items():
            columns.add(key, row.place, row.size, row.extension, row.label)
        return columns

    def named(self) -> list[Bad]:
        """In the order of the file."""
        return [bad for _, bad in sorted(self.bad, key=lambda one: one[0])]


def text(name: bytes) -> str:
    """A member's name; bytes that are no UTF-8 appear as \\xNN, as JSON could not hold them."""
    return name.decode("utf8", "backslashreplace")


def shown(name: str) -> str:
    """A name for one line of a message: printable and not too long."""
    plain = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
    return plain if len(plain) <= KEY_SHOWN else plain[: KEY_SHOWN - 1] + "…"


def _unsafe(raw: bytes, name: str) -> str | None:
    """Why a name is not used: it leads out of the tar, or a screen cannot show it."""
    if CONTROL.search(name):
        return "has control characters in its name"
    if ABSOLUTE.match(raw) or b".." in re.split(rb"[/\\]", raw):
        return "leads out of the tar"
    return None


def read_member(fd: int, offset: int, size: int) -> bytes:
    """The bytes of one member; fewer than `size` where the tar has been cut since it was indexed."""
    return os.pread(fd, size, offset)


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

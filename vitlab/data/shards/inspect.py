"""Every byte of a folder of shards looked at: is all of it there, whole, readable, and what the index says?

`open_shards` looks at names and sizes alone, for a start must be quick. Here the hash of every tar is
computed, its headers are walked again and compared with its columns, and every image is decoded. What is bad
is named and the rest is still looked at. Tars are looked at in threads: hashing and decoding leave Python's
lock to the others.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vitlab.batch import Bad
from vitlab.config import UserError
from vitlab.data.bad import KINDS, BadInputError
from vitlab.data.images.decode import decode
from vitlab.data.shards.index import INDEX, ShardInfo, Shards, read_index
from vitlab.data.shards.tars import NO_LABEL, Columns, examine, read_member

MEANING = KINDS | {
    "broken_index": "an index that cannot be trusted",
    "changed_tar": "a tar that is not the one of the index",
    "changed_columns": "columns that do not fit their tar",
    "unreadable": "a file that the system does not let be read",
    "split_leak": "an image that lies in more than one split",
    "stray_tar": "a tar that the index does not name",
}

Step = Callable[[int], None]  # so many more images are done


@dataclass(frozen=True)
class Verdict:
    """What was looked at, what is bad in it, and what a person should know without it being bad."""

    tars: int = 0
    images: int = 0
    bytes: int = 0
    bad: list[Bad] = field(default_factory=list)
    warnings: list[Bad] = field(default_factory=list)
    known: int = 0  # bad members that the index has noted: they are no samples


@dataclass
class _Looked:
    """One tar."""

    split: str
    info: ShardInfo
    bad: list[Bad] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    hashes: list[int] = field(default_factory=list)  # 8 bytes of each image's sha256; 0: not read
    bare: list[str] = field(default_factory=list)  # keys of samples without a label
    told: set[tuple[str, str]] = field(default_factory=set)

    def add(self, kind: str, key: str, reason: str) -> None:
        """Each kind is told once of a sample, and once of the tar as a whole."""
        if (kind, key) not in self.told:
            self.told.add((kind, key))
            self.bad.append(Bad(kind, self.info.file, key, reason))


class _How(NamedTuple):
    decodes: bool
    step: Step
    stop: threading.Event  # or an interrupt would wait for the tars that are being looked at


def verify(path: Path, *, decodes: bool = True, threads: int = 0, step: Step = lambda n: None) -> Verdict:
    """Everything about the shards of a folder. `decodes`: every image too, which takes most of the time."""
    if not (path / INDEX).is_file():
        raise UserError(
            f"{path}: no {INDEX} in it; give a folder that `vitlab shards SOURCE DEST` has written"
        )
    try:
        shards = read_index(path)
    except UserError as error:
        return Verdict(bad=[Bad("broken_index", INDEX, "", str(error).removeprefix(f"{path / INDEX}: "))])
    pairs = [(split, info) for split, infos in shards.splits.items() for info in infos]
    if not all(isinstance(number, int) for _, info in pairs for number in (info.count, info.bytes)):
        return Verdict(bad=[Bad("broken_index", INDEX, "", "a count or a number of bytes is no number")])
    how = _How(decodes, step, threading.Event())
    pool = ThreadPoolExecutor(threads or os.cpu_count() or 1)
    try:
        looked = list(pool.map(lambda pair: _look(shards, pair[0], pair[1], how), pairs))
    finally:
        how.stop.set()
        pool.shutdown(cancel_futures=True)
    return _verdict(shards, looked)


def _verdict(shards: Shards, looked: list[_Looked]) -> Verdict:
    noted = {(one.kind, one.key, Path(one.shard).name) for one in shards.bad}
    found = [one for tar in looked for one in (*tar.bad, *_without_label(tar, looked))]
    bad = [one for one in found if (one.kind, one.key, one.shard) not in noted]
    named = {tar.info.file for tar in looked}
    stray = sorted(file.name for file in shards.path.glob("*.tar") if file.name not in named)
    warnings = [Bad("stray_tar", name, "", "is in the folder, but not in the index") for name in stray]
    leaks = _leaks(looked)
    # Of images that were drawn anew, others were hashed than those that lie here.
    drawn = shards.made.get("resize") or shards.made.get("quality")
    by_hash = "sha256" in str(shards.made.get("rule")) and not drawn
    return Verdict(
        len(looked),
        sum(tar.info.count for tar in looked),
        sum(tar.info.bytes for tar in looked),
        [*bad, *leaks] if by_hash else bad,
        warnings if by_hash else [*warnings, *leaks],
        len(found) - len(bad),
    )


# ---------------------------------------------------------------- one tar


def _look(shards: Shards, split: str, info: ShardInfo, how: _How) -> _Looked:
    tar, path = _Looked(split, info), shards.path / info.file
    if Path(info.file).name != info.file:
        tar.add("unsafe_name", "", "the index names a file that is not in its folder")
    elif not path.is_file():
        tar.add("missing_shard", "", f"the file is missing, and with it {info.count} samples")
    else:
        try:
            columns = _check_tar(tar, path, _columns(tar, shards))
            _check_samples(tar, path, columns, len(shards.classes), how)
        except OSError as error:
            tar.add("unreadable", "", error.strerror or type(error).__name__)
    how.step(info.count - len(tar.hashes))
    return tar


def _check_tar(tar: _Looked, path: Path, columns: Columns | None) -> Columns:
    """The file as a whole. Returns the samples to look at: those of the columns, else of the tar itself."""
    size = path.stat().st_size
    if size < tar.info.bytes:  # to be copied again: what its end lacks is counted, not told one by one
        columns = columns or Columns()
        lost = sum(o + s > size for o, s in zip(columns.offsets, columns.sizes, strict=True))
        samples = f"; {lost} of {tar.info.count} samples are not whole" if columns.keys else ""
        tar.add("cut_tar", "", f"has {size} bytes, but {tar.info.bytes} in the index{samples}")
        return columns
    if size > tar.info.bytes:
        tar.add("changed_tar", "", f"has {size} bytes, but {tar.info.bytes} in the index")
    try:
        found = examine(path)
    except UserError as error:
        tar.add("broken_header", "", str(error).removeprefix(f"{path}: ").partition(";")[0])
        return columns or Columns()
    if size == tar.info.bytes and found.sha256 != tar.info.sha256:
        tar.add("changed_tar", "", "its bytes are others than those of the index (sha256)")
    for one in found.bad:
        tar.add(one.kind, one.key, one.reason)
    if columns is None:
        return found.columns
    _compare(tar, columns, found.columns)
    return columns


def _check_samples(tar: _Looked, path: Path, columns: Columns, classes: int, how: _How) -> None:
    tar.keys = columns.keys
    rows = zip(columns.keys, columns.offsets, columns.sizes, columns.labels, strict=True)
    with path.open("rb") as file:
        for key, offset, length, label in rows:
            if how.stop.is_set():
                return
            data = read_member(file.fileno(), offset, length)
            whole = len(data) == length
            tar.hashes.append(int.from_bytes(hashlib.sha256(data).digest()[:8], "big") if whole else 0)
            if how.decodes and whole:
                _decode(tar, key, data)
            if label == NO_LABEL:
                tar.bare.append(key)
            elif not 0 <= label < classes:
                tar.add("wrong_label", key, f"label {label}, but there are {classes} classes")
            how.step(1)


def _columns(tar: _Looked, shards: Shards) -> Columns | None:
    try:
        columns = shards.columns(tar.info)
    except (UserError, TypeError, ValueError, OSError) as error:
        reason = str(error).partition("; make it anew")[0]
        tar.add("changed_columns", "", reason.removeprefix(f"{shards.path}{os.sep}"))
        return None
    words, numbers = (columns.keys, columns.extensions), (columns.offsets, columns.sizes, columns.labels)
    if all(isinstance(w, str) for some in words for w in some) and all(
        isinstance(n, int) for some in numbers for n in some
    ):
        return columns
    tar.add("changed_columns", "", "the columns hold what is no word or no number")
    return None


def _compare(tar: _Looked, columns: Columns, own: Columns) -> None:
    """Every sample of the columns is in the tar where they say, and the reverse."""
    said, there = _by_key(tar, columns), _by_key(tar, own)
    told = {key for _, key in tar.told}
    if tar.told and not there:  # nothing to compare with, and that has been told
        return
    for key in dict.fromkeys((*said, *there)):
        if key not in told and said.get(key) != there.get(key):
            tar.add("changed_columns", key, _difference(said.get(key), there.get(key)))


def _by_key(tar: _Looked, columns: Columns) -> dict[str, tuple[int, int, str, int]]:
    rows = zip(columns.offsets, columns.sizes, columns.extensions, columns.labels, strict=True)
    table: dict[str, tuple[int, int, str, int]] = {}
    for key, row in zip(columns.keys, rows, strict=True):
        if key in table:
            tar.add("duplicate_key", key, "is there more than once")
        table[key] = row
    return table


def _difference(said: tuple[int, int, str, int] | None, there: tuple[int, int, str, int] | None) -> str:
    if said is None:
        return "is in the tar, but not in the columns"
    if there is None:
        return "is in the columns, but not in the tar"
    parts = zip(("offset", "size", "extension", "label"), said, there, strict=True)
    return "; ".join(f"{name} {a} in the columns, {b} in the tar" for name, a, b in parts if a != b)


def _decode(tar: _Looked, key: str, data: bytes) -> None:
    try:
        decode(data, 3)
    except BadInputError as error:
        tar.add(error.kind, key, error.reason)


# ---------------------------------------------------------------- all tars


def _without_label(tar: _Looked, looked: list[_Looked]) -> list[Bad]:
    """Samples without a label, unless none has one: then they are for pretraining."""
    if all(len(one.bare) == len(one.hashes) for one in looked):
        return []
    return [Bad("no_label", tar.info.file, key, "no label, but others have one") for key in tar.bare]


def _leaks(looked: list[_Looked]) -> list[Bad]:
    """Images of equal bytes in two splits, each named where it stands in the later one."""
    found: list[Bad] = []
    earlier: dict[str, np.ndarray] = {}
    for split in dict.fromkeys(tar.split for tar in looked):
        tars = [tar for tar in looked if tar.split == split]
        for tar in tars:
            hashes = np.array(tar.hashes, np.uint64)
            for other, those in earlier.items():
                for i in np.flatnonzero(np.isin(hashes, those) & (hashes != 0)):
                    found.append(Bad("split_leak", tar.info.file, tar.keys[i], f"equal to one of {other}"))
        earlier[split] = np.array([h for tar in tars for h in tar.hashes], np.uint64)
    return found

"""Tars of WebDataset's layout as a source, to be packed anew: other sizes, other splits, smaller images.

Tars that are already split (by an index, or by names such as train-… and test-…) keep their splits.
Else they are split by content like any other source. The samples come in a fixed mixed order: tars sorted by
class, as many are, make batches of few classes (see `reading/order.py`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vitlab.batch import Bad
from vitlab.config import UserError, digest
from vitlab.data.bad import BadInputError
from vitlab.data.making.progress import shown
from vitlab.data.making.sources import Raw, Source, plain_key
from vitlab.data.shards.index import INDEX, open_shards
from vitlab.data.shards.indexing import split_of
from vitlab.data.shards.tars import NO_LABEL, Columns, index_tar, read_member


class _Part(NamedTuple):
    """One tar, the samples in it, and its split."""

    file: Path
    columns: Columns
    split: str


def tars(path: Path) -> Source:
    """`tars:DIR`: every sample of its tars with its label, mixed."""
    if not path.is_dir():
        raise UserError(f"data.source: tars:{path}: no such directory; give one that holds .tar files")
    parts, classes, bad = _indexed(path) if (path / INDEX).is_file() else _foreign(path)
    split = len({part.split for part in parts if len(part.columns)}) > 1

    ends = np.cumsum([len(part.columns) for part in parts])
    total = int(ends[-1])

    def samples(start: int) -> Iterator[Raw]:
        for number, sample in enumerate(np.random.default_rng(0).permutation(total)[start:].tolist(), start):
            place = int(np.searchsorted(ends, sample, side="right"))
            file, columns, side = parts[place]
            row = sample - int(ends[place]) + len(columns)
            key = columns.keys[row]
            read = partial(_member, file, columns.offsets[row], columns.sizes[row])
            yield Raw(
                plain_key(number, key),
                columns.labels[row],
                read,
                f"{file.name}: {key}",
                side if split else None,
            )

    stats = [(part.file.name, part.file.stat()) for part in parts]
    mark = digest([[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats])
    labelled = any(label != NO_LABEL for part in parts for label in part.columns.labels)
    return Source(f"tars:{path}", samples, classes, total, mark, labelled, split, bad)


def _indexed(path: Path) -> tuple[list[_Part], list[str], list[Bad]]:
    shards = open_shards(path)
    pairs = [(split, info) for split, infos in shards.splits.items() for info in infos]
    listed = shown(pairs, "reading the index", "tars", len(pairs))
    parts = [_Part(path / info.file, shards.columns(info), split) for split, info in listed]
    return parts, shards.classes, []


def _foreign(path: Path) -> tuple[list[_Part], list[str], list[Bad]]:
    files = sorted(path.glob("*.tar"))
    if not files:
        raise UserError(f"data.source: tars:{path}: no .tar file in it; unpack .tar.gz first")
    parts, bad = [], []
    for file in shown(files, "looking into the tars", "tars", len(files)):
        columns, wrong = index_tar(file)
        parts.append(_Part(file, columns, split_of(file.name)))
        bad += wrong
    return parts, [], bad


def _member(file: Path, offset: int, size: int) -> bytes:
    try:
        fd = os.open(file, os.O_RDONLY)
    except OSError as error:
        raise BadInputError("missing_shard", f"cannot be opened: {error.strerror}") from None
    try:
        data = read_member(fd, offset, size)
    finally:
        os.close(fd)
    if len(data) < size:
        raise BadInputError("cut_tar", "the tar ends before this sample does")
    return data

"""Samples by number: one place in one tar, one `pread`; what cannot be read is named, not raised."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable
from itertools import accumulate
from typing import NamedTuple

from vitlab.batch import Bad
from vitlab.data.bad import BadInputError
from vitlab.data.shards.index import Shards
from vitlab.data.shards.tars import NO_LABEL, Columns, read_member

OPEN_TARS = 256  # at most so many stay open in one process, with their columns


class Stored(NamedTuple):
    """A sample as it lies in its tar."""

    data: bytes | None  # of the image file; none where it cannot be read
    label: int
    key: str
    shard: str
    bad: Bad | None = None  # what is wrong with it; a wrong label leaves the image as it is


EMPTY = Stored(None, NO_LABEL, "", "")  # a slot without a sample


class _Open(NamedTuple):
    columns: Columns
    fd: int | None  # -1: there is no such file; None: to be opened


def _close(tar: _Open, close: Callable[[int], None] = os.close) -> None:  # held: modules go at an exit
    if tar.fd is not None and tar.fd >= 0:
        close(tar.fd)


class Reader:
    """Samples of a split by number. Keeps the tars that were read last open."""

    def __init__(self, shards: Shards, split: str) -> None:
        self.tars = shards.tars(split)
        self.ends = list(accumulate(tar.info.count for tar in self.tars))
        self.open: OrderedDict[int, _Open] = OrderedDict()

    def __del__(self, close: Callable[[_Open], None] = _close) -> None:  # held: names go at an exit
        for tar in self.open.values():
            close(tar)

    def read(self, number: int) -> Stored:
        """Any problem of this sample alone comes back in `Stored.bad`."""
        shard = bisect_right(self.ends, number)
        tar = self.tars[shard]
        row = number - (self.ends[shard] - tar.info.count)
        columns, fd = self._opened(shard)
        key, label, file = columns.keys[row], columns.labels[row], tar.name
        try:
            data = _bytes(fd, columns.offsets[row], columns.sizes[row])
        except BadInputError as error:
            return Stored(None, NO_LABEL, key, file, Bad(error.kind, file, key, error.reason))
        if not NO_LABEL <= label < len(tar.shards.classes):
            reason = f"label {label}, but there are {len(tar.shards.classes)} classes"
            return Stored(data, NO_LABEL, key, file, Bad("wrong_label", file, key, reason))
        if tar.labels is not None and label != NO_LABEL:
            label = tar.labels[label]
        return Stored(data, label, key, file)

    def release(self) -> None:
        """Closes the tars of stores: an evicted one keeps its room on the disk while it is open."""
        for shard, tar in self.open.items():
            if self.tars[shard].shards.cache is not None and tar.fd != -1:
                _close(tar)
                self.open[shard] = tar._replace(fd=None)

    def _opened(self, shard: int) -> tuple[Columns, int]:
        shards, info = self.tars[shard][:2]
        tar = self.open.get(shard)
        if tar is None:
            while len(self.open) >= OPEN_TARS:
                _close(self.open.popitem(last=False)[1])
            tar = _Open(shards.columns(info), None)
        fd = shards.open(info) if tar.fd is None else tar.fd
        self.open[shard] = tar._replace(fd=fd)
        self.open.move_to_end(shard)
        return tar.columns, fd


def _bytes(fd: int, offset: int, size: int) -> bytes:
    if fd < 0:
        raise BadInputError("missing_shard", "the shard's file is missing")
    try:
        data = read_member(fd, offset, size)
    except OSError as error:
        raise BadInputError("missing_shard", f"the shard cannot be read ({error.strerror})") from error
    if len(data) < size:
        raise BadInputError("cut_tar", f"the tar ends after {len(data)} of its {size} bytes")
    return data

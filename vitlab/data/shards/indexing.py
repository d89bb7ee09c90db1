"""An index for tars that are already there: every good sample is found, everything bad is named.

Several tars are read at a time, each once. An index made twice of the same tars is the same to the byte.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from vitlab.batch import Bad
from vitlab.config import UserError
from vitlab.data.bad import check_bound
from vitlab.data.shards.index import INDEX, SPLITS, ShardInfo, Shards, columns_path, save_index, write_json
from vitlab.data.shards.tars import NO_LABEL, Examined, examine, shown

PREFIXES = {"train": "train", "val": "val", "held_out": "held_out", "test": "held_out"}
PACKED = (".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
KEPT = ("no_label", "wrong_label")  # bad, but samples still: methods without labels learn from them
AT_A_TIME = 8  # tars; more would only make one disk seek
MOST_CLASSES = 100_000  # without names, a higher number is rather a wrong label than a class
SHOW_AFTER = 2.0  # seconds until a progress line appears
LOOK = 0.2  # seconds between two looks at how far the reading is


def index_existing(path: Path, classes: Sequence[str] | None = None, max_bad: float = 0.001) -> Shards:
    """An index for tars that are already there, however damaged; a file's split is the start of its name.

    `train-…`, `val-…`, `held_out-…` or `test-…`; without such names everything is for training. A tar that
    has gone since an earlier index is not in the new one; one without samples is named, but not listed.
    Class names: as given, else those of an earlier index, else the numbers up to the highest label.
    Nothing is written where more than the fraction `max_bad` of samples and bad things is bad.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such directory; give one that holds .tar files")
    listed = sorted(path.glob("*.tar"))
    tars = [tar for tar in listed if tar.is_file()]
    packed = sorted(file.name for file in path.iterdir() if file.name.lower().endswith(PACKED))
    if tars and packed:
        raise UserError(f"{path}: holds compressed tars too, as {packed[0]}; unpack them or move them away")
    if not tars:
        if packed:
            raise UserError(
                f"{path}: no .tar file in it, only compressed ones such as {packed[0]}; unpack them first"
            )
        raise UserError(f"{path}: no .tar file in it; write shards with `vitlab shards SOURCE DEST`")
    found = _examine_all(tars)
    names = _class_names(path, found, classes)
    found = [_within(one, tar.name, len(names)) for tar, one in zip(tars, found, strict=True)]
    lost = [
        Bad("missing_shard", tar.name, "", "a link to a file that is not there")
        for tar in listed
        if tar.is_symlink() and not tar.exists()
    ]
    bad = [*lost, *(bad for one in found for bad in one.bad)]
    samples = sum(len(one.columns) for one in found)
    if not samples:
        raise UserError(f"{path}: no sample in {len(tars)} tars; the first: {bad[0]}")
    way = "mend them, or leave them out with --max-bad 1: index.json then names them all"
    check_bound(bad, samples + sum(one.kind not in KEPT for one in bad), max_bad, str(path), way)
    splits: dict[str, list[ShardInfo]] = {name: [] for name in SPLITS}
    for tar, one in zip(tars, found, strict=True):
        if len(one.columns):
            write_json(columns_path(tar), one.columns.plain())
            splits[split_of(tar.name)].append(ShardInfo(tar.name, len(one.columns), one.bytes, one.sha256))
    shards = Shards(path, names, splits, {"source": "existing tars"}, bad)
    save_index(shards)
    return shards


def split_of(file: str) -> str:
    return next((split for prefix, split in PREFIXES.items() if file.startswith(prefix + "-")), "train")


def _examine_all(tars: list[Path]) -> list[Examined]:
    """All of them, several at a time; the first that cannot be read stops the others."""
    total = sum(tar.stat().st_size for tar in tars)
    reading = _Reading(total)
    with ThreadPoolExecutor(min(AT_A_TIME, os.cpu_count() or 1)) as pool, _line(reading):
        futures = [pool.submit(examine, tar, reading.seen) for tar in tars]
        try:
            _watch(futures, reading)
        finally:
            reading.stopped = True  # a no-op once all are done
            pool.shutdown(cancel_futures=True)
    return [future.result() for future in futures]


class _StoppedError(Exception):
    """Another tar could not be read, or the person has had enough."""


class _Reading:
    """How many bytes all threads together have read."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.stopped = total, 0, False
        self.lock = threading.Lock()
        self.show: Callable[[], None] = lambda: None

    def seen(self, count: int) -> None:
        if self.stopped:
            raise _StoppedError
        with self.lock:
            self.done += count


def _watch(futures: list[Future[Examined]], reading: _Reading) -> None:
    pending = set(futures)
    while pending:
        done, pending = wait(pending, LOOK, FIRST_EXCEPTION)
        for future in done:
            future.result()  # raises what it has met
        reading.show()


@contextmanager
def _line(reading: _Reading) -> Iterator[None]:
    """Bytes, rate and time left on stderr, once it takes longer than a moment."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (TextColumn("reading tars"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    progress = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))
    task, begin = progress.add_task("", total=reading.total), time.monotonic()

    def show() -> None:
        if time.monotonic() - begin > SHOW_AFTER:
            progress.start()  # again is nothing
            progress.update(task, completed=reading.done)

    reading.show = show
    try:
        yield
    finally:
        if progress.live.is_started:
            progress.stop()


def _class_names(path: Path, found: list[Examined], given: Sequence[str] | None) -> list[str]:
    known = list(given or _earlier_names(path))
    if known:
        return known
    labels = (label for one in found for label in one.columns.labels if label <= MOST_CLASSES)
    return [str(number) for number in range(max(labels, default=NO_LABEL) + 1)]


def _within(one: Examined, shard: str, classes: int) -> Examined:
    """Labels that no class has are named and taken away; the samples stay."""
    columns, bad = one.columns, list(one.bad)
    labels = list(columns.labels)
    for i, label in enumerate(labels):
        if label >= classes:
            labels[i] = NO_LABEL
            reason = f"its label is {label}, but there are {classes} classes, from 0"
            bad.append(Bad("wrong_label", shard, shown(columns.keys[i]), reason))
    return replace(one, columns=replace(columns, labels=labels), bad=bad)


def _earlier_names(path: Path) -> list[str]:
    """Class names of the index that is about to be replaced; none where they were only numbers."""
    try:
        names = json.loads((path / INDEX).read_text("utf8"))["classes"]
        names = [str(name) for name in names]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [] if names == [str(i) for i in range(len(names))] else names

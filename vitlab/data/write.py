"""Labelled images to shards: split by content, packed into tars, indexed, all or nothing.

A sample's split follows from the hash of its image bytes alone. Identical images therefore never lie
on both sides of a split, and a sample stays on its side when the data grows or changes its order.
Everything is written beside the destination, which gets its name when the last file is complete.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from vitlab.config import UserError, nearest
from vitlab.data.hugging_face import hugging_face, load_hugging_face
from vitlab.data.index import INDEX, SPLITS, ShardInfo, Shards, describe, open_shards, save_index
from vitlab.data.settings import ShardsConfig, check_classes
from vitlab.data.sources import Source, digits, folder, idx
from vitlab.data.tars import Sample, index_tar, write_tar

SHOW_AFTER = 2.0  # seconds until a progress line appears


def prepare(config: ShardsConfig, dest: Path) -> Shards:
    """The shards of an experiment: those at `config.path`, or at `dest`, written there from `config.source`.

    `dest` is written once. A source that has grown is seen again after the folder was deleted.
    """
    if config.path is not None:
        shards = open_shards(Path(config.path))
    elif (dest / INDEX).is_file():
        shards = open_shards(dest)
    else:
        source = open_source(str(config.source), config.image_column, config.label_column)
        shards = write_shards(
            limited(source, config.limit),
            dest,
            held_out=config.held_out,
            val=config.val,
            shard_samples=config.shard_samples,
        )
    check_classes(config, shards)
    return shards


def open_source(text: str, image: str | None = None, label: str | None = None) -> Source:
    """`digits`, `folder:PATH`, a directory, `idx:PATH`, `hf:NAME[:split]`; `image`, `label`: hf columns."""
    kind, _, rest = text.partition(":")
    if text == "digits":
        return digits()
    if kind == "hf" and rest:
        return hugging_face(load_hugging_face(rest), text, image, label)
    if kind in ("folder", "idx") and rest:
        return {"folder": folder, "idx": idx}[kind](Path(rest))
    if Path(text).is_dir():
        return folder(Path(text))
    near = nearest(text, ("digits",))
    raise UserError(
        f"data.source: given '{text}'; "
        f"allowed: digits, folder:PATH, an existing directory, idx:PATH, hf:NAME[:split]{near}"
    )


def limited(source: Source, limit: int | None) -> Source:
    """No more than the first so many images."""
    if limit is None:
        return source
    total = limit if source.total is None else min(limit, source.total)
    return replace(source, samples=itertools.islice(source.samples, limit), total=total)


def write_shards(
    source: Source, dest: Path, *, held_out: float = 0.2, val: float = 0.1, shard_samples: int = 1000
) -> Shards:
    """All samples of a source as shards in a new directory `dest`."""
    if dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
        raise UserError(f"{dest}: is there already and not empty; give a new directory or remove it")
    part = dest.absolute().with_name(f"{dest.name}.partial-{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)  # of a process with this number that was killed
    part.mkdir(parents=True)
    try:
        splits = _write_splits(source, part, held_out, val, shard_samples)
        if not splits["train"]:
            raise UserError(
                f"{source.name}: no samples for training; give more images or a smaller held_out and val"
            )
        rule = "u = sha256(image bytes) / 2^256; held_out: u < held_out; val: u < held_out + val; else train"
        made = {"source": source.name, "rule": rule, "held_out": held_out, "val": val}
        shards = Shards(part, source.classes(), splits, {**made, "shard_samples": shard_samples})
        save_index(shards)
        _name(part, dest)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return replace(shards, path=dest)


def _name(part: Path, dest: Path) -> None:
    try:
        part.replace(dest)
    except OSError as error:
        raise UserError(
            f"{dest}: cannot be named so ({error.strerror}); did another process write it?"
        ) from error


def _write_splits(
    source: Source, part: Path, held_out: float, val: float, size: int
) -> dict[str, list[ShardInfo]]:
    splits: dict[str, list[ShardInfo]] = {name: [] for name in SPLITS}
    waiting: dict[str, list[Sample]] = defaultdict(list)
    for sample in _watched(source):
        split = side(sample.data, held_out, val)
        waiting[split].append(sample)
        if len(waiting[split]) == size:
            splits[split].append(_write_one(part, split, len(splits[split]), waiting.pop(split)))
    for split, samples in waiting.items():
        splits[split].append(_write_one(part, split, len(splits[split]), samples))
    return splits


def side(data: bytes, held_out: float, val: float) -> str:
    """The split of an image: its hash as a number in [0, 1), so always the same one."""
    u = int.from_bytes(hashlib.sha256(data).digest(), "big") / 2**256
    return "held_out" if u < held_out else "val" if u < held_out + val else "train"


def _write_one(part: Path, split: str, number: int, samples: list[Sample]) -> ShardInfo:
    """One tar and its columns; what the columns say is read back from the tar itself."""
    tar = part / f"{split}-{number:06d}.tar"
    write_tar(tar, samples)
    columns, bad = index_tar(tar)
    assert not bad, bad
    return describe(tar, columns)


def _watched(source: Source) -> Iterator[Sample]:
    """The samples; a line with count and rate on stderr once it takes longer than a moment."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    rate = TextColumn("{task.fields[rate]:.0f} images/s")
    columns = (TextColumn("writing shards"), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn())
    begin, shown = time.monotonic(), False
    progress = Progress(*columns, console=Console(stderr=True))
    task = progress.add_task("", total=source.total, rate=0.0)
    try:
        for done, sample in enumerate(source.samples, start=1):
            yield sample
            elapsed = time.monotonic() - begin
            if elapsed > SHOW_AFTER:
                shown = True
                progress.start()
                progress.update(task, completed=done, rate=done / elapsed)
    finally:
        if shown:
            progress.stop()

"""Labelled images to shards: split by content, packed into tars, indexed, all or nothing.

A sample's split follows from the hash of its image bytes alone. Identical images therefore never lie
on both sides of a split, and a sample stays on its side when the data grows or changes its order.
Everything is written beside the destination, which gets its name when the last file is complete.

Hugging Face's `datasets` is imported here and nowhere else; its images are copied, never re-encoded.
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
from typing import Any

import numpy as np

from vitlab.config import UserError, nearest
from vitlab.data.index import INDEX, SPLITS, ShardInfo, Shards, describe, open_shards, save_index
from vitlab.data.settings import ShardsConfig, check_classes
from vitlab.data.sources import Source, digits, encoded, folder, idx, png
from vitlab.data.tars import Sample, index_tar, write_tar

SHOW_AFTER = 2.0  # seconds until a progress line appears

IMAGE_NAMES = ("image", "img")
LABEL_NAMES = ("label", "labels", "cls", "class", "target", "fine_label")


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
    return describe(tar, index_tar(tar))


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


# ---------------------------------------------------------------- Hugging Face


def load_hugging_face(name: str) -> Any:
    """`NAME[:split]` of the hub or of a directory, saved by `save_to_disk` or holding data files."""
    import datasets

    name, _, split = name.partition(":")
    try:
        if Path(name, "dataset_info.json").is_file() or Path(name, "dataset_dict.json").is_file():
            found = datasets.load_from_disk(name)
        else:
            found = datasets.load_dataset(name)
    except (OSError, ValueError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"data.source: hf:{name}: cannot be loaded: {first}") from error
    if not isinstance(found, dict):
        return found
    if (split or "train") not in found:
        near = nearest(split, found)
        raise UserError(
            f"data.source: hf:{name}: no split '{split or 'train'}'; there are: {', '.join(found)}{near}"
        )
    return found[split or "train"]


def hugging_face(
    dataset: Any, name: str = "hf", image: str | None = None, label: str | None = None
) -> Source:
    """A `Dataset`, its rows in a fixed mixed order, or an `IterableDataset`, its rows as they come."""
    import datasets

    if not isinstance(dataset, datasets.Dataset | datasets.IterableDataset):
        raise UserError(
            f"{name}: given {type(dataset).__name__}; allowed: a datasets.Dataset or IterableDataset"
        )
    if not dataset.features:
        raise UserError(f"{name}: the dataset does not say what its columns hold; give it `features=`")
    kinds = dataset.features
    images = [column for column, kind in kinds.items() if isinstance(kind, datasets.Image)]
    image = _column(name, "image", image, images, IMAGE_NAMES)
    label = _column(name, "label", label, _label_columns(kinds), LABEL_NAMES)
    names = _label_names(dataset, label)
    rows = dataset.select_columns([image, label]).cast_column(image, datasets.Image(decode=False))
    total = None
    if isinstance(rows, datasets.Dataset):
        total = len(rows)
        rows = rows.select(np.random.default_rng(0).permutation(total), keep_in_memory=True)
    seen: set[int] = set()
    samples = _rows(rows, image, label, names, seen)
    return Source(name, samples, lambda: names or [str(i) for i in range(max(seen, default=0) + 1)], total)


def _label_columns(kinds: Any) -> list[str]:
    import datasets

    classes = [column for column, kind in kinds.items() if isinstance(kind, datasets.ClassLabel)]
    plain = [
        c for c, kind in kinds.items() if getattr(kind, "dtype", "").startswith(("int", "uint", "string"))
    ]
    return classes or [column for column in plain if column in LABEL_NAMES] or plain


def _column(name: str, what: str, given: str | None, fit: list[str], usual: tuple[str, ...]) -> str:
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
    known = [column for column in usual if column in fit]
    if not known:
        raise UserError(f"{name}: which column is the {what}? those that fit: {', '.join(fit) or 'none'}; "
                        f"name it in data.{what}_column")  # fmt: skip
    return known[0]


def _label_names(dataset: Any, label: str) -> list[str]:
    """The class names; empty where labels are plain numbers. Strings cost one pass over the labels."""
    kind = dataset.features[label]
    names = getattr(kind, "names", None)
    if names is not None:
        return list(names)
    if kind.dtype in ("string", "large_string"):
        return sorted({str(row[label]) for row in dataset.select_columns([label])})
    return []


def _rows(rows: Any, image: str, label: str, names: list[str], seen: set[int]) -> Iterator[Sample]:
    place = {name: i for i, name in enumerate(names)}
    for i, row in enumerate(rows):
        key, given = f"{i:09d}", row[label]
        number = place.get(given, -1) if isinstance(given, str) else -1 if given is None else int(given)
        if number < 0:
            raise UserError(
                f"sample {key}: label {given!r}; allowed: a class or a number from 0; remove the row"
            )
        seen.add(number)
        yield encoded(key, _bytes(row[image], key), number)


def _bytes(value: Any, key: str) -> bytes:
    """The encoded image of a row: given as it is, or in a file, or still pixels."""
    if isinstance(value, dict) and value.get("bytes"):
        return bytes(value["bytes"])
    if isinstance(value, dict) and value.get("path"):
        return Path(value["path"]).read_bytes()
    if value is None or isinstance(value, dict):
        raise UserError(f"sample {key}: no image in this row; remove it, as with dataset.filter")
    return png(value)

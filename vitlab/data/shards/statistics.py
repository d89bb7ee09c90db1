"""What a person wants to know of shards before training on them: how many of what, how large, how bright.

Counts come from the columns and are exact. Sizes, mean and spread need decoded images: those of a fixed
random part of the training split, or all of it. Mean and spread are of values in 0..1. Every image weighs
the same whatever its size, since models see all at one size. They follow from exact counts of the 256 values.

Letters: C channels, H W image.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from vitlab.config import UserError
from vitlab.data.bad import BadInputError
from vitlab.data.images.augment import eval_transform
from vitlab.data.images.decode import decode
from vitlab.data.shards.index import ShardInfo, Shards, Tar
from vitlab.data.shards.tars import NO_LABEL, read_member

LOOKED = 5000  # images that are decoded, unless all are
VALUES = np.arange(256) / 255
TARS = 16  # that examples are taken from
NO_SEED = torch.zeros(1, dtype=torch.int64)  # nothing is drawn where an image is only shrunk

T = TypeVar("T")
Step = Callable[[int], None]  # so many more images are done


class Split(NamedTuple):
    images: int
    bytes: int
    counts: np.ndarray  # images of each class


class Seen(NamedTuple):
    """What the decoded images showed."""

    widths: list[int]
    heights: list[int]
    broken: int  # that could not be decoded
    mean: list[float]  # one a channel; a single one where no image has colours
    std: list[float]


@dataclass(frozen=True)
class Statistics:
    classes: list[str]
    splits: dict[str, Split]
    formats: dict[str, float]  # the fraction of all images, the most frequent first
    seen: Seen
    chosen: int  # of the training images, so many were to be decoded
    of: int

    def plain(self) -> dict[str, object]:
        """For a file."""
        splits = {}
        for name, split in self.splits.items():
            splits[name] = {"images": split.images, "bytes": split.bytes, "counts": split.counts.tolist()}
        names = ("min", "median", "max")
        return {
            "classes": self.classes,
            "splits": splits,
            "formats": self.formats,
            "looked_at": {"images": self.chosen, "of": self.of, "broken": self.seen.broken},
            "width": dict(zip(names, spread(self.seen.widths), strict=True)),
            "height": dict(zip(names, spread(self.seen.heights), strict=True)),
            "mean": self.seen.mean,
            "std": self.seen.std,
        }


def spread(values: list[int]) -> tuple[int, float, int]:
    """The smallest, the one in the middle, the largest."""
    return min(values), float(np.median(values)), max(values)


def statistics(shards: Shards, most: int | None = LOOKED, step: Step = lambda n: None) -> Statistics:
    """`most`: so many training images are decoded; None: all. `step` hears of each."""
    splits, formats = _count(shards)
    count = shards.count("train")
    chosen = np.arange(count)
    if most is not None and most < count:
        chosen = np.sort(np.random.default_rng(0).choice(count, most, replace=False))
    seen = _see(_decoded(shards, chosen), step)
    if not seen.widths:
        raise UserError(
            f"{shards.path}: none of {len(chosen)} images can be decoded; "
            f"list what is wrong with `vitlab shards verify {shards.path}`"
        )
    return Statistics(shards.classes, splits, formats, seen, len(chosen), count)


def _count(shards: Shards) -> tuple[dict[str, Split], dict[str, float]]:
    splits, formats = {}, Counter[str]()
    for name, infos in shards.splits.items():
        counts = np.zeros(len(shards.classes), np.int64)
        for info in infos:
            columns = shards.columns(info)
            formats.update(columns.extensions)
            labels = np.array(columns.labels, np.int64)
            fit = labels[(labels >= 0) & (labels < len(counts))]
            counts += np.bincount(fit, minlength=len(counts))
        splits[name] = Split(sum(info.count for info in infos), sum(info.bytes for info in infos), counts)
    total = max(1, formats.total())
    return splits, {name: n / total for name, n in formats.most_common()}


def _see(images: Iterator[Tensor | None], step: Step) -> Seen:
    widths, heights, broken, grey = [], [], 0, True
    shares = np.zeros(
        (3, 256)
    )  # C 256: the fraction of an image's pixels with each value, summed over images
    for image in images:
        step(1)
        if image is None:
            broken += 1
            continue
        pixels = image.numpy().reshape(3, -1)
        shares += np.stack([np.bincount(one, minlength=256) for one in pixels]) / pixels.shape[1]
        grey = grey and bool((pixels == pixels[:1]).all())
        heights.append(image.shape[1])
        widths.append(image.shape[2])
    shares /= max(1, len(widths))
    mean = shares @ VALUES
    std = np.sqrt(np.maximum(shares @ VALUES**2 - mean**2, 0))
    channels = 1 if grey else 3
    return Seen(widths, heights, broken, mean[:channels].tolist(), std[:channels].tolist())


def _decoded(shards: Shards, chosen: np.ndarray) -> Iterator[Tensor | None]:
    """uint8 3 H W, in the order of their numbers whichever thread is first: sums of floats depend on it."""
    start = 0
    with ThreadPoolExecutor() as pool:
        for info in shards.split("train"):
            rows = chosen[(chosen >= start) & (chosen < start + info.count)] - start
            start += info.count
            if len(rows):
                yield from _of_one(shards, info, rows.tolist(), pool)


def _of_one(
    shards: Shards, info: ShardInfo, rows: list[int], pool: ThreadPoolExecutor
) -> Iterator[Tensor | None]:
    columns = shards.columns(info)
    with _opened(shards, info) as fd:
        for i in range(0, len(rows), 64):  # decoded images that may wait
            part = rows[i : i + 64]
            yield from pool.map(lambda row: _decode(fd, columns.offsets[row], columns.sizes[row]), part)


@contextmanager
def _opened(shards: Shards, info: ShardInfo) -> Iterator[int]:
    fd = shards.open(info)
    try:
        yield fd
    finally:
        if fd >= 0:
            os.close(fd)


def _decode(fd: int, offset: int, size: int) -> Tensor | None:
    try:
        return decode(read_member(fd, offset, size), 3) if fd >= 0 else None
    except BadInputError:  # it is counted, and `verify` names it
        return None


def examples(
    shards: Shards, classes: int = 12, each: int = 8, side: int = 128
) -> tuple[list[Tensor], list[int]]:
    """Some training images of some classes, spread over the classes and the tars: always the same ones.

    A larger image is shrunk to `side` and cut to its middle.
    """
    found: dict[int, list[tuple[Tar, int, int]]] = {}
    for tar in _spread_over(shards.tars("train"), TARS):
        columns = tar.shards.columns(tar.info)
        for offset, size, label in zip(columns.offsets, columns.sizes, columns.labels, strict=True):
            here = label if 0 <= label < len(tar.shards.classes) else NO_LABEL
            here = tar.labels[here] if tar.labels is not None and here != NO_LABEL else here
            found.setdefault(here, []).append((tar, offset, size))
    images, labels, small = [], [], eval_transform(side)
    for label in _spread_over(sorted(found), classes):
        order = np.random.default_rng(label + 1).permutation(len(found[label]))
        for tar, offset, size in (found[label][i] for i in order[:each]):
            with _opened(tar.shards, tar.info) as fd:
                image = _decode(fd, offset, size)
            if image is not None:
                images.append(small([image], NO_SEED)[0] if min(image.shape[1:]) > side else image)
                labels.append(label)
    return images, labels


def _spread_over(things: Sequence[T], most: int) -> list[T]:
    """At most so many, at equal distances."""
    places = np.linspace(0, len(things) - 1, min(most, len(things))).round().astype(int)
    return [things[i] for i in places]

"""Several sets of shards read as one: classes united by name, samples drawn by weight.

Without weights the sets are one: an ordinary `Order` over all shards, every sample at most once an
epoch. With weights an epoch has as many samples as all sets together, but of each stream a set fills
a fixed number of places, whatever its size. A small set comes round several times in an epoch, a large
one takes several epochs: set k goes on where it stopped, so counted from the start of training each of
its samples came equally often or once more, but for the few its own epochs leave out.

Everything is closed form, as in `order.py`. Set k is an `Order` of its own with one sample per stream
and step; its place there after e epochs is e·n, for n places an epoch. Which set has a place follows
from whole-number division: in every batch each set is within three samples of its weight.

Letters: K sets, S streams, B global batch, T batches of an epoch, W workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vitlab.config import UserError, digest
from vitlab.data.reading.order import Held, Order, Streams, check_shape
from vitlab.data.settings import ShardsConfig
from vitlab.data.shards.index import ShardInfo, Shards, Tar, open_shards
from vitlab.data.shards.tars import Columns

FORMAT = "vitlab-blend/1"
LINE, SEEDS = 11, 12  # purposes: each has its own random numbers


# ---------------------------------------------------------------- which sample


@dataclass(frozen=True)
class BlendOrder(Streams):
    """The order of several sets' samples, numbered by set, then by shard, then by position in the shard."""

    sizes: tuple[tuple[int, ...], ...]  # samples in each shard of each set
    weights: tuple[float, ...]  # what share of the samples a set gives, in any unit
    streams: int
    batch: int
    seed: int
    window: int
    _held: dict[int, Held] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_shape(self.count, self.streams, self.batch, self.seed, self.window)
        for k, (sizes, weight) in enumerate(zip(self.sizes, self.weights, strict=True)):
            if sum(sizes) < self.streams:
                raise UserError(
                    f"data.sets[{k}]: has {sum(sizes)} samples to train on, but they come in {self.streams} "
                    f"streams; give it {self.streams} or more, or set data.streams lower"
                )
            if not self.quotas[k]:
                places = self.steps * self.each
                raise UserError(
                    f"data.sets[{k}].weight: given {weight:g} of {sum(self.weights):g}, less than one of "
                    f"the {places} samples that a stream has in an epoch; give more or leave the set out"
                )

    @cached_property
    def count(self) -> int:
        return sum(map(sum, self.sizes))

    @property
    def steps(self) -> int:
        return self.count // self.batch

    @cached_property
    def quotas(self) -> tuple[int, ...]:
        """K: how many places of each stream's epoch a set fills; by largest remainder they fill it."""
        total = self.steps * self.each
        wanted = np.array(self.weights) / sum(self.weights) * total
        whole = np.floor(wanted).astype(np.int64)
        most = np.argsort(whole - wanted, kind="stable")
        whole[most[: total - int(whole.sum())]] += 1
        return tuple(whole.tolist())

    @cached_property
    def orders(self) -> tuple[Order, ...]:
        """K: the order of each set by itself."""
        seeds = np.random.default_rng([self.seed, SEEDS]).integers(2**62, size=len(self.sizes)).tolist()
        pairs = zip(self.sizes, seeds, strict=True)
        return tuple(Order(sizes, self.streams, self.streams, seed, self.window) for sizes, seed in pairs)

    def stretch(self, epoch: int, stream: int, start: int, stop: int) -> np.ndarray:
        out = np.empty(stop - start, dtype=np.int64)
        sets, first = self._sets(epoch, stream, start, stop)
        base = 0
        for k, order in enumerate(self.orders):
            slots = np.flatnonzero(sets == k)
            place = epoch * self.quotas[k] + first[k]
            out[slots] = base + _across_epochs(order, stream, place, place + len(slots))
            base += order.count
        return out

    def _sets(self, epoch: int, stream: int, start: int, stop: int) -> tuple[np.ndarray, list[int]]:
        """The set at every place of a part of a stream, and how many samples of each came before.

        All streams play one line of sets, each from another place: shifted by what a batch takes of one
        stream, so that a batch is a stretch of that line, as even as the line is. On it, of the first r
        places that larger sets left, a set has floor(r·n/m): n of m in a round, as evenly as can be.
        """
        total = self.steps * self.each
        random = np.random.default_rng([self.seed, epoch, LINE])
        begin = int(random.integers(total)) + self.each * int(random.permutation(self.streams)[stream])
        rest = begin + np.concatenate([[0], np.arange(start, stop + 1)])
        sets, first = np.empty(stop - start, dtype=np.int64), [0] * len(self.quotas)
        for k in sorted(range(len(self.quotas)), key=lambda k: -self.quotas[k]):
            taken = rest * self.quotas[k] // total
            sets[taken[2:] > taken[1:-1]] = k
            first[k] = int(taken[1] - taken[0])
            rest, total = rest - taken, total - self.quotas[k]
        return sets, first


def _across_epochs(order: Order, stream: int, start: int, stop: int) -> np.ndarray:
    """A stream's samples from one place to another, counted from the start of the first epoch."""
    length = order.steps * order.each
    parts = [np.empty(0, dtype=np.int64)]
    for epoch in range(start // length, -(-stop // length)):
        begin = epoch * length
        parts.append(order.stretch(epoch, stream, max(start - begin, 0), min(stop - begin, length)))
    return np.concatenate(parts)


def order_for(
    sizes: Sequence[Sequence[int]],
    weights: Sequence[float | None],
    streams: int,
    batch: int,
    seed: int,
    window: int,
) -> Streams:
    """The order of sets of shards: one alone and sets without weights are read as one."""
    given = [weight for weight in weights if weight is not None]
    if given and len(given) < len(weights):
        raise UserError(
            f"data.sets: {len(given)} of {len(weights)} sets have a weight; give it to all of them or to none"
        )
    if min(given, default=1) <= 0:
        raise UserError(f"data.sets: weight: given {min(given):g}; allowed: numbers above 0")
    if not given or len(sizes) == 1:
        return Order(tuple(size for one in sizes for size in one), streams, batch, seed, window)
    return BlendOrder(tuple(map(tuple, sizes)), tuple(given), streams, batch, seed, window)


def training_order(shards: Shards, streams: int, batch: int, seed: int, window: int) -> Streams:
    """The order of the training split, of one set of shards or of several."""
    shards.split("train")  # refuses where there is none at all
    sizes = [[info.count for info in part.splits.get("train", [])] for part in sets_of(shards)]
    weights = shards.weights if isinstance(shards, Blend) else (None,)
    return order_for(sizes, weights, streams, batch, seed, window)


# ---------------------------------------------------------------- which tar


@dataclass(frozen=True)
class Blend(Shards):
    """Several sets of shards as one. Only `tars` knows where a tar lies and how its classes are numbered."""

    parts: tuple[Shards, ...] = ()
    weights: tuple[float | None, ...] = ()

    @property
    def where(self) -> str:
        return " + ".join(part.where for part in self.parts)

    @property
    def described(self) -> str:
        """Sets that have no class in common may well be meant to: one word for each, or a slip."""
        counts = [len(part.classes) for part in self.parts if part.classes]
        if len(counts) < 2 or sum(counts) > len(self.classes):
            return super().described
        return f"{super().described}; no two of the sets share a class"

    @property
    def content(self) -> str:
        parts = [part.content for part in self.parts]
        return digest({"format": FORMAT, "parts": parts, "weights": list(self.weights)})

    def tars(self, split: str) -> list[Tar]:
        self.split(split)  # refuses where there is none at all
        number = {name: i for i, name in enumerate(self.classes)}
        out = []
        for part in self.parts:
            labels = tuple(number[name] for name in part.classes)
            same = labels == tuple(range(len(labels)))
            tars = part.tars(split) if part.splits.get(split) else []
            here = f"{part.where}/"
            out += [tar._replace(labels=None if same else labels, set=here) for tar in tars]
        return out

    @property
    def address(self) -> str:
        raise AssertionError("several sets lie in several places; ask `sets_of`")

    def file(self, info: ShardInfo) -> Path:
        raise AssertionError(f"{info.file}: several sets may have a file of this name; ask `tars`")

    def open(self, info: ShardInfo) -> int:
        raise AssertionError(f"{info.file}: several sets may have a file of this name; ask `tars`")

    def columns(self, info: ShardInfo) -> Columns:
        raise AssertionError(f"{info.file}: several sets may have a file of this name; ask `tars`")


class Named(NamedTuple):
    """What opens shards again in another process, and tells that they are the same."""

    addresses: tuple[str, ...]  # one of each set
    content: str


def named(shards: Shards) -> Named:
    return Named(tuple(part.address for part in sets_of(shards)), shards.content)


def open_named(name: Named, config: ShardsConfig) -> Shards:
    """Refuses what was put there in the meantime: nobody may train on it under the old name."""
    parts = [open_shards(address, config.max_bad, config.remote) for address in name.addresses]
    shards = blend(parts, config.weights)
    if shards.content != name.content:
        raise UserError(
            f"{shards.where}: holds other shards than when this began; put those back, or start it again"
        )
    return shards


def sets_of(shards: Shards) -> tuple[Shards, ...]:
    """What was blended, or the shards themselves."""
    return shards.parts if isinstance(shards, Blend) else (shards,)


def blend(parts: Sequence[Shards], weights: Sequence[float | None]) -> Shards:
    """Several sets as one, their classes united by name: those of the first set first, then new ones."""
    assert parts
    assert len(parts) == len(weights)
    if len(parts) == 1:
        return parts[0]
    classes = list(dict.fromkeys(name for part in parts for name in part.classes))
    names = dict.fromkeys(name for part in parts for name in part.splits)
    splits = {name: [info for part in parts for info in part.splits.get(name, [])] for name in names}
    path = Path(" + ".join(str(part.path) for part in parts))  # for people; no such folder
    return Blend(
        path,
        classes,
        splits,
        made={"sets": [part.made for part in parts]},
        bad=[one._replace(shard=f"{part.where}/{one.shard}") for part in parts for one in part.bad],
        lost={f"{part.content}/{file}": size for part in parts for file, size in part.lost.items()},
        parts=tuple(parts),
        weights=tuple(weights),
    )

"""Which sample is in which batch: a pure function of the data's shape, the seed and the epoch.

The global batch is cut from S canonical streams, not from the workers that happen to exist. A worker
serves whole streams, so the same samples meet in the same step on 1, 2 or S workers, and a run resumes
at any step from integers alone: nothing is replayed and no loader state is saved.

Shuffling is two-fold, as reading from disk wants it: the sequence of shards changes every epoch, and a
jittered sort mixes samples within a bounded window, so each stream reads near one place at a time. The
whole sequence is rotated by a random offset before the remainder is cut off; otherwise the same
samples could be left out epoch after epoch.

Nothing is made for a whole epoch. Because no sample moves by as much as the window, a part of a stream
follows from the part of the sequence that lies within a window of it, and the generator of the noise
can jump there. A step in the middle of an epoch of millions of samples costs milliseconds.

Letters: N samples, S streams, B global batch, L samples of a stream in an epoch, W workers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from vitlab.config import UserError

SHARDS, OFFSET, WINDOW = 1, 2, 3  # purposes: each has its own random numbers
HELD = 4096  # samples of a stream that are computed at once, or four windows if that is more
LAID = 2**17  # shards in the sequences that are kept: a small set in a blend has many epochs at a time


class Held(NamedTuple):
    """A part of a stream."""

    epoch: int
    part: int
    samples: np.ndarray


class Streams(ABC):
    """Global batches of S streams: what workers and resuming need, whatever the streams are made of."""

    streams: int
    batch: int
    window: int
    _held: dict[int, Held]  # of each stream the part that was asked for last

    @property
    @abstractmethod
    def steps(self) -> int:
        """Global batches in an epoch; the remainder, less than one batch, is another one every epoch."""

    @abstractmethod
    def stretch(self, epoch: int, stream: int, start: int, stop: int) -> np.ndarray:
        """int64: the samples of a stream from one place in its epoch to another."""

    @property
    def each(self) -> int:
        """Samples that a batch takes of every stream."""
        return self.batch // self.streams

    def batch_indices(self, epoch: int, step: int) -> np.ndarray:
        """B, int64: the sample in every slot. Slot stream·(B/S) + t is the t-th of its stream."""
        return self._rows(epoch, step, range(self.streams))

    def share(self, rank: int, workers: int) -> np.ndarray:
        """B/W, int64: the slots of one worker, which serves the streams rank, rank + W, …"""
        slots = np.arange(self.batch, dtype=np.int64).reshape(self.streams, -1)
        return slots[self._served(rank, workers)].reshape(-1)

    def part(self, epoch: int, step: int, rank: int, workers: int) -> np.ndarray:
        """B/W, int64: the samples in a worker's slots. Other workers' streams are not computed."""
        return self._rows(epoch, step, self._served(rank, workers))

    def _served(self, rank: int, workers: int) -> range:
        if not 0 <= rank < workers or self.streams % workers:
            raise UserError(
                f"workers: given {workers} (rank {rank}), but the data comes in {self.streams} streams; "
                f"allowed: {', '.join(map(str, divisors(self.streams)))} (or other data.streams)"
            )
        return range(rank, self.streams, workers)

    def _rows(self, epoch: int, step: int, streams: Iterable[int]) -> np.ndarray:
        assert 0 <= step < self.steps, f"step {step} of {self.steps}"
        length = max(1, max(HELD, 4 * self.window) // self.each) * self.each
        part, first = divmod(step * self.each, length)
        parts = [self._part(epoch, stream, part, length) for stream in streams]
        return np.concatenate([samples[first : first + self.each] for samples in parts])

    def _part(self, epoch: int, stream: int, part: int, length: int) -> np.ndarray:
        held = self._held.get(stream)
        if held is None or held[:2] != (epoch, part):
            stop = min((part + 1) * length, self.steps * self.each)
            held = Held(epoch, part, self.stretch(epoch, stream, part * length, stop))
            self._held[stream] = held
        return held.samples


class _Layout(NamedTuple):
    """The sequence of an epoch: where the runs of shards end, and what leads from a place to a sample."""

    ends: np.ndarray
    shifts: np.ndarray
    offset: int


@dataclass(frozen=True)
class Order(Streams):
    """The order of N samples, numbered by shard and then by position in the shard."""

    sizes: tuple[int, ...]  # samples in each shard
    streams: int
    batch: int
    seed: int
    window: int
    _held: dict[int, Held] = field(default_factory=dict, init=False, repr=False, compare=False)
    _layouts: dict[int, _Layout] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_shape(self.count, self.streams, self.batch, self.seed, self.window)

    @cached_property
    def count(self) -> int:
        return sum(self.sizes)

    @property
    def steps(self) -> int:
        return self.count // self.batch

    def stretch(self, epoch: int, stream: int, start: int, stop: int) -> np.ndarray:
        places = stream * self.steps * self.each + self._jitter(epoch, stream, start, stop)
        layout = self._layout(epoch)
        places = (places + layout.offset) % self.count
        samples: np.ndarray = places + layout.shifts[np.searchsorted(layout.ends, places, side="right")]
        return samples

    def _layout(self, epoch: int) -> _Layout:
        """The samples shard after shard, the shards shuffled, begun at a random place."""
        if epoch not in self._layouts:
            while len(self._layouts) * (len(self.sizes) + 100) > LAID:
                self._layouts.pop(next(iter(self._layouts)))
            sizes = np.array(self.sizes, dtype=np.int64)
            shards = self._random(epoch, SHARDS).permutation(len(sizes))
            ends = np.cumsum(sizes[shards])
            shifts = (np.cumsum(sizes) - sizes)[shards] - (ends - sizes[shards])
            offset = int(self._random(epoch, OFFSET).integers(self.count))
            self._layouts[epoch] = _Layout(ends, shifts, offset)
        return self._layouts[epoch]

    def _jitter(self, epoch: int, stream: int, start: int, stop: int) -> np.ndarray:
        """Where the samples of a part of the stream lie in its unmixed stretch of the sequence.

        Sample i sorts by i + window·noise, noise in [0, 1), so it moves by less than the window: only
        those within a window of the part can be in it, and all before them come before it.
        """
        length = self.steps * self.each
        low, high = max(0, start - self.window), min(length, stop + self.window)
        random = self._random(epoch, WINDOW, stream)
        random.bit_generator.advance(low)  # type: ignore[attr-defined]  # one draw a sample
        keys = np.arange(low, high) + self.window * random.random(high - low)
        return low + np.argsort(keys, kind="stable")[start - low : stop - low]

    def _random(self, epoch: int, purpose: int, stream: int = 0) -> np.random.Generator:
        return np.random.default_rng([self.seed, epoch, purpose, stream])


def check_shape(n: int, streams: int, batch: int, seed: int, window: int) -> None:
    """Refuses what gives no whole batch, or none that all streams have an equal part in."""
    if streams < 1 or batch < 1 or batch % streams:
        raise UserError(
            f"batch size: given {batch}, but the samples come in {streams} streams; "
            f"give a multiple of {max(streams, 1)} or other data.streams"
        )
    if n < batch:
        fits = f"{n // streams * streams} or less" if n >= streams else "more images or fewer data.streams"
        raise UserError(f"batch size: given {batch}, but there are only {n} samples; give {fits}")
    if seed < 0 or window < 1:
        raise UserError(
            f"seed and window: given {seed} and {window}; allowed: a seed from 0, a window from 1"
        )


def exact(n: int, batch: int, workers: int, rank: int) -> np.ndarray:
    """steps ceil(B/W), int64: every sample once, the same steps on every rank, -1 in empty slots."""
    if batch < 1:
        raise UserError(f"batch size: given {batch}; allowed: 1 or more")
    each = -(-batch // workers)
    steps = -(-n // (each * workers))
    slots = np.arange(steps * workers * each, dtype=np.int64).reshape(steps, workers, each)[:, rank]
    return np.where(slots < n, slots, -1)


def chosen(n: int, most: int) -> np.ndarray:
    """At most so many of n samples, int64, in their order: always the same, and fewer are some of more."""
    return np.sort(np.random.default_rng(0).permutation(n)[:most])


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]

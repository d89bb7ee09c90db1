"""Which sample is in which batch: a pure function of the data's shape, the seed and the epoch.

The global batch is cut from S canonical streams, not from the workers that happen to exist. A worker
serves whole streams, so the same samples meet in the same step on 1, 2 or S workers, and a run resumes
at any step from integers alone: nothing is replayed and no loader state is saved.

Shuffling is two-fold, as reading from disk wants it: the sequence of shards changes every epoch, and a
jittered sort mixes samples within a bounded window, so each stream reads near one place at a time. The
whole sequence is rotated by a random offset before the remainder is cut off; otherwise the same
samples could be left out epoch after epoch.

Letters: N samples, S streams, B global batch, L samples of a stream in an epoch, W workers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from vitlab.config import UserError

SHARDS, OFFSET, WINDOW = 1, 2, 3  # purposes: each has its own random numbers
KEPT_EPOCHS = 2  # loaders ask for the next epoch before the last one is consumed


@dataclass(frozen=True)
class Order:
    """The order of N samples, numbered by shard and then by position in the shard."""

    sizes: tuple[int, ...]  # samples in each shard
    streams: int
    batch: int
    seed: int
    window: int
    _epochs: dict[int, np.ndarray] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        n, s, b = sum(self.sizes), self.streams, self.batch
        if s < 1 or b < 1 or b % s:
            raise UserError(
                f"batch size: given {b}, but the samples come in {s} streams; "
                f"give a multiple of {max(s, 1)} or other data.streams"
            )
        if n < b:
            raise UserError(
                f"batch size: given {b}, but there are only {n} samples; give {n // s * s} or less"
            )
        if self.seed < 0 or self.window < 1:
            raise UserError(
                f"seed and window: given {self.seed} and {self.window}; "
                "allowed: a seed from 0, a window from 1"
            )

    @property
    def steps(self) -> int:
        """Global batches in an epoch; the remainder, less than one batch, is another one every epoch."""
        return sum(self.sizes) // self.batch

    def batch_indices(self, epoch: int, step: int) -> np.ndarray:
        """B, int64: the sample in every slot. Slot stream·(B/S) + t is the t-th of its stream."""
        row: np.ndarray = self._epoch(epoch)[step]
        return row

    def share(self, rank: int, workers: int) -> np.ndarray:
        """B/W, int64: the slots of one worker, which serves the streams rank, rank + W, …"""
        if not 0 <= rank < workers or self.streams % workers:
            raise UserError(
                f"workers: given {workers} (rank {rank}), but the data comes in {self.streams} streams; "
                f"allowed: {', '.join(map(str, divisors(self.streams)))} (or other data.streams)"
            )
        slots = np.arange(self.batch, dtype=np.int64).reshape(self.streams, -1)
        return slots[rank::workers].reshape(-1)

    def _epoch(self, epoch: int) -> np.ndarray:
        if epoch not in self._epochs:
            for old in sorted(self._epochs)[: 1 - KEPT_EPOCHS]:
                del self._epochs[old]
            self._epochs[epoch] = self._cut(epoch)
        return self._epochs[epoch]

    def _cut(self, epoch: int) -> np.ndarray:
        """steps B, int64: all global batches of an epoch."""
        used = self.steps * self.batch
        streams = self._sequence(epoch)[:used].reshape(self.streams, -1)
        mixed = [row[self._jitter(epoch, i, len(row))] for i, row in enumerate(streams)]
        by_stream = np.stack(mixed).reshape(self.streams, self.steps, -1)
        table = by_stream.swapaxes(0, 1).reshape(self.steps, self.batch)
        table.setflags(write=False)
        return table

    def _sequence(self, epoch: int) -> np.ndarray:
        """N, int64: the samples shard after shard, the shards shuffled, begun at a random place."""
        starts = np.concatenate([[0], np.cumsum(self.sizes)]).astype(np.int64)
        shards = self._random(epoch, SHARDS).permutation(len(self.sizes))
        runs = [np.arange(starts[i], starts[i + 1]) for i in shards]
        return np.roll(np.concatenate(runs), -int(self._random(epoch, OFFSET).integers(starts[-1])))

    def _jitter(self, epoch: int, stream: int, length: int) -> np.ndarray:
        """A permutation that moves nothing by as much as the window."""
        noise = self._random(epoch, WINDOW, stream).random(length)
        return np.argsort(np.arange(length) + self.window * noise, kind="stable")

    def _random(self, epoch: int, purpose: int, stream: int = 0) -> np.random.Generator:
        return np.random.default_rng([self.seed, epoch, purpose, stream])


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

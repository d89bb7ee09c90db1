"""What a batch is, and the randomness that belongs to a sample.

Every random number that touches a sample (crop, flip, mask, dropout, drop path) is a pure function of
(seed, epoch, position in the epoch, purpose). No process's own generator is involved, so the numbers
are the same on any number of workers and loader processes, on any device, and again after a resume.

Letters: B samples, N numbers a sample, C channels, H W image.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15  # the constants of splitmix64 (Steele et al., 2014)
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB
SPARES = 4  # a step's views, and those of the step before
CACHED = 2**18  # numbers, so 1 MB of floats: what a core's cache holds beside the rest


class View(NamedTuple):
    """One augmented image that a method needs of every sample: its name and its side in pixels."""

    name: str
    size: int
    draws: str = ""  # the view whose random numbers it has, to show the same part; empty: its own


class Bad(NamedTuple):
    """A sample that could not be read: its kind (see `vitlab.data.bad`), where it lies, and why."""

    kind: str
    shard: str
    key: str
    reason: str

    def __str__(self) -> str:
        return f"{self.shard}: {self.key}: {self.reason}" if self.key else f"{self.shard}: {self.reason}"


@dataclass(frozen=True)
class Batch:
    """One worker's part of one micro-batch."""

    views: list[Tensor]  # one per `View`, B C H W; uint8 from the loader, float after `to`
    labels: Tensor  # B, int64; -1 where the sample has none
    weight: Tensor  # B, float32; 0 for a slot that holds no real sample
    seeds: Tensor  # B, int64; the sample's own randomness
    keys: list[str]  # B, the names the samples have in their shards
    bad: list[Bad] = field(default_factory=list)  # those of its samples that could not be read: weight 0
    mean: Tensor = field(default_factory=lambda: torch.zeros(()))  # C 1 1, what `to` normalised with
    std: Tensor = field(default_factory=lambda: torch.ones(()))
    others: Tensor | None = None  # B, int64: labels of what was mixed in, of a batch that is mixed
    share: Tensor | None = None  # B: what each image has of its own label, the rest is the other's

    def pixels(self, view: int = 0) -> Tensor:
        """A view as it was before it was normalised: values in 0..1."""
        return self.views[view] * self.std + self.mean

    def to(self, device: torch.device, mean: Tensor, std: Tensor) -> Batch:
        """On the device, as floats normalised with `mean` and `std` (each C 1 1, of values in 0..1)."""
        return self.on(device).normalised(mean, std)

    def on(self, device: torch.device) -> Batch:
        """On the device, the views still uint8."""
        return replace(
            self,
            views=[view.to(device, non_blocking=True) for view in self.views],
            labels=self.labels.to(device, non_blocking=True),
            weight=self.weight.to(device, non_blocking=True),
            seeds=self.seeds.to(device, non_blocking=True),
        )

    def normalised(self, mean: Tensor, std: Tensor) -> Batch:
        views = [_normalised(view, mean, std) for view in self.views]
        return replace(self, views=views, mean=mean, std=std)


def _normalised(view: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """B C H W, uint8 → float32, contiguous. On a CPU some images at a time, which stay in its cache.

    The operations are those of torchvision, in its order: a factor for each colour would save a part of the
    time, but another rounding here makes other figures of every training.
    """
    if view.device.type != "cpu":
        return view.float().div_(255).sub_(mean).div_(std).contiguous()
    out = _room(view.shape)
    each = max(1, CACHED // max(1, view[:1].numel()))
    for part, whole in zip(torch.split(view, each), torch.split(out, each), strict=True):
        whole.copy_(part).div_(255).sub_(mean).div_(std)
    return out


_spare: list[np.ndarray] = [np.empty(0, np.float32)]  # memory of earlier batches, the latest last


def _held() -> list[int]:
    """How many references each of them has."""
    return [sys.getrefcount(array) for array in _spare]


(FREE,) = _held()  # of one that no tensor holds


def _room(shape: torch.Size) -> Tensor:
    """float32, not filled: memory of a batch that nobody holds any more, if there is some of this size.

    New memory costs as much again as what is written to it: the system clears every page first. A tensor
    made of an array holds it for as long as anything of the tensor lives, so its count of references tells.
    """
    free = (i for i, held in enumerate(_held()) if held == FREE and _spare[i].size == shape.numel())
    found = next(free, None)
    array = np.empty(shape.numel(), np.float32) if found is None else _spare.pop(found)
    _spare.append(array)
    del _spare[:-SPARES]
    return torch.from_numpy(array).view(shape)


def sample_seeds(seed: int, epoch: int, positions: np.ndarray) -> np.ndarray:
    """Positions in the epoch's order (B, int) → each sample's own 64-bit seed (B, int64)."""
    base = int.from_bytes(hashlib.sha256(f"{seed}/{epoch}".encode()).digest()[:8], "little")
    with np.errstate(over="ignore"):
        z = positions.astype(np.uint64) * np.uint64(GOLDEN) + np.uint64(base)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(MIX_1)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(MIX_2)
        return (z ^ (z >> np.uint64(31))).astype(np.int64)


def derived(seeds: Tensor, purpose: str) -> Tensor:
    """B, int64 → B, int64: seeds of their own for one of several views of the same samples."""
    base = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8], "little")
    return _scramble(_scramble(seeds) ^ _signed(base))


def uniform(seeds: Tensor, purpose: str, n: int) -> Tensor:
    """B, int64 → B N, float32 in [0, 1): the n numbers that each sample has for this purpose."""
    draw: Any = _opaque if torch.compiler.is_compiling() else _draw
    numbers: Tensor = draw(seeds, purpose, n)
    return numbers


def _draw(seeds: Tensor, purpose: str, n: int) -> Tensor:
    base = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8], "little")
    steps = torch.arange(1, n + 1, device=seeds.device) * _signed(GOLDEN)
    z = _scramble(seeds ^ _signed(base))[:, None] + steps
    return (_scramble(z) >> 40 & 0xFFFFFF).float() * 2.0**-24


# A compiler cannot trace a digest, and its arithmetic does not wrap at 64 bits: for it this is one operation.
_opaque = torch.library.custom_op(
    "vitlab::uniform", _draw, mutates_args=(), schema="(Tensor seeds, str purpose, int n) -> Tensor"
)
_opaque.register_fake(lambda seeds, purpose, n: seeds.new_empty((seeds.shape[0], n), dtype=torch.float32))


def _scramble(z: Tensor) -> Tensor:
    z = (z ^ _shift(z, 30)) * _signed(MIX_1)
    z = (z ^ _shift(z, 27)) * _signed(MIX_2)
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Shift right with zeros from the left, as for unsigned numbers."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value

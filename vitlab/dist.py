"""Who am I among how many, and on what device: decided here and nowhere else."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """One process's place in the group. `World()` is a single process without a group."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: device(0))

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """Sum over all ranks; no gradient flows through it."""
        if self.size == 1:
            return value
        total = value.detach().clone()
        torch_dist.all_reduce(total)
        return total

    def gather(self, thing: Any) -> list[Any]:
        """One plain Python object of every rank, by rank. For small things."""
        if self.size == 1:
            return [thing]
        things: list[Any] = [None] * self.size
        torch_dist.all_gather_object(things, thing)
        return things

    def from_first(self, thing: Any) -> Any:
        """Rank 0's object on every rank."""
        if self.size == 1:
            return thing
        box = [thing]
        torch_dist.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        if self.size > 1:
            torch_dist.barrier()


def device(local_rank: int) -> torch.device:
    """The accelerator of this process, or the CPU."""
    return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")


def backend(where: torch.device) -> str:
    """The collective library that serves a device."""
    return "nccl" if where.type == "cuda" else "gloo"


def world_of_group() -> World:
    """The world of the process group that this process has joined (by Ray Train or torchrun)."""
    if not torch_dist.is_initialized():
        return World()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    return World(torch_dist.get_rank(), torch_dist.get_world_size(), device(local))


def half(where: torch.device, precision: str) -> bool:
    """Whether matrix products run in bfloat16: `auto` means where the device is made for it."""
    if precision == "auto":
        return where.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return precision == "bf16"


def workers() -> int:
    """How many processes train together."""
    return torch_dist.get_world_size() if torch_dist.is_initialized() else 1


def gathered(value: Tensor) -> Tensor:
    """A tensor of every rank, of the same shape on all, stacked by rank: for use inside models."""
    if workers() == 1:
        return value[None]
    whole: Tensor = (_gather_op if torch.compiler.is_compiling() else _gather)(value)
    return whole


def summed(value: Tensor) -> Tensor:
    """The sum of a tensor over all ranks: for use inside models."""
    if workers() == 1:
        return value
    total: Tensor = (_sum_op if torch.compiler.is_compiling() else _sum)(value)
    return total


def _gather(value: Tensor) -> Tensor:
    parts = [torch.empty_like(value) for _ in range(workers())]
    torch_dist.all_gather(parts, value.contiguous())
    return torch.stack(parts)


def _sum(value: Tensor) -> Tensor:
    total = value.contiguous().clone()
    torch_dist.all_reduce(total)
    return total


# For a compiler each collective is one operation, which it neither looks into nor repeats of its own accord.
_gather_op: Any = torch.library.custom_op(
    "vitlab::gather", _gather, mutates_args=(), schema="(Tensor value) -> Tensor"
)
_gather_op.register_fake(lambda value: value.new_empty((workers(), *value.shape)))
_sum_op: Any = torch.library.custom_op(
    "vitlab::sum", _sum, mutates_args=(), schema="(Tensor value) -> Tensor"
)
_sum_op.register_fake(lambda value: torch.empty_like(value, memory_format=torch.contiguous_format))

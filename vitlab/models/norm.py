"""Batch normalisation over the global batch.

Paper: Ioffe and Szegedy 2015 (arXiv 1502.03167). With several workers, the statistics are those of all
their samples: forward and backward have one collective each (`nn.SyncBatchNorm` refuses a CPU). Every
worker computes the same statistics from the same numbers in the same order, so buffers are equal on all
of them to the bit. Alone, it is torch's own, but for maps in channels-last layout on a CPU: torch sums those
one value after the other and loses two digits (1e-5 against 2e-7 over 100 000 values, measured).

Local counts, means and sums of squared distances are merged as in Chan et al. 1979, which loses no digits
where a mean is large against its spread. Statistics are never computed in half precision; the gradients
of scale and shift are local sums, which the engine reduces like those of any other parameter.

Letters: B samples, C channels, n values of a channel here, N on all workers, W workers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vitlab.dist import gathered, summed, workers

PLACES = (0, 2, 3)  # the dimensions that a channel's statistics run over


class BatchNorm2d(nn.BatchNorm2d):
    """B C height width → the same, each channel normalised over the samples and places of all workers.

    `recomputing` is set while activation checkpointing repeats a forward pass: running statistics have
    moved in the first one.
    """

    recomputing = False

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (the name nn.BatchNorm2d gives it)
        if not self.training:
            return super().forward(input)
        moves = self.track_running_stats and not self.recomputing
        if workers() > 1 or _summed_naively(input):
            out, mean, variance = _Everywhere.apply(input, self.weight, self.bias, self.eps)
            if moves:
                self._move(mean, variance)
            normed: Tensor = out
            return normed
        if moves or self.running_mean is None or self.running_var is None:
            return super().forward(input)
        # What is saved for the gradient must have the first pass's shapes: so statistics, but thrown away.
        lost = (self.running_mean.clone(), self.running_var.clone())
        return F.batch_norm(input, *lost, self.weight, self.bias, True, 0.0, self.eps)

    @torch.no_grad()
    def _move(self, mean: Tensor, variance: Tensor) -> None:
        """Running statistics towards these, as torch does; without a momentum, the mean of all steps."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        part = 1 / self.num_batches_tracked.to(mean.dtype) if self.momentum is None else self.momentum
        for running, new in ((self.running_mean, mean), (self.running_var, variance)):
            running.add_((new.to(running.dtype) - running) * part)


class _Everywhere(torch.autograd.Function):
    """y = x̂ · weight + bias, x̂ = (x - mean) · (variance + ε)^-½ with the statistics of all workers.

    Also gives mean and unbiased variance. Backward, over all workers:
    dx = weight · (variance + ε)^-½ · (dy - Σdy / N - x̂ · Σ(dy · x̂) / N)

    What is kept is x less its local mean; `off` is how far that mean is from everybody's. Each line is one
    pass over the map: a step spends its time in reading and writing.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = _wide(x)
        n = x.numel() // x.shape[1]
        local = wide.sum(PLACES) / max(n, 1)  # a worker without samples counts for nothing
        centred = wide - _spread(local)
        room = centred * centred
        squares = room.sum(PLACES)
        total, mean, squares = _merge(gathered(torch.cat([local.new_full((1,), float(n)), local, squares])))
        scale, off = (squares / total + eps).rsqrt(), local - mean
        ctx.save_for_backward(centred, weight, scale, off, total)
        ctx.dtype = x.dtype
        slope = scale if weight is None else scale * weight.to(scale.dtype)
        start = off * slope if bias is None else off * slope + bias.to(scale.dtype)
        variance = squares / (total - 1)
        ctx.mark_non_differentiable(mean, variance)
        torch.addcmul(_spread(start), centred, _spread(slope), out=room)
        return room.to(x.dtype), mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        centred, weight, scale, off, total = ctx.saved_tensors
        wide = _wide(dy)
        plain = wide.sum(PLACES)
        room = wide * centred
        crossed = (room.sum(PLACES) + off * plain) * scale  # Σ(dy · x̂) here
        mean, mean_crossed = (summed(torch.stack([plain, crossed])) / total).unbind(0)
        factor = scale if weight is None else scale * weight.to(scale.dtype)
        slope = -factor * scale * mean_crossed
        start = -factor * mean + slope * off
        dx = torch.addcmul(_spread(start), wide, _spread(factor), out=room).addcmul_(centred, _spread(slope))
        if weight is None:
            return dx.to(ctx.dtype), None, None, None
        return dx.to(ctx.dtype), crossed.to(weight.dtype), plain.to(weight.dtype), None


def _summed_naively(x: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not x.is_contiguous()
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def _merge(parts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """W (1 + 2C) → N (1), the means of all (C), the sums of squared distances from them (C)."""
    n, (means, squares) = parts[:, :1], parts[:, 1:].chunk(2, dim=1)
    total = n.sum(0)
    mean = (n * means).sum(0) / total
    return total, mean, (squares + n * (means - mean).square()).sum(0)


def _spread(channels: Tensor) -> Tensor:
    """C → 1 C 1 1."""
    return channels.view(1, -1, 1, 1)


def _wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x.float() if x.dtype.itemsize < 4 else x


@contextmanager
def repeating(block: nn.Module) -> Iterator[None]:
    """While this lasts, the block repeats a forward pass: its running statistics stay."""
    norms = [module for module in block.modules() if isinstance(module, BatchNorm2d)]
    for norm in norms:
        norm.recomputing = True
    try:
        yield
    finally:
        for norm in norms:
            norm.recomputing = False

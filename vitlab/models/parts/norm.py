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

BLOCK = 128 * 1024  # numbers


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


class BatchNorm1d(BatchNorm2d):
    """B C → the same: a map of one place, with the names of `nn.BatchNorm1d`."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (the name nn.BatchNorm1d gives it)
        return super().forward(input[..., None, None])[..., 0, 0]


class _Everywhere(torch.autograd.Function):
    """y = x̂ · weight + bias, x̂ = (x - mean) · (variance + ε)^-½ with the statistics of all workers.

    Also gives mean and unbiased variance. Backward, over all workers:
    dx = weight · (variance + ε)^-½ · (dy - Σdy / N - x̂ · Σ(dy · x̂) / N)

    A map is worked on as rows of C numbers, block by block where a sum needs numbers of its own: a block
    stays in the cache, and the map is read and written as seldom as can be.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = _rows(x)
        n = rows.shape[0]
        local = rows.sum(0) / max(n, 1)  # a worker without samples counts for nothing
        squares = torch.stack([(block - local).square_().sum(0) for block in _blocks(rows)]).sum(0)
        total, mean, squares = _merge(gathered(torch.cat([local.new_full((1,), float(n)), local, squares])))
        scale = (squares / total + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, scale, total)
        slope = scale if weight is None else scale * weight.to(scale.dtype)
        start = -mean * slope if bias is None else bias.to(scale.dtype) - mean * slope
        variance = squares / (total - 1)
        ctx.mark_non_differentiable(mean, variance)
        # Not `_map`: a view that a Function gives out cannot be changed in place, as nets of others do.
        out = torch.empty(x.shape, dtype=rows.dtype, device=x.device, memory_format=torch.channels_last)
        out.permute(0, 2, 3, 1).view(rows.shape).copy_(torch.addcmul(start, rows, slope))
        return out.to(x.dtype), mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale, total = ctx.saved_tensors
        rows, slopes = _rows(x), _rows(dy)
        plain, pairs = slopes.sum(0), zip(_blocks(rows), _blocks(slopes), strict=True)
        crossed = torch.stack([(block - mean).mul_(slope).sum(0) for block, slope in pairs]).sum(0) * scale
        shift, turn = (summed(torch.stack([plain, crossed])) / total).unbind(0)
        factor = scale if weight is None else scale * weight.to(scale.dtype)
        turn = -factor * scale * turn
        dx = _map(torch.addcmul(-factor * shift - mean * turn, slopes, factor).addcmul_(rows, turn), x)
        if weight is None:
            return dx, None, None, None
        return dx, crossed.to(weight.dtype), plain.to(weight.dtype), None


def _rows(x: Tensor) -> Tensor:
    """B C height width → n C, at least in float32; a view of what is in channels-last layout."""
    wide = x.float() if x.dtype.itemsize < 4 else x
    return wide.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _map(rows: Tensor, like: Tensor) -> Tensor:
    """n C → the shape and type of a map."""
    b, c, height, width = like.shape
    return rows.view(b, height, width, c).permute(0, 3, 1, 2).to(like.dtype)


def _blocks(rows: Tensor) -> tuple[Tensor, ...]:
    """n C in stretches that fit into a CPU's cache; whole elsewhere, where a short stretch is idle time."""
    return torch.split(rows, max(1, BLOCK // rows.shape[1])) if rows.device.type == "cpu" else (rows,)


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

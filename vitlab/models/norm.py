"""Batch normalisation over the global batch.

Paper: Ioffe and Szegedy 2015 (arXiv 1502.03167). With several workers, the statistics are those of all
their samples, forward and backward, by one reduction each; `nn.SyncBatchNorm` refuses a CPU. Running
statistics are therefore the same on every worker. Alone, it is torch's own.

Local counts, means and sums of squared distances are merged as in Chan et al. 1979, which loses no digits
where a mean is large against its spread.

Letters: B samples, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlab.dist import World, world_of_group


class BatchNorm2d(nn.BatchNorm2d):
    """B C height width → the same, each channel normalised over the samples and places of all workers.

    `recomputing` is set while activation checkpointing repeats a forward pass: running statistics have
    moved in the first one.
    """

    recomputing = False

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (the name nn.BatchNorm2d gives it)
        world = world_of_group() if self.training else World()
        if world.size == 1:
            return super().forward(input)
        raise NotImplementedError


__all__ = ["BatchNorm2d", "F", "Any", "torch", "nn"]

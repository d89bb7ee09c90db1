"""Projection heads: what stands between a backbone's pooled features and a self-supervised loss.

Papers: SwAV (Caron et al. 2020, arXiv 2006.09882) and DINO (Caron et al. 2021, 2104.14294), appendix C;
weight normalisation: Salimans and Kingma 2016 (1602.07868). Parameter names and initialisation are those of
DINO's code: truncated normal, σ = 0.02, for the MLP; torch's own for the directions of the last layer, and 1
for their lengths.

Letters: B samples, D width of the features, H hidden width, E bottleneck, K dimensions of the output.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlab.methods.base import full
from vitlab.models import Backbone
from vitlab.models.parts.norm import BatchNorm1d
from vitlab.models.vit import init_linears


class UnitRows(nn.Module):
    """A dense layer without biases: row k of its weight is g_k · v_k / |v_k|.

    The weight is made here, in every forward: ZeRO-3 gathers parameters for the module that owns them.
    """

    def __init__(self, dim: int, out: int, *, fixed: bool) -> None:
        """`fixed`: g stays 1, only directions are learned."""
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out, 1), requires_grad=not fixed)
        self.weight_v = nn.Parameter(nn.Linear(dim, out, bias=False).weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        """B E → B K."""
        return F.linear(x, torch._weight_norm(self.weight_v, self.weight_g, 0))


class DINOHead(nn.Module):
    """B D → an MLP with the exact GELU → unit length in the bottleneck → B K: with g = 1, cosines."""

    def __init__(
        self, dims: tuple[int, int, int, int], layers: int, *, norm_last_layer: bool, batch_norm: bool = False
    ) -> None:
        """`dims`: D, H, E, K."""
        super().__init__()
        dim, hidden, bottleneck, out = dims
        widths = [dim, *[hidden] * (layers - 1), bottleneck]
        parts: list[nn.Module] = []
        for before, after in pairwise(widths):
            parts += [nn.Linear(before, after), *([BatchNorm1d(after)] if batch_norm else []), nn.GELU()]
        self.mlp = nn.Sequential(*parts[: -2 if batch_norm else -1]) if layers > 1 else parts[0]
        init_linears(self.mlp, "deit")
        self.last_layer = UnitRows(bottleneck, out, fixed=norm_last_layer)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last_layer(F.normalize(full(self.mlp(x)), dim=-1))
        return out


@torch.no_grad()
def pooled_width(model: Backbone) -> int:
    """D: how many pooled features a model has, found by looking at one black image."""
    trains, device = model.training, next(model.parameters()).device
    image = torch.zeros(1, model.config.in_chans, *model.image_size, device=device)
    pooled: Tensor = model.eval()(image, {"pooled"}).pooled
    model.train(trains)
    return pooled.shape[-1]

"""The parts of CoAtNet: stem, MBConv block, transformer block with places, head.

Papers: Dai et al. 2021 (arXiv 2106.04803) for the order, norm first; Sandler et al. 2018 (1801.04381) for
MBConv; Hu et al. 2017 (1709.01507) for squeeze and excitation. Names are timm's; `coatnet.py` tells how the
two ways to halve a map, `timm` and `paper`, differ, and what the kinds of places are.

Maps lie channels last in memory: a 1×1 convolution is a matrix product, and B C Y X is B N C, uncopied.

Letters: B samples, C and D channels, Y and X sides of a map, N = Y·X, E channels inside a block,
D width, H heads.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlab.models.features import Size
from vitlab.models.parts.norm import BatchNorm2d
from vitlab.models.parts.transformer import SampleDrop

EXPANSION = 4  # of an MBConv block, and of an MLP
HEAD_WIDTH = 32
Downsample = Literal["timm", "paper"]
Relative = Literal["bias", "absolute", "none"]


class Place(NamedTuple):
    """Where a block stands."""

    name: str  # stage and block
    stride: int
    window: Size  # sides of its output
    drop_path: float


class Pointwise(nn.Conv2d):
    """A 1×1 convolution as a matrix product."""

    def __init__(self, dim: int, out: int, bias: bool = True, stride: int = 1) -> None:
        super().__init__(dim, out, 1, stride, bias=bias)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (the name nn.Conv2d gives it)
        """B C Y X → B D Y X."""
        step = self.stride[0]
        rows = input[:, :, ::step, ::step].permute(0, 2, 3, 1)
        return F.linear(rows, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class Pool(nn.Module):
    """Half the sides, then, where the width changes, another width."""

    def __init__(self, dim: int, out: int, how: Downsample) -> None:
        super().__init__()
        self.pool = F.avg_pool2d if how == "timm" else F.max_pool2d
        self.expand = Pointwise(dim, out) if dim != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """B C Y X → B D Y/2 X/2, rounded up."""
        out: Tensor = self.expand(self.pool(x, 2, ceil_mode=True))
        return out


class Stem(nn.Module):
    """Two 3×3 convolutions, the first with stride 2."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, dim, 3, 2, 1, bias=False)
        self.norm1 = BatchNorm2d(dim)
        self.conv2 = nn.Conv2d(dim, dim, 3, 1, 1, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """B C height width → B D height/2 width/2."""
        images = images.contiguous(memory_format=torch.channels_last)
        out: Tensor = self.conv2(F.gelu(self.norm1(self.conv1(images))))
        return out


class SqueezeExcite(nn.Module):
    """A factor for each channel of a sample, read from the means of all channels."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Pointwise(dim, hidden)
        self.fc2 = Pointwise(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """B E Y X → B E Y X."""
        gate: Tensor = self.fc2(F.silu(self.fc1(x.mean((2, 3), keepdim=True)))).sigmoid()
        return x * gate


class MBConv(nn.Module):
    """x ← shortcut(x) + project(squeeze(depthwise(expand(norm(x)))))."""

    def __init__(self, dim: int, out: int, place: Place, how: Downsample) -> None:
        super().__init__()
        inner = EXPANSION * out
        early, late = (1, place.stride) if how == "timm" else (place.stride, 1)
        self.shortcut = Pool(dim, out, how) if place.stride > 1 else nn.Identity()
        self.pre_norm = BatchNorm2d(dim)
        self.conv1_1x1 = Pointwise(dim, inner, bias=False, stride=early)
        self.norm1 = BatchNorm2d(inner)
        self.conv2_kxk = nn.Conv2d(inner, inner, 3, late, 1, groups=inner, bias=False)
        self.norm2 = BatchNorm2d(inner)
        self.se = SqueezeExcite(inner, out // 4)
        self.conv3_1x1 = Pointwise(inner, out)
        self.drop_path = SampleDrop(place.drop_path, f"drop_path/{place.name}/conv", whole=True)

    def forward(self, x: Tensor, seeds: Tensor | None = None) -> Tensor:
        """B C Y X → B D Y/stride X/stride."""
        y = F.gelu(self.norm1(self.conv1_1x1(self.pre_norm(x))))
        y = self.se(F.gelu(self.norm2(self.conv2_kxk(y))))
        out: Tensor = self.shortcut(x) + self.drop_path(self.conv3_1x1(y), seeds)
        return out


class Norm(nn.LayerNorm):
    """LayerNorm over the channels of a map."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=1e-6)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (the name nn.LayerNorm gives it)
        """B C Y X → B C Y X."""
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def named(**parts: nn.Module) -> nn.Sequential:
    """One after another, under these names."""
    return nn.Sequential(OrderedDict(parts))


class Places(nn.Module):
    """What attention adds for the places of query and key; the table has one entry a distance and head."""

    def __init__(self, heads: int, window: Size, relative: Relative) -> None:
        super().__init__()
        self.window, self.relative = window, relative
        self.relative_position_bias_table = nn.Parameter(torch.zeros(math.prod(sides(window)), heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, grid: Size) -> Tensor:
        """H N N; H 1 N where every query sees the same."""
        table = stretched(self.relative_position_bias_table.T, self.window, grid)  # H 2Y-1 2X-1
        if self.relative == "absolute":
            return F.avg_pool2d(table[None], 2, ceil_mode=True)[0].flatten(1)[:, None]
        # bias[y, x, v, u] = table[y - v + Y - 1, x - u + X - 1]: windows of the table, each turned around
        windows = table.unfold(1, grid[0], 1).unfold(2, grid[1], 1).flip(3, 4)
        return windows.reshape(len(table), math.prod(grid), -1)


def sides(grid: Size) -> Size:
    """How many distances there are down and across."""
    return 2 * grid[0] - 1, 2 * grid[1] - 1


def stretched(table: Tensor, window: Size, grid: Size) -> Tensor:
    """A table for `window`, H times all distances → H 2Y-1 2X-1, for `grid`, bicubic."""
    image = table.reshape(len(table), *sides(window))
    if window == grid:
        return image
    fine = image.to(torch.promote_types(image.dtype, torch.float32))[None]
    return F.interpolate(fine, sides(grid), mode="bicubic")[0].to(image.dtype)


class Attention(nn.Module):
    """softmax(Q K^T / √32 + places) V; a head's Q, K and V lie side by side in `qkv`."""

    def __init__(self, dim: int, out: int, window: Size, relative: Relative) -> None:
        super().__init__()
        self.heads = out // HEAD_WIDTH
        self.qkv = Pointwise(dim, 3 * out)
        self.rel_pos = Places(self.heads, window, relative) if relative != "none" else None
        self.proj = Pointwise(out, out)

    def forward(self, x: Tensor, show: bool = False) -> tuple[Tensor, Tensor | None]:
        """B C Y X → B D Y X and, to show, the attention B H N N, which is then computed openly."""
        grid = x.shape[2], x.shape[3]
        qkv = self.qkv(x).permute(0, 2, 3, 1).reshape(x.shape[0], math.prod(grid), self.heads, 3, HEAD_WIDTH)
        q, k, v = qkv.permute(3, 0, 2, 1, 4)  # B H N 32 each
        bias = None if self.rel_pos is None else self.rel_pos(grid).to(q.dtype)
        maps = None
        if show:
            scores = q @ k.mT * HEAD_WIDTH**-0.5
            maps = (scores if bias is None else scores + bias).softmax(-1)
            out = maps.to(v.dtype) @ v
        else:
            mask = None if bias is None else bias.expand(-1, math.prod(grid), -1)[None]
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        joined = out.transpose(1, 2).reshape(x.shape[0], *grid, -1).permute(0, 3, 1, 2)
        return self.proj(joined), maps


class Transformer(nn.Module):
    """x ← shortcut(x) + attention(norm(x)), then x ← x + mlp(norm(x)); pools after the norm if strided."""

    def __init__(self, dim: int, out: int, place: Place, how: Downsample, relative: Relative) -> None:
        super().__init__()
        strided = place.stride > 1
        self.shortcut = Pool(dim, out, how) if strided else nn.Identity()
        self.norm1 = Norm(dim) if not strided else named(norm=Norm(dim), down=Pool(dim, dim, how))
        self.attn = Attention(dim, out, place.window, relative)
        self.drop_path1 = SampleDrop(place.drop_path, f"drop_path/{place.name}/attn", whole=True)
        self.norm2 = Norm(out)
        wide = EXPANSION * out
        self.mlp = named(fc1=Pointwise(out, wide), act=nn.GELU(), fc2=Pointwise(wide, out))
        self.drop_path2 = SampleDrop(place.drop_path, f"drop_path/{place.name}/mlp", whole=True)

    def forward(
        self, x: Tensor, seeds: Tensor | None = None, show: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """B C Y X → B D Y/stride X/stride, and its attention if it is to be shown."""
        branch, maps = self.attn(self.norm1(x), show)
        x = self.shortcut(x) + self.drop_path1(branch, seeds)
        x = x + self.drop_path2(self.mlp(self.norm2(x)), seeds)
        return x, maps


class Head(nn.Module):
    """Mean, norm, dense layer with tanh, classifier."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pre_logits = named(fc=nn.Linear(dim, dim), act=nn.Tanh())
        self.fc = nn.Linear(dim, num_classes) if num_classes else nn.Identity()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """B D Y X → what the classifier reads, B D, and logits, B classes."""
        pooled = self.pre_logits(self.norm(x.mean((2, 3))))
        return pooled, self.fc(pooled)


def shrunk(size: Size, stride: int) -> Size:
    """Sides of a map `stride` times smaller, rounded up."""
    return -(-size[0] // stride), -(-size[1] // stride)

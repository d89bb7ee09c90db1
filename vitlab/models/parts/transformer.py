"""The parts of a plain transformer: patches, positions, attention, block.

Papers: Vaswani et al. 2017 (arXiv 1706.03762), Dosovitskiy et al. 2020 (2010.11929); stochastic depth:
Huang et al. 2016 (1603.09382); LayerScale: Touvron et al. 2021 (2103.17239). Parameter names are timm's.

Departures: a patch is cut out and multiplied, which equals the convolution of the papers, so that patches
nobody looks at are never embedded; drop path and dropout draw from each sample's own seed.

Every parameter is used only in the forward of the module that owns it: ZeRO-3 gathers it there.

A block can be asked for its `first` tokens alone: of the last block a model often reads no more than the
class token. Keys and values still come of all tokens: the result is the same, most of the work is not done.

Letters: B samples, T tokens, F first tokens, N patches, K kept patches, D width, H heads, C channels,
p patch side.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlab.batch import uniform


class PatchProjection(nn.Conv2d):
    """A convolution whose stride is its kernel, given patches already cut out."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (the name nn.Conv2d gives it)
        """B K C·p·p → B K D."""
        return F.linear(input.to(self.weight.dtype), self.weight.flatten(1), self.bias)


class PatchEmbed(nn.Module):
    """Image → one vector a patch, row by row."""

    def __init__(self, patch_size: int, in_chans: int, dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = PatchProjection(in_chans, dim, patch_size, patch_size)

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """B C height width → B N D, or B K D of the patches `keep` (B K) alone."""
        patches = cut(images, self.patch_size).flatten(2)
        if keep is not None:
            patches = pick(patches, keep)
        out: Tensor = self.proj(patches)
        return out


def cut(images: Tensor, p: int) -> Tensor:
    """B C height width → B N C p p."""
    b, c, height, width = images.shape
    grid = images.reshape(b, c, height // p, p, width // p, p)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(b, -1, c, p, p)


def pick(tokens: Tensor, index: Tensor) -> Tensor:
    """B N D at index (B K) → B K D."""
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))


def sincos(dim: int, grid: tuple[int, int], prefix: int) -> Tensor:
    """Fixed positions, 1 (prefix + N) D: zeros for the prefix, then [sin x, cos x, sin y, cos y] a patch.

    ω_i = 10000^(-i / (D/4)); x, the column, comes first, as in the weights that MAE's authors gave out.
    """
    omega = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    y, x = (torch.arange(side, dtype=torch.float64)[:, None] * omega for side in grid)  # side D/4
    rows = y[:, None].expand(-1, grid[1], -1).flatten(0, 1)
    columns = x[None].expand(grid[0], -1, -1).flatten(0, 1)
    waves = torch.cat([columns.sin(), columns.cos(), rows.sin(), rows.cos()], dim=1)
    return torch.cat([waves.new_zeros(prefix, dim), waves])[None].float()


def resample(
    table: Tensor, old: tuple[int, int], new: tuple[int, int], mode: str = "bicubic", more: float = 0.0
) -> Tensor:
    """Positions of one grid (1 N D, row by row) for another: bicubic as in the code of DeiT and MAE.

    With `more` the old grid is stretched over sides of that much more than the new one's, as in DINO's.
    """
    if old == new:
        return table
    image = table.reshape(len(table), *old, -1).movedim(3, 1)
    image = image.to(torch.promote_types(table.dtype, torch.float32))
    if more:
        times = [(side + more) / before for side, before in zip(new, old, strict=True)]
        fine = F.interpolate(image, scale_factor=times, mode=mode, recompute_scale_factor=False)
    else:
        fine = F.interpolate(image, new, mode=mode)
    return fine.to(table.dtype).movedim(1, 3).flatten(1, 2)


class SampleDrop(nn.Module):
    """Dropout, of single numbers or of a sample's whole branch (drop path), scaled by 1 / (1 - rate)."""

    def __init__(self, rate: float, purpose: str, whole: bool = False) -> None:
        super().__init__()
        self.rate, self.purpose, self.whole = rate, purpose, whole

    def forward(self, x: Tensor, seeds: Tensor | None = None) -> Tensor:
        """B …, with the samples' seeds (B); without seeds torch's own generator decides."""
        if not self.training or self.rate == 0:
            return x
        shape = (len(x),) + (1,) * (x.ndim - 1) if self.whole else tuple(x.shape)
        count = 1 if self.whole else x[0].numel()
        if seeds is None:
            noise = torch.rand(len(x), count, device=x.device)
        else:
            noise = uniform(seeds, self.purpose, count)
        return x * (noise >= self.rate).to(x.dtype).div(1 - self.rate).view(shape)


class LayerScale(nn.Module):
    """A learned factor a channel."""

    def __init__(self, dim: int, start: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), start))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


def _layer_scale(dim: int, start: float | None) -> nn.Module:
    return nn.Identity() if start is None else LayerScale(dim, start)


class QKV(nn.Linear):
    """One dense layer for Q, K and V, each of `num_heads` heads.

    Without `key_bias`, as in BEiT, there are biases of queries and values alone: `q_bias`, `v_bias`.
    """

    def __init__(self, dim: int, num_heads: int, key_bias: bool = True) -> None:
        super().__init__(dim, 3 * dim, bias=key_bias)
        self.num_heads = num_heads
        if not key_bias:
            self.q_bias, self.v_bias = (nn.Parameter(torch.zeros(dim)) for _ in range(2))

    def forward(  # type: ignore[override]
        self,
        input: Tensor,  # noqa: A002  (the name nn.Linear gives it)
        first: int | None = None,
    ) -> tuple[Tensor, ...]:
        """B T D → Q, K, V, B H T D/H each; with `first` Q has these tokens alone."""
        bias: Tensor | None = self.bias
        if bias is None:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        if first is None:
            return self._heads(F.linear(input, self.weight, bias), 3)
        dim = self.in_features
        queries = F.linear(input[:, :first], self.weight[:dim], bias[:dim])
        return self._heads(queries, 1) + self._heads(F.linear(input, self.weight[dim:], bias[dim:]), 2)

    def _heads(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        split = x.view(*x.shape[:2], parts, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        return tuple(split.unbind(0))


class Attention(nn.Module):
    """softmax(Q K^T / √(D/H) + bias) V."""

    def __init__(self, dim: int, num_heads: int, key_bias: bool = True) -> None:
        super().__init__()
        self.qkv = QKV(dim, num_heads, key_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self,
        x: Tensor,
        maps: list[Tensor] | None = None,
        first: int | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """B T D → B T D (B F D); a list in `maps` gets the attention, B H T T, then computed openly.

        `bias` (H T T) is added to the scores of every sample.
        """
        q, k, v = self.qkv(x, first)
        if bias is not None:
            bias = bias[None, :, :first].to(q.dtype)
        if maps is None:
            out = F.scaled_dot_product_attention(q, k, v, bias)
        else:
            scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
            maps.append((scores if bias is None else scores + bias).softmax(-1))
            out = maps[-1].to(v.dtype) @ v
        joined: Tensor = self.proj(out.transpose(1, 2).flatten(2))
        return joined


class Mlp(nn.Module):
    """Two layers with the exact GELU between."""

    def __init__(self, dim: int, hidden: int, drop: SampleDrop) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.drop = drop
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, seeds: Tensor | None = None) -> Tensor:
        out: Tensor = self.fc2(self.drop(F.gelu(self.fc1(x)), seeds))
        return out


class Block(nn.Module):
    """x ← x + attention(norm(x)), then x ← x + mlp(norm(x)).

    Dropout stands where the ViT paper has it: after every dense layer except those of Q, K and V.
    `name` tells the block's random numbers from those of other blocks.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        name: str,
        init_values: float | None = None,
        drop_path: float = 0.0,
        dropout: float = 0.0,
        key_bias: bool = True,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.ls1 = _layer_scale(dim, init_values)
        self.drop1 = SampleDrop(dropout, f"dropout/{name}/attn")
        self.drop_path1 = SampleDrop(drop_path, f"drop_path/{name}/attn", whole=True)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.ls2 = _layer_scale(dim, init_values)
        self.drop2 = SampleDrop(dropout, f"dropout/{name}/mlp")
        self.drop_path2 = SampleDrop(drop_path, f"drop_path/{name}/mlp", whole=True)
        self.attn = Attention(dim, num_heads, key_bias)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), SampleDrop(dropout, f"dropout/{name}/hidden"))

    def forward(
        self,
        x: Tensor,
        seeds: Tensor | None = None,
        maps: list[Tensor] | None = None,
        first: int | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """B T D → B T D, or of the `first` tokens alone; `maps`, where given, gets this block's attention."""
        branch = self.drop1(self.attn(self.norm1(x), maps, first, bias), seeds)
        x = (x if first is None else x[:, :first]) + self.drop_path1(self.ls1(branch), seeds)
        branch = self.drop2(self.mlp(self.norm2(x), seeds), seeds)
        out: Tensor = x + self.drop_path2(self.ls2(branch), seeds)
        return out

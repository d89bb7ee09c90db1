"""The parts of CvT: patches and Q, K and V out of convolutions, attention, block.

Paper: Wu et al. 2021 (arXiv 2103.15808). Parameter names are those of the authors' code (microsoft/CvT).

Maps are kept in memory channels last: then tokens B N D and their map B D h w are the same numbers in the
same places, and nothing is copied between the two.

A block can be asked for its `first` tokens alone: of the last block a model often reads no more than the
class token. The convolution of the queries, which the class token does not pass, still runs then: its
running statistics move and its gradient is zero, as in the authors' code.

Letters: B samples, N patches, P prefix tokens (the class token), T = P + N, Tk those of keys, F first
tokens, D width, H heads, C channels, h w the grid, d = D/H.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlab.models.features import Size
from vitlab.models.parts.norm import BatchNorm2d
from vitlab.models.parts.transformer import SampleDrop

KERNEL, PADDING = 3, 1  # of the convolutions before the dense layers of Q, K and V
QUICK = 1.702  # the factor in the quick GELU


class PatchConv(nn.Conv2d):
    """A convolution whose output lies channels last."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (the name nn.Conv2d gives it)
        image = input.to(self.weight.dtype).contiguous(memory_format=torch.channels_last)
        return super().forward(image)


class ConvEmbed(nn.Module):
    """Image or map → tokens, normed."""

    def __init__(self, in_chans: int, dim: int, kernel: int, stride: int, padding: int) -> None:
        super().__init__()
        self.proj = PatchConv(in_chans, dim, kernel, stride, padding)
        self.norm = nn.LayerNorm(dim, eps=1e-5)

    def forward(self, image: Tensor) -> Tensor:
        """B C height width → B N D."""
        out: Tensor = self.norm(to_tokens(self.proj(image)))
        return out


def to_tokens(image: Tensor) -> Tensor:
    """B D h w → B N D."""
    return image.flatten(2).transpose(1, 2)


def to_image(tokens: Tensor, grid: Size) -> Tensor:
    """B N D → B D h w, which lies channels last."""
    b, _, d = tokens.shape
    return tokens.transpose(1, 2).view(b, d, *grid)


class Attention(nn.Module):
    """softmax(Q K^T / √D) V; Q, K and V come of depth-wise convolutions, or of the tokens themselves."""

    def __init__(self, dim: int, num_heads: int, convolved: bool, kv_stride: int) -> None:
        super().__init__()
        self.num_heads, self.scale, self.convolved = num_heads, dim**-0.5, convolved
        if self.convolved:
            self.conv_proj_q = _conv_projection(dim, 1)
            self.conv_proj_k = _conv_projection(dim, kv_stride)
            self.conv_proj_v = _conv_projection(dim, kv_stride)
        self.proj_q = nn.Linear(dim, dim)
        self.proj_k = nn.Linear(dim, dim)
        self.proj_v = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, grid: Size, maps: list[Tensor] | None, first: int | None) -> Tensor:
        """B T D → B T D (B F D); a list in `maps` gets the attention, B H T Tk, then computed openly."""
        inputs = self._convolve(x, grid, first) if self.convolved else (x[:, :first], x, x)
        layers = (self.proj_q, self.proj_k, self.proj_v)
        q, k, v = (
            layer(tokens).unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # B H T d
            for layer, tokens in zip(layers, inputs, strict=True)
        )
        if maps is None:
            out = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        else:
            maps.append((q @ k.transpose(-2, -1) * self.scale).softmax(-1))
            out = maps[-1].to(v.dtype) @ v
        joined: Tensor = self.proj(out.transpose(1, 2).flatten(2))
        return joined

    def _convolve(self, x: Tensor, grid: Size, first: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """What the dense layers of Q, K and V read; prefix tokens go round the convolutions."""
        n = grid[0] * grid[1]
        lead, patches = torch.split(x, [x.shape[1] - n, n], dim=1)
        image = to_image(patches.contiguous(), grid)
        q, k, v = (to_tokens(p(image)) for p in (self.conv_proj_q, self.conv_proj_k, self.conv_proj_v))
        if first is not None:
            q = q[:, : first - lead.shape[1]]
        if x.shape[1] == n:
            return q, k, v
        return torch.cat([lead, q], 1), torch.cat([lead, k], 1), torch.cat([lead, v], 1)


def _conv_projection(dim: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(dim, dim, KERNEL, stride, PADDING, groups=dim, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=BatchNorm2d(dim)))


class QuickIn(nn.Linear):
    """1.702 · (W x + b): what the SiLU has to see to be 1.702 times the quick GELU."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (the name nn.Linear gives it)
        return F.linear(QUICK * input, self.weight, QUICK * self.bias)


class QuickOut(nn.Linear):
    """W (x / 1.702) + b."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (the name nn.Linear gives it)
        return F.linear(input, self.weight / QUICK, self.bias)


class Mlp(nn.Module):
    """Two layers with the exact GELU or the quick one, x · sigmoid(1.702 x), between.

    The quick one is silu(1.702 x) / 1.702. Both factors go into small tensors, never over the hidden ones,
    which are four times as wide: one pass over those instead of three, and as much less to keep.
    """

    def __init__(self, dim: int, hidden: int, quick: bool) -> None:
        super().__init__()
        self.quick = quick
        self.fc1 = (QuickIn if quick else nn.Linear)(dim, hidden)
        self.fc2 = (QuickOut if quick else nn.Linear)(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x)
        out: Tensor = self.fc2(F.silu(hidden) if self.quick else F.gelu(hidden))
        return out


class Block(nn.Module):
    """x ← x + attention(norm(x)), then x ← x + mlp(norm(x)); `name` is that of its random numbers."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        name: str,
        *,
        convolved: bool,
        kv_stride: int,
        quick: bool,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-5)
        self.attn = Attention(dim, num_heads, convolved, kv_stride)
        self.drop_path1 = SampleDrop(drop_path, f"drop_path/{name}/attn", whole=True)
        self.norm2 = nn.LayerNorm(dim, eps=1e-5)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), quick)
        self.drop_path2 = SampleDrop(drop_path, f"drop_path/{name}/mlp", whole=True)

    def forward(
        self,
        x: Tensor,
        grid: Size,
        seeds: Tensor | None = None,
        maps: list[Tensor] | None = None,
        first: int | None = None,
    ) -> Tensor:
        """B T D → B T D, or of the `first` tokens alone; `maps`, where given, gets this block's attention."""
        branch = self.attn(self.norm1(x), grid, maps, first)
        x = x[:, :first] + self.drop_path1(branch, seeds)
        out: Tensor = x + self.drop_path2(self.mlp(self.norm2(x)), seeds)
        return out

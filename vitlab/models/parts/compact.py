"""The parts of compact transformers: tokens from patches or convolutions, attention, block, positions.

Paper: Hassani et al. 2021 (arXiv 2104.05704); `vitlab.models.compact` names sources and departures.

Letters: B samples, N patches, P prefix tokens, T = P + N, Q queries, D width, H heads, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlab.models.features import Size
from vitlab.models.parts.transformer import PatchProjection, SampleDrop, cut, resample

MAXIMUM = (3, 2, 1)  # kernel, stride and padding of the pooling behind every convolution
BETWEEN = 64  # channels between two convolutions


class Tokenizer(nn.Module):
    """Images → one vector a patch, row by row: patches multiplied, or convolution, maximum, ReLU in turn."""

    def __init__(
        self, in_chans: int, dim: int, patch_size: int | None, windows: Sequence[tuple[int, int, int]]
    ) -> None:
        """A patch size, or the convolutions' kernel, stride and padding, one after the other."""
        super().__init__()
        self.patch_size = patch_size
        if patch_size is not None:
            layers = [nn.Sequential(PatchProjection(in_chans, dim, patch_size, patch_size))]
        else:
            widths = [in_chans, *[BETWEEN] * (len(windows) - 1), dim]
            layers = [
                nn.Sequential(
                    nn.Conv2d(widths[i], widths[i + 1], *window, bias=False),
                    nn.MaxPool2d(*MAXIMUM),
                    nn.ReLU(),
                )
                for i, window in enumerate(windows)
            ]
        self.conv_layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        """B C height width → B N D."""
        if self.patch_size is not None:
            out: Tensor = self.conv_layers(cut(images, self.patch_size).flatten(2))
            return out
        # Channels last: maxima run over neighbouring memory, and the tokens at the end need no copy.
        maps: Tensor = self.conv_layers(images.contiguous(memory_format=torch.channels_last))
        return maps.flatten(2).transpose(1, 2)


class QKV(nn.Linear):
    """Queries, keys and values of `num_heads` heads by one matrix without bias."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__(dim, 3 * dim, bias=False)
        self.num_heads = num_heads

    def forward(  # type: ignore[override]
        self,
        input: Tensor,  # noqa: A002  (the name nn.Linear gives it)
        first: bool = False,
    ) -> tuple[Tensor, ...]:
        """B T D → queries B H Q D/H, keys and values B H T D/H; `first`: the first token's query alone."""
        if not first:
            return self._heads(F.linear(input, self.weight), 3)
        query, others = self.weight.split([self.in_features, 2 * self.in_features])  # type: ignore[no-untyped-call]
        return self._heads(F.linear(input[:, :1], query), 1) + self._heads(F.linear(input, others), 2)

    def _heads(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        split = x.view(*x.shape[:2], parts, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        return tuple(split.unbind(0))


class Attention(nn.Module):
    """softmax(Q K^T / √(D/H)) V."""

    def __init__(
        self, dim: int, num_heads: int, name: str, dropout: float = 0.0, attention_dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.qkv = QKV(dim, num_heads)
        self.attn_drop = SampleDrop(attention_dropout, f"dropout/{name}/probabilities")
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = SampleDrop(dropout, f"dropout/{name}/attn")

    def forward(
        self, x: Tensor, seeds: Tensor | None, shown: bool, first: bool
    ) -> tuple[Tensor, Tensor | None]:
        """B T D → B Q D, and the probabilities, B H Q T, if they are to be shown."""
        q, k, v = self.qkv(x, first)
        found: Tensor | None = None
        if shown or (self.training and self.attn_drop.rate > 0):
            found = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
            # Drawn query by query, so that the first query's numbers do not hang on how many there are.
            kept = self.attn_drop(found.transpose(1, 2), seeds).transpose(1, 2)
            out = kept.to(v.dtype) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v)
        joined: Tensor = self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)), seeds)
        return joined, found if shown else None


class Layer(nn.Module):
    """x ← norm1(x + attention(pre_norm(x))), then x ← x + linear2(GELU(linear1(x)))."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        hidden: int,
        name: str,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        """`name` tells the block's random numbers from those of other blocks."""
        super().__init__()
        self.pre_norm = nn.LayerNorm(dim)
        self.self_attn = Attention(dim, num_heads, name, dropout, attention_dropout)
        self.drop_path1 = SampleDrop(drop_path, f"drop_path/{name}/attn", whole=True)
        self.norm1 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, hidden)
        self.dropout1 = SampleDrop(dropout, f"dropout/{name}/hidden")
        self.linear2 = nn.Linear(hidden, dim)
        self.dropout2 = SampleDrop(dropout, f"dropout/{name}/mlp")
        self.drop_path2 = SampleDrop(drop_path, f"drop_path/{name}/mlp", whole=True)

    def forward(
        self, x: Tensor, seeds: Tensor | None, shown: bool, first: bool
    ) -> tuple[Tensor, Tensor | None]:
        """B T D → B Q D: all tokens, or the `first` alone; the probabilities, B H Q T, where `shown`."""
        branch, found = self.self_attn(self.pre_norm(x), seeds, shown, first)
        x = self.norm1((x[:, :1] if first else x) + self.drop_path1(branch, seeds))
        branch = self.linear2(self.dropout1(F.gelu(self.linear1(x)), seeds))
        out: Tensor = x + self.drop_path2(self.dropout2(branch, seeds), seeds)
        return out, found


def along(count: int, dim: int) -> Tensor:
    """Fixed positions 1 T D: number p has sin(p ω) at even, cos(p ω) at odd i, ω = 10000^(-2⌊i/2⌋/D)."""
    i = torch.arange(dim, dtype=torch.float64)
    angles = torch.arange(count, dtype=torch.float64)[:, None] / 10000.0 ** (2 * (i // 2) / dim)
    angles = angles.float()  # rounded before the sine, as in the authors' code
    return torch.where(i % 2 == 0, angles.sin(), angles.cos())[None]


def between(table: Tensor, prefix: int, old: Size, new: Size) -> Tensor:
    """Learned positions 1 (P + N) D of one grid for another, bilinear; those of the prefix stay."""
    return torch.cat([table[:, :prefix], resample(table[:, prefix:], old, new, "bilinear")], dim=1)

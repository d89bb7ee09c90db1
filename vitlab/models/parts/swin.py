"""The parts of a Swin transformer: patches, their merging, attention within windows, block.

Paper: Liu et al. 2021 (arXiv 2103.14030). Parameter names are timm's. Norms have the authors' ε, 1e-5, which
is torch's own default.

Letters: B samples, N tokens, D width, W windows, T slots of a window, M = W·T, H heads, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vitlab.models.features import Size
from vitlab.models.parts.transformer import Mlp, PatchProjection, SampleDrop, cut
from vitlab.models.parts.windows import Move, Order, move

APART = -100.0  # added to the scores of two slots that the shift brought together
TINY = torch.finfo(
    torch.float32
).tiny  # below are e^-100 and other subnormal numbers: products of them are slow


class Patches(nn.Module):
    """Image → one normed vector a patch, in the order asked for."""

    def __init__(self, patch_size: int, in_chans: int, dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = PatchProjection(in_chans, dim, patch_size, patch_size)
        self.norm = nn.LayerNorm(dim)

    def forward(self, images: Tensor, order: Tensor) -> Tensor:
        """B C height width → B N D."""
        patches = cut(images, self.patch_size).flatten(2).index_select(1, order)
        out: Tensor = self.norm(self.proj(patches))
        return out


class PatchMerging(nn.Module):
    """Two by two tokens become one of twice the width."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor, enter: Move) -> Tensor:
        """B N D → B N/4 2D."""
        fours = move(x, enter).view(x.shape[0], -1, 4 * x.shape[-1])
        out: Tensor = self.reduction(self.norm(fours))
        return out


class WindowAttention(nn.Module):
    """softmax(Q K^T / √(D/H) + bias of the two slots' distance) V within each window."""

    def __init__(self, dim: int, num_heads: int, window: Size, qkv_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window = window
        rows = (2 * window[0] - 1) * (2 * window[1] - 1)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, num_heads))
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, order: Order, maps: list[Tensor] | None = None) -> Tensor:
        """B N D → B N D; a list in `maps` gets the attention, B W H T T."""
        if order.fill is not None:
            x = move(x, order.fill)
        out = self._attend(self.qkv(x), self._bias(order), maps)
        if order.fill is not None:
            out = move(out, Move(order.fill.back, order.fill.there))
        joined: Tensor = self.proj(out)
        return joined

    def _bias(self, order: Order) -> Tensor:
        """1 H T T, or W H T T where windows are shifted."""
        bias = F.embedding(order.relative, self.relative_position_bias_table).permute(2, 0, 1)
        if order.regions is None:
            return bias[None]
        apart = order.regions[:, None, :, None] != order.regions[:, None, None, :]  # W 1 T T
        return bias + apart.to(bias.dtype) * APART

    def _attend(self, qkv: Tensor, bias: Tensor, maps: list[Tensor] | None) -> Tensor:
        """B M 3D → B M D."""
        if maps is None and _by_hand(qkv):
            done: Tensor = _Attended.apply(qkv, bias, self.num_heads)
            return done
        b, t, h = qkv.shape[0], bias.shape[-1], self.num_heads
        q, k, v = qkv.view(b, -1, t, 3, h, qkv.shape[-1] // (3 * h)).permute(3, 0, 1, 4, 2, 5)  # B W H T D/H
        attention = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias).softmax(-1)
        if len(bias) > 1:
            attention = F.threshold(attention, TINY, 0.0)
        if maps is not None:
            maps.append(attention)
        out: Tensor = attention.to(v.dtype) @ v
        return out.transpose(2, 3).reshape(b, -1, qkv.shape[-1] // 3)


def _by_hand(x: Tensor) -> bool:
    """Where nobody else fuses the steps or chooses their precision."""
    return x.is_cpu and not torch.compiler.is_compiling() and not torch.is_autocast_enabled("cpu")


class _Attended(torch.autograd.Function):
    """The attention of all windows with one copy of Q, K and V and two of the scores, there and back.

    With G = B·W·H: P = softmax(Q K^T s + bias), O = P V; dP = dO V^T, dS = P ∘ (dP - Σ dP ∘ P),
    dQ = s dS K, dK = s dS^T Q, dV = P^T dO, and the bias has the sum of dS over the samples.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bias: Tensor, heads: int) -> Tensor:
        t, d = bias.shape[-1], qkv.shape[-1] // (3 * heads)
        packed = qkv.view(-1, t, 3, heads, d).permute(2, 0, 3, 1, 4).reshape(3, -1, t, d)  # 3 G T D/H
        q, k, v = packed
        p = q.new_empty(len(q), t, t)
        torch.baddbmm(p, q, k.mT, beta=0, alpha=d**-0.5, out=p)
        p.view(-1, *bias.shape).add_(bias)
        torch.softmax(p, -1, out=p)
        if len(bias) > 1:
            torch.threshold_(p, TINY, 0.0)
        ctx.save_for_backward(packed, p)
        ctx.shape = bias.shape
        out: Tensor = (p @ v).view(-1, heads, t, d).transpose(1, 2).reshape(len(qkv), -1, heads * d)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (q, k, v), p = ctx.saved_tensors
        (heads, t, _), d, b = ctx.shape[1:], q.shape[-1], len(grad)
        grad = grad.reshape(-1, t, heads, d).transpose(1, 2).reshape(-1, t, d)  # G T D/H
        grads = q.new_empty(3, *q.shape)
        torch.bmm(p.mT, grad, out=grads[2])
        ds = torch._softmax_backward_data(grad @ v.mT, p, -1, p.dtype)
        torch.baddbmm(q, ds, k, beta=0, alpha=d**-0.5, out=grads[0])
        torch.baddbmm(k, ds.mT, q, beta=0, alpha=d**-0.5, out=grads[1])
        back = grads.view(3, -1, heads, t, d).permute(1, 3, 0, 2, 4).reshape(b, -1, 3 * heads * d)
        return back, ds.view(-1, *ctx.shape).sum(0), None


class Block(nn.Module):
    """x ← x + attention(norm(x)), then x ← x + mlp(norm(x)); `name` tells its random numbers apart."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: Size,
        mlp_ratio: float,
        qkv_bias: bool,
        drop_path: float,
        name: str,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, num_heads, window, qkv_bias)
        self.drop_path1 = SampleDrop(drop_path, f"drop_path/{name}/attn", whole=True)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), SampleDrop(0.0, f"dropout/{name}/hidden"))
        self.drop_path2 = SampleDrop(drop_path, f"drop_path/{name}/mlp", whole=True)

    def forward(
        self, x: Tensor, order: Order, seeds: Tensor | None = None, maps: list[Tensor] | None = None
    ) -> Tensor:
        """B N D → B N D, tokens in the order of this block's windows."""
        x = x + self.drop_path1(self.attn(self.norm1(x), order, maps), seeds)
        out: Tensor = x + self.drop_path2(self.mlp(self.norm2(x)), seeds)
        return out

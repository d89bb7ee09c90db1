"""ViT-Lite, CVT and CCT: compact transformers for small images and small data sets.

Paper: Hassani et al. 2021 (arXiv 2104.05704). Parameter names are those of the authors' code
(SHI-Labs/Compact-Transformers): its state dicts load as they are. ViT-Lite reads a class token from patches;
CVT has no class token and weighs all tokens (sequence pooling); CCT cuts no patches, its tokens come from
convolutions. CVT here is the *compact* vision transformer, not the convolutional one.

As in the authors' code: a second norm replaces the residual stream in the middle of a block; Q, K and V have
no bias; LayerNorm's ε is 1e-5; dense layers start as a truncated normal of σ = 0.02, learned positions of
σ = 0.2, convolutions as He's normal, the class token as zero; fixed positions run along the sequence, the
class token first, and know nothing of rows.

Departures and choices:
- attention dropout and drop path are 0 unless asked for; the authors train with 0.1 each.
- learned positions of another grid are bilinear, as the authors' are for weights; here in the forward too.
  Fixed positions are computed anew.
- fixed positions are a buffer that is saved, as the authors' frozen parameter is.
- maxima are taken before the ReLU, which gives the same numbers from a quarter of the work.
- with a class token, the last block computes that token alone, unless more is wanted.
- `attentions` are the probabilities before dropout.
- a mask token may stand for tokens behind the tokenizer; convolutions overlap, so in CCT the neighbours of a
  masked token have seen a part of its pixels.

Letters: B samples, N patches, P prefix tokens (1 or 0), T = P + N, Q queries, D width, H heads, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from vitlab.config import UserError
from vitlab.models.features import Backbone, BackboneConfig, Features, Size, grid_of
from vitlab.models.parts.compact import MAXIMUM, Layer, Tokenizer, along, between
from vitlab.models.parts.transformer import SampleDrop

SIZES: dict[int, dict[str, Any]] = {
    2: {"embed_dim": 128, "depth": 2, "num_heads": 2, "mlp_ratio": 1.0},
    4: {"embed_dim": 128, "depth": 4, "num_heads": 2, "mlp_ratio": 1.0},
    6: {"embed_dim": 256, "depth": 6, "num_heads": 4, "mlp_ratio": 2.0},
    7: {"embed_dim": 256, "depth": 7, "num_heads": 4, "mlp_ratio": 2.0},
    14: {"embed_dim": 384, "depth": 14, "num_heads": 6, "mlp_ratio": 3.0},
}


def _patches(depth: int, patch_size: int, pool: str) -> dict[str, Any]:
    return {**SIZES[depth], "patch_size": patch_size, "pool": pool}


def _convolutions(depth: int, kernel: int, layers: int) -> dict[str, Any]:
    """The authors' rule for stride and padding."""
    stride, padding = max(1, kernel // 2 - 1), max(1, kernel // 2)
    tokenizer = {"kernel_size": kernel, "stride": stride, "padding": padding, "conv_layers": layers}
    return {**SIZES[depth], **tokenizer, "pool": "sequence"}


PRESETS: dict[str, dict[str, Any]] = {
    "vit_lite_6_4": _patches(6, 4, "token"),
    "vit_lite_7_4": _patches(7, 4, "token"),
    "vit_lite_7_8": _patches(7, 8, "token"),
    "vit_lite_7_16": _patches(7, 16, "token"),
    "cvt_6_4": _patches(6, 4, "sequence"),
    "cvt_7_4": _patches(7, 4, "sequence"),
    "cvt_7_8": _patches(7, 8, "sequence"),
    "cct_2_3x2": _convolutions(2, 3, 2),
    "cct_4_3x2": _convolutions(4, 3, 2),
    "cct_6_3x1": _convolutions(6, 3, 1),
    "cct_6_3x2": _convolutions(6, 3, 2),
    "cct_7_3x1": _convolutions(7, 3, 1),
    "cct_7_3x2": _convolutions(7, 3, 2),
    "cct_14_7x2": _convolutions(14, 7, 2),
}
Name = Literal[
    "vit_lite_6_4",
    "vit_lite_7_4",
    "vit_lite_7_8",
    "vit_lite_7_16",
    "cvt_6_4",
    "cvt_7_4",
    "cvt_7_8",
    "cct_2_3x2",
    "cct_4_3x2",
    "cct_6_3x1",
    "cct_6_3x2",
    "cct_7_3x1",
    "cct_7_3x2",
    "cct_14_7x2",
]
CONVOLUTION = ("kernel_size", "stride", "padding", "conv_layers")
TOKENS = ("classifier.class_emb", "classifier.positional_emb", "classifier.mask_token")

Run = Callable[..., Any]


class CompactConfig(BackboneConfig):
    presets = PRESETS

    name: Name
    patch_size: int | None = Field(None, gt=0)  # null: convolutions, which need the four numbers below
    kernel_size: int | None = Field(None, gt=0)
    stride: int | None = Field(None, gt=0)
    padding: int | None = Field(None, ge=0)
    conv_layers: int | None = Field(None, gt=0)
    embed_dim: int = Field(gt=0)
    depth: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    mlp_ratio: float = Field(gt=0)
    pool: Literal["token", "sequence"]
    positions: Literal["learned", "sincos", "none"] = "learned"
    dropout: float = Field(0.0, ge=0, lt=1)
    attention_dropout: float = Field(0.0, ge=0, lt=1)
    drop_path: float = Field(0.0, ge=0, lt=1)  # of the last block; linearly from 0 at the first
    mask_token: bool = False

    @model_validator(mode="after")
    def _check(self) -> CompactConfig:
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim {self.embed_dim} is not divisible by num_heads {self.num_heads}")
        given = [name for name in CONVOLUTION if getattr(self, name) is not None]
        if self.patch_size is not None and given:
            raise ValueError(
                f"{given[0]}: given beside patch_size {self.patch_size}; one of them has to be null"
            )
        if self.patch_size is None and len(given) < len(CONVOLUTION):
            missing = ", ".join(name for name in CONVOLUTION if name not in given)
            raise ValueError(f"patch_size: given null; convolutions need {missing} too")
        return self

    def grid(self, image_size: Size) -> Size:
        if self.patch_size is not None:
            return grid_of(image_size, self.patch_size)
        return self._after(image_size[0]), self._after(image_size[1])

    def windows(self) -> list[tuple[int, int, int]]:
        """Kernel, stride and padding of every convolution; with patches there is none."""
        if not (self.kernel_size and self.stride and self.padding is not None and self.conv_layers):
            return []
        return [(self.kernel_size, self.stride, self.padding)] * self.conv_layers

    def _passed(self) -> list[tuple[int, int, int]]:
        """What a side goes through: convolution, maximum, convolution, …"""
        return [window for convolution in self.windows() for window in (convolution, MAXIMUM)]

    def _after(self, side: int) -> int:
        out = side
        for kernel, stride, padding in self._passed():
            out = (out + 2 * padding - kernel) // stride + 1 if out > 0 else 0
        if out <= 0:
            raise UserError(f"image_size {side} leaves no tokens; smallest: {self._smallest()}")
        return out

    def _smallest(self) -> int:
        side = 1
        for kernel, stride, padding in reversed(self._passed()):
            side = max(1, (side - 1) * stride + kernel - 2 * padding)
        return side


class Classifier(nn.Module):
    """Everything behind the tokenizer."""

    positional_emb: Tensor | None

    def __init__(self, config: CompactConfig, grid: Size) -> None:
        super().__init__()
        dim, self.grid, self.prefix = config.embed_dim, grid, int(config.pool == "token")
        if self.prefix:
            self.class_emb = nn.Parameter(torch.zeros(1, 1, dim))
        else:
            self.attention_pool = nn.Linear(dim, 1)
        if config.mask_token:
            self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        count = self.prefix + grid[0] * grid[1]
        self.fixed = config.positions == "sincos"
        if config.positions == "learned":
            self.positional_emb = nn.Parameter(torch.zeros(1, count, dim))
        else:
            self.register_buffer("positional_emb", along(count, dim) if self.fixed else None)
        self.dropout = SampleDrop(config.dropout, "dropout/embed")
        self.blocks = nn.ModuleList(_layer(config, i) for i in range(config.depth))
        self.norm = nn.LayerNorm(dim)
        self.fc = nn.Linear(dim, config.num_classes) if config.num_classes else nn.Identity()

    def forward(
        self,
        tokens: Tensor,
        grid: Size,
        want: frozenset[str],
        mask: Tensor | None,
        seeds: Tensor | None,
        run: Run,
    ) -> dict[str, Any]:
        """B N D, on this grid → what was wanted, by name, or the logits; `run` runs a block."""
        x = self.dropout(self._embed(tokens, grid, mask), seeds)
        maps: list[Tensor] = []
        layers: list[Tensor] = []
        shown = "attentions" in want
        short = bool(self.prefix) and not want & {"tokens", "pyramid", "attentions", "layers"}
        for i, block in enumerate(self.blocks):
            x, found = run(block, x, seeds, shown, short and i == len(self.blocks) - 1)
            if found is not None:
                maps.append(found)
            if "layers" in want:
                layers.append(x[:, self.prefix :].transpose(1, 2).unflatten(2, grid))
        return self._read(x, grid, want, maps) | {"layers": layers}

    def _embed(self, tokens: Tensor, grid: Size, mask: Tensor | None) -> Tensor:
        """B N D → B T D: masked, with the class token, with positions."""
        if mask is not None:
            tokens = torch.where(mask[..., None], self.mask_token.to(tokens.dtype), tokens)
        if self.prefix:
            first = self.class_emb.to(tokens.dtype).expand(tokens.shape[0], -1, -1)
            tokens = torch.cat([first, tokens], dim=1)
        places = self.positions(grid)
        return tokens if places is None else tokens + places

    def positions(self, grid: Size) -> Tensor | None:
        """1 T D for this grid: the table, or one made for the grid."""
        table = self.positional_emb
        if table is None or grid == self.grid:
            return table
        if self.fixed:
            return along(self.prefix + grid[0] * grid[1], table.shape[2]).to(table)
        return between(table, self.prefix, self.grid, grid)

    def _read(self, x: Tensor, grid: Size, want: frozenset[str], maps: list[Tensor]) -> dict[str, Any]:
        """Last block's output, B T D (B 1 D where nothing else is looked at) → everything that was wanted."""
        found: dict[str, Any] = {"attentions": maps}
        whole = not self.prefix or bool(want & {"tokens", "pyramid"})
        x = self.norm(x if whole else x[:, :1])
        found["prefix"] = x[:, : self.prefix]
        if want & {"tokens", "pyramid"}:
            found["tokens"] = x[:, self.prefix :]
            found["pyramid"] = [found["tokens"].transpose(1, 2).unflatten(2, grid)]
        if not want or want & {"logits", "pooled"}:
            found["pooled"] = x[:, 0] if self.prefix else self._pool(x)
        if not want or "logits" in want:
            found["logits"] = self.fc(found["pooled"])
        return found

    def _pool(self, x: Tensor) -> Tensor:
        """Sequence pooling: B N D → B D, the tokens weighed by softmax(x w + b) over the sequence."""
        weights: Tensor = self.attention_pool(x).squeeze(2).softmax(dim=1)  # B N
        return (weights.to(x.dtype)[:, None] @ x).squeeze(1)


def _layer(c: CompactConfig, i: int) -> Layer:
    rate, hidden = c.drop_path * i / max(1, c.depth - 1), int(c.embed_dim * c.mlp_ratio)
    return Layer(c.embed_dim, c.num_heads, hidden, str(i), c.dropout, c.attention_dropout, rate)


class Compact(Backbone):
    """Images B C height width → logits, or the `Features` that were wanted."""

    heads = ("classifier.fc",)
    layered = True
    config: CompactConfig

    def __init__(self, config: CompactConfig, num_classes: int, image_size: int | Size) -> None:
        super().__init__(config, num_classes, image_size)
        self.tokenizer = Tokenizer(config.in_chans, config.embed_dim, config.patch_size, config.windows())
        self.classifier = Classifier(self.config, self.config.grid(self.image_size))
        self._init()

    def _init(self) -> None:
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight)
            elif isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        for name, value in self.named_parameters():
            if name in TOKENS[1:]:
                nn.init.trunc_normal_(value, std=0.2 if name == TOKENS[1] else 0.02)

    def compute(
        self,
        images: Tensor,
        want: frozenset[str],
        keep: Tensor | None,
        mask: Tensor | None,
        seeds: Tensor | None,
    ) -> Tensor | Features:
        grid = self.config.grid((images.shape[2], images.shape[3]))
        found = self.classifier(self.tokenizer(images), grid, want, mask, seeds, self.run)
        if not want:
            logits: Tensor = found["logits"]
            return logits
        return Features(**{name: found[name] for name in want})

    def resized(self, name: str, value: Tensor) -> Tensor | None:
        """Positions of another square grid; fixed ones are computed."""
        own = self.classifier
        if name != TOKENS[1] or own.positional_emb is None:
            return None
        if own.fixed:
            return own.positional_emb.clone()
        side = math.isqrt(max(0, value.shape[1] - own.prefix)) if value.ndim == 3 else 0
        if side == 0 or side**2 + own.prefix != value.shape[1]:
            return None
        return between(value, own.prefix, (side, side), own.grid)

    @property
    def num_layers(self) -> int:
        return self.config.depth + 2

    def layer_of(self, name: str) -> int:
        """0 for everything before the blocks, i + 1 for `classifier.blocks.i`, depth + 1 behind them."""
        if name in TOKENS or name.startswith("tokenizer."):
            return 0
        _, part, *rest = name.split(".")
        return int(rest[0]) + 1 if part == "blocks" else self.config.depth + 1

    def no_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name in TOKENS}

"""ViT and DeiT: plain vision transformers.

Papers: Dosovitskiy et al. 2020 (arXiv 2010.11929); Touvron et al. 2020 (2012.12877) for the distillation
token with its own head. Parameter names are timm's: a state dict of timm or of DeiT loads as it is, and
so does the encoder of a checkpoint of MAE (He et al. 2021, 2111.06377).

Departures and choices:
- mean pooling leaves the class token in place and takes the mean over the patches, then `fc_norm` (timm,
  MAE); `tokens` and `prefix` of such a model pass through `fc_norm` as well: they are normed in either case.
- in training, too, a distilled model's logits are the mean of both heads; a method asks for `heads` by name.
- initialisation `deit`: truncated normal, σ = 0.02, for dense layers, tokens and positions, zero biases,
  torch's own for the patches, as in DeiT's code; `mae`: Xavier uniform for dense layers and patches, as in
  MAE's and in ViT's JAX code.
- the ViT paper has one more dense layer before the head in pre-training; it is left out, as in timm.
- fixed positions are a buffer that is saved, so weights move between `learned` and `sincos` both ways.

Letters: B samples, N patches, K kept patches, P prefix tokens, T = P + N, D width, H heads.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from vitlab.config import UserError
from vitlab.models.features import NAMES, Backbone, BackboneConfig, Features, Size, grid_of, wanted
from vitlab.models.layers import Block, PatchEmbed, SampleDrop, pick, sincos

PRESETS: dict[str, dict[str, Any]] = {
    "vit_tiny": {"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3},
    "vit_small": {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6},
    "vit_base": {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12},
    "vit_large": {"patch_size": 16, "embed_dim": 1024, "depth": 24, "num_heads": 16},
    "vit_huge": {"patch_size": 14, "embed_dim": 1280, "depth": 32, "num_heads": 16},
    "deit_tiny": {"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3, "distilled": True},
    "deit_small": {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6, "distilled": True},
    "deit_base": {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12, "distilled": True},
}
Name = Literal[
    "vit_tiny", "vit_small", "vit_base", "vit_large", "vit_huge", "deit_tiny", "deit_small", "deit_base"
]
TOKENS = ("cls_token", "dist_token", "pos_embed", "mask_token")


class ViTConfig(BackboneConfig):
    presets = PRESETS

    name: Name
    patch_size: int = Field(gt=0)
    embed_dim: int = Field(gt=0)
    depth: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    mlp_ratio: float = Field(4.0, gt=0)
    drop_path: float = Field(0.0, ge=0, lt=1)  # of the last block; linearly from 0 at the first
    dropout: float = Field(0.0, ge=0, lt=1)
    init_values: float | None = None  # LayerScale's start; null: no LayerScale
    pool: Literal["token", "mean"] = "token"
    positions: Literal["learned", "sincos"] = "learned"
    init: Literal["deit", "mae"] = "deit"
    distilled: bool = False
    mask_token: bool = False

    @model_validator(mode="after")
    def _check(self) -> ViTConfig:
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim {self.embed_dim} is not divisible by num_heads {self.num_heads}")
        if self.positions == "sincos" and self.embed_dim % 4:
            raise ValueError(
                f"embed_dim {self.embed_dim} is not divisible by 4, which positions: sincos needs"
            )
        if self.distilled and self.pool == "mean":
            raise ValueError("pool: given 'mean'; a distilled model reads its tokens, allowed: token")
        return self

    def grid(self, image_size: Size) -> Size:
        return grid_of(image_size, self.patch_size)


class ViT(Backbone):
    """Images B C height width → logits, or the `Features` that were wanted."""

    gives = frozenset(NAMES)
    keeps = True
    config: ViTConfig
    pos_embed: Tensor

    def __init__(self, config: ViTConfig, num_classes: int, image_size: int | Size) -> None:
        super().__init__(config, num_classes, image_size)
        self.grid = config.grid(self.image_size)
        self.prefix = 2 if config.distilled else 1
        self._add_embedding()
        self.blocks = nn.ModuleList(self._block(i) for i in range(config.depth))
        self._add_head()
        self._init()

    def _add_embedding(self) -> None:
        config, dim = self.config, self.config.embed_dim
        self.patch_embed = PatchEmbed(config.patch_size, config.in_chans, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        if config.distilled:
            self.dist_token = nn.Parameter(torch.zeros(1, 1, dim))
        if config.mask_token:
            self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        if config.positions == "sincos":
            self.register_buffer("pos_embed", sincos(dim, self.grid, self.prefix))
        else:
            self.pos_embed = nn.Parameter(torch.zeros(1, self.prefix + self.grid[0] * self.grid[1], dim))
        self.pos_drop = SampleDrop(config.dropout, "dropout/embed")

    def _block(self, i: int) -> Block:
        c = self.config
        rate = c.drop_path * i / max(1, c.depth - 1)
        return Block(c.embed_dim, c.num_heads, c.mlp_ratio, str(i), c.init_values, rate, c.dropout)

    def _add_head(self) -> None:
        dim, mean = self.config.embed_dim, self.config.pool == "mean"
        self.norm = nn.Identity() if mean else nn.LayerNorm(dim, eps=1e-6)
        self.fc_norm = nn.LayerNorm(dim, eps=1e-6) if mean else nn.Identity()
        heads = ["head", "head_dist"] if self.config.distilled else ["head"]
        for name in heads:
            self.add_module(name, nn.Linear(dim, self.num_classes) if self.num_classes else nn.Identity())

    def _init(self) -> None:
        init_linears(self, self.config.init)
        if self.config.init == "mae":
            nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))
        for name, value in self.named_parameters():
            if name in TOKENS:
                nn.init.trunc_normal_(value, std=0.02)

    # ------------------------------------------------------------ forward

    def forward(
        self,
        images: Tensor,
        want: Collection[str] = (),
        *,
        keep: Tensor | None = None,
        mask: Tensor | None = None,
        seeds: Tensor | None = None,
    ) -> Tensor | Features:
        """Nothing wanted: logits. `keep` (B K, int64): only these patches go in. `mask` (B N, bool): these
        are replaced by the mask token. `seeds` (B, int64): each sample's randomness in training; without
        them drop path and dropout draw from torch's generator.
        """
        names = wanted(want)
        self._refuse(images, names, keep, mask)
        x = self.pos_drop(self._embed(images, keep, mask), seeds)
        maps: list[Tensor] | None = [] if "attentions" in names else None
        for block in self.blocks:
            x = block(x, seeds, maps)
        return self._read(x, names, maps)

    def _refuse(self, images: Tensor, want: frozenset[str], keep: Tensor | None, mask: Tensor | None) -> None:
        given, made = tuple(images.shape[1:]), (self.config.in_chans, *self.image_size)
        if given != made:
            raise UserError(f"images: given {_times(given)}, the model is made for {_times(made)}")
        if mask is not None and not self.config.mask_token:
            raise UserError("mask: the model has no mask token; build it with mask_token: true")
        if keep is not None and (mask is not None or "pyramid" in want):
            raise UserError(
                "keep: given with a mask or a wanted pyramid, which need every patch; leave one out"
            )
        if "heads" in want and not self.config.distilled:
            raise UserError("want: given 'heads'; this model has one head, a distilled one has two")

    def _embed(self, images: Tensor, keep: Tensor | None, mask: Tensor | None) -> Tensor:
        """B T D with positions added: prefix tokens first, then the patches, all or those kept."""
        patches = self.patch_embed(images, keep)
        if mask is not None:
            patches = torch.where(mask[..., None], self.mask_token.to(patches.dtype), patches)
        places = self.pos_embed[:, self.prefix :]
        if keep is not None:
            places = pick(places.expand(len(images), -1, -1), keep)
        tokens: list[Tensor] = (
            [self.cls_token, self.dist_token] if self.config.distilled else [self.cls_token]
        )
        prefix = torch.cat(tokens, dim=1) + self.pos_embed[:, : self.prefix]
        return torch.cat([prefix.expand(len(images), -1, -1), patches + places], dim=1)

    def _read(self, x: Tensor, want: frozenset[str], maps: list[Tensor] | None) -> Tensor | Features:
        """Last block's output, B T D → logits or features."""
        sources = self._pool(x)
        found: dict[str, Any] = {"attentions": maps}
        if not want or want & {"logits", "heads"}:
            found["heads"] = tuple(
                getattr(self, h)(s) for h, s in zip(("head", "head_dist"), sources, strict=False)
            )
            found["logits"] = sum(found["heads"]) / len(sources)
        if not want:
            logits: Tensor = found["logits"]
            return logits
        if "pooled" in want:
            found["pooled"] = sum(sources[1:], start=sources[0]) / len(sources)
        if want & {"tokens", "prefix", "pyramid"}:
            normed = self.norm(x) if self.config.pool == "token" else self.fc_norm(x)
            found["prefix"], found["tokens"] = normed[:, : self.prefix], normed[:, self.prefix :]
        if "pyramid" in want:
            found["pyramid"] = [found["tokens"].transpose(1, 2).unflatten(2, self.grid)]
        return Features(**{name: found[name] for name in want})

    def _pool(self, x: Tensor) -> list[Tensor]:
        """What the heads read: B D for each head."""
        if self.config.pool == "mean":
            return [self.fc_norm(x[:, self.prefix :].mean(1))]
        return list(self.norm(x[:, : self.prefix]).unbind(1))

    # ------------------------------------------------------------ layer-wise decay

    @property
    def num_layers(self) -> int:
        return self.config.depth + 2

    def layer_of(self, name: str) -> int:
        """0 for everything before the blocks, i + 1 for `blocks.i`, depth + 1 for norm and heads."""
        first, _, rest = name.partition(".")
        if first in TOKENS or first == "patch_embed":
            return 0
        return int(rest.partition(".")[0]) + 1 if first == "blocks" else self.config.depth + 1

    def no_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name in TOKENS}


def init_linears(module: nn.Module, how: Literal["deit", "mae"]) -> None:
    """Every dense layer below: truncated normal (deit) or Xavier uniform (mae), zero biases."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            if how == "mae":
                nn.init.xavier_uniform_(layer.weight)
            else:
                nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)


def _times(shape: tuple[int, ...]) -> str:
    return "×".join(str(side) for side in shape)

"""ViT and DeiT: plain vision transformers.

Papers: Dosovitskiy et al. 2020 (arXiv 2010.11929); Touvron et al. 2020 (2012.12877) for the distillation
token with its own head. Parameter names are timm's: a state dict of timm or of DeiT loads as it is, and
so does the encoder of a checkpoint of MAE (He et al. 2021, 2111.06377).

Departures and choices:
- mean pooling leaves the class token in place and takes the mean over the patches, then `fc_norm` (timm,
  MAE); `tokens` and `prefix` of such a model pass through `fc_norm` as well: they are normed in either case.
- a distilled model's two heads are joined by `combine`: `mean` of the logits (the authors' code) or their
  `sum`; `concat` has one head instead, over both tokens side by side. In training, too; a method that needs
  the two asks for `heads` by name.
- an image of another size than the model was made for gets its positions by bicubic interpolation, as DeiT
  and MAE bring them to another resolution (`resample: plain`); DINO's code stretches them over sides of a
  tenth of a patch more, which `resample: dino` does, here as when weights of another grid are loaded. It
  moved logits by 1e-4 to 2e-3 of the largest (random weights, 4×4 patches to 12×12 and 3×3).
- where only the class token is read, the last block computes no other.
- initialisation `deit`: truncated normal, σ = 0.02, for dense layers, tokens and positions, zero biases,
  torch's own for the patches, as in DeiT's code (timm now starts the class token at σ = 1e-6); `mae`: Xavier
  uniform for dense layers, as in MAE's and in ViT's JAX code, and for patches, as in MAE's (JAX: LeCun
  normal). A head starts as other dense layers do; MAE's fine-tuning has σ = 2e-5, ViT's JAX code zero.
- the ViT paper has one more dense layer before the head in pre-training; it is left out, as in timm.
- `relative: shared` and `block` are BEiT's tables (Bao et al. 2021, 2106.08254), one for all blocks in
  pre-training, one a block in fine-tuning, where each starts as the shared one; `key_bias: false` as there.
  `init: beit` is that of its pre-training code: truncated normal of σ = 0.02 cut at ±σ for everything that
  is not a norm, the last layer of every branch of block i divided by √(2i), a head's weights by another 1000
  (its fine-tuning code does not cut: its head begins at 2e-5, this one at 1.1e-5).
- fixed positions are a buffer that is saved, so weights move between `learned` and `sincos` both ways.

Letters: B samples, N patches, K kept patches, P prefix tokens, T = P + N, D width, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from vitlab.models.features import NAMES, Backbone, BackboneConfig, Features, Size, grid_of
from vitlab.models.parts.relative import EXTRA, RelativeBias, retabled
from vitlab.models.parts.transformer import Block, PatchEmbed, SampleDrop, pick, resample, sincos

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
MORE = {"plain": 0.0, "dino": 0.1}  # patches by which positions are stretched too far


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
    positions: Literal["learned", "sincos", "none"] = "learned"
    resample: Literal["plain", "dino"] = "plain"  # how positions are brought to images of another size
    relative: Literal["none", "shared", "block"] = "none"  # tables of distances that attention adds
    key_bias: bool = True  # keys have a bias, which no softmax sees
    init: Literal["deit", "mae", "beit"] = "deit"
    distilled: bool = False
    combine: Literal["mean", "sum", "concat"] = "mean"  # how a distilled model's two heads become one
    mask_token: bool = False

    @model_validator(mode="after")
    def _check(self) -> ViTConfig:
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim {self.embed_dim} is not divisible by num_heads {self.num_heads}")
        if self.positions == "sincos" and self.embed_dim % 4:
            raise ValueError(
                f"embed_dim {self.embed_dim} is not divisible by 4, which positions: sincos needs"
            )
        if self.distilled and self.relative != "none":
            raise ValueError(
                f"relative: given '{self.relative}'; its tables know one class token, a distilled model "
                "has two; allowed: none"
            )
        if self.distilled and self.pool == "mean":
            raise ValueError("pool: given 'mean'; a distilled model reads its tokens, allowed: token")
        if self.combine != "mean" and not self.distilled:
            raise ValueError(
                f"combine: given '{self.combine}', but there are no two heads; give distilled: true"
            )
        return self

    def grid(self, image_size: Size) -> Size:
        return grid_of(image_size, self.patch_size)


class ViT(Backbone):
    """Images B C height width → logits, or the `Features` that were wanted."""

    keeps = True
    layered = True
    config: ViTConfig
    pos_embed: Tensor | None

    def __init__(self, config: ViTConfig, num_classes: int, image_size: int | Size) -> None:
        super().__init__(config, num_classes, image_size)
        self.grid = config.grid(self.image_size)
        self.prefix = 2 if config.distilled else 1
        self.heads = ["head", "head_dist"] if config.distilled and config.combine != "concat" else ["head"]
        self.gives = frozenset(NAMES) if len(self.heads) == 2 else frozenset(NAMES) - {"heads"}
        self.keeps = config.relative == "none"  # tables are for the whole grid
        self._add_embedding()
        tables = {"none": 0, "shared": 1, "block": config.depth}[config.relative]
        self.rel_pos_bias = nn.ModuleList(RelativeBias(self.grid, config.num_heads) for _ in range(tables))
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
        if config.positions != "learned":
            fixed = config.positions == "sincos"
            self.register_buffer("pos_embed", sincos(dim, self.grid, self.prefix) if fixed else None)
        else:
            self.pos_embed = nn.Parameter(torch.zeros(1, self.prefix + self.grid[0] * self.grid[1], dim))
        self.pos_drop = SampleDrop(config.dropout, "dropout/embed")

    def _block(self, i: int) -> Block:
        c = self.config
        rate = c.drop_path * i / max(1, c.depth - 1)
        drops = (rate, c.dropout)
        return Block(c.embed_dim, c.num_heads, c.mlp_ratio, str(i), c.init_values, *drops, c.key_bias)

    def _add_head(self) -> None:
        dim, mean = self.config.embed_dim, self.config.pool == "mean"
        self.norm = nn.Identity() if mean else nn.LayerNorm(dim, eps=1e-6)
        self.fc_norm = nn.LayerNorm(dim, eps=1e-6) if mean else nn.Identity()
        width = 2 * dim if self.config.combine == "concat" else dim
        for name in self.heads:
            self.add_module(name, nn.Linear(width, self.num_classes) if self.num_classes else nn.Identity())

    def _init(self) -> None:
        init_linears(self, self.config.init)
        patches, cut = self.patch_embed.proj, 0.02 if self.config.init == "beit" else 2.0
        if self.config.init == "mae":
            nn.init.xavier_uniform_(patches.weight.flatten(1))
        for name, value in self.named_parameters():
            if name in TOKENS:
                nn.init.trunc_normal_(value, std=0.02, a=-cut, b=cut)
        if self.config.init == "beit":
            nn.init.trunc_normal_(patches.weight, std=0.02, a=-cut, b=cut)
            self._rescale()

    @torch.no_grad()
    def _rescale(self) -> None:
        """What `init: beit` does beside drawing."""
        self.get_parameter("patch_embed.proj.bias").zero_()
        for i in range(self.config.depth):
            for layer in ("attn.proj", "mlp.fc2"):
                self.get_parameter(f"blocks.{i}.{layer}.weight").div_(math.sqrt(2 * (i + 1)))
        for name in self.heads if self.num_classes else ():
            self.get_parameter(f"{name}.weight").div_(1000)

    # ------------------------------------------------------------ forward

    def compute(
        self,
        images: Tensor,
        want: frozenset[str],
        keep: Tensor | None,
        mask: Tensor | None,
        seeds: Tensor | None,
    ) -> Tensor | Features:
        grid = self.config.grid((images.shape[2], images.shape[3]))
        x = self.pos_drop(self._embed(images, grid, keep, mask), seeds)
        maps: list[Tensor] | None = [] if "attentions" in want else None
        layers: list[Tensor] = []
        alone = self.config.pool == "token" and not want & {"tokens", "pyramid", "attentions", "layers"}
        last, bias = len(self.blocks) - 1, None
        for i, block in enumerate(self.blocks):
            if i < len(self.rel_pos_bias):  # a shared table is read once
                bias = self.rel_pos_bias[i](grid)
            x = self.run(block, x, seeds, maps, self.prefix if alone and i == last else None, bias)
            if "layers" in want:
                layers.append(x[:, self.prefix :].transpose(1, 2).unflatten(2, grid))
        return self._read(x, want, {"attentions": maps and list(maps), "layers": layers}, grid)

    def _embed(self, images: Tensor, grid: Size, keep: Tensor | None, mask: Tensor | None) -> Tensor:
        """B T D with positions added: prefix tokens first, then the patches, all or those kept."""
        patches = self.patch_embed(images, keep)
        if mask is not None:
            patches = torch.where(mask[..., None], self.mask_token.to(patches.dtype), patches)
        tokens: list[Tensor] = (
            [self.cls_token, self.dist_token] if self.config.distilled else [self.cls_token]
        )
        prefix = torch.cat(tokens, dim=1)
        if self.pos_embed is None:
            return torch.cat([prefix.expand(images.shape[0], -1, -1), patches], dim=1)
        places = self._places(self.pos_embed, self.grid, grid)
        if keep is not None:
            places = pick(places.expand(images.shape[0], -1, -1), keep)
        prefix = prefix + self.pos_embed[:, : self.prefix]
        return torch.cat([prefix.expand(images.shape[0], -1, -1), patches + places], dim=1)

    def _read(self, x: Tensor, want: frozenset[str], found: dict[str, Any], grid: Size) -> Tensor | Features:
        """Last block's output, B T D → logits or features."""
        sources = self._pool(x)
        if not want or want & {"logits", "heads"}:
            found["heads"] = tuple(getattr(self, h)(s) for h, s in zip(self.heads, sources, strict=True))
            found["logits"] = self._join(found["heads"])
        if not want:
            logits: Tensor = found["logits"]
            return logits
        if "pooled" in want:
            found["pooled"] = self._join(sources)
        if want & {"tokens", "prefix", "pyramid"}:
            normed = self.norm(x) if self.config.pool == "token" else self.fc_norm(x)
            found["prefix"], found["tokens"] = normed[:, : self.prefix], normed[:, self.prefix :]
        if "pyramid" in want:
            found["pyramid"] = [found["tokens"].transpose(1, 2).unflatten(2, grid)]
        return Features(**{name: found[name] for name in want})

    def _pool(self, x: Tensor) -> list[Tensor]:
        """What the heads read: B D for each head, or B 2·D for the one over both tokens."""
        if self.config.pool == "mean":
            return [self.fc_norm(x[:, self.prefix :].mean(1))]
        tokens = self.norm(x[:, : self.prefix])
        return [tokens.flatten(1)] if self.config.combine == "concat" else list(tokens.unbind(1))

    def _join(self, parts: Sequence[Tensor]) -> Tensor:
        if len(parts) == 1:
            return parts[0]
        return parts[0] + parts[1] if self.config.combine == "sum" else (parts[0] + parts[1]) / 2

    def resized(self, name: str, value: Tensor) -> Tensor | None:
        """Positions or distances of another square grid; those of the prefix tokens stay."""
        if name.startswith("rel_pos_bias."):
            span = math.isqrt(max(0, len(value) - EXTRA))
            if span % 2 == 0 or span**2 + EXTRA != len(value):
                return None
            return retabled(value, ((span + 1) // 2,) * 2, self.grid)
        side = math.isqrt(max(0, value.shape[1] - self.prefix)) if value.ndim == 3 else 0
        if name != "pos_embed" or side == 0 or side**2 + self.prefix != value.shape[1]:
            return None
        patches = self._places(value, (side, side), self.grid)
        return torch.cat([value[:, : self.prefix], patches], dim=1)

    def _places(self, positions: Tensor, old: Size, new: Size) -> Tensor:
        """1 (P + N) D of one grid → 1 N D of another, without the prefix."""
        return resample(positions[:, self.prefix :], old, new, more=MORE[self.config.resample])

    def adapted(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A table that all blocks shared becomes that of every block."""
        state, shared = super().adapted(state), [n for n in state if n.startswith("rel_pos_bias.")]
        if self.config.relative == "block" and shared == ["rel_pos_bias.0.table"]:
            state |= {f"rel_pos_bias.{i}.table": state[shared[0]] for i in range(self.config.depth)}
        return state

    # ------------------------------------------------------------ layer-wise decay

    @property
    def num_layers(self) -> int:
        return self.config.depth + 2

    def layer_of(self, name: str) -> int:
        """0 for everything before the blocks, i + 1 for `blocks.i`, depth + 1 for norm and heads.

        A table goes with its block, one that is shared with the head, as in BEiT's code.
        """
        first, _, rest = name.partition(".")
        if first in TOKENS or first == "patch_embed":
            return 0
        inside = ("blocks", "rel_pos_bias") if self.config.relative == "block" else ("blocks",)
        return int(rest.partition(".")[0]) + 1 if first in inside else self.config.depth + 1

    def no_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name in TOKENS}


def init_linears(module: nn.Module, how: Literal["deit", "mae", "beit"]) -> None:
    """Every dense layer below: truncated normal (beit: at ±σ) or Xavier uniform (mae), zero biases."""
    cut = 0.02 if how == "beit" else 2.0
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            if how == "mae":
                nn.init.xavier_uniform_(layer.weight)
            else:
                nn.init.trunc_normal_(layer.weight, std=0.02, a=-cut, b=cut)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

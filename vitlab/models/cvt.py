"""CvT: a transformer of three stages whose tokens, queries, keys and values come of convolutions.

Paper: Wu et al. 2021 (arXiv 2103.15808). Parameter names, initialisation and order of operations are those
of the authors' code (microsoft/CvT), so their weights load as they are. As there: scores are divided by
√D, not by √(D/H); the class token lives in the last stage and passes by the convolutions; convolutions
start as torch starts them, dense layers from a truncated normal, and the head keeps torch's own biases.

Departures and choices:
- the authors' weights were trained with `activation: quick_gelu`; the port of Hugging Face computes the
  exact GELU with the same weights, which `activation: gelu` is here.
- `drop_path` grows from 0 to its value over the last stage and is 0 in the others, as in the authors'
  settings, whose value is 0.1, for cvt_w24 0.3 (here 0 unless given); each sample draws from its own seed.
- what all their settings have in common is fixed: biases for Q, K and V, 3×3 convolutions before them.
- `positions: learned` adds a table after each stage's patches, with a place for the class token in the last
  (the paper's ablation; `stageN.pos_embed`); images of other sizes get it by bicubic interpolation.
- `pool: mean` is the authors' model without a class token: the mean over the normed patches.
- where only the class token is read, the last block computes no other; nothing that is seen of the model,
  running statistics included, changes by it.
- the last map of `pyramid` is `tokens`, after the final norm; the others are the stages' raw outputs.

Letters: B samples, N patches, P prefix tokens (the class token), T = P + N, F first tokens, D width,
C channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from vitlab.config import UserError
from vitlab.models.features import Backbone, BackboneConfig, Features, Size
from vitlab.models.parts.cvt import Block, ConvEmbed, to_image
from vitlab.models.parts.transformer import resample

PRESETS: dict[str, dict[str, Any]] = {
    "cvt_13": {"embed_dims": (64, 192, 384), "num_heads": (1, 3, 6), "depths": (1, 2, 10)},
    "cvt_21": {"embed_dims": (64, 192, 384), "num_heads": (1, 3, 6), "depths": (1, 4, 16)},
    "cvt_w24": {"embed_dims": (192, 768, 1024), "num_heads": (3, 12, 16), "depths": (2, 2, 20)},
}
STAGES = range(3)

Positive = Annotated[int, Field(gt=0, strict=True)]
Natural = Annotated[int, Field(ge=0, strict=True)]
Projection = Literal["dw_bn", "linear"]
Name = Literal["cvt_13", "cvt_21", "cvt_w24"]


class CvTConfig(BackboneConfig):
    presets = PRESETS

    name: Name
    embed_dims: tuple[Positive, Positive, Positive] = Field(strict=False)
    depths: tuple[Positive, Positive, Positive] = Field(strict=False)
    num_heads: tuple[Positive, Positive, Positive] = Field(strict=False)
    patch_sizes: tuple[Positive, Positive, Positive] = Field((7, 3, 3), strict=False)
    patch_strides: tuple[Positive, Positive, Positive] = Field((4, 2, 2), strict=False)
    patch_padding: tuple[Natural, Natural, Natural] = Field((2, 1, 1), strict=False)
    conv_embed: bool = True  # false: patches do not overlap, patch_strides is also their size
    conv_projection: tuple[Projection, Projection, Projection] = Field(
        ("dw_bn", "dw_bn", "dw_bn"), strict=False
    )
    kv_stride: Literal[1, 2] = 2  # of the convolutions of K and V
    mlp_ratio: float = Field(4.0, gt=0)
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    positions: Literal["none", "learned"] = "none"
    pool: Literal["token", "mean"] = "token"
    drop_path: float = Field(0.0, ge=0, lt=1)  # of the last block; linearly from 0 over the last stage

    @model_validator(mode="after")
    def _check(self) -> CvTConfig:
        for dim, heads in zip(self.embed_dims, self.num_heads, strict=True):
            if dim % heads:
                raise ValueError(f"embed_dims: {dim} is not divisible by its num_heads {heads}")
        return self

    @property
    def batch_norm(self) -> bool:  # type: ignore[override]
        return "dw_bn" in self.conv_projection

    def patches(self, stage: int) -> tuple[int, int, int]:
        """Side, stride and padding of a stage's patches."""
        stride = self.patch_strides[stage]
        if not self.conv_embed:
            return stride, stride, 0
        return self.patch_sizes[stage], stride, self.patch_padding[stage]

    def grids(self, image_size: Size) -> list[Size]:
        """Patches down and across after each stage."""
        found, (height, width) = [], image_size
        for stage in STAGES:
            kernel, stride, padding = self.patches(stage)
            height, width = ((s + 2 * padding - kernel) // stride + 1 for s in (height, width))
            if height < 1 or width < 1:
                given = "×".join(str(side) for side in image_size)
                raise UserError(f"image_size {given}: nothing is left in stage {stage}; give larger images")
            found.append((height, width))
        return found

    def grid(self, image_size: Size) -> Size:
        """Patches down and across of the last stage, whose tokens are the features."""
        return self.grids(image_size)[-1]


class Stage(nn.Module):
    """Patches of an image or of the map before, then blocks."""

    def __init__(self, config: CvTConfig, stage: int, grid: Size) -> None:
        super().__init__()
        dim, depth, last = config.embed_dims[stage], config.depths[stage], stage == STAGES[-1]
        in_chans = config.embed_dims[stage - 1] if stage else config.in_chans
        self.grid, self.prefix = grid, int(last and config.pool == "token")
        self.patch_embed = ConvEmbed(in_chans, dim, *config.patches(stage))
        if self.prefix:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.learned = config.positions == "learned"
        if self.learned:
            self.pos_embed = nn.Parameter(torch.zeros(1, self.prefix + grid[0] * grid[1], dim))
        rate = config.drop_path if last else 0.0
        self.blocks = nn.ModuleList(
            Block(
                dim,
                config.num_heads[stage],
                config.mlp_ratio,
                f"{stage}.{i}",
                convolved=config.conv_projection[stage] == "dw_bn",
                kv_stride=config.kv_stride,
                quick=config.activation == "quick_gelu",
                drop_path=rate * i / max(1, depth - 1),
            )
            for i in range(depth)
        )

    def forward(
        self,
        image: Tensor,
        grid: Size,
        run: Callable[..., Any],
        seeds: Tensor | None,
        maps: list[Tensor] | None,
        first: int | None,
    ) -> Tensor:
        """B C height width, and the grid it will have → B T D, or B F D of the `first` tokens alone."""
        x: Tensor = self.patch_embed(image)
        if self.prefix:
            x = torch.cat([self.cls_token.to(x.dtype).expand(x.shape[0], -1, -1), x], dim=1)
        if self.learned:
            lead, places = self.pos_embed[:, : self.prefix], self.pos_embed[:, self.prefix :]
            x = x + torch.cat([lead, resample(places, self.grid, grid)], dim=1)
        for i, block in enumerate(self.blocks, 1):
            x = run(block, x, grid, seeds, maps, first if i == len(self.blocks) else None)
        return x


class CvT(Backbone):
    """Images B C height width → logits, or the `Features` that were wanted."""

    config: CvTConfig

    def __init__(self, config: CvTConfig, num_classes: int, image_size: int | Size) -> None:
        super().__init__(config, num_classes, image_size)
        self.prefix = int(config.pool == "token")
        if not self.prefix:
            self.gives = self.gives - {"prefix"}
        for i, grid in enumerate(config.grids(self.image_size)):
            self.add_module(f"stage{i}", Stage(config, i, grid))
        dim = config.embed_dims[-1]
        self.norm = nn.LayerNorm(dim, eps=1e-5)
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()
        self._init()

    def _init(self) -> None:
        for name, layer in self.named_modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if name != "head":
                    nn.init.zeros_(layer.bias)
        for name, value in self.named_parameters():
            if name.endswith(("cls_token", "pos_embed")):
                nn.init.trunc_normal_(value, std=0.02)

    def compute(
        self,
        images: Tensor,
        want: frozenset[str],
        keep: Tensor | None,
        mask: Tensor | None,
        seeds: Tensor | None,
    ) -> Tensor | Features:
        maps: list[Tensor] | None = [] if "attentions" in want else None
        alone = self.prefix and not want & {"tokens", "pyramid", "attentions"}
        pyramid, x, image = [], images, images
        grids = self.config.grids((images.shape[2], images.shape[3]))
        for i, grid in enumerate(grids):
            first = 1 if alone and i == STAGES[-1] else None
            x = getattr(self, f"stage{i}")(image, grid, self.run, seeds, maps, first)
            if i < STAGES[-1]:
                image = to_image(x, grid)
                pyramid.append(image)
        return self._read(self.norm(x), want, maps, pyramid, grids[-1])

    def _read(
        self, x: Tensor, want: frozenset[str], maps: list[Tensor] | None, pyramid: list[Tensor], grid: Size
    ) -> Tensor | Features:
        """The last stage's tokens, normed, B T D (of the class token alone, B 1 D) → logits or features."""
        pooled = x[:, 0] if self.prefix else x.mean(1)
        if not want:
            logits: Tensor = self.head(pooled)
            return logits
        found: dict[str, Any] = {"pooled": pooled, "attentions": maps and list(maps)}
        found["prefix"], found["tokens"] = x[:, : self.prefix], x[:, self.prefix :]
        if "logits" in want:
            found["logits"] = self.head(pooled)
        if "pyramid" in want:
            found["pyramid"] = [*pyramid, to_image(found["tokens"], grid)]
        return Features(**{name: found[name] for name in want})

    def resized(self, name: str, value: Tensor) -> Tensor | None:
        """A stage's positions of another square grid; that of the class token stays."""
        owner, _, leaf = name.rpartition(".")
        if leaf != "pos_embed" or self.config.positions != "learned" or value.ndim != 3:
            return None
        stage: Stage = self.get_submodule(owner)  # type: ignore[assignment]
        side = math.isqrt(max(0, value.shape[1] - stage.prefix))
        if side == 0 or side**2 + stage.prefix != value.shape[1]:
            return None
        lead, places = value[:, : stage.prefix], value[:, stage.prefix :]
        return torch.cat([lead, resample(places, (side, side), stage.grid)], dim=1)

    # ------------------------------------------------------------ layer-wise decay

    @property
    def num_layers(self) -> int:
        return sum(self.config.depths) + 2

    def layer_of(self, name: str) -> int:
        """0 for the first patches, then one number a block; later patches go with the block after them."""
        owner, _, rest = name.partition(".")
        if not owner.startswith("stage"):
            return self.num_layers - 1
        stage, parts = int(owner.removeprefix("stage")), rest.split(".")
        if parts[0] == "blocks":
            return sum(self.config.depths[:stage]) + int(parts[1]) + 1
        return sum(self.config.depths[:stage]) + 1 if stage else 0

    def no_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith(("cls_token", "pos_embed"))}

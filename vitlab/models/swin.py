"""Swin: attention in windows that shift from block to block, in stages that merge patches.

Paper: Liu et al. 2021 (arXiv 2103.14030). The mask token is that of SimMIM (Xie et al. 2021, 2111.09886): it
stands for a patch after the patches' norm. Parameter names are timm's, where the merging of patches opens a
stage; index tables and masks are computed, not saved. `layouts/swin.py` reads the authors' own checkpoints.

Choices:
- any size that the patch divides: where a side of a stage is not a multiple of the window, zeros fill it at
  the right and the bottom; an odd side is filled before merging. `padding: official` fills before the shift
  (the authors' detection code, Hugging Face, torchvision), `padding: timm` after it. Without a shift, or
  where the window divides the side, both are the same.
- a side not larger than the window: with `padding: official` the window shrinks to the smaller side and
  does not shift at all (the authors' code, Hugging Face); with `padding: timm` it shrinks to that side and
  does not shift along it. For a square both are the same. The bias table has the size that this gives for
  `image_size`. An image of another size may come in: a window that has to shrink further reads the middle
  of the table.
- the regions of a shifted window are kept apart by adding -100, as the authors do, not -∞. What that leaves
  of a probability, e^-100, is a subnormal number, and products of those take most of a CPU's time in a
  shifted block: below 1.2e-38 it counts as zero, which no sum notices.
- drop path grows linearly over the blocks of all stages, the first has none. It is 0 unless asked for; the
  authors' code has 0.1, and 0.2 to 0.5 for their models of ImageNet-1K.
- absolute positions, patches without a norm and another scale of the scores, options of the authors' code
  that none of their models uses, are left out.
- an image not divisible by the patch is refused; the authors' detection code pads it.
- initialisation is the authors': truncated normal, σ = 0.02, for dense layers and tables, torch's own for the
  patches; norms have ε = 1e-5.

Letters: B samples, N tokens, D width, W windows, T slots of a window, M = W·T, H heads, C channels.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from vitlab.models.features import Backbone, BackboneConfig, Features, Size, grid_of
from vitlab.models.parts.swin import Block, Patches, PatchMerging
from vitlab.models.parts.windows import (
    Padding,
    Stage,
    merged,
    move,
    plan,
    settings,
    shifts,
    shrunk,
    slots_grid,
)

PRESETS: dict[str, dict[str, Any]] = {
    "swin_tiny": {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)},
    "swin_small": {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)},
    "swin_base": {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)},
    "swin_large": {"embed_dim": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48)},
}
Name = Literal["swin_tiny", "swin_small", "swin_base", "swin_large"]
Count = Annotated[int, Field(gt=0, strict=True)]
TABLE = "relative_position_bias_table"


class SwinConfig(BackboneConfig):
    presets = PRESETS

    name: Name
    patch_size: int = Field(4, gt=0)
    embed_dim: int = Field(gt=0)  # of the first stage; doubled by each merging
    depths: tuple[Count, ...] = Field(min_length=1, strict=False)  # blocks a stage
    num_heads: tuple[Count, ...] = Field(min_length=1, strict=False)  # a stage
    window_size: int = Field(7, gt=0)
    mlp_ratio: float = Field(4.0, gt=0)
    qkv_bias: bool = True
    drop_path: float = Field(0.0, ge=0, lt=1)  # of the last block; linearly from 0 at the first
    padding: Padding = "official"
    mask_token: bool = False

    @model_validator(mode="after")
    def _check(self) -> SwinConfig:
        if len(self.num_heads) != len(self.depths):
            raise ValueError(
                f"num_heads: given {len(self.num_heads)} numbers; expected {len(self.depths)}, as in depths"
            )
        for i, heads in enumerate(self.num_heads):
            if (self.embed_dim << i) % heads:
                raise ValueError(
                    f"num_heads: given {heads} for stage {i}; its width {self.embed_dim << i} "
                    "is not divisible by that"
                )
        return self

    def grid(self, image_size: Size) -> Size:
        return grid_of(image_size, self.patch_size)


class SwinStage(nn.Module):
    """Merging (not in the first stage) and blocks; `Swin` calls them."""

    def __init__(self, config: SwinConfig, stage: int, window: Size) -> None:
        super().__init__()
        dim, before = config.embed_dim << stage, sum(config.depths[:stage])
        self.downsample = PatchMerging(dim // 2) if stage else nn.Identity()
        rates = [config.drop_path * i / max(1, sum(config.depths) - 1) for i in range(sum(config.depths))]
        self.blocks = nn.ModuleList(
            Block(dim, config.num_heads[stage], window, config.mlp_ratio, config.qkv_bias, rates[i], str(i))
            for i in range(before, before + config.depths[stage])
        )


class Head(nn.Module):
    """The classifier under timm's name."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(dim, num_classes) if num_classes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(x)
        return out


class Swin(Backbone):
    """Images B C height width → logits, or the `Features` that were wanted.

    `tokens` are those of the last stage after the norm, row by row; there are no prefix tokens. `pyramid` has
    the output of every stage before the next one merges it, the last one after the norm. `attentions` has
    one B W H T T a block, windows and slots as that block's shift and padding laid them. `mask` counts the
    patches of the image, row by row.
    """

    config: SwinConfig

    def __init__(self, config: SwinConfig, num_classes: int, image_size: int | Size) -> None:
        super().__init__(config, num_classes, image_size)
        windows = self._windows()
        self.settings = settings(windows, config.depths, config.padding)
        dim = config.embed_dim
        self.patch_embed = Patches(config.patch_size, config.in_chans, dim)
        if config.mask_token:
            self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.layers = nn.ModuleList(SwinStage(config, i, window) for i, window in enumerate(windows))
        self.norm = nn.LayerNorm(dim << (len(config.depths) - 1))
        self.head = Head(dim << (len(config.depths) - 1), num_classes)
        self._init()

    def _windows(self) -> tuple[Size, ...]:
        """The windows of the stages' bias tables: those of an image of `image_size`."""
        grid, window = self.config.grid(self.image_size), (self.config.window_size,) * 2
        found = []
        for _ in self.config.depths:
            found.append(shrunk(grid, window, self.config.padding))
            grid = merged(grid)
        return tuple(found)

    def same_in_timm(self) -> bool:
        """Whether timm's model of these sizes has the same windows for an image of `image_size`."""
        grid, full = self.config.grid(self.image_size), (self.config.window_size,) * 2
        how: Padding = self.config.padding
        for depth in self.config.depths:
            window, shift = shrunk(grid, full, how), shifts(grid, full, how)
            if window != shrunk(grid, full, "timm"):
                return False
            padded = how == "official" and slots_grid(grid, window) != grid
            if depth > 1 and (shift != shifts(grid, full, "timm") or (any(shift) and padded)):
                return False
            grid = merged(grid)
        return True

    def _init(self) -> None:
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        for name, value in self.named_parameters():
            if name.endswith(TABLE) or name == "mask_token":
                nn.init.trunc_normal_(value, std=0.02)

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
        stages = plan(f"{grid[0]} {grid[1]}", self.settings, str(images.device))
        maps: list[Tensor] | None = [] if "attentions" in want else None
        levels: list[Tensor] | None = [] if "pyramid" in want else None
        x = self._embed(images, mask, stages[0].enter.there)
        for layer, stage in zip(self.layers, stages, strict=True):
            x = self._stage(layer, x, stage, seeds, maps)
            if levels is not None and stage is not stages[-1]:
                levels.append(_rows(x, stage))
        return self._read(x, want, stages[-1], maps, levels)

    def _embed(self, images: Tensor, mask: Tensor | None, order: Tensor) -> Tensor:
        """B N D, in the order of the first block's windows."""
        x: Tensor = self.patch_embed(images, order)
        if mask is None:
            return x
        return torch.where(mask[:, order, None], self.mask_token.to(x.dtype), x)

    def _stage(
        self, layer: Any, x: Tensor, stage: Stage, seeds: Tensor | None, maps: list[Tensor] | None
    ) -> Tensor:
        if not isinstance(layer.downsample, nn.Identity):
            x = layer.downsample(x, stage.enter)
        for i, block in enumerate(layer.blocks):
            if i and stage.turn is not None:
                x = move(x, stage.turn[(i + 1) % 2])
            x = self.run(block, x, stage.orders[i % 2], seeds, maps)
        return x

    def _read(
        self,
        x: Tensor,
        want: frozenset[str],
        stage: Stage,
        maps: list[Tensor] | None,
        levels: list[Tensor] | None,
    ) -> Tensor | Features:
        """Last block's output, B N D → logits or features."""
        x = self.norm(x)
        pooled = x.mean(1)
        if not want:
            logits: Tensor = self.head(pooled)
            return logits
        found: dict[str, Any] = {"attentions": maps, "pooled": pooled, "prefix": x[:, :0]}
        if "logits" in want:
            found["logits"] = self.head(pooled)
        if "tokens" in want:
            found["tokens"] = move(x, stage.leave)
        if levels is not None:
            found["pyramid"] = [*levels, _rows(x, stage)]
        return Features(**{name: found[name] for name in want})

    # ------------------------------------------------------------ tables of other windows

    def resized(self, name: str, value: Tensor) -> Tensor | None:
        """A bias table for another window, bicubic over its two distances, as in the authors' code.

        The table given is that of a square window.
        """
        if not name.endswith(TABLE):
            return None
        attention = self.get_submodule(name.rpartition(".")[0])
        height, width = (2 * side - 1 for side in attention.window)  # type: ignore[union-attr]
        side = round(len(value) ** 0.5)
        if value.ndim != 2 or side * side != len(value):
            return None
        table = value.T.reshape(1, -1, side, side).float()
        found = F.interpolate(table, size=(height, width), mode="bicubic", align_corners=False)
        return found.flatten(2)[0].T.to(value.dtype).contiguous()

    # ------------------------------------------------------------ layer-wise decay

    @property
    def num_layers(self) -> int:
        return sum(self.config.depths) + 2

    def layer_of(self, name: str) -> int:
        """0 for the patches and the mask token, one number a block; merging goes with the block after it."""
        first, *rest = name.split(".")
        if first in ("patch_embed", "mask_token"):
            return 0
        if first != "layers":
            return self.num_layers - 1
        number = int(rest[2]) if rest[1] == "blocks" else 0
        return sum(self.config.depths[: int(rest[0])]) + number + 1

    def no_decay(self) -> set[str]:
        names = (name for name, _ in self.named_parameters())
        return {name for name in names if name.endswith(TABLE) or name == "mask_token"}


def _rows(x: Tensor, stage: Stage) -> Tensor:
    """B N D in a stage's last order → B D height width."""
    return move(x, stage.leave).transpose(1, 2).view(len(x), x.shape[-1], *stage.grid)

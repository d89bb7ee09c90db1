"""CoAtNet: convolution in the early stages, attention with a relative bias in the late ones.

Paper: Dai et al. 2021 (arXiv 2106.04803). Names, sizes and numbers are those of timm's `coatnet_0_224` …
`coatnet_4_224`; the convolutions are in `parts/coatnet.py`.

Where timm departs from the paper, `downsample` decides: `timm` pools by means and takes the stride in the
depth-wise convolution; `paper` pools by maxima and takes it in the 1×1 convolution before.

Other choices, as in timm where nothing else is said:
- MBConv expands to 4 times its output's width, squeezes to a quarter of that width; the stem's last
  convolution has neither norm nor activation, because the first block begins with a norm.
- the head is mean pooling, LayerNorm, a dense layer with tanh, the classifier: the paper does not mention
  the dense layer, but its parameter counts are met only with it. `pooled` is what the classifier reads;
  `tokens` are the last map through the head's norm.
- initialisation: convolutions normal, σ² = 2 / fan out; dense layers of transformer blocks Xavier uniform,
  biases of their MLP σ = 1e-6; bias tables truncated normal, σ = 0.02; the head torch's own.
- an odd side is pooled with a window cut off at the edge, so that any image size works; timm's fail there.
- an image of another size than the model was made for gets its tables by bicubic interpolation.
- `relative: absolute` keeps the tables, but every key place gets the mean of 2×2 entries, whoever asks: all
  parameters are trained, none knows a distance. `none` has no tables.

Letters: B samples, C channels, Y and X sides of a map, N = Y·X, D width, H heads.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from vitlab.config import UserError
from vitlab.models.features import Backbone, BackboneConfig, Features, Size
from vitlab.models.parts.coatnet import (
    HEAD_WIDTH,
    Downsample,
    Head,
    MBConv,
    Place,
    Places,
    Relative,
    Stem,
    Transformer,
    named,
    shrunk,
    stretched,
)

PRESETS: dict[str, dict[str, Any]] = {
    "coatnet_0": {"stem_width": 64, "dims": (96, 192, 384, 768), "depths": (2, 3, 5, 2)},
    "coatnet_1": {"stem_width": 64, "dims": (96, 192, 384, 768), "depths": (2, 6, 14, 2)},
    "coatnet_2": {"stem_width": 128, "dims": (128, 256, 512, 1024), "depths": (2, 6, 14, 2)},
    "coatnet_3": {"stem_width": 192, "dims": (192, 384, 768, 1536), "depths": (2, 6, 14, 2)},
    "coatnet_4": {"stem_width": 192, "dims": (192, 384, 768, 1536), "depths": (2, 12, 28, 2)},
}
Name = Literal["coatnet_0", "coatnet_1", "coatnet_2", "coatnet_3", "coatnet_4"]
Four = tuple[int, int, int, int]

TABLE = "relative_position_bias_table"


class CoAtNetConfig(BackboneConfig):
    presets = PRESETS
    batch_norm = True

    name: Name
    stem_width: int = Field(gt=0)
    dims: Four = Field(strict=False)  # widths of the four stages
    depths: Four = Field(strict=False)  # blocks in each
    layout: Literal["C-C-C-C", "C-C-C-T", "C-C-T-T", "C-T-T-T", "T-T-T-T"] = "C-C-T-T"
    relative: Relative = "bias"
    downsample: Downsample = "timm"
    drop_path: float = Field(0.0, ge=0, lt=1)  # of the last block; linearly from 0 at the first

    @model_validator(mode="after")
    def _check(self) -> CoAtNetConfig:
        for key, given, unit in (("depths", self.depths, 1), ("dims", self.dims, 8)):
            if any(number <= 0 or number % unit for number in given):
                kind = f"multiples of {unit}" if unit > 1 else "numbers"
                raise ValueError(f"{key}: given {list(given)}; allowed: four {kind} above 0")
        for dim, kind in zip(self.dims, self.kinds, strict=True):
            if kind == "T" and dim % HEAD_WIDTH:
                raise ValueError(
                    f"dims: given {dim} for a stage of attention, which is not divisible by {HEAD_WIDTH}"
                )
        return self

    @property
    def kinds(self) -> list[str]:
        """C or T for each stage."""
        return self.layout.split("-")

    def grid(self, image_size: Size) -> Size:
        for side in image_size:
            if side <= 0:
                raise UserError(f"image_size: given {side}; allowed: 1 or more")
        return shrunk(image_size, 32)


class CoAtNet(Backbone):
    """Images B C height width → logits, or the `Features` that were wanted."""

    heads = ("head.fc",)
    config: CoAtNetConfig

    def __init__(self, config: CoAtNetConfig, num_classes: int, image_size: int | Size) -> None:
        super().__init__(config, num_classes, image_size)
        self.stem = Stem(config.in_chans, config.stem_width)
        self.stages = nn.Sequential(*(self._stage(i) for i in range(4)))
        self.head = Head(config.dims[-1], num_classes)
        for part in (self.stem, *(block for stage in self._stages() for block in stage)):
            _init(part)

    def _stage(self, i: int) -> nn.Module:
        c, window = self.config, shrunk(self.image_size, 4 * 2**i)
        before, last = sum(c.depths[:i]), max(1, sum(c.depths) - 1)
        blocks: list[nn.Module] = []
        for j in range(c.depths[i]):
            place = Place(f"{i}.{j}", 2 if j == 0 else 1, window, c.drop_path * (before + j) / last)
            dim = (c.stem_width, *c.dims)[i] if j == 0 else c.dims[i]
            if c.kinds[i] == "C":
                blocks.append(MBConv(dim, c.dims[i], place, c.downsample))
            else:
                blocks.append(Transformer(dim, c.dims[i], place, c.downsample, c.relative))
        return named(blocks=nn.Sequential(*blocks))

    def _stages(self) -> list[list[nn.Module]]:
        """The blocks of each stage."""
        return [list(stage.get_submodule("blocks").children()) for stage in self.stages]

    def compute(
        self,
        images: Tensor,
        want: frozenset[str],
        keep: Tensor | None,
        mask: Tensor | None,
        seeds: Tensor | None,
    ) -> Tensor | Features:
        x, pyramid, attentions = self.stem(images), [], []
        for stage in self._stages():
            for block in stage:
                if isinstance(block, MBConv):
                    x = self.run(block, x, seeds)
                else:
                    x, found = self.run(block, x, seeds, "attentions" in want)
                    attentions.append(found)
            pyramid.append(x)
        return self._read(x, want, {"pyramid": pyramid, "attentions": attentions})

    def _read(self, x: Tensor, want: frozenset[str], found: dict[str, Any]) -> Tensor | Features:
        """Last map, B D Y X → logits or features."""
        if not want or want & {"logits", "pooled"}:
            found["pooled"], found["logits"] = self.head(x)
        if not want:
            logits: Tensor = found["logits"]
            return logits
        if "tokens" in want:
            found["tokens"] = self.head.norm(x.flatten(2).transpose(1, 2))
        if "prefix" in want:
            found["prefix"] = x.new_zeros(x.shape[0], 0, x.shape[1])
        return Features(**{name: found[name] for name in want})

    def resized(self, name: str, value: Tensor) -> Tensor | None:
        """A bias table of another square image."""
        if not name.endswith(TABLE) or value.ndim != 2:
            return None
        side = math.isqrt(len(value))
        if side % 2 == 0 or side**2 != len(value):
            return None
        old, places = (side + 1) // 2, self.get_submodule(name.removesuffix("." + TABLE))
        assert isinstance(places, Places)
        return stretched(value.T, (old, old), places.window).flatten(1).T

    @property
    def num_layers(self) -> int:
        return sum(self.config.depths) + 2

    def layer_of(self, name: str) -> int:
        """0 for the stem, i + 1 for block i counted over all stages, the last for the head."""
        first, *rest = name.split(".")
        if first != "stages":
            return 0 if first == "stem" else self.num_layers - 1
        return sum(self.config.depths[: int(rest[0])]) + int(rest[2]) + 1

    def no_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith(TABLE)}


def _init(part: nn.Module) -> None:
    """timm's start of the convolutions of the stem or of a block."""
    for name, layer in part.named_modules():
        if not isinstance(layer, nn.Conv2d):
            continue
        if isinstance(part, Transformer):
            nn.init.xavier_uniform_(layer.weight)
        else:
            fan = math.prod(layer.kernel_size) * layer.out_channels // layer.groups
            nn.init.normal_(layer.weight, std=math.sqrt(2 / fan))
        if layer.bias is not None:
            nn.init.normal_(layer.bias, std=1e-6 if name.startswith("mlp") else 0.0)

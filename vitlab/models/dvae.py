"""Discrete VAE: an encoder that names every part of an image by one of V codes, a decoder that paints them.

Paper: Ramesh et al. 2021 (arXiv 2102.12092), appendix A; names, sizes and the start are those of
openai/DALL-E: its two state dicts, each name behind `encoder.` or `decoder.`, load as they are. Bottleneck
blocks whose path is scaled by 1/(number of blocks)²; maxima between the encoder's groups, nearest
neighbours between the decoder's; each halving of the side doubles the width. Weights start as a normal
of σ = 1/√(inputs of a sum), biases as zero. It is trained by `vitlab.methods.dvae`.

It is a tokenizer and no classifier: the one stage that trains it is `tokenizer`, and a method that learns
from codes is handed the trained model. What it gives:

- `tokens`: the codes' logits, B N V, row by row; a part's code is the largest one's number.
- `pyramid`: the same as one map, B V h w; `pooled`: their mean, B V, which stands for logits too.

Departures:
- it takes normalised images, as every model here, and turns them back into pixels 0..1 before they are
  mapped to ε..1-ε. The mean and spread for that are buffers, told before training (`normalised`), so that a
  saved model needs nothing beside it. OpenAI's weights have no such buffers: those of the model stay.
- the number of groups is free, so that small images keep some parts: a code stands for 2^(groups-1) pixels
  down and across.
- mixed precision is bfloat16; the two convolutions at the codes are float32 there, as in the official code.

Letters: B samples, N parts (h·w), V codes, C channels, h w the grid of codes.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from vitlab.config import UserError
from vitlab.models.features import Backbone, BackboneConfig, Features, Size
from vitlab.models.parts.dvae import Decoder, Encoder, map_pixels

PRESETS: dict[str, dict[str, Any]] = {"dvae": {}}


class DVAEConfig(BackboneConfig):
    presets = PRESETS

    name: Literal["dvae"]
    vocab: int = Field(8192, gt=1)
    groups: int = Field(4, gt=0)
    blocks: int = Field(2, gt=0)  # of a group
    n_hid: int = Field(256, gt=0, multiple_of=4)  # width of the groups at full size
    n_init: int = Field(128, gt=0)  # width at which the decoder begins
    num_classes: int | None = Field(None, ge=0, le=0)

    @property
    def reduce(self) -> int:
        """The side in pixels of what a code stands for."""
        return 1 << (self.groups - 1)

    def grid(self, image_size: Size) -> Size:
        for side in image_size:
            if side <= 0 or side % self.reduce:
                low = max(1, side // self.reduce) * self.reduce
                raise UserError(
                    f"image_size {side} is not divisible by {self.reduce}, the side in pixels of a code with "
                    f"groups {self.groups}; nearest: {low} or {low + self.reduce}"
                )
        return image_size[0] // self.reduce, image_size[1] // self.reduce


class DVAE(Backbone):
    """Images B C height width → logits of codes, among the `Features` that were wanted."""

    gives = frozenset({"tokens", "pooled", "pyramid", "logits"})
    heads = ()
    config: DVAEConfig
    mean: Tensor
    std: Tensor

    def __init__(self, config: DVAEConfig, num_classes: int, image_size: int | Size) -> None:
        if num_classes:
            raise UserError(f"dvae: names codes, not classes; given num_classes {num_classes}, allowed: 0")
        super().__init__(config, num_classes, image_size)
        sizes = (config.in_chans, config.n_hid, config.groups, config.blocks, config.vocab)
        self.encoder, self.decoder = Encoder(*sizes), Decoder(*sizes, config.n_init)
        for name in ("mean", "std"):
            self.register_buffer(name, torch.full((config.in_chans, 1, 1), 0.5))

    def normalised(self, mean: Tensor, std: Tensor) -> None:
        self.mean.copy_(mean.view_as(self.mean))
        self.std.copy_(std.view_as(self.std))

    def pixels(self, images: Tensor) -> Tensor:
        """Normalised images → values in 0..1."""
        return images * self.std + self.mean

    def normal(self, pixels: Tensor) -> Tensor:
        """Values in 0..1 → normalised images."""
        return (pixels - self.mean) / self.std

    def compute(
        self,
        images: Tensor,
        want: frozenset[str],
        keep: Tensor | None,
        mask: Tensor | None,
        seeds: Tensor | None,
    ) -> Tensor | Features:
        self.config.grid((images.shape[2], images.shape[3]))
        codes = self.encoder(map_pixels(self.pixels(images)), self.run)
        if not want:
            pooled: Tensor = codes.mean((2, 3))
            return pooled
        found: dict[str, Any] = {"pyramid": [codes]}
        if want & {"pooled", "logits"}:
            found["pooled"] = found["logits"] = codes.mean((2, 3))
        if "tokens" in want:
            found["tokens"] = codes.flatten(2).transpose(1, 2)
        return Features(**{name: found[name] for name in want})

    def decode(self, codes: Tensor, grid: Size) -> tuple[Tensor, Tensor]:
        """B N V, each part's weights of the codes → μ and ln b of every pixel's logit, B C height width."""
        painted: Tensor = self.decoder(codes.transpose(1, 2).reshape(len(codes), -1, *grid), self.run)
        location, scale = painted.chunk(2, dim=1)
        return location, scale

    @property
    def num_layers(self) -> int:
        """Of either half: the input, each block, the output; codes are where the halves meet."""
        return 2 * (self.config.groups * self.config.blocks + 2)

    def layer_of(self, name: str) -> int:
        half, _, part, *inside = name.split(".")
        each = self.config.groups * self.config.blocks
        if part == "input":
            layer = 0
        elif part == "output":
            layer = each + 1
        else:
            group, block = int(part.removeprefix("group_")), int(inside[0].removeprefix("block_"))
            layer = (group - 1) * self.config.blocks + block
        return layer + (each + 2 if half == "decoder" else 0)

    def no_decay(self) -> set[str]:
        return set()

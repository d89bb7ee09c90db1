"""SimMIM: masked patches go in as one learned token, and a single linear layer paints their pixels.

Paper: Xie et al. 2021 (arXiv 2111.09886), with the conventions of the authors' code: units of `mask_patch`
pixels are hidden, ⌈units · mask_ratio⌉ of them in every image, whatever the model's own patch; the last map
of the model, after its norm, is turned into pixels by a 1×1 convolution and a pixel shuffle, both as torch
starts them; the loss is the L1 distance to the plain (normalised) image over hidden pixels and channels.

Departures: a sample's noise comes from its own seed; the 1e-5 that their code adds to the number of hidden
pixels, which is never zero and swallows it, is left out; so are targets normalised over a sliding window,
which their code got later. Weight decay spares what theirs does in effect: positions, the class token,
Swin's mask token (their list names Swin's bias tables too, by a prefix that none of them has). Their ViT is
`relative: shared`, `positions: none`, `init_values: 0.1`, `key_bias: false`, `init: beit`.

Letters: B samples, N tokens, U units, C channels, s stride of the last map.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn

from vitlab.batch import Batch, uniform
from vitlab.config import Config, UserError
from vitlab.methods.base import Losses, Method, full, visible_at_most
from vitlab.methods.mae import Picture
from vitlab.models import Backbone, CompactConfig, SwinConfig, ViTConfig

UNITS = 6  # a side, about: 32 of the authors' 192 pixels, and of their 224


class SimMIMConfig(Config):
    name: Literal["simmim"] = "simmim"
    mask_ratio: float = Field(0.6, gt=0, lt=1)
    mask_patch: int | None = Field(None, gt=0)  # pixels; null: what fits best into a sixth of the side


class SimMIM(Method):
    headless = True
    takes = (ViTConfig, SwinConfig, CompactConfig)

    def __init__(self, config: SimMIMConfig, model: Backbone, image_size: int) -> None:
        super().__init__()
        self.config, self.model, self.image_size = config, model, image_size
        self.grid: int = model.config.grid(model.image_size)[0]  # tokens a side, as the model's mask has them
        self.units = image_size // (config.mask_patch or _unit(image_size, self.grid))  # a side
        self.hidden = math.ceil(self.units**2 * config.mask_ratio)
        merges, chans = _merges(model.config), model.config.in_chans
        width, stride = model.config.embed_dim << merges, image_size // self.grid << merges
        self.decoder = nn.Sequential(nn.Conv2d(width, stride**2 * chans, 1), nn.PixelShuffle(stride))
        for name, parameter in model.named_parameters():
            if "attention_pool" in name:  # no gradient reaches it, and decay alone must not shrink it
                parameter.requires_grad_(False)

    @classmethod
    def problems(cls, name: str, config: SimMIMConfig, model: Any, side: int) -> Iterator[str]:
        yield from super().problems(name, config, model, side)
        if not isinstance(model, cls.takes):
            return
        if not model.mask_token:
            yield f"{name}.model.mask_token: given false; simmim hides patches behind it, allowed: true"
        try:
            grid = model.grid((side, side))[0]
        except UserError:
            return  # told of the model
        if side % grid or grid % (1 << _merges(model)):
            yield (
                f"{name}.model.name: given {model.name!r}, whose strides do not divide {side} pixels evenly; "
                "simmim paints whole patches, give a data.image_size that they all divide"
            )
        elif config.mask_patch is not None and config.mask_patch not in _fitting(side, grid):
            allowed = ", ".join(str(unit) for unit in _fitting(side, grid))
            yield (
                f"{name}.method.mask_patch: given {config.mask_patch}; it must be a multiple of the model's "
                f"{side // grid} pixels and divide {side}, allowed: {allowed}"
            )
        else:
            units = (side // (config.mask_patch or _unit(side, grid))) ** 2
            if math.ceil(units * config.mask_ratio) == units:
                most = f"at most {visible_at_most(units)}" if units > 1 else "none"
                yield (
                    f"{name}.method.mask_ratio: given {config.mask_ratio}, which leaves nothing of {units} "
                    f"units visible; allowed: {most}, or a smaller {name}.method.mask_patch"
                )

    def losses(self, batch: Batch) -> Losses:
        """For each sample the mean over its hidden pixels, all of the same number."""
        hidden = self._hide(batch)
        error = (self._paint(batch, hidden) - full(batch.views[0])).abs().mean(1)  # B side side
        shown = self._pixels(hidden)[:, 0].to(error.dtype)
        loss = (error * shown).sum((1, 2)) / (self.hidden * (self.image_size // self.units) ** 2)
        return Losses((loss * batch.weight).sum(), {})

    def picture(self, batch: Batch) -> Picture:
        units, original = self._hide(batch), batch.views[0]
        hidden, painted = self._pixels(units), self._paint(batch, units).detach().to(original.dtype)
        return Picture(original, original.masked_fill(hidden, 0.0), painted.where(hidden, original))

    def _hide(self, batch: Batch) -> Tensor:
        """B U U, true where a unit is hidden: those whose noise is least."""
        noise = uniform(batch.seeds, "mask", self.units**2)
        rank = noise.argsort(dim=1, stable=True).argsort(dim=1, stable=True)
        return (rank < self.hidden).view(-1, self.units, self.units)

    def _paint(self, batch: Batch, units: Tensor) -> Tensor:
        """The whole image as the decoder sees it, B C side side."""
        mask = _blown(units, self.grid // self.units).flatten(1)
        maps = self.model(batch.views[0], {"pyramid"}, mask=mask, seeds=batch.seeds).pyramid
        painted: Tensor = self.decoder(maps[-1])
        return full(painted)

    def _pixels(self, units: Tensor) -> Tensor:
        """B U U → B 1 side side."""
        return _blown(units, self.image_size // self.units)[:, None]

    def no_decay(self) -> set[str]:
        """What the authors' code spares in effect: a ViT's mask token decays, Swin's does not."""
        spared = {"cls_token", "pos_embed", "classifier.class_emb", "classifier.positional_emb"}
        if isinstance(self.model.config, SwinConfig):
            spared = {"mask_token"}
        return {f"model.{name}" for name in self.model.no_decay() & spared}

    def export(self) -> Backbone:
        return self.model


def _blown(units: Tensor, times: int) -> Tensor:
    """B U U → B U·times U·times."""
    return units.repeat_interleave(times, 1).repeat_interleave(times, 2)


def _fitting(side: int, grid: int) -> list[int]:
    """Units in pixels: whole tokens, whole units an image."""
    token = side // grid
    return [unit for unit in range(token, side + 1, token) if side % unit == 0]


def _unit(side: int, grid: int) -> int:
    return min(_fitting(side, grid), key=lambda unit: abs(unit - side / UNITS))


def _merges(model: Any) -> int:
    """How often the sides of the maps are halved behind the patches: Swin does between its stages."""
    return len(model.depths) - 1 if isinstance(model, SwinConfig) else 0

"""Augmentation: what one sample's own random numbers do to its image.

The parameters of all operations come from `vitlab.batch.uniform`, from the sample's seed and the
view's name, for a whole batch in one call. No generator of any process is read, seeded or forked:
the images do not depend on who loads them or in which order, and drawing them costs next to nothing.
The pictures themselves are torchvision's (`transforms.v2.functional`), on uint8 tensors C H W.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from vitlab.batch import View, uniform
from vitlab.config import Config

Transform = Callable[[Sequence[Tensor], Tensor], Tensor]  # images (each C H W) and seeds (B) → B C H W
RATIO = math.log(4 / 3)  # a crop's sides differ by at most this, as in Inception (Szegedy et al., 2015)
NUMBERS = 9  # random numbers a sample and view has: 4 for the crop, 2 shift, 1 each flip, rotate, scale

Range = Annotated[list[float], Field(min_length=2, max_length=2)]


class AugmentConfig(Config):
    """What happens to training images, in this order. Without anything: resize and centre crop."""

    crop_scale: Range | None = None  # area of a random crop, from and to, as fractions of the image
    pad: int = Field(default=0, ge=0)  # shift by up to so many pixels, zeros move in
    flip: bool = False  # left and right, every second time
    rotate: float = Field(default=0.0, ge=0, le=180)  # by up to so many degrees either way
    zoom: float = Field(default=0.0, ge=0, lt=1)  # larger or smaller by up to this fraction

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.crop_scale is not None and not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(
                f"crop_scale: given {self.crop_scale}; allowed: [low, high] with 0 < low <= high <= 1"
            )
        return self


def train_transform(config: AugmentConfig, view: View) -> Transform:
    """Images of any size and their seeds → the augmented view of each."""

    def transform(images: Sequence[Tensor], seeds: Tensor) -> Tensor:
        numbers = uniform(seeds, f"augment/{view.name}", NUMBERS).tolist()
        return torch.stack(
            [_augment(image, u, config, view.size) for image, u in zip(images, numbers, strict=True)]
        )

    return transform


def eval_transform(size: int) -> Transform:
    """Shorter side to `size`, then the centre; an image of that size passes unchanged."""

    def transform(images: Sequence[Tensor], seeds: Tensor) -> Tensor:
        return torch.stack([fit(image, size) for image in images])

    return transform


def fit(image: Tensor, size: int) -> Tensor:
    """C H W → C size size, without any chance in it."""
    from torchvision.transforms.v2 import functional as F

    if image.shape[-2:] == (size, size):
        return image
    fitted: Tensor = F.center_crop(F.resize(image, [size], antialias=True), [size, size])
    return fitted


def _augment(image: Tensor, u: Sequence[float], config: AugmentConfig, size: int) -> Tensor:
    image = fit(image, size) if config.crop_scale is None else _crop(image, u[:4], config.crop_scale, size)
    if config.pad:
        image = _shift(image, u[4], u[5], config.pad)
    if config.flip and u[6] < 0.5:
        image = image.flip(-1)
    if config.rotate or config.zoom:
        image = _turn(image, config.rotate * (2 * u[7] - 1), (1 + config.zoom) ** (2 * u[8] - 1))
    return image


def _crop(image: Tensor, u: Sequence[float], scale: Sequence[float], size: int) -> Tensor:
    """A random part of the image, its area and shape at random, scaled to the view's size."""
    from torchvision.transforms.v2 import functional as F

    height, width = image.shape[-2:]
    area = height * width * (scale[0] + (scale[1] - scale[0]) * u[0])
    ratio = math.exp(RATIO * (2 * u[1] - 1))
    h = min(height, max(1, round(math.sqrt(area / ratio))))
    w = min(width, max(1, round(math.sqrt(area * ratio))))
    top, left = int(u[2] * (height - h + 1)), int(u[3] * (width - w + 1))
    part: Tensor = F.resized_crop(image, top, left, h, w, [size, size], antialias=True)
    return part


def _shift(image: Tensor, u: float, v: float, pad: int) -> Tensor:
    """The crop at a random place of the image with `pad` zeros on every side."""
    height, width = image.shape[-2:]
    padded = image.new_zeros((image.shape[0], height + 2 * pad, width + 2 * pad))
    padded[:, pad : pad + height, pad : pad + width] = image
    top, left = int(u * (2 * pad + 1)), int(v * (2 * pad + 1))
    return padded[:, top : top + height, left : left + width]


def _turn(image: Tensor, degrees: float, scale: float) -> Tensor:
    """Rotation and zoom about the centre in one resampling, zeros move in."""
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as F

    bilinear = InterpolationMode.BILINEAR
    turned: Tensor = F.affine(image, degrees, [0, 0], scale, [0.0, 0.0], interpolation=bilinear)
    return turned

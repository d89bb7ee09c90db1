"""Augmentation: what one sample's own random numbers do to its image.

The parameters of all operations come from `vitlab.batch.uniform`, from the sample's seed and the view's name
(that of the view it draws as, if it does), for a whole batch in one call. No generator of any process is
read, seeded or forked: the images do not depend on who loads them or in which order, and drawing them costs
next to nothing. A purpose has numbers of its own (`augment/VIEW`, `augment/VIEW/colour`, …), so what is
switched off changes nothing of the rest.

Order, as in DINO's, MSN's and timm's code: crop, shift, flip, turn, RandAugment, colours, blur, solarisation,
erasing. Geometry is torchvision's (`transforms.v2.functional`) on uint8 tensors C H W; colours are Pillow's,
as in those codes.

Departures: a crop is drawn once and cut to the image, where torchvision draws up to ten times until one fits;
so is an erased rectangle, for which timm does.
The spread of a blur is in pixels of images of 224: it shrinks with the side of the largest view, and views of
one image keep the same. An erased rectangle is normal noise with ImageNet's mean and spread, before
normalisation; timm's is standard normal after it, which is the same up to rounding for data normalised with
these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vitlab.batch import View, uniform
from vitlab.data import colours, rand_augment
from vitlab.data.recipes import AugmentConfig, ViewRecipe

Transform = Callable[[Sequence[Tensor], Tensor], Tensor]  # images (each C H W) and seeds (B) → B C H W
NUMBERS = 9  # random numbers a sample and view has: 4 for the crop, 2 shift, 1 each flip, rotate, scale
ERASING = 5  # and for erasing: whether, area, shape, 2 for the place
FULL_SIDE = 224  # of the images that a blur's spread is given for
AREA = (0.02, 1 / 3)  # of an erased rectangle, as a fraction of the image
SHAPE = (0.3, 1 / 0.3)  # its height over its width
NOISE = (114.5, 57.6)  # mean and spread of its values: ImageNet's 0.449 and 0.226 of 255


def train_transform(config: AugmentConfig, view: View, largest: int = 0) -> Transform:
    """Images of any size and their seeds → the augmented view of each.

    `largest`: the side of the method's largest view, which this one shows parts of.
    """
    recipe, name = config.for_view(view), f"augment/{view.draws or view.name}"
    scale = max(largest, view.size) / FULL_SIDE

    def transform(images: Sequence[Tensor], seeds: Tensor) -> Tensor:
        numbers = uniform(seeds, name, NUMBERS).tolist()
        placed = [_place(image, u, recipe, view.size) for image, u in zip(images, numbers, strict=True)]
        views = torch.stack(_paint(placed, seeds, recipe, name, scale))
        if recipe.erase:
            _erase(views, seeds, recipe.erase, name)
        return views

    return transform


def eval_transform(size: int) -> Transform:
    """Shorter side to `size`, then the centre; an image of that size passes unchanged."""

    def transform(images: Sequence[Tensor], seeds: Tensor) -> Tensor:
        return torch.stack([fit(image, size) for image in images])

    return transform


def fit(image: Tensor, size: int, interpolation: str = "bilinear") -> Tensor:
    """C H W → C size size, without any chance in it."""
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as F

    if image.shape[-2:] == (size, size):
        return image
    how = InterpolationMode(interpolation)
    fitted: Tensor = F.center_crop(F.resize(image, [size], interpolation=how, antialias=True), [size, size])
    return fitted


# ---------------------------------------------------------------- where: crop, shift, flip, turn


def _place(image: Tensor, u: Sequence[float], recipe: ViewRecipe, size: int) -> Tensor:
    if recipe.crop_scale is None:
        image = fit(image, size, recipe.interpolation)
    else:
        image = _crop(image, u[:4], recipe, recipe.crop_scale, size)
    if recipe.pad:
        image = _shift(image, u[4], u[5], recipe.pad)
    if recipe.flip and u[6] < 0.5:
        image = image.flip(-1)
    if recipe.rotate or recipe.zoom:
        image = _turn(image, recipe.rotate * (2 * u[7] - 1), (1 + recipe.zoom) ** (2 * u[8] - 1))
    return image


def _crop(image: Tensor, u: Sequence[float], recipe: ViewRecipe, scale: Sequence[float], size: int) -> Tensor:
    """A random part of the image, its area and shape at random, scaled to the view's size."""
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as F

    height, width = image.shape[-2:]
    area = height * width * (scale[0] + (scale[1] - scale[0]) * u[0])
    low, high = map(math.log, recipe.crop_ratio)
    ratio = math.exp(low + (high - low) * u[1])
    h = min(height, max(1, round(math.sqrt(area / ratio))))
    w = min(width, max(1, round(math.sqrt(area * ratio))))
    top, left = int(u[2] * (height - h + 1)), int(u[3] * (width - w + 1))
    how = InterpolationMode(recipe.interpolation)
    part: Tensor = F.resized_crop(image, top, left, h, w, [size, size], interpolation=how, antialias=True)
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


# ---------------------------------------------------------------- what: RandAugment, colours, erasing


def _paint(images: list[Tensor], seeds: Tensor, recipe: ViewRecipe, name: str, scale: float) -> list[Tensor]:
    """Each image C H W through Pillow and back, if anything is to be done there."""
    rand, paints = recipe.rand_augment, colours.changes_colours(recipe)
    if rand is None and not paints:
        return images
    bicubic = recipe.interpolation == "bicubic"
    draws = uniform(seeds, f"{name}/rand", rand_augment.NUMBERS * (rand.ops if rand else 0)).tolist()
    numbers = uniform(seeds, f"{name}/colour", colours.NUMBERS).tolist()
    painted = []
    for image, drawn, u in zip(map(colours.to_pillow, images), draws, numbers, strict=True):
        if rand is not None:
            image = rand_augment.rand_augment(image, drawn, rand, bicubic)
        painted.append(colours.to_tensor(colours.paint(image, u, recipe, scale) if paints else image))
    return painted


def _erase(views: Tensor, seeds: Tensor, prob: float, name: str) -> None:
    """B C H W, in place: in some images a rectangle becomes noise, each value drawn for itself."""
    channels, height, width = views.shape[1:]
    for i, u in enumerate(uniform(seeds, f"{name}/erase", ERASING).tolist()):
        if u[0] >= prob:
            continue
        area = height * width * (AREA[0] + (AREA[1] - AREA[0]) * u[1])
        ratio = SHAPE[0] * (SHAPE[1] / SHAPE[0]) ** u[2]
        h = min(height, max(1, round(math.sqrt(area * ratio))))
        w = min(width, max(1, round(math.sqrt(area / ratio))))
        top, left = int(u[3] * (height - h + 1)), int(u[4] * (width - w + 1))
        drawn = uniform(seeds[i : i + 1], f"{name}/noise", channels * h * w).view(channels, h, w)
        noise = torch.special.ndtri(drawn + rand_augment.TINY) * NOISE[1] + NOISE[0]
        views[i, :, top : top + h, left : left + w] = noise.round().clamp(0, 255).byte()

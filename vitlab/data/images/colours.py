"""Colours, blur and solarisation of a view, as DINO's and MSN's code has them: on Pillow images.

Brightness, contrast, saturation and hue are torchvision's `ColorJitter`; grey, its `RandomGrayscale`; blur is
Pillow's `GaussianBlur`, three passes of a box. A grey image knows no saturation, hue or colour: what would
change these leaves it as it is.

Letters: C channels, H W image.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from vitlab.data.images.recipes import ViewRecipe

NUMBERS = 10  # random numbers: jitter at all, its order, 4 factors, grey, blur, sigma, solarize
ORDERS = list(itertools.permutations(range(4)))
THRESHOLD = 128  # solarisation's, as in DINO's code


def to_pillow(image: Tensor) -> Image.Image:
    """uint8 C H W → an image of one or three channels."""
    planes = [Image.fromarray(plane) for plane in image.numpy()]
    return planes[0] if len(planes) == 1 else Image.merge("RGB", planes)


def to_tensor(image: Image.Image) -> Tensor:
    """The way back: uint8 C H W."""
    return torch.from_numpy(np.stack([np.asarray(plane) for plane in image.split()]))


def changes_colours(recipe: ViewRecipe) -> bool:
    return bool(recipe.jitter or recipe.grey or recipe.blur or recipe.solarize)


def paint(image: Image.Image, u: Sequence[float], recipe: ViewRecipe, scale: float) -> Image.Image:
    """Jitter, grey, blur, solarisation; `scale`: a pixel of 224 px images in this view's pixels."""
    from torchvision.transforms.v2 import functional as F

    if recipe.jitter is not None and u[0] < recipe.jitter_prob:
        image = jitter(image, u[1], u[2:6], recipe.jitter)
    if u[6] < recipe.grey and image.mode != "L":
        image = F.rgb_to_grayscale(image, num_output_channels=3)
    if u[7] < recipe.blur:
        low, high = recipe.blur_sigma
        image = image.filter(ImageFilter.GaussianBlur(scale * (low + (high - low) * u[8])))
    if u[9] < recipe.solarize:
        image = F.solarize(image, THRESHOLD)
    return image


def jitter(image: Image.Image, order: float, u: Sequence[float], strength: Sequence[float]) -> Image.Image:
    """Factors between 1 - s and 1 + s (the hue's between -s and s of the circle), in one of 24 orders."""
    from torchvision.transforms.v2 import functional as F

    apply = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
    for i in ORDERS[int(order * len(ORDERS))]:
        if strength[i] and (i < 2 or image.mode != "L"):
            low, high = spread(i, strength[i])
            image = apply[i](image, low + (high - low) * u[i])
    return image


def spread(i: int, strength: float) -> tuple[float, float]:
    """Between what the factor of the i-th of brightness, contrast, saturation and hue lies."""
    return (-strength, strength) if i == 3 else (max(0.0, 1 - strength), 1 + strength)

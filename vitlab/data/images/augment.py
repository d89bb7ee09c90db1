"""Augmentation: what one sample's own random numbers do to its image.

The parameters of all operations come from `vitlab.batch.uniform`, from the sample's seed and the view's name
(that of the view it draws as, if it does), for a whole batch in one call. No generator of any process is
read, seeded or forked: the images do not depend on who loads them or in which order, and drawing them costs
next to nothing. A purpose has numbers of its own (`augment/VIEW`, `augment/VIEW/colour`, …), so what is
switched off changes nothing of the rest.

Order, as in DINO's, MSN's and timm's code: crop, shift, flip, turn, RandAugment, colours, blur, solarisation,
erasing. Geometry has the same bits as torchvision's (`transforms.v2.functional`) on uint8 tensors C H W;
colours are Pillow's, as in those codes. What a view shows of an image follows from the image's size and the
numbers alone, so it is known before the image is decoded (`vitlab/data/images/views.py`).

Departures: a crop is drawn once and cut to the image, where torchvision draws up to ten times until one fits;
so is an erased rectangle, for which timm does.
The spread of a blur is in pixels of images of 224: it shrinks with the side of the largest view, and views of
one image keep the same. An erased rectangle is normal noise with ImageNet's mean and spread, before
normalisation; timm's is standard normal after it, which is the same up to rounding for data normalised with
these.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitlab.batch import View, uniform
from vitlab.data.images import colours, rand_augment
from vitlab.data.images.decode import Box, Region
from vitlab.data.images.recipes import AugmentConfig, ViewRecipe

OPERATIONS: dict[str, Any] = {
    "bilinear": torch.ops.aten._upsample_bilinear2d_aa.default,
    "bicubic": torch.ops.aten._upsample_bicubic2d_aa.default,
}
Edges = tuple[float, float, float, float]  # left, top, right, bottom
BEFORE = 16  # pixels of a view that may be made before its first
NEAR = 0.1  # of a scaled pixel: a border that is met; a pixel of a view takes two at least
NUMBERS = 9  # random numbers a sample and view has: 4 for the crop, 2 shift, 1 each flip, rotate, scale
ERASING = 5  # and for erasing: whether, area, shape, 2 for the place
FULL_SIDE = 224  # of the images that a blur's spread is given for
AREA = (0.02, 1 / 3)  # of an erased rectangle, as a fraction of the image
SHAPE = (0.3, 1 / 0.3)  # its height over its width
NOISE = (114.5, 57.6)  # mean and spread of its values: ImageNet's 0.449 and 0.226 of 255


@dataclass(frozen=True)
class Transform:
    """What makes one view. Called with images (each C H W) and their seeds (B), it gives B C H W.

    What it does in steps, for those who have not decoded the images yet: `numbers` of a batch, `box` of an
    image from its size, `show` the box, and `paint` the batch.
    """

    recipe: ViewRecipe
    size: int  # of the view, in pixels along a side
    name: str = ""  # whose random numbers it draws
    scale: float = 1.0  # a pixel of images of 224, in pixels of the views

    def __call__(self, images: Sequence[Tensor], seeds: Tensor) -> Tensor:
        views = self.room(len(images), images[0].shape[0])
        for image, u, view in zip(images, self.numbers(seeds), views, strict=True):
            height, width = image.shape[-2:]
            self.show(Region(image.permute(1, 2, 0).numpy()), self.box(height, width, u), u, view)
        self.paint(views, seeds)
        return views

    def room(self, count: int, channels: int) -> Tensor:
        """B C H W, for so many views; what is in it is not defined yet."""
        return torch.empty((count, channels, self.size, self.size), dtype=torch.uint8)

    def numbers(self, seeds: Tensor) -> list[list[float]]:
        """Each sample's own, for all that is done to the shape of its image."""
        drawn: list[list[float]] = uniform(seeds, self.name, NUMBERS).tolist()
        return drawn

    def box(self, height: int, width: int, u: Sequence[float]) -> Box:
        """What the view shows of an image of this size, and the size that this becomes."""
        if self.recipe.crop_scale is None:
            return whole(height, width, self.size)
        return _crop(height, width, u, self.recipe, self.size)

    def show(self, region: Region, box: Box, u: Sequence[float], view: Tensor) -> None:
        """Fills the view (C H W) with the box: scaled, shifted, flipped and turned."""
        recipe = self.recipe
        image = _centre(resampled(region, box, recipe.interpolation), self.size)
        if recipe.pad:
            image = _shift(image, u[4], u[5], recipe.pad)
        if recipe.flip and u[6] < 0.5:
            image = image[:, ::-1]
        if recipe.rotate or recipe.zoom:
            angle, zoom = recipe.rotate * (2 * u[7] - 1), (1 + recipe.zoom) ** (2 * u[8] - 1)
            image = _turn(image, angle, zoom)
        np.copyto(view.numpy(), image.transpose(2, 0, 1))  # flips in the same pass, which torch's copy cannot

    def paint(self, views: Tensor, seeds: Tensor) -> None:
        """B C H W, in place: RandAugment, colours, blur, solarisation, erasing."""
        _paint(views, seeds, self.recipe, self.name, self.scale)
        if self.recipe.erase:
            _erase(views, seeds, self.recipe.erase, self.name)


def train_transform(config: AugmentConfig, view: View, largest: int = 0) -> Transform:
    """Images of any size → the augmented view of each.

    `largest`: the side of the method's largest view, which this one shows parts of.
    """
    name, scale = f"augment/{view.draws or view.name}", max(largest, view.size) / FULL_SIDE
    return Transform(config.for_loader(view), view.size, name, scale)


def eval_transform(size: int) -> Transform:
    """Shorter side to `size`, then the centre; an image of that size passes unchanged."""
    return Transform(ViewRecipe(), size)


# ---------------------------------------------------------------- where: crop, shift, flip, turn


def whole(height: int, width: int, size: int) -> Box:
    """All of an image, its shorter side scaled to `size`."""
    longer = int(size * max(height, width) / min(height, width))
    rows, columns = (longer, size) if height > width else (size, longer)
    return Box(0, 0, height, width, rows, columns)


def _crop(height: int, width: int, u: Sequence[float], recipe: ViewRecipe, size: int) -> Box:
    """A random part of the image, its area and shape at random, scaled to the view's size."""
    assert recipe.crop_scale is not None
    smallest, largest = recipe.crop_scale
    area = height * width * (smallest + (largest - smallest) * u[0])
    low, high = map(math.log, recipe.crop_ratio)
    ratio = math.exp(low + (high - low) * u[1])
    h = min(height, max(1, round(math.sqrt(area / ratio))))
    w = min(width, max(1, round(math.sqrt(area * ratio))))
    return Box(int(u[2] * (height - h + 1)), int(u[3] * (width - w + 1)), h, w, size, size)


def resampled(region: Region, box: Box, interpolation: str) -> np.ndarray:
    """The box of a region, rows columns C, antialiased."""
    if region.scale > 1:
        return _from_scaled(region, box, interpolation)
    top, left = box.top - region.top, box.left - region.left
    part = region.pixels[top : top + box.height, left : left + box.width]
    if (box.height, box.width) == (box.rows, box.columns):
        return part
    if not _native():
        return _by_torchvision(part, box, interpolation)
    return _by_torch(part, [box.rows, box.columns], interpolation)


def _by_torch(part: np.ndarray, sizes: list[int], interpolation: str, *scales: float) -> np.ndarray:
    """Colours side by side take it 2/3 of the time where the pixels are contiguous."""
    packed = torch.from_numpy(np.ascontiguousarray(part)[None].transpose(0, 3, 1, 2))
    out: np.ndarray = OPERATIONS[interpolation](packed, sizes, False, *scales).numpy()[0].transpose(1, 2, 0)
    return out


def _by_torchvision(part: np.ndarray, box: Box, interpolation: str) -> np.ndarray:
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as F

    how, colours_first = InterpolationMode(interpolation), torch.from_numpy(part).permute(2, 0, 1)
    out: Tensor = F.resize(colours_first, [box.rows, box.columns], interpolation=how, antialias=True)
    return out.permute(1, 2, 0).numpy()


def _from_scaled(region: Region, box: Box, interpolation: str) -> np.ndarray:
    """The box begins inside of a pixel that stands for several, but torch's operation where its input does.

    So it begins before the box, where a pixel of the view and one of the region have their borders together.
    Where there is no such place, Pillow serves, which needs none but takes four times as long.
    """
    top, left = (box.top - region.top) / region.scale, (box.left - region.left) / region.scale
    height, width = box.height / region.scale, box.width / region.scale
    bottom, right = math.ceil(top + height), math.ceil(left + width)
    y, above = _start(top, height / box.rows)
    x, before = _start(left, width / box.columns)
    if above < 0 or before < 0:
        y, x = math.floor(top), math.floor(left)
        part, edges = (
            region.pixels[y:bottom, x:right],
            (left - x, top - y, left + width - x, top + height - y),
        )
        return _by_pillow(part, edges, box, interpolation)
    part, sizes = region.pixels[y:bottom, x:right], [above + box.rows, before + box.columns]
    return _by_torch(part, sizes, interpolation, box.rows / height, box.columns / width)[above:, before:]


def _start(first: float, step: float) -> tuple[int, int]:
    """Pixels of the region to skip, and pixels of the view to make before its first; -1 if none will do.

    `first`: where the view begins in the region, `step`: how much of it a pixel of the view takes.
    """
    starts = [first - n * step for n in range(BEFORE) if first - n * step > -NEAR]
    apart = [abs(start - round(start)) for start in starts]
    n = apart.index(min(apart))
    return (round(starts[n]), n) if apart[n] <= NEAR else (0, -1)


def _by_pillow(part: np.ndarray, edges: Edges, box: Box, interpolation: str) -> np.ndarray:
    """What lies between the edges."""
    image = Image.fromarray(part[..., 0] if part.shape[2] == 1 else part)
    scaled = image.resize((box.columns, box.rows), Image.Resampling[interpolation.upper()], edges)
    return np.array(scaled).reshape(box.rows, box.columns, -1)


@functools.cache
def _native() -> bool:
    """Whether torchvision would leave bytes to torch's own operations, as it does on these processors."""
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def _centre(image: np.ndarray, size: int) -> np.ndarray:
    height, width = image.shape[:2]
    top, left = round((height - size) / 2), round((width - size) / 2)
    return image[top : top + size, left : left + size]


def _shift(image: np.ndarray, u: float, v: float, pad: int) -> np.ndarray:
    """The crop at a random place of the image with `pad` zeros on every side."""
    height, width = image.shape[:2]
    padded = np.zeros((height + 2 * pad, width + 2 * pad, image.shape[2]), np.uint8)
    padded[pad : pad + height, pad : pad + width] = image
    top, left = int(u * (2 * pad + 1)), int(v * (2 * pad + 1))
    return padded[top : top + height, left : left + width]


def _turn(image: np.ndarray, degrees: float, scale: float) -> np.ndarray:
    """Rotation and zoom about the centre in one resampling, zeros move in."""
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as F

    bilinear, colours_first = InterpolationMode.BILINEAR, torch.from_numpy(image.transpose(2, 0, 1).copy())
    turned: Tensor = F.affine(colours_first, degrees, [0, 0], scale, [0.0, 0.0], interpolation=bilinear)
    return turned.permute(1, 2, 0).numpy()


# ---------------------------------------------------------------- what: RandAugment, colours, erasing


def _paint(views: Tensor, seeds: Tensor, recipe: ViewRecipe, name: str, scale: float) -> None:
    """B C H W, in place: each image through Pillow and back, if anything is to be done there."""
    rand, paints = recipe.rand_augment, colours.changes_colours(recipe)
    if rand is None and not paints:
        return
    bicubic = recipe.interpolation == "bicubic"
    draws = uniform(seeds, f"{name}/rand", rand_augment.NUMBERS * (rand.ops if rand else 0)).tolist()
    numbers = uniform(seeds, f"{name}/colour", colours.NUMBERS).tolist()
    for view, drawn, u in zip(views, draws, numbers, strict=True):
        image = colours.to_pillow(view)
        if rand is not None:
            image = rand_augment.rand_augment(image, drawn, rand, bicubic)
        view.copy_(colours.to_tensor(colours.paint(image, u, recipe, scale) if paints else image))


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

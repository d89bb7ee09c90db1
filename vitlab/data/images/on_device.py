"""Colours, blur, solarisation, flips and erasing for whole batches, on the device that trains.

The other way to do what `augment` and `colours` do image by image in the loader processes, which then crop
and resize alone. The random numbers are the same, and so is the arithmetic of Pillow: eight bits after every
operation, cut off or rounded as there, luminance in sixteenths of 16 bits, hue and saturation in bytes, a
blur of three passes of a box. Floats of 24 bits hold all of it, so that only values at the very edge between
two levels may fall to the other side.

Views of one size are painted together: few operations on large tensors. What is drawn for an image is a
number in a tensor, and an operation that does not happen has the number that changes nothing (a factor of 1,
a radius of 0) or is masked: the host never waits for the device to know whom an operation concerns.

Departures: RandAugment stays with the loaders, and so does a flip before a turn.

Letters: B images of a batch, N of a stack of views, C channels, H W image, K taps of a box on one side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from vitlab.batch import CACHED, View, uniform
from vitlab.data.images import augment, colours
from vitlab.data.images.rand_augment import TINY
from vitlab.data.images.recipes import AugmentConfig, ViewRecipe

Painter = Callable[[Sequence[Tensor], Tensor], list[Tensor]]  # views (each B C H W) and seeds (B) → views
AT_ONCE = 2**24  # values painted at a time, which bounds the memory: 64 MiB for each of some fifteen tensors
FLIP = 6  # its place among the numbers that say where
HUE = 3  # its place among brightness, contrast, saturation and hue
LUMA = (19595 / 65536, 38470 / 65536, 7471 / 65536)  # Pillow's weights of red, green, blue; exact in floats
PASSES = 3  # of the box
ONE = 2.0**24  # the weights of a box are whole parts of it


class Lots(NamedTuple):
    """What is drawn for each of N images."""

    flip: Tensor  # bool
    order: Tensor  # N 4, which of the four colour operations comes first, second, …
    factor: Tensor  # N 4, float32; 1 leaves brightness, contrast, saturation; the hue's is unused
    hued: Tensor  # bool: the hue turns at all, which even by 0 goes through 8 bits
    turn: Tensor  # by so many of its 256 steps
    grey: Tensor  # bool
    radius: Tensor  # float32, of the box, in pixels; 0: no blur
    solarize: Tensor  # bool


def paint_on_device(config: AugmentConfig, specs: Sequence[View]) -> Painter:
    """uint8 views and the images' seeds, on any device → uint8 views as the loaders would have made them."""
    recipes = [config.for_device(spec) for spec in specs]
    names = [f"augment/{spec.draws or spec.name}" for spec in specs]
    scale = max(spec.size for spec in specs) / augment.FULL_SIDE
    busy = [i for i, r in enumerate(recipes) if r.flip or colours.changes_colours(r)]
    groups = [[i for i in busy if specs[i].size == size] for size in sorted({specs[i].size for i in busy})]

    def paint(views: Sequence[Tensor], seeds: Tensor) -> list[Tensor]:
        painted = list(views)
        for group in groups:
            lots = [_draw(seeds, recipes[i], names[i], scale) for i in group]
            stack = torch.cat([views[i] for i in group])
            stack = _paint(stack, _joined(lots), [recipes[i] for i in group], scale)
            for i, view in zip(group, stack.chunk(len(group)), strict=True):
                painted[i] = view
        for i, recipe in enumerate(recipes):
            if recipe.erase:
                each = _at_once(painted[i])
                parts = zip(torch.split(painted[i], each), torch.split(seeds, each), strict=True)
                painted[i] = torch.cat([_erase(*part, recipe.erase, names[i]) for part in parts])
        return painted

    return paint


# ---------------------------------------------------------------- what is drawn


def _draw(seeds: Tensor, recipe: ViewRecipe, name: str, scale: float) -> Lots:
    """In doubles, as Python counts: a number on either side of a probability is so on both ways."""
    place = uniform(seeds, name, augment.NUMBERS).double()
    u = uniform(seeds, f"{name}/colour", colours.NUMBERS).double()
    strength = recipe.jitter or [0.0] * 4
    jitters = u[:, 0] < (recipe.jitter_prob if recipe.jitter else 0.0)
    factor = torch.stack([_between(colours.spread(i, s), u[:, 2 + i]) for i, s in enumerate(strength)], 1)
    sigma = scale * _between(recipe.blur_sigma, u[:, 8])
    return Lots(
        flip=place[:, FLIP] < (0.5 if recipe.flip else 0.0),
        order=_orders(seeds.device)[(u[:, 1] * len(colours.ORDERS)).long()],
        factor=torch.where(jitters[:, None], factor, 1.0).float(),
        hued=jitters & (strength[HUE] > 0),
        turn=(factor[:, HUE] * 255).trunc() % 256,
        grey=u[:, 6] < recipe.grey,
        radius=_radius(torch.where(u[:, 7] < recipe.blur, sigma, 0.0).float()),
        solarize=u[:, 9] < recipe.solarize,
    )


def _between(ends: Sequence[float], u: Tensor) -> Tensor:
    return ends[0] + (ends[1] - ends[0]) * u


def _joined(lots: Sequence[Lots]) -> Lots:
    return Lots(*(torch.cat(drawn) for drawn in zip(*lots, strict=True)))


@cache
def _orders(device: torch.device) -> Tensor:
    return torch.tensor(colours.ORDERS, device=device)


def _radius(sigma: Tensor) -> Tensor:
    """Of the box whose passes make this blur, as Pillow takes it from Gwosdek et al. 2011."""
    part = sigma * sigma / PASSES
    length = (12 * part.double() + 1).sqrt().float()
    whole = ((length - 1) / 2).floor()
    rest = (2 * whole + 1) * (whole * (whole + 1) - 3 * part) / (6 * (part - (whole + 1) * (whole + 1)))
    return whole + rest


# ---------------------------------------------------------------- what becomes of the pixels


def _paint(stack: Tensor, lots: Lots, recipes: Sequence[ViewRecipe], scale: float) -> Tensor:
    """N C H W, uint8, some at a time."""
    each = _at_once(stack)
    parts = zip(torch.split(stack, each), *(torch.split(drawn, each) for drawn in lots), strict=True)
    return torch.cat([_painted(part, Lots(*drawn), recipes, scale) for part, *drawn in parts])


def _at_once(stack: Tensor) -> int:
    """How many images: on a CPU as many as stay in its cache."""
    most = CACHED if stack.device.type == "cpu" else AT_ONCE
    return max(1, most // max(1, stack[:1].numel()))


def _painted(stack: Tensor, lots: Lots, recipes: Sequence[ViewRecipe], scale: float) -> Tensor:
    """In the order of `colours.paint`; what no recipe has is left out, the rest by the lots."""
    if any(r.flip for r in recipes):
        stack = torch.where(_each(lots.flip), stack.flip(-1), stack)
    if not any(map(colours.changes_colours, recipes)):
        return stack
    images, colourful = stack.float(), stack.shape[1] > 1
    if any(r.jitter for r in recipes):
        images = _jittered(images, lots, colourful and any(r.jitter and r.jitter[HUE] for r in recipes))
    if colourful and any(r.grey for r in recipes):
        images = torch.where(_each(lots.grey), _luminance(images), images)
    widest = max(scale * r.blur_sigma[1] if r.blur else 0.0 for r in recipes)
    if widest:
        images = _blurred(images, lots.radius, int(_radius(torch.tensor(widest))) + 1)
    if any(r.solarize for r in recipes):
        turned = _each(lots.solarize) & (images >= colours.THRESHOLD)
        images = torch.where(turned, 255 - images, images)
    return images.byte()


def _each(drawn: Tensor) -> Tensor:
    """N → N 1 1 1."""
    return drawn[:, None, None, None]


def _jittered(images: Tensor, lots: Lots, hues: bool) -> Tensor:
    """Each image's four in its own order. The hue, which costs most, is done once for all: in each image
    what comes before it is done before, the rest after it."""
    steps = torch.arange(lots.order.shape[1], device=images.device)
    turn = (lots.order == HUE).int().argmax(1, keepdim=True)  # the step at which the hue's comes
    factor = lots.factor.gather(1, lots.order)
    if not hues:
        factor = torch.where(steps == turn, 1.0, factor)
        for i in range(len(steps)):
            images = _blended(images, lots.order[:, i], factor[:, i])
        return images
    before, after = torch.where(steps < turn, factor, 1.0), torch.where(steps > turn, factor, 1.0)
    for i in range(HUE):
        images = _blended(images, lots.order[:, i], before[:, i])
    images = torch.where(_each(lots.hued), _turned(images, lots.turn), images)
    for i in range(1, HUE + 1):
        images = _blended(images, lots.order[:, i], after[:, i])
    return images


def _blended(images: Tensor, kind: Tensor, factor: Tensor) -> Tensor:
    """From or towards black (brightness, 0), the mean's grey (contrast, 1), a pixel's (saturation, 2)."""
    grey = _luminance(images)
    mean = (grey.flatten(1).sum(1, dtype=torch.float64) / grey[0].numel() + 0.5).floor().float()
    even = torch.where(kind == 1, mean, 0.0)  # what all of an image moves from
    base = torch.where(_each(kind == 2), grey, _each(even))
    return (images - base).mul_(_each(factor)).add_(base).clamp_(0, 255).floor_()


def _luminance(images: Tensor) -> Tensor:
    """N C H W → N 1 H W."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images[:, :1], images[:, 1:2], images[:, 2:]
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2]).add_(0.5).floor_()


def _turned(images: Tensor, steps: Tensor) -> Tensor:
    """The hue moves on by so many of the 256 steps of its circle; N 3 H W, there and back by Pillow's way."""
    red, green, _ = images.unbind(1)
    low, value = images.aminmax(dim=1)
    spread = value - low
    r, g, b = (value[:, None] - images).div_(spread.clamp(min=1)[:, None]).unbind(1)
    sector = torch.where(red == value, b - g, torch.where(green == value, r - b + 2, g - r + 4)).div_(6)
    hue = _cut_to_byte(sector.add_(sector < 0))
    saturation = _cut_to_byte(spread.div_(value.clamp(min=1))).div_(255)
    six = hue.add_(steps[:, None, None]).remainder_(256).mul_(6)  # sixths of the circle, in 255 parts each
    corners = torch.arange(5, 0, -2, device=images.device)[:, None, None] * 255
    near = (six[:, None] + corners).remainder_(6 * 255)
    share = near.sub_(2 * 255).abs_().neg_().add_(2 * 255).clamp_(0, 255).div_(255)
    return share.mul_(saturation[:, None]).neg_().add_(1).mul_(value[:, None]).round_()


def _cut_to_byte(share: Tensor) -> Tensor:
    """0..1 → 0..255, cut off as the exact product 256 s - s is; floats may round it up to a whole."""
    level = (share * 255).floor_()
    return level.add_((share * 256).sub_(level) < share, alpha=-1)


def _blurred(images: Tensor, radius: Tensor, taps: int) -> Tensor:
    """Passes of a box along the rows, then along the columns, each rounded to whole levels."""
    weights = _taps(radius, taps)
    for dim in (-1, -2):
        for _ in range(PASSES):
            images = _box(images, weights, dim)
    return images


def _taps(radius: Tensor, taps: int) -> Tensor:
    """N → N K+1: the weight of a pixel and of those 1, 2, … K away on either side; the last has a part."""
    whole, inner = radius.floor(), (ONE / (2 * radius + 1)).floor()
    edge = ((ONE - (2 * whole + 1) * inner) / 2).floor()
    away = torch.arange(taps + 1, device=radius.device)
    last = torch.where(away == whole[:, None] + 1, edge[:, None], 0.0)
    return torch.where(away <= whole[:, None], inner[:, None], last) / ONE


def _box(images: Tensor, weights: Tensor, dim: int) -> Tensor:
    taps, length = weights.shape[1] - 1, images.shape[dim]
    sides = [taps, taps, 0, 0] if dim == -1 else [0, 0, taps, taps]
    wide = torch.nn.functional.pad(images, sides, mode="replicate")
    out = images * _each(weights[:, 0])
    for k in range(1, taps + 1):
        around = wide.narrow(dim, taps - k, length) + wide.narrow(dim, taps + k, length)
        out.add_(around.mul_(_each(weights[:, k])))
    return out.add_(0.5).floor_()


def _erase(view: Tensor, seeds: Tensor, prob: float, name: str) -> Tensor:
    """B C H W: in some images a rectangle becomes noise, each value drawn for itself."""
    channels, height, width = view.shape[1:]
    u = uniform(seeds, f"{name}/erase", augment.ERASING).double()
    area = height * width * _between(augment.AREA, u[:, 1])
    ratio = augment.SHAPE[0] * (augment.SHAPE[1] / augment.SHAPE[0]) ** u[:, 2]
    h = (area * ratio).sqrt().round().clamp(1, height).long()
    w = (area / ratio).sqrt().round().clamp(1, width).long()
    top, left = (u[:, 3] * (height - h + 1)).long(), (u[:, 4] * (width - w + 1)).long()
    rows = torch.arange(height, device=view.device) - top[:, None]  # B H, from the rectangle's first
    columns = torch.arange(width, device=view.device) - left[:, None]
    down, along = (rows >= 0) & (rows < h[:, None]), (columns >= 0) & (columns < w[:, None])
    inside = (down & (u[:, :1] < prob))[:, :, None] & along[:, None]  # B H W
    planes = torch.arange(channels, device=view.device)[:, None, None] * _each(h * w)
    number = planes + (rows[:, :, None] * w[:, None, None] + columns[:, None])[:, None]  # row by row in it
    number = torch.where(inside[:, None], number, 0).flatten(1)
    drawn = uniform(seeds, f"{name}/noise", channels * _largest(height, width)).gather(1, number)
    noise = torch.special.ndtri(drawn + TINY) * augment.NOISE[1] + augment.NOISE[0]
    return torch.where(inside[:, None], noise.round().clamp(0, 255).byte().view_as(view), view)


def _largest(height: int, width: int) -> int:
    """At least the pixels of the largest rectangle, whose sides are rounded."""
    area = height * width * augment.AREA[1]
    sides = sum(math.sqrt(area * ratio) for ratio in augment.SHAPE)  # of the longest: height and width
    return min(height * width, math.ceil(area + sides) + 1)

"""RandAugment in the form that DeiT was trained with: timm's `rand-m9-mstd0.5-inc1`, on Pillow images.

Paper: Cubuk et al. 2019 (arXiv 1909.13719). Conventions of timm: fifteen operations, each as likely, drawn
with repetition; each is applied with probability 1/2 at a magnitude of its own, normal about 9 of 10; all
grow stronger with the magnitude (`inc1`); what moves in from outside is middle grey.

Departures: timm fills with the data's mean colour where it is told one. At the highest magnitude its
posterisation keeps no bit, a black image that Pillow refuses by now; here one bit stays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import NormalDist

from PIL import Image, ImageOps

from vitlab.data.images.recipes import RandAugmentConfig

NUMBERS = 4  # random numbers an operation has: which, whether, how strong, which way
HIGHEST = 10.0  # of magnitudes
GREY = 128
TINY = 2.0**-25  # half the distance between two random numbers: keeps the normal's inverse finite
NORMAL = NormalDist()

Operation = Callable[[Image.Image, float, bool], Image.Image]  # image, magnitude in 0..1, other way


def rand_augment(
    image: Image.Image, u: Sequence[float], config: RandAugmentConfig, bicubic: bool
) -> Image.Image:
    """What the numbers of one image draw; `bicubic`: how its pixels move."""
    for i in range(0, NUMBERS * config.ops, NUMBERS):
        which, whether, strength, way = u[i : i + NUMBERS]
        if whether < config.prob:
            magnitude = config.magnitude + config.noise * NORMAL.inv_cdf(strength + TINY)
            level = min(max(magnitude, 0.0), HIGHEST) / HIGHEST
            image = operate(NAMES[int(which * len(NAMES))], image, level, way < 0.5, bicubic)
    return image


def operate(name: str, image: Image.Image, level: float, other: bool, bicubic: bool) -> Image.Image:
    """One operation by name; `level` in 0..1, `other`: darker instead of brighter, left instead of right."""
    if name in MOVES:
        return _move(image, MOVES[name](-level if other else level, *image.size), bicubic)
    if name == "rotate":
        how = Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR
        return image.rotate(30 * (-level if other else level), resample=how, fillcolor=_grey(image))
    return COLOURS[name](image, level, other)


def _move(image: Image.Image, matrix: tuple[float, ...], bicubic: bool) -> Image.Image:
    how = Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample=how, fillcolor=_grey(image))


def _grey(image: Image.Image) -> int | tuple[int, int, int]:
    return GREY if image.mode == "L" else (GREY, GREY, GREY)


def _enhance(adjust: str) -> Operation:
    """torchvision's function of that name with a factor of 1 ± 0.9, at least 0.1."""

    def operation(image: Image.Image, level: float, other: bool) -> Image.Image:
        from torchvision.transforms.v2 import functional as F

        changed: Image.Image = getattr(F, adjust)(image, max(0.1, 1 + 0.9 * (-level if other else level)))
        return changed

    return operation


def _solarize_add(image: Image.Image, level: float, other: bool) -> Image.Image:
    add = min(128, int(level * 110))
    return image.point([min(255, i + add) if i < 128 else i for i in range(256)] * len(image.getbands()))


# Where a pixel of the result comes from: x' = a·x + b·y + c, y' = d·x + e·y + f.
MOVES: dict[str, Callable[[float, int, int], tuple[float, ...]]] = {
    "shear_x": lambda level, w, h: (1, 0.3 * level, 0, 0, 1, 0),
    "shear_y": lambda level, w, h: (1, 0, 0, 0.3 * level, 1, 0),
    "translate_x": lambda level, w, h: (1, 0, 0.45 * level * w, 0, 1, 0),
    "translate_y": lambda level, w, h: (1, 0, 0, 0, 1, 0.45 * level * h),
}
COLOURS: dict[str, Operation] = {
    "autocontrast": lambda image, level, other: ImageOps.autocontrast(image),
    "equalize": lambda image, level, other: ImageOps.equalize(image),
    "invert": lambda image, level, other: ImageOps.invert(image),
    "posterize": lambda image, level, other: ImageOps.posterize(image, max(1, 4 - int(level * 4))),
    "solarize": lambda image, level, other: ImageOps.solarize(image, 256 - min(256, int(level * 256))),
    "solarize_add": _solarize_add,
    "colour": _enhance("adjust_saturation"),
    "contrast": _enhance("adjust_contrast"),
    "brightness": _enhance("adjust_brightness"),
    "sharpness": _enhance("adjust_sharpness"),
}
NAMES = (*COLOURS, "rotate", *MOVES)

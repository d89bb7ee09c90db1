"""Colours, blur and solarisation against torchvision's transforms and Pillow, and their distributions."""

from __future__ import annotations

import itertools

import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from samples import photo
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from vitlab.batch import View, uniform
from vitlab.config import build
from vitlab.data import AugmentConfig, train_transform
from vitlab.data.images.colours import NUMBERS, ORDERS, jitter, paint, to_pillow, to_tensor
from vitlab.data.images.recipes import ViewRecipe

OFF = [
    0.0,
    0.0,
    0.5,
    0.5,
    0.5,
    0.5,
    0.99,
    0.99,
    0.5,
    0.99,
]  # every operation's numbers, all unlikely but jitter


def painted(image: Tensor, u: list[float], scale: float = 1.0, **keys: object) -> Tensor:
    return to_tensor(paint(to_pillow(image), u, build(ViewRecipe, keys), scale))


@pytest.mark.parametrize("channels", [1, 3])
def test_to_pillow_and_back(channels: int) -> None:
    given = photo(channels)
    assert torch.equal(to_tensor(to_pillow(given)), given)
    turned = given.flip(-1)[:, 3:20, 5:30]  # rows that do not lie one behind another
    assert torch.equal(to_tensor(to_pillow(turned)), turned)


@pytest.mark.parametrize("order", range(24))
def test_jitter_is_torchvision_s_in_every_order(order: int) -> None:
    image, u, strength = to_pillow(photo()), [0.1, 0.9, 0.3, 0.7], [0.4, 0.4, 0.2, 0.1]
    factors = [1 - 0.4 + 0.8 * 0.1, 1 - 0.4 + 0.8 * 0.9, 1 - 0.2 + 0.4 * 0.3, -0.1 + 0.2 * 0.7]
    names = ["brightness", "contrast", "saturation", "hue"]
    expected = image
    for i in list(itertools.permutations(range(4)))[order]:
        expected = getattr(F, f"adjust_{names[i]}")(expected, factors[i])
    ours = jitter(image, (order + 0.5) / 24, u, strength)
    assert torch.equal(to_tensor(ours), to_tensor(expected))
    # The same on a tensor, which rounds otherwise: a hue goes through 8 bits in Pillow.
    tensor = photo()
    for i in ORDERS[order]:
        tensor = getattr(F, f"adjust_{names[i]}")(tensor, factors[i])
    apart = (to_tensor(ours).float() - tensor.float()).abs()
    assert apart.mean() < 2.5


def test_factors_and_probabilities_are_uniform() -> None:
    recipe = build(ViewRecipe, {"jitter": [0.4, 0, 0, 0], "jitter_prob": 0.8, "solarize": 0.2, "grey": 0.2})
    flat = torch.tensor([100, 60, 250], dtype=torch.uint8).view(3, 1, 1).expand(3, 4, 4).contiguous()
    kinds = {"grey": 0, "solarize": 0, "jitter": 0}
    levels = []
    for u in uniform(torch.arange(2000), "augment/x/colour", NUMBERS).tolist():
        out = to_tensor(paint(to_pillow(flat), u, recipe, 1.0))
        red, green, blue = out[:, 0, 0].tolist()
        if red == green:  # hides whether it is solarised
            kinds["grey"] += 1
        elif blue < 128:  # jitter alone leaves at least 150
            kinds["solarize"] += 1
        elif u[0] < 0.8:
            kinds["jitter"] += not torch.equal(out, flat)  # but where the factor is 1, or rounds to it
            levels.append(float(red))
        else:
            assert torch.equal(out, flat)
    assert 340 < kinds["grey"] < 460  # of 2000
    assert 270 < kinds["solarize"] < 370  # of the 1600 that are not grey
    assert 960 < kinds["jitter"] < 1080  # of the 1280 that are neither
    assert kinds["jitter"] > 0.97 * len(levels)
    spread = torch.tensor(levels)
    assert 59 < spread.min() < 63
    assert 137 < spread.max() < 141
    assert abs(spread.mean() - 100) < 3
    assert abs(spread.std() - 80 / 12**0.5) < 1.5


def test_grey_is_torchvision_s() -> None:
    given = photo()
    expected = to_tensor(F.rgb_to_grayscale(to_pillow(given), num_output_channels=3))
    assert torch.equal(painted(given, [*OFF[:6], 0.1, *OFF[7:]], grey=0.2), expected)
    assert torch.equal(painted(given, OFF, grey=0.2), given)


@pytest.mark.parametrize(("u", "sigma"), [(0.0, 0.1), (0.5, 1.05), (0.99, 1.981)])
def test_blur_is_pillow_s_and_nearly_gaussian(u: float, sigma: float) -> None:
    given = photo()
    ours = painted(given, [*OFF[:7], 0.3, u, 0.99], blur=0.5)
    expected = to_tensor(to_pillow(given).filter(ImageFilter.GaussianBlur(sigma)))
    assert torch.equal(ours, expected)
    true = F.gaussian_blur(given, [17, 17], [sigma, sigma]).float()
    inside = (slice(None), slice(8, -8), slice(8, -8))
    apart = (ours.float() - true)[inside].abs()  # three boxes, rounded each time, for the curve
    assert apart.mean() < 1.0
    assert apart.max() < 14
    assert torch.equal(painted(given, OFF, blur=0.5), given)


def test_blur_shrinks_with_the_image() -> None:
    given = photo()
    ours = painted(given, [*OFF[:7], 0.3, 1.0, 0.99], scale=28 / 224, blur=0.5)
    assert torch.equal(ours, to_tensor(to_pillow(given).filter(ImageFilter.GaussianBlur(0.25))))


def test_the_largest_view_sets_the_blur() -> None:
    config = build(AugmentConfig, {"blur": 1.0, "blur_sigma": [8.0, 8.0]})
    small = F.resize(photo(), [32, 32])
    (alone,) = train_transform(config, View("a", 32))([small], torch.tensor([1]))
    (beside,) = train_transform(config, View("a", 32), 112)([small], torch.tensor([1]))
    for view, sigma in ((alone, 8 * 32 / 224), (beside, 4.0)):
        assert torch.equal(view, to_tensor(to_pillow(small).filter(ImageFilter.GaussianBlur(sigma))))


def test_solarisation_is_pillow_s() -> None:
    given = photo()
    ours = painted(given, [*OFF[:9], 0.1], solarize=0.2)
    assert torch.equal(ours, to_tensor(ImageOps.solarize(to_pillow(given), 128)))
    assert torch.equal(painted(given, OFF, solarize=0.2), given)


def test_a_grey_image_keeps_its_channel() -> None:
    given = photo(1)
    everything = {"jitter": [0.4, 0.4, 0.4, 0.2], "grey": 1.0, "blur": 1.0, "solarize": 1.0}
    ours = painted(given, [0.0, 0.3, 0.1, 0.8, 0.9, 0.2, 0.0, 0.0, 0.5, 0.0], **everything)
    assert ours.shape == given.shape
    assert not torch.equal(ours, given)
    colours_only = {"jitter": [0.0, 0.0, 0.4, 0.5], "grey": 1.0}
    assert torch.equal(
        painted(given, [0.0, 0.3, 0.1, 0.8, 0.9, 0.2, 0.0, 0.0, 0.5, 0.0], **colours_only), given
    )


def test_without_hue_and_saturation_grey_equals_colour() -> None:
    """What a grey image undergoes is what its three equal channels do."""
    given, u = photo(1), [0.0, 0.3, 0.1, 0.8, 0.9, 0.2, 0.9, 0.0, 0.5, 0.0]
    keys = {"jitter": [0.4, 0.4, 0.0, 0.0], "blur": 1.0, "solarize": 1.0}
    three = painted(given.expand(3, -1, -1).contiguous(), u, **keys)
    assert (three.float() - painted(given, u, **keys).float()).abs().max() <= 1


def test_pillow_has_the_modes() -> None:
    assert (to_pillow(photo(1)).mode, to_pillow(photo(3)).mode) == ("L", "RGB")
    assert isinstance(to_pillow(photo()), Image.Image)

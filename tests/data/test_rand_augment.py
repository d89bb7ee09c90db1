"""RandAugment against timm's operations, pixel for pixel, and how often each is drawn."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from PIL import Image
from samples import photo
from timm.data.auto_augment import AugmentOp, rand_augment_transform

from vitlab.batch import uniform
from vitlab.data import RandAugmentConfig
from vitlab.data.images import rand_augment as ours
from vitlab.data.images.colours import to_pillow, to_tensor

THEIRS = {  # ours → timm's name
    "autocontrast": "AutoContrast",
    "equalize": "Equalize",
    "invert": "Invert",
    "posterize": "PosterizeIncreasing",
    "solarize": "SolarizeIncreasing",
    "solarize_add": "SolarizeAdd",
    "colour": "ColorIncreasing",
    "contrast": "ContrastIncreasing",
    "brightness": "BrightnessIncreasing",
    "sharpness": "SharpnessIncreasing",
    "rotate": "Rotate",
    "shear_x": "ShearX",
    "shear_y": "ShearY",
    "translate_x": "TranslateXRel",
    "translate_y": "TranslateYRel",
}


def test_the_operations_are_timm_s() -> None:
    (theirs,) = (rand_augment_transform("rand-m9-mstd0.5-inc1", {"translate_pct": 0.45}),)
    assert set(ours.NAMES) == set(THEIRS)
    assert sorted(op.name for op in theirs.ops) == sorted(THEIRS.values())
    config, op = RandAugmentConfig(), theirs.ops[0]
    assert (config.magnitude, config.noise, config.prob, config.ops) == (
        op.magnitude,
        op.magnitude_std,
        op.prob,
        theirs.num_layers,
    )


@pytest.mark.parametrize("magnitude", [0.0, 2.5, 9.0, 9.7, 9.99])
@pytest.mark.parametrize("other", [False, True])
@pytest.mark.parametrize("name", THEIRS)
def test_an_operation_is_timm_s(
    name: str, other: bool, magnitude: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = to_pillow(photo())
    monkeypatch.setattr(random, "random", lambda: 1.0 if other else 0.0)  # timm's way to choose the sign
    hparams = {"img_mean": (128,) * 3, "interpolation": Image.Resampling.BICUBIC}
    expected = AugmentOp(THEIRS[name], prob=1.0, magnitude=magnitude, hparams=hparams)(image)
    done = ours.operate(name, image, magnitude / 10, other, bicubic=True)
    assert torch.equal(to_tensor(done), to_tensor(expected))


@pytest.mark.parametrize("name", THEIRS)
def test_the_highest_magnitude_leaves_an_image(name: str) -> None:
    done = ours.operate(name, to_pillow(photo()), 1.0, False, bicubic=True)
    assert len(to_tensor(done).unique()) > 1


@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.parametrize("bicubic", [False, True])
def test_grey_images_stay_grey(name: str, bicubic: bool) -> None:
    image = to_pillow(photo(1))
    done = ours.operate(name, image, 0.9, True, bicubic)
    assert (done.mode, done.size) == ("L", image.size)
    assert (done.tobytes() != image.tobytes()) == (name != "colour")


def test_what_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[str, float, bool]] = []

    def note(name: str, image: Image.Image, level: float, other: bool, bicubic: bool) -> Image.Image:
        drawn.append((name, level, other))
        return image

    monkeypatch.setattr(ours, "operate", note)
    config, image = RandAugmentConfig(magnitude=7.0), to_pillow(photo(1, 8))
    for u in uniform(torch.arange(6000), "augment/x/rand", 8).tolist():
        ours.rand_augment(image, u, config, bicubic=True)
    assert 5800 < len(drawn) < 6200  # of 12000, half
    counts = Counter(name for name, _, _ in drawn)
    assert set(counts) == set(ours.NAMES)
    assert min(counts.values()) > 330
    assert max(counts.values()) < 470  # 400 each
    levels = torch.tensor([level for _, level, _ in drawn]) * 10
    assert abs(levels.mean() - 7) < 0.03
    assert abs(levels.std() - 0.5) < 0.02
    assert abs(sum(other for _, _, other in drawn) / len(drawn) - 0.5) < 0.03


def test_magnitudes_stay_within_their_scale() -> None:
    image = to_pillow(photo())
    for u in ([0.2, 0.0, 0.0, 0.0], [0.2, 0.0, 1 - 2**-24, 0.0]):  # the ends of the normal distribution
        done = ours.rand_augment(image, u, RandAugmentConfig(noise=5.0, ops=1), bicubic=False)
        assert done.size == image.size

"""Augmentation is a pure function of the sample's seed and the view, and does what it says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vitlab.batch import View
from vitlab.config import UserError, build
from vitlab.data import AugmentConfig, eval_transform, train_transform

FULL = AugmentConfig(crop_scale=[0.5, 1.0], pad=1, flip=True, rotate=20, zoom=0.1)
SEEDS = torch.arange(64) * 7919


def pictures(n: int = 64, side: int = 8, channels: int = 1) -> list[Tensor]:
    shape = (n, channels, side, side)
    return list(torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)))


def test_same_seed_same_picture_alone_or_in_a_batch() -> None:
    given, transform = pictures(), train_transform(FULL, View("a", 8))
    state = torch.get_rng_state()
    batch = transform(given, SEEDS)
    torch.manual_seed(5)
    torch.rand(3)
    alone = [transform(given[i : i + 1], SEEDS[i : i + 1])[0] for i in reversed(range(64))][::-1]
    assert batch.dtype == torch.uint8
    assert batch.shape == (64, 1, 8, 8)
    assert torch.equal(batch, torch.stack(alone))
    torch.set_rng_state(state)
    transform(given, SEEDS)
    assert torch.equal(torch.get_rng_state(), state)


def test_views_and_seeds_differ() -> None:
    given = pictures()
    a, b = (train_transform(FULL, View(name, 8))(given, SEEDS) for name in "ab")
    c = train_transform(FULL, View("a", 8))(given, SEEDS + 1)
    assert (a != b).flatten(1).any(1).float().mean() > 0.9
    assert (a != c).flatten(1).any(1).float().mean() > 0.9
    same = train_transform(FULL, View("a", 8))([given[0]] * 64, SEEDS)
    assert len(same.flatten(1).unique(dim=0)) > 60


def test_nothing_asked_nothing_done() -> None:
    given = pictures()
    assert torch.equal(train_transform(AugmentConfig(), View("a", 8))(given, SEEDS), torch.stack(given))
    assert torch.equal(eval_transform(8)(given, SEEDS), torch.stack(given))


def test_flip_half_of_them() -> None:
    given = pictures()
    out = train_transform(AugmentConfig(flip=True), View("a", 8))(given, SEEDS)
    flipped = [torch.equal(x.flip(-1), y) for x, y in zip(given, out, strict=True)]
    kept = [torch.equal(x, y) for x, y in zip(given, out, strict=True)]
    assert all(a or b for a, b in zip(flipped, kept, strict=True))
    assert 20 < sum(flipped) < 44


def test_pad_shifts_every_way() -> None:
    dot = torch.zeros(1, 5, 5, dtype=torch.uint8)
    dot[0, 2, 2] = 255
    out = train_transform(AugmentConfig(pad=1), View("a", 5))([dot] * 400, torch.arange(400))
    places, counts = out.nonzero()[:, 2:].unique(dim=0, return_counts=True)
    assert places.tolist() == [[y, x] for y in (1, 2, 3) for x in (1, 2, 3)]
    assert counts.min() > 20


def test_rotation_and_zoom_keep_the_middle() -> None:
    given = torch.full((1, 9, 9), 200, dtype=torch.uint8)
    out = train_transform(AugmentConfig(rotate=45, zoom=0.2), View("a", 9))([given] * 32, SEEDS[:32])
    assert (out[:, :, 3:6, 3:6] == 200).all()
    assert (out[:, :, 0, 0] < 200).any()


def test_crops_have_the_view_s_size_and_the_picture_s_values() -> None:
    ramp = torch.arange(20, dtype=torch.uint8).mul(10).repeat(3, 30, 1)  # 3 30 20
    out = train_transform(AugmentConfig(crop_scale=[0.1, 0.5]), View("a", 6))([ramp] * 64, SEEDS)
    assert out.shape == (64, 3, 6, 6)
    means = out.float().mean((1, 2, 3))
    assert means.min() < 70 < 120 < means.max()  # from all over
    assert (out[..., 1:] >= out[..., :-1]).all()


def test_eval_takes_the_centre() -> None:
    wide = torch.zeros(1, 8, 16, dtype=torch.uint8)
    wide[..., 4:12] = 100
    assert (eval_transform(4)([wide], SEEDS[:1]) > 80).all()
    assert eval_transform(16)([wide], SEEDS[:1]).shape == (1, 1, 16, 16)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"crop_scale": [0.5, 0.2]}, r"crop_scale: given \[0.5, 0.2\]; allowed"),
        ({"crop_scale": [0.5]}, "crop_scale"),
        ({"pad": -1}, "pad: given -1"),
        ({"rotat": 3}, "did you mean 'rotate'"),
    ],
)
def test_refused(given: dict[str, object], text: str) -> None:
    with pytest.raises(UserError, match=text):
        build(AugmentConfig, given)

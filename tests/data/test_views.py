"""Files become the views that decoded images become, and one bad file is nobody else's matter."""

from __future__ import annotations

import io
import sys
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from samples import photo
from torch import Tensor

from vitlab.batch import View
from vitlab.config import build
from vitlab.data import AugmentConfig, eval_transform, train_transform
from vitlab.data.images.augment import Transform
from vitlab.data.images.decode import JpegPicture
from vitlab.data.images.decode import decode as decode_whole
from vitlab.data.images.views import make_views

SEEDS = torch.arange(64) * 7919
CROP = {"crop_scale": [0.08, 1.0], "flip": True}


def file(side: int = 96, channels: int = 3, kind: str = "JPEG", **options: Any) -> bytes:
    pixels = photo(channels, side).permute(1, 2, 0).squeeze(-1).numpy()
    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(out, kind, **options)
    return out.getvalue()


def transforms(size: int = 32, **keys: Any) -> list[Transform]:
    config = build(AugmentConfig, keys)
    views = (View("global/0", size), View("global/1", size), View("local/0", size // 2))
    return [train_transform(config, view, size) for view in views]


def by_hand(files: list[bytes], given: list[Transform], channels: int) -> list[Tensor]:
    images = [decode_whole(data, channels) for data in files]
    return [transform(images, SEEDS[: len(files)]) for transform in given]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["none", "mae", "deit", "dino"])
def test_views_of_files_are_those_of_their_images(name: str, channels: int) -> None:
    """At full scale bit by bit: the views are too large for another."""
    files = [file(side, kind=kind) for side in (90, 100) for kind in ("JPEG", "PNG", "WEBP")]
    files += [file(90, progressive=True), file(90, 1), file(90, 1, "PNG"), file(90, subsampling=0)]
    given = [*transforms(64, name=name), eval_transform(64)]
    views, bad = make_views(files, SEEDS[: len(files)], given, channels, 10**6)
    assert bad == [None] * len(files)
    for ours, theirs in zip(views, by_hand(files, given, channels), strict=True):
        assert ours.is_contiguous()
        assert torch.equal(ours, theirs)


def test_all_views_of_a_sample_come_of_one_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    region = JpegPicture.region
    monkeypatch.setattr(JpegPicture, "region", lambda self, *b: asked.append(b) or region(self, *b))
    make_views([file(), None, file()], SEEDS[:3], transforms(name="dino"), 3, 10**6)
    assert [len(boxes) for boxes in asked] == [3, 3]
    assert {(box.rows, box.columns) for box in asked[0]} == {(32, 32), (16, 16)}


@pytest.mark.parametrize("name", ["dino", "deit"])
def test_bad_and_empty_slots_are_black_and_change_nothing_else(name: str) -> None:
    given = transforms(name=name, erase=1.0)
    good = [file(side) for side in (60, 70, 80, 90)]
    spoiled: list[bytes | None] = [good[0], good[1][:-900], None, b"no image", good[3]]
    seeds = SEEDS[:5]
    views, bad = make_views(spoiled, seeds, given, 3, 10**6)
    whole, _ = make_views([good[0], good[1], good[2], good[2], good[3]], seeds, given, 3, 10**6)
    assert [error and error.kind for error in bad] == [None, "cut_image", None, "unknown_format", None]
    assert all(error is None or error.__traceback__ is None for error in bad)
    for ours, theirs in zip(views, whole, strict=True):
        assert torch.equal(ours[[0, 4]], theirs[[0, 4]])
        assert not ours[1:4].any()
        assert all(theirs.flatten(1).any(1))


def test_too_large_ones_are_named() -> None:
    _, bad = make_views([file(90, kind="PNG"), file(90, kind="PNG")], SEEDS[:2], transforms(), 3, 8099)
    assert [(error.kind, error.reason) for error in bad if error] == [
        ("too_large", "decodes to 90×90 pixels, data.max_pixels allows 8099 in all")
    ] * 2


def test_nothing_to_see() -> None:
    views, bad = make_views([None] * 3, SEEDS[:3], transforms(name="dino"), 1, 10**6)
    assert [tuple(view.shape) for view in views] == [(3, 1, 32, 32), (3, 1, 32, 32), (3, 1, 16, 16)]
    assert not any(view.any() for view in views)
    assert bad == [None] * 3


@pytest.mark.parametrize("keys", [CROP, {**CROP, "interpolation": "bicubic"}, {}])
def test_large_photos_are_decoded_small_and_look_the_same(keys: dict[str, Any]) -> None:
    files = [file(1000, quality=90)] * 8
    given = [*transforms(**keys), eval_transform(32)]
    views, _ = make_views(files, SEEDS[:8], given, 3, 10**7)
    scaled = 0
    for ours, theirs in zip(views, by_hand(files, given, 3), strict=True):
        apart = (ours.float() - theirs.float()).square().mean((1, 2, 3))
        scaled += int((apart > 0).sum())
        assert apart.max() < 255**2 / 10**4  # 40 dB
        assert apart.mean() < 255**2 / 10**4.5
    assert scaled > 25  # of 32


def test_scaled_decoding_takes_the_time_of_less(monkeypatch: pytest.MonkeyPatch) -> None:
    held = []
    module = sys.modules["vitlab.data.images.decode"]
    decode = module.simplejpeg.decode_jpeg

    def counted(*given: Any, **more: Any) -> np.ndarray:
        pixels: np.ndarray = decode(*given, **more)
        held.append(pixels.shape)
        return pixels

    monkeypatch.setattr("simplejpeg.decode_jpeg", counted)
    make_views([file(1000)], SEEDS[:1], [eval_transform(32), eval_transform(62)], 3, 10**7)
    make_views([file(1000)], SEEDS[:1], [eval_transform(32), eval_transform(200)], 3, 10**7)
    assert held == [(125, 125, 3), (500, 500, 3)]

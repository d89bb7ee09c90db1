"""Augmentation is a pure function of the sample's seed and the view, and does what it says."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from samples import all_same, config, photo, plan, region_of, resampled, shards
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from vitlab.batch import View, uniform
from vitlab.config import UserError, build
from vitlab.data import AugmentConfig, eval_transform, train_batches, train_transform
from vitlab.data.images import augment as augment_module
from vitlab.data.images.colours import jitter, to_tensor
from vitlab.data.images.decode import Box
from vitlab.data.images.recipes import PRESETS

FULL = AugmentConfig(crop_scale=[0.5, 1.0], pad=1, flip=True, rotate=20, zoom=0.1)
SEEDS = torch.arange(64) * 7919
OLD: dict[str, dict[str, Any]] = {
    "nothing": {},
    "crop": {"crop_scale": [0.2, 1.0], "flip": True},
    "shift": {"pad": 2, "flip": True},
    "turn": {"rotate": 15, "zoom": 0.15},
    "all": {"crop_scale": [0.5, 1.0], "pad": 1, "flip": True, "rotate": 20, "zoom": 0.1},
}


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


@pytest.mark.parametrize("size", [4, 7, 16, 40])
def test_fitting_is_torchvision_s(size: int) -> None:
    for height, width in ((20, 31), (31, 20), (16, 16), (5, 90), (33, 34), (1, 3)):
        given = photo(3, 90)[:, :height, :width]
        scaled = F.resize(given, [size], antialias=True)
        assert torch.equal(eval_transform(size)([given], SEEDS[:1])[0], F.center_crop(scaled, [size, size]))


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("how", ["bilinear", "bicubic"])
def test_resampling_is_torchvision_s(
    how: str, channels: int, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit by bit, whether colours lie side by side or in planes, for parts and for all of an image."""
    monkeypatch.setattr(augment_module, "_native", lambda: native)
    planes = photo(channels, 60)
    side_by_side = planes.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    for top, left, h, w, rows, columns in ((3, 5, 41, 50, 16, 24), (0, 0, 60, 60, 9, 70), (9, 2, 1, 3, 8, 8)):
        box = Box(top, left, h, w, rows, columns)
        theirs = F.resized_crop(planes, *box[:4], [rows, columns], F.InterpolationMode(how), antialias=True)
        for image in (planes, side_by_side):
            assert torch.equal(resampled(region_of(image), box, how), theirs)
        moved = region_of(side_by_side[:, top:, left:], top, left)
        assert torch.equal(resampled(moved, box, how), theirs)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("how", ["bilinear", "bicubic"])
def test_boxes_of_scaled_regions(how: str, channels: int) -> None:
    """A region at 1/4, here means of 16 pixels each, wherever the box begins in it."""
    whole = photo(channels, 600)
    small = whole.float().unflatten(1, (150, 4)).unflatten(3, (150, 4)).mean((2, 4)).round().byte()
    small = small.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    for top, left, side in (
        (0, 0, 600),
        (40, 80, 400),
        (1, 2, 500),
        (101, 153, 401),
        (90, 33, 448),
        (1, 150, 448),
    ):
        box = Box(top, left, side, side, 56, 50)
        theirs = F.resized_crop(whole, *box[:4], [56, 50], F.InterpolationMode(how), antialias=True)
        for region in (
            region_of(small, 0, 0, 4),
            region_of(small[:, top // 4 :, left // 4 :], top & ~3, left & ~3, 4),
        ):
            ours = resampled(region, box, how)
            assert ours.shape == theirs.shape
            error = (ours.float() - theirs.float()).square().mean()
            assert error < 255**2 / 10**3.7  # 37 dB: means of squares are not libjpeg's smaller blocks


@pytest.mark.parametrize(
    ("first", "step", "found"),
    [
        (0.0, 2.3, (0, 0)),
        (7.0, 2.3, (7, 0)),
        (7.25, 2.25, (5, 1)),  # 7.25 - 2.25
        (7.5, 2.3, (-1, -1)),
        (31.5, 2.1, (21, 5)),
        (7.5, 3.0, (0, -1)),  # never near a border
        (0.5, 2.3, (0, -1)),  # nothing lies before it
    ],
)
def test_where_resampling_begins(first: float, step: float, found: tuple[int, int]) -> None:
    skipped, more = augment_module._start(first, step)
    if found != (-1, -1):
        assert (skipped, more) == found
    assert more < 0 or abs(first - more * step - skipped) <= 0.1


def test_boxes_follow_from_sizes_and_numbers_alone() -> None:
    """As torchvision's RandomResizedCrop has them, and drawn before there is an image."""
    transform = train_transform(build(AugmentConfig, {"crop_scale": [0.2, 0.2]}), View("a", 32))
    drawn = [transform.box(300, 400, u) for u in transform.numbers(SEEDS)]
    areas = torch.tensor([box.height * box.width / 120_000 for box in drawn])
    ratios = torch.tensor([box.width / box.height for box in drawn])
    assert (areas - 0.2).abs().max() < 0.002
    assert 0.74 < ratios.min() < 0.8
    assert 1.25 < ratios.max() < 1.34
    assert all(0 <= box.top <= 300 - box.height and 0 <= box.left <= 400 - box.width for box in drawn)
    assert {box[4:] for box in drawn} == {(32, 32)}
    assert eval_transform(32).box(300, 400, []) == (0, 0, 300, 400, 32, 42)


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


# ---------------------------------------------------------------- all of it together


EVERYTHING: dict[str, Any] = {
    "crop_scale": [0.3, 0.9],
    "pad": 1,
    "flip": True,
    "rotate": 10,
    "rand_augment": {},
    "jitter": [0.4, 0.4, 0.2, 0.1],
    "grey": 0.5,
    "blur": 0.5,
    "solarize": 0.5,
    "erase": 0.5,
}


def transformed(view: View, given: list[Tensor], largest: int = 0, **keys: Any) -> Tensor:
    return train_transform(build(AugmentConfig, keys), view, largest)(given, SEEDS[: len(given)])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_function_of_the_seed(name: str, channels: int) -> None:
    given = [photo(channels, 40)] * 16
    for view in (View("global/1", 28), View("local/0", 12), View("image", 28)):
        one, again = (transformed(view, given, name=name) for _ in range(2))
        assert one.shape == (16, channels, view.size, view.size)
        assert one.dtype == torch.uint8
        assert torch.equal(one, again)
        assert len(one.flatten(1).unique(dim=0)) == (1 if name == "none" else 16)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [1, 2, 5])
def test_small_images(side: int, channels: int) -> None:
    given = [photo(channels, side)] * 32
    assert transformed(View("a", side), given, **EVERYTHING).shape == (32, channels, side, side)
    assert transformed(View("a", 7), given, **EVERYTHING).shape == (32, channels, 7, 7)


def test_alone_or_in_a_batch_with_everything_on() -> None:
    given, config = [photo(3, 24)] * 24, build(AugmentConfig, EVERYTHING)
    transform = train_transform(config, View("a", 16))
    whole = transform(given, SEEDS[:24])
    alone = [transform(given[i : i + 1], SEEDS[i : i + 1])[0] for i in range(24)]
    assert torch.equal(whole, torch.stack(alone))


def test_a_view_that_draws_as_another_shows_the_same() -> None:
    given = [photo(3, 96)] * 12
    keys = {"crop_scale": [0.3, 0.6], "flip": True, "jitter": [0.4, 0.4, 0.4, 0.1], "solarize": 0.3}
    image = transformed(View("image", 32), given, **keys)
    assert torch.equal(transformed(View("twin", 32, "image"), given, **keys), image)
    small = transformed(View("tokens", 16, "image"), given, **keys)
    other = transformed(View("tokens", 16), given, **keys)
    means = [F.resize(image, [16, 16], antialias=True).float() - x.float() for x in (small, other)]
    assert means[0].abs().mean() < 8 < 25 < means[1].abs().mean()


def test_what_is_switched_on_changes_nothing_of_the_rest() -> None:
    """Each operation has numbers of its own: the crop is the same with colours or without."""
    given = [photo(3, 40)] * 40
    keys = {"crop_scale": [0.3, 0.6], "flip": True, "grey": 0.5}
    plain, more = (
        transformed(View("a", 24), given, **keys),
        transformed(View("a", 24), given, erase=0.5, **keys),
    )
    untouched = (plain == more).flatten(1).all(1)
    assert 10 < untouched.sum() < 30
    places = (plain != more).any(1)[~untouched]
    for changed in places:  # a rectangle of noise, that may by chance equal what was there
        rows, columns = changed.any(1).nonzero(), changed.any(0).nonzero()
        box = changed[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert box.float().mean() > 0.9


def test_operations_come_in_the_official_order() -> None:
    """crop → flip → jitter → grey → blur → solarize: torchvision and Pillow with the drawn numbers."""
    given, seeds = photo(3, 80), torch.tensor([17])
    keys = {
        "crop_scale": [0.4, 1.0],
        "interpolation": "bicubic",
        "flip": True,
        "jitter": [0.4, 0.4, 0.2, 0.1],
    }
    config = build(AugmentConfig, {**keys, "grey": 1.0, "blur": 1.0, "solarize": 1.0})
    ours = train_transform(config, View("global/0", 224))([given], seeds)[0]
    u, c = (
        uniform(seeds, "augment/global/0", 9)[0].tolist(),
        uniform(seeds, "augment/global/0/colour", 10)[0].tolist(),
    )
    area, ratio = 80 * 80 * (0.4 + 0.6 * u[0]), (4 / 3) ** (2 * u[1] - 1)
    h, w = (min(80, round((area * r) ** 0.5)) for r in (1 / ratio, ratio))
    top, left = int(u[2] * (81 - h)), int(u[3] * (81 - w))
    pixels = Image.fromarray(given.permute(1, 2, 0).numpy()).crop((left, top, left + w, top + h))
    image = pixels.resize((224, 224), Image.Resampling.BICUBIC)
    image = ImageOps.mirror(image) if u[6] < 0.5 else image
    image = jitter(image, c[1], c[2:6], [0.4, 0.4, 0.2, 0.1])
    image = F.rgb_to_grayscale(image, 3).filter(ImageFilter.GaussianBlur(0.1 + 1.9 * c[8]))
    apart = (to_tensor(ImageOps.solarize(image, 128)).float() - ours.float()).abs()
    assert apart.mean() < 0.3  # tensors and Pillow round a bicubic crop otherwise by one at most


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_crop_is_pillow_s(interpolation: str) -> None:
    given = photo(3, 100)
    ours = transformed(
        View("a", 32), [given], crop_scale=[1.0, 1.0], crop_ratio=[1.0, 1.0], interpolation=interpolation
    )
    how = Image.Resampling[interpolation.upper()]
    theirs = to_tensor(Image.fromarray(given.permute(1, 2, 0).numpy()).resize((32, 32), how))
    assert (ours[0].float() - theirs.float()).abs().max() <= 1


def test_the_ratio_of_a_crop() -> None:
    wide = torch.arange(100, dtype=torch.uint8).repeat(1, 100, 1)
    rows = {}
    for low, high in ((0.25, 0.25), (4.0, 4.0)):
        out = transformed(View("a", 64), [wide] * 8, crop_scale=[0.1, 0.1], crop_ratio=[low, high]).float()
        rows[low] = float((out[..., -1] - out[..., 0]).mean())
    assert rows[4.0] == pytest.approx(4 * rows[0.25], rel=0.15)


def test_erased_rectangles_are_imagenet_s_noise() -> None:
    given = [torch.zeros(3, 64, 64, dtype=torch.uint8)] * 64
    out = transformed(View("a", 64), given, erase=0.25)
    erased = (out > 0).flatten(1).any(1)
    assert 8 <= erased.sum() <= 25
    values = out[out > 0].float()
    assert abs(values.mean() - 116) < 2  # a little above 114.5: zeros are left out, what lies outside is cut
    assert abs(values.std() - 55.5) < 2
    areas = (out[erased] > 0).any(1).float().mean((1, 2))
    assert 0.01 < areas.min() < 0.1
    assert 0.2 < areas.max() <= 0.36


def before(image: Tensor, u: list[float], keys: dict[str, Any], size: int) -> Tensor:
    """What these keys did before there were others: results under their content keys must stay true."""
    if "crop_scale" in keys:
        low, high = keys["crop_scale"]
        height, width = image.shape[-2:]
        area = height * width * (low + (high - low) * u[0])
        ratio = math.exp(math.log(4 / 3) * (2 * u[1] - 1))
        h = min(height, max(1, round(math.sqrt(area / ratio))))
        w = min(width, max(1, round(math.sqrt(area * ratio))))
        top, left = int(u[2] * (height - h + 1)), int(u[3] * (width - w + 1))
        image = F.resized_crop(image, top, left, h, w, [size, size], antialias=True)
    else:
        image = F.center_crop(F.resize(image, [size], antialias=True), [size, size])
    if pad := keys.get("pad", 0):
        top, left = (int(v * (2 * pad + 1)) for v in u[4:6])
        image = F.pad(image, [pad])[:, top : top + size, left : left + size]
    if keys.get("flip") and u[6] < 0.5:
        image = image.flip(-1)
    if "rotate" in keys:
        scale = (1 + keys["zoom"]) ** (2 * u[8] - 1)
        how = InterpolationMode.BILINEAR
        image = F.affine(image, keys["rotate"] * (2 * u[7] - 1), [0, 0], scale, [0.0, 0.0], interpolation=how)
    return image


@pytest.mark.parametrize("name", OLD)
def test_the_old_keys_give_the_old_pictures(name: str) -> None:
    given, keys = pictures(64, 20, 3), OLD[name]
    numbers = uniform(SEEDS, "augment/image", 9).tolist()
    expected = torch.stack([before(x, u, keys, 16) for x, u in zip(given, numbers, strict=True)])
    assert torch.equal(transformed(View("image", 16), given, **keys), expected)


@pytest.mark.parametrize("name", ["dino", "deit"])
def test_loaders_change_nothing(name: str, tmp_path: Path) -> None:
    made, settings = shards(tmp_path / "s", n=60), config(tmp_path / "s")
    views = [View("global/0", 8), View("global/1", 8), View("local/0", 4)]
    augment = build(AugmentConfig, {"name": name})
    runs = [
        list(train_batches(made, settings, plan(views=views, epochs=1, augment=augment, loaders=n)))
        for n in (0, 2)
    ]
    assert all_same(*runs)
    assert not torch.equal(runs[0][0].views[0], runs[0][0].views[1])


def test_views_that_a_method_lacks_are_refused(tmp_path: Path) -> None:
    made, settings = shards(tmp_path / "s", n=60), config(tmp_path / "s")
    augment = build(AugmentConfig, {"name": "dino", "views": {"globl/0": {"blur": 0.0}}})
    with pytest.raises(UserError, match=r"augment.views: given 'globl/0'; the method has one, two"):
        train_batches(made, settings, plan(augment=augment))

"""Painting whole batches on the device gives what the loaders' Pillow gives, image by image."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from samples import photo
from torch import Tensor

from vitlab.batch import Batch, View
from vitlab.config import build, resolved
from vitlab.data import AugmentConfig, ReadPlan, ShardsConfig, draw_lots, mixed, train_transform
from vitlab.data.images import on_device
from vitlab.data.images.on_device import paint_on_device
from vitlab.dist import World
from vitlab.jobs.place import mover

SEEDS = torch.arange(64) * 7919 + 3
ONE = View("global/1", 40)
ALL: dict[str, Any] = {
    "flip": True,
    "jitter": [0.4, 0.4, 0.4, 0.2],
    "grey": 0.2,
    "blur": 0.5,
    "solarize": 0.3,
    "erase": 0.3,
}


def pictures(channels: int = 3, side: int = 40, n: int = 64) -> Tensor:
    """Parts of a photograph, all different, and then noise, whose colours are as far apart as colours get."""
    scene = photo(channels, side)
    seen = [scene.roll(i, -1) // (1 + i % 3) for i in range(n // 2)]
    shape, generator = (n - n // 2, channels, side, side), torch.Generator().manual_seed(1)
    return torch.cat(
        [torch.stack(seen), torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)]
    )


def by_loader(keys: dict[str, Any], given: Tensor, view: View, largest: int = 0) -> Tensor:
    return train_transform(build(AugmentConfig, keys), view, largest)(list(given), SEEDS[: len(given)])


def by_device(keys: dict[str, Any], given: list[Tensor], views: list[View]) -> list[Tensor]:
    config = build(AugmentConfig, {**keys, "on_device": True})
    return paint_on_device(config, views)(given, SEEDS[: len(given[0])])


def apart(a: Tensor, b: Tensor) -> Tensor:
    assert a.dtype == b.dtype == torch.uint8
    return (a.float() - b.float()).abs()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("keys", "mean", "most", "changed"),
    [
        ({"flip": True}, 0, 0, 20),
        ({"jitter": [0.4, 0, 0, 0]}, 1e-4, 1, 60),
        ({"jitter": [0, 0.4, 0, 0]}, 1e-4, 1, 60),
        (
            {"jitter": [1.5, 1.5, 0, 0], "jitter_prob": 0.5},
            1e-4,
            1,
            20,
        ),  # cut off at white, and at a factor of 0
        ({"jitter": [0, 0, 0.4, 0]}, 1e-4, 1, 60),
        ({"jitter": [0, 0, 0, 0.5]}, 2e-3, 7, 60),  # a hue beside its next one of 255 differs by 6 levels
        ({"grey": 0.5}, 0, 0, 20),
        ({"blur": 0.7}, 1e-4, 1, 30),
        ({"blur": 0.7, "blur_sigma": [3.0, 60.0]}, 1e-4, 1, 30),
        ({"solarize": 0.5}, 0, 0, 20),
        ({"erase": 0.5}, 1e-3, 1, 20),
        ({"jitter": [0.4, 0.4, 0.2, 0.1], "jitter_prob": 0.8}, 2e-3, 12, 40),
        (ALL, 2e-3, 255, 60),  # beside the threshold of solarisation a level falls to its other side
    ],
)
def test_an_operation_is_pillow_s(
    keys: dict[str, Any], mean: float, most: int, changed: int, channels: int
) -> None:
    given = pictures(channels)
    loader, (device,) = by_loader(keys, given, ONE), by_device(keys, [given], [ONE])
    off = apart(loader, device)
    assert off.mean() <= mean
    assert off.max() <= most
    done = (loader != given).flatten(1).any(1).sum()
    colours_only = ("grey" in keys and len(keys) == 1) or keys.get("jitter", [1])[:2] == [0, 0]
    assert done == 0 if channels == 1 and colours_only else done >= changed


VIEWS = {
    "dino": [View("global/0", 64), View("global/1", 64), View("local/0", 24), View("local/1", 24)],
    "msn": [View("target", 64), View("anchor/0", 64), View("focal/0", 24)],
    "beit": [View("image", 64), View("tokens", 32, "image")],
    "mae": [View("image", 64)],
    "simmim": [View("image", 48)],
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", VIEWS)
def test_a_preset_is_the_same_on_both_ways(name: str, channels: int) -> None:
    given, views = pictures(channels, 80), VIEWS[name]
    config = build(AugmentConfig, {"name": name, "on_device": True})
    placed = [by_loader(resolved(config.for_loader(view)), given, view) for view in views]
    painted = by_device({"name": name}, placed, views)
    for view, crop, ours in zip(views, placed, painted, strict=True):
        theirs = by_loader({"name": name}, given, view, largest=max(v.size for v in views))
        assert apart(ours, theirs).mean() < 2e-3, view
        assert (ours != crop).flatten(1).any(1).float().mean() > 0.3, view


def test_every_order_of_the_jitter_occurs() -> None:
    keys = {"jitter": [0.4, 0.4, 0.4, 0.3]}
    drawn = on_device._draw(SEEDS.repeat(8) + torch.arange(512), build(AugmentConfig, keys), "augment/a", 1.0)
    assert len(drawn.order.unique(dim=0)) == 24
    assert (drawn.order.sort(1).values == torch.arange(4)).all()
    assert drawn.turn.min() >= 0
    assert drawn.turn.max() <= 255


@pytest.mark.parametrize("cached", [1, 2**14])
def test_alone_or_in_a_batch(cached: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given, config = pictures(), build(AugmentConfig, {**ALL, "on_device": True})
    paint = paint_on_device(config, [ONE])
    state = torch.get_rng_state()
    (whole,) = paint([given], SEEDS)
    assert torch.equal(torch.get_rng_state(), state)
    alone = [paint([given[i : i + 1]], SEEDS[i : i + 1])[0] for i in range(0, 64, 5)]
    assert torch.equal(whole[::5], torch.cat(alone))
    back = torch.arange(63, -1, -1)
    assert torch.equal(paint([given[back]], SEEDS[back])[0], whole[back])
    monkeypatch.setattr(on_device, "CACHED", cached)
    assert torch.equal(paint([given], SEEDS)[0], whole)


def test_views_do_not_touch_one_another() -> None:
    views, keys = VIEWS["dino"], {**ALL, "name": "dino"}
    given = [pictures(side=view.size, n=12) for view in views]
    before = [view.clone() for view in given]
    together = by_device(keys, given, views)
    largest = View("none of them", 64)
    config = build(AugmentConfig, {**keys, "on_device": True})
    for view, image, ours in zip(views, given, together, strict=True):
        idle = torch.zeros(12, 3, 64, 64, dtype=torch.uint8)
        alone = paint_on_device(config, [view, largest])([image, idle], SEEDS[:12])[0]
        assert torch.equal(alone, ours)
    assert all(map(torch.equal, given, before))
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [1, 2, 5])
def test_small_images(side: int, channels: int) -> None:
    given, view = pictures(channels, side), View("a", side)
    keys = {**ALL, "blur_sigma": [1.0, 400.0]}
    assert apart(by_loader(keys, given, view), *by_device(keys, [given], [view])).mean() < 0.1


def test_black_images_of_bad_samples_harm_none() -> None:
    given = pictures(n=16)
    holed = given.clone()
    holed[::4] = 0
    whole, some = by_device(ALL, [given], [ONE])[0], by_device(ALL, [holed], [ONE])[0]
    kept = torch.arange(16) % 4 > 0
    assert torch.equal(whole[kept], some[kept])
    assert torch.equal(some[~kept], by_loader(ALL, holed, ONE)[~kept])


def test_what_is_not_asked_for_is_not_done() -> None:
    given = [pictures(n=4), pictures(n=4)]
    views = [View("a", 40), View("b", 40)]
    for keys in ({}, {"on_device": True}, ALL):  # the last: all of it, but by the loaders
        painted = paint_on_device(build(AugmentConfig, keys), views)(given, SEEDS[:4])
        assert all(x is y for x, y in zip(painted, given, strict=True))
    one = by_device({"views": {"a": {"solarize": 1.0}}}, given, views)
    assert one[1] is given[1]
    assert torch.equal(one[0], torch.where(given[0] > 127, 255 - given[0], given[0]))


@pytest.mark.parametrize("mixes", [False, True])
def test_a_worker_paints_before_it_normalises(mixes: bool) -> None:
    given, view = pictures(n=8), View("image", 40)
    keys = {**ALL, "cutmix": 1.0 if mixes else 0.0}
    settings = ShardsConfig(path="x", image_size=40, channels=3, streams=2, mean=[0.4] * 3, std=[0.2] * 3)
    world = World(device=torch.device("cpu"))
    moved = {}
    for where in (False, True):
        augment = build(AugmentConfig, {**keys, "on_device": where})
        views = [given if where else by_loader(keys, given, view)]
        batch = Batch(views, torch.arange(8), torch.ones(8), SEEDS[:8], [str(i) for i in range(8)])
        plan = ReadPlan(views=[view], batch=8, epochs=1, augment=augment)
        moved[where] = mover(settings, world, plan)(batch)
        lots = draw_lots(batch, augment, 4)
        plain = batch.to(world.device, torch.full((3, 1, 1), 0.4), torch.full((3, 1, 1), 0.2))
        if not where:
            assert torch.equal(moved[where].views[0], (mixed(plain, lots) if mixes else plain).views[0])
    off = (moved[False].views[0] - moved[True].views[0]).abs() * 0.2 * 255
    assert off.mean() < 0.01
    assert (moved[True].others is not None) == mixes
    eval_batch = Batch([given], torch.arange(8), torch.ones(8), SEEDS[:8], [""] * 8)
    assert torch.allclose(mover(settings, world)(eval_batch).pixels() * 255, given.float(), atol=1e-3)


def test_loaders_leave_to_the_device_what_is_its() -> None:
    given, view = pictures(side=48, n=8), View("global/1", 32)
    late = by_loader({"name": "dino", "on_device": True}, given, view)
    assert torch.equal(late, by_loader({"crop_scale": [0.4, 1.0], "interpolation": "bicubic"}, given, view))
    (painted,) = by_device({"name": "dino"}, [late], [view])
    assert apart(painted, by_loader({"name": "dino"}, given, view)).mean() < 2e-3

"""The augment section: presets with the authors' values, changes for views, and what is refused."""

from __future__ import annotations

import pytest

from vitlab.batch import View
from vitlab.config import UserError, build, resolved
from vitlab.data import AugmentConfig, RandAugmentConfig
from vitlab.data.images.recipes import PRESETS, ViewRecipe


def preset(name: str, **more: object) -> AugmentConfig:
    return build(AugmentConfig, {"name": name, **more})


def test_without_a_name_nothing_is_done() -> None:
    assert AugmentConfig() == preset("none")
    assert AugmentConfig().for_view(View("image", 8)) == ViewRecipe()
    assert not AugmentConfig().crops
    assert not AugmentConfig().mixes


@pytest.mark.parametrize(
    ("name", "view", "values"),
    [
        (
            "mae",
            "image",
            {"crop_scale": [0.2, 1.0], "interpolation": "bicubic", "flip": True, "jitter": None},
        ),
        ("simmim", "image", {"crop_scale": [0.67, 1.0], "interpolation": "bilinear", "flip": True}),
        ("beit", "tokens", {"crop_scale": [0.08, 1.0], "jitter": [0.4, 0.4, 0.4, 0.0], "jitter_prob": 1.0}),
        ("deit", "image", {"rand_augment": RandAugmentConfig(), "erase": 0.25, "jitter": None}),
        ("dino", "global/0", {"crop_scale": [0.4, 1.0], "blur": 1.0, "solarize": 0.0, "grey": 0.2}),
        ("dino", "global/1", {"crop_scale": [0.4, 1.0], "blur": 0.1, "solarize": 0.2, "jitter_prob": 0.8}),
        ("dino", "local/5", {"crop_scale": [0.05, 0.4], "blur": 0.5, "jitter": [0.4, 0.4, 0.2, 0.1]}),
        ("msn", "anchor/0", {"crop_scale": [0.3, 1.0], "interpolation": "bilinear", "blur": 0.5}),
        ("msn", "focal/9", {"crop_scale": [0.05, 0.3], "jitter": [0.4, 0.4, 0.4, 0.1], "grey": 0.2}),
    ],
)
def test_presets_are_the_authors_values(name: str, view: str, values: dict[str, object]) -> None:
    recipe = preset(name).for_view(View(view, 8))
    assert {key: getattr(recipe, key) for key in values} == values


def test_deit_mixes_as_its_authors() -> None:
    deit = preset("deit")
    assert (deit.mixup, deit.cutmix, deit.mix_prob, deit.mix_switch) == (0.8, 1.0, 1.0, 0.5)
    assert deit.mixes
    assert not preset("deit", mix_prob=0.0).mixes
    assert {name for name in PRESETS if preset(name).mixes} == {"deit"}


def test_keys_beside_the_name_win() -> None:
    assert preset("mae", flip=False).flip is False
    assert preset("dino", jitter=None).jitter is None
    assert preset("deit", rand_augment=None).rand_augment is None
    assert preset("deit", rand_augment={"magnitude": 5}).rand_augment == RandAugmentConfig(magnitude=5)
    dino = preset("dino", crop_scale=[0.25, 1.0], views={"local": {"blur": 0.0}, "global": {"flip": False}})
    local, globe = (dino.for_view(View(name, 8)) for name in ("local/0", "global/1"))
    assert (local.crop_scale, local.blur, local.flip) == ([0.05, 0.4], 0.0, True)
    assert (globe.crop_scale, globe.blur, globe.flip) == ([0.25, 1.0], 0.1, False)


def test_the_full_name_wins_over_its_part() -> None:
    config = build(AugmentConfig, {"views": {"a/1": {"pad": 2}, "a": {"pad": 1, "flip": True}}})
    found = {name: config.for_view(View(name, 8)) for name in ("a/0", "a/1", "ab")}
    assert {name: (r.pad, r.flip) for name, r in found.items()} == {
        "a/0": (1, True),
        "a/1": (2, True),
        "ab": (0, False),
    }


def test_a_view_that_draws_as_another_shares_its_changes() -> None:
    config = build(AugmentConfig, {"views": {"image": {"crop_scale": [0.5, 1.0]}, "tokens": {"blur": 1.0}}})
    tokens = config.for_view(View("tokens", 4, "image"))
    assert (tokens.crop_scale, tokens.blur) == ([0.5, 1.0], 1.0)
    assert config.for_view(View("tokens", 4)).crop_scale is None
    assert config.crops


@pytest.mark.parametrize("name", PRESETS)
def test_the_resolved_config_holds_every_value_and_is_read_again(name: str) -> None:
    tree = resolved(preset(name, views={"x": {"pad": 1}}))
    assert set(tree) == set(AugmentConfig.model_fields)
    assert tree["views"] == {**PRESETS[name].get("views", {}), "x": {"pad": 1}}
    assert build(AugmentConfig, tree) == preset(name, views={"x": {"pad": 1}})


def test_the_presets_stay_as_they_are() -> None:
    before = resolved(preset("dino"))
    preset("dino", views={"local": {"blur": 0.0}, "global/1": {"solarize": 1.0}})
    assert resolved(preset("dino")) == before


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "deit"])
def test_the_device_does_what_the_loaders_leave(name: str) -> None:
    view, plain = View("global/1", 8), ViewRecipe()
    whole, late = preset(name), preset(name, on_device=True)
    assert (whole.for_loader(view), whole.for_device(view)) == (whole.for_view(view), plain)
    loader, device = late.for_loader(view), late.for_device(view)
    kept = {"crop_scale", "crop_ratio", "interpolation", "pad", "rotate", "zoom", "rand_augment"}
    for key, value in late.for_view(view):
        if key in kept:
            assert (getattr(loader, key), getattr(device, key)) == (value, getattr(plain, key))
        else:
            assert getattr(device, key) == value, key
            if key not in (
                "jitter_prob",
                "blur_sigma",
            ):  # which say nothing where there is no jitter, no blur
                assert getattr(loader, key) == getattr(plain, key), key
    assert preset("deit", on_device=True, rand_augment=None).for_device(view).erase == 0.25


def test_a_flip_stays_before_a_turn() -> None:
    view = View("a", 8)
    for keys in ({"rotate": 10}, {"zoom": 0.1}):
        config = build(AugmentConfig, {"flip": True, "on_device": True, **keys})
        assert (config.for_loader(view).flip, config.for_device(view).flip) == (True, False)
    config = build(AugmentConfig, {"flip": True, "pad": 2, "on_device": True})
    assert (config.for_loader(view).flip, config.for_device(view).flip) == (False, True)


def test_views_that_a_method_lacks() -> None:
    config = preset(
        "dino", views={"local": {"blur": 0.1}, "globl/0": {"blur": 0.1}, "image": {"flip": False}}
    )
    assert sorted(config.unknown_views(["image"])) == ["globl/0", "local"]
    assert config.unknown_views(["image/0", "globl/0"]) == ["local"]  # the preset's, but changed here
    assert preset("dino").unknown_views(["image"]) == []


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"name": "dinno"}, "name: given \"dinno\"; allowed: none, mae, simmim, .*; did you mean 'dino'"),
        ({"views": {"a": {"blurr": 1.0}}}, r"views.a.blurr: unknown key .*did you mean 'blur'"),
        ({"views": {"a": {"mixup": 1.0}}}, r"views.a.mixup: unknown key"),
        ({"views": {"a": {"blur": 2.0}}}, r"views.a.blur: given 2.0; must be at least 0 and at most 1"),
        ({"views": {"a": {"crop_scale": [0.5, 0.1]}}}, r"views.a.crop_scale: given \[0.5, 0.1\]"),
        ({"views": {"a": 3}}, "views.a: given 3"),
        ({"views": 3}, "views: given 3"),
        ({"jitter": [0.4, 0.4, 0.4]}, "jitter: given .*; must have at least 4 items"),
        ({"jitter": [0.4, 0.4, 0.4, 0.6]}, "jitter: given .*at most 0.5"),
        ({"jitter": [0.4, -0.4, 0.4, 0.1]}, r"jitter\[1\]: given -0.4"),
        ({"crop_ratio": [0.0, 1.0]}, r"crop_ratio: given \[0.0, 1.0\]; allowed"),
        ({"blur_sigma": [2.0, 1.0]}, r"blur_sigma: given \[2.0, 1.0\]; allowed"),
        ({"interpolation": "cubic"}, 'interpolation: given "cubic"; allowed: bilinear, bicubic'),
        ({"rand_augment": {"magnitud": 3}}, "rand_augment.magnitud: unknown key"),
        ({"rand_augment": {"magnitude": 11}}, "rand_augment.magnitude: given 11"),
        ({"mix_prob": 1.5}, "mix_prob: given 1.5"),
        ({"mixup": -1}, "mixup: given -1"),
        (
            {"name": "deit", "on_device": True},
            "on_device: given true beside rand_augment, which only the loaders do; allowed: one of the two; "
            "give rand_augment: null, or leave on_device out",
        ),
        (
            {"on_device": True, "views": {"local": {"rand_augment": {}}}},
            "on_device: given true beside views.local.rand_augment, .*; give views.local.rand_augment: null",
        ),
        ({"views": {"a": {"on_device": True}}}, "views.a.on_device: unknown key"),
    ],
)
def test_refused_in_one_line(given: dict[str, object], line: str) -> None:
    with pytest.raises(UserError, match=line) as error:
        build(AugmentConfig, given)
    assert "\n" not in str(error.value)

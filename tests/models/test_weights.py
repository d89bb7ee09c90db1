"""Loading is strict and says what it did; a model folder gives back what was saved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from parity import redraw
from timm.models.vision_transformer import VisionTransformer
from zoo import SMALL, small

from vitlab.config import UserError
from vitlab.models import create_model, load_model, load_state, load_weights, save_model

TINY = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
PREPROCESS = {"size": 16, "mean": [0.1, 0.2, 0.3], "std": [1.0, 2.0, 0.1]}


def tiny(classes: int = 3, **more: object) -> torch.nn.Module:
    return create_model("vit_tiny", num_classes=classes, image_size=16, **{**TINY, **more})


def test_refusal_names_every_tensor_that_does_not_fit() -> None:
    model, state = tiny(), tiny().state_dict()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    del state["norm.bias"], state["blocks.1.mlp.fc2.bias"]
    state["patch_embed.proj.wieght"] = state.pop("patch_embed.proj.weight")
    state["head.weight"] = torch.zeros(5, 16)
    with pytest.raises(UserError) as caught:
        load_state(model, state)
    line = str(caught.value)
    assert "3 missing (patch_embed.proj.weight, blocks.1.mlp.fc2.bias, norm.bias)" in line
    assert "1 not in the model (patch_embed.proj.wieght)" in line
    assert "1 of other shape (head.weight: given 5×16, model 3×16)" in line
    assert "\n" not in line
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_refusal_names_a_handful() -> None:
    with pytest.raises(UserError, match=r"31 missing \(([^,]*, ){4}[^,]* and 26 more\)"):
        load_state(tiny(), {"cls_token": torch.zeros(1, 1, 16)})


def test_replaced_parts_stay_fresh() -> None:
    other, model = tiny(5), tiny(3, distilled=False)
    redraw(other)
    head = model.head.weight.clone()
    state = {**other.state_dict(), "head_dist.weight": torch.zeros(5, 16)}
    report = load_state(model, state, replace=("head", "head_dist"))
    assert report.fresh == ("head.weight", "head.bias")
    assert set(report.ignored) == {"head.weight", "head.bias", "head_dist.weight"}
    assert set(report.loaded) == set(model.state_dict()) - {"head.weight", "head.bias"}
    assert torch.equal(model.head.weight, head)
    assert torch.equal(model.blocks[1].attn.qkv.weight, other.blocks[1].attn.qkv.weight)
    with pytest.raises(UserError, match=r"head_dist.weight"):  # `head` is not a prefix of `head_dist`
        load_state(model, state, replace=("head",))


def test_a_replaced_head_stays_fresh_even_where_it_would_fit() -> None:
    model, other = tiny(), tiny()
    head = model.head.weight.clone()
    load_state(model, other.state_dict(), replace=("head",))
    assert torch.equal(model.head.weight, head)


def test_weights_of_timm_load_as_they_are() -> None:
    reference = VisionTransformer(img_size=16, num_classes=3, **TINY)
    for positions in ("learned", "sincos"):
        model = tiny(positions=positions)
        assert load_state(model, reference.state_dict()).fresh == ()
        assert torch.equal(model.pos_embed, reference.pos_embed)


@pytest.mark.parametrize(
    "more", [{}, {"distilled": True, "init_values": 0.1}, {"pool": "mean", "positions": "sincos"}]
)
def test_round_trip(more: dict[str, object], tmp_path: Path) -> None:
    model = tiny(**more)
    redraw(model)
    save_model(model, tmp_path / "model", preprocess=PREPROCESS, labels=["a", "é", "c"])
    loaded = load_model(tmp_path / "model")
    assert (loaded.preprocess, loaded.labels) == (PREPROCESS, ["a", "é", "c"])
    assert loaded.model.config == model.config
    assert loaded.model.image_size == model.image_size
    state = loaded.model.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(loaded.model.eval()(x), model.eval()(x))
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert (config["name"], config["image_size"], config["num_classes"]) == ("vit_tiny", [16, 16], 3)
    assert config["embed_dim"] == 16
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == sorted(
        ["config.json", "model.safetensors", "preprocess.json", "labels.json"]
    )


@pytest.mark.parametrize("name", SMALL)
def test_every_family_comes_back(name: str, tmp_path: Path) -> None:
    model = small(name)
    with torch.no_grad():
        for value in model.state_dict().values():
            value.add_(1)
    save_model(model, tmp_path, preprocess={}, labels=[])
    loaded, other = load_model(tmp_path).model, small(name)
    report = load_weights(other, tmp_path)
    assert type(loaded) is type(model)
    assert loaded.config == model.config
    assert set(report.loaded) == set(model.state_dict())
    assert report.fresh == report.ignored == report.resized == ()
    for found in (loaded, other):
        assert all(torch.equal(found.state_dict()[n], value) for n, value in model.state_dict().items())


def test_a_folder_of_no_family_is_one_line(tmp_path: Path) -> None:
    save_model(tiny(), tmp_path, preprocess={}, labels=[])
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "name": "vit_tony"}))
    with pytest.raises(UserError, match=r"name: given 'vit_tony'; allowed: .*did you mean 'vit_tiny'\?"):
        load_model(tmp_path)


def test_tensors_gathered_elsewhere_are_what_is_saved(tmp_path: Path) -> None:
    model, other = tiny(), tiny()
    save_model(model, tmp_path, preprocess={}, labels=[], state=other.state_dict())
    assert torch.equal(load_model(tmp_path).model.head.weight, other.head.weight)
    with pytest.raises(UserError, match=r"state: .*: 32 missing \(cls_token, .*; 1 not in the model \(x\)"):
        save_model(model, tmp_path, preprocess={}, labels=[], state={"x": torch.zeros(1)})


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "preprocess.json", "labels.json"])
@pytest.mark.parametrize("harm", ["gone", "cut", "other"])
def test_damaged_folders_are_one_line(name: str, harm: str, tmp_path: Path) -> None:
    save_model(tiny(), tmp_path, preprocess=PREPROCESS, labels=["a", "b", "c"])
    file = tmp_path / name
    if harm == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-9] if harm == "cut" else b'"text"')
    with pytest.raises(UserError, match="no such file" if harm == "gone" else "damaged") as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [("image_size", 16), ("num_classes", None), ("embed_dim", 24), ("depht", 1), ("image_size", [15, 16])],
)
def test_configs_that_do_not_fit_are_one_line(key: str, value: object, tmp_path: Path) -> None:
    save_model(tiny(), tmp_path, preprocess={}, labels=[])
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(UserError, match=key if key != "embed_dim" else "of other shape") as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)

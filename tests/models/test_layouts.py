"""Weights that others have written load exactly, and what does not fit is refused in one line."""

from __future__ import annotations

import argparse
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from parity import images, redraw
from safetensors.torch import save_file
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from zoo import SMALL, small

from vitlab.config import UserError
from vitlab.models import ViT, create_model, load_weights, save_model
from vitlab.models.layouts import LAYOUTS

SIZES = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
HF = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 16,
    "patch_size": 4,
    "layer_norm_eps": 1e-6,
    "num_labels": 3,
}
State = dict[str, Tensor]


def tiny(classes: int = 3, size: int = 16, **more: object) -> ViT:
    model = create_model("vit_tiny", num_classes=classes, image_size=size, **{**SIZES, **more})
    assert isinstance(model, ViT)
    return model


def timm_state(**more: object) -> State:
    family = VisionTransformerDistilled if more.pop("distilled", False) else VisionTransformer
    reference = family(img_size=16, **{"num_classes": 3, **SIZES, **more})
    redraw(reference)
    return reference.state_dict()


def same(model: nn.Module, state: State, beside: tuple[str, ...] = ()) -> None:
    own = model.state_dict()
    assert set(own) - set(beside) == set(state)
    for name, value in state.items():
        assert torch.equal(own[name], value), name


def refused(model: nn.Module, source: object, line: str, **more: object) -> str:
    """One line, and nothing of the model has changed."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match=line) as caught:
        load_weights(model, source, **more)
    assert "\n" not in str(caught.value)
    same(model, before)
    return str(caught.value)


# ---------------------------------------------------------------- timm and the authors' own code


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({}, {}),
        ({"global_pool": "avg"}, {"pool": "mean"}),
        ({"init_values": 0.1}, {"init_values": 0.1}),
        ({"distilled": True}, {"distilled": True}),
        ({}, {"positions": "sincos"}),
    ],
    ids=["token", "mean", "layer_scale", "distilled", "sincos"],
)
def test_timm_there_and_back(theirs: dict[str, object], ours: dict[str, object]) -> None:
    state, model = timm_state(**theirs), tiny(**ours)
    report = load_weights(model, state)
    same(model, state)
    assert (report.layout, report.fresh, report.ignored, report.resized) == ("timm", (), (), ())
    assert set(report.loaded) == set(state)
    assert str(report) == f"{len(state)} tensors loaded (layout: timm)"
    family = VisionTransformerDistilled if theirs.pop("distilled", False) else VisionTransformer
    family(img_size=16, num_classes=3, **SIZES, **theirs).load_state_dict(model.state_dict())


def beside(**shapes: tuple[int, ...]) -> State:
    return {name.replace("__", "."): torch.randn(shape) for name, shape in shapes.items()}


MAE = beside(
    mask_token=(1, 1, 8),
    decoder_pos_embed=(1, 17, 8),
    decoder_embed__weight=(8, 16),
    decoder_embed__bias=(8,),
    decoder_blocks__0__attn__qkv__weight=(24, 8),
    decoder_norm__weight=(8,),
    decoder_pred__weight=(48, 8),
)
DINO = beside(
    head__mlp__0__weight=(8, 16), head__last_layer__weight_g=(9, 1), head__last_layer__weight_v=(9, 4)
)
MSN = beside(
    fc__fc1__weight=(8, 16),
    fc__bn1__running_mean=(8,),
    fc__bn1__num_batches_tracked=(),
    fc__fc3__weight=(4, 8),
)


def test_the_full_checkpoint_of_mae() -> None:
    encoder, model = timm_state(num_classes=0), tiny(positions="sincos")
    report = load_weights(model, {"model": {**encoder, **MAE}, "epoch": 3}, replace=["head"])
    same(model, encoder, ("head.weight", "head.bias"))
    assert (report.layout, report.part) == ("facebookresearch/mae", "model")
    assert report.fresh == ("head.weight", "head.bias")
    assert set(report.ignored) == set(MAE)
    assert "left out: mask_token, decoder_pos_embed, decoder_embed.weight" in str(report)
    assert "started fresh: head.weight, head.bias" in str(report)
    refused(tiny(0, mask_token=True), {**encoder, **MAE}, r"1 missing \(mask_token\)")
    load_weights(tiny(0, mask_token=True), {**encoder, **MAE}, replace=["mask_token"])


def test_the_encoder_of_mae_alone() -> None:
    encoder, model = timm_state(num_classes=0), tiny(0, positions="sincos")
    assert load_weights(model, {"model": encoder}).layout == "timm"
    same(model, encoder)
    refused(tiny(), {"model": encoder}, r"2 missing \(head.weight, head.bias\); replace=\('head',\) starts")


@pytest.mark.parametrize("part", [None, "teacher", "student"])
def test_a_checkpoint_of_dino(part: str | None) -> None:
    teacher, student, model = timm_state(num_classes=0), timm_state(num_classes=0), tiny(0)
    student = {name: value + 1 for name, value in student.items()}
    checkpoint = {
        "student": {f"module.backbone.{n}": v for n, v in student.items()}
        | {f"module.{n}": v for n, v in DINO.items()},
        "teacher": {f"backbone.{n}": v for n, v in teacher.items()} | DINO,
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}},
        "dino_loss": {"center": torch.zeros(1, 9)},
        "epoch": 4,
    }
    report = load_weights(model, checkpoint, part=part)
    same(model, student if part == "student" else teacher)
    assert report.layout == "facebookresearch/dino"
    assert report.part == (part or "teacher")
    assert set(report.beside) == set(checkpoint) - {"epoch", report.part}
    assert set(report.ignored) == set(DINO)
    assert "dino, teacher of the checkpoint" in str(report) or part == "student"


def test_the_backbone_of_dino_alone() -> None:
    state, model = timm_state(num_classes=0), tiny(0)
    assert load_weights(model, {f"module.{n}": v for n, v in state.items()}).layout == "timm"
    same(model, state)


def test_a_checkpoint_of_msn() -> None:
    state, model = timm_state(num_classes=0), tiny(0)
    target = {f"module.{n}": v for n, v in {**state, **MSN}.items()}
    encoder = {n: v + 1 if v.is_floating_point() else v for n, v in target.items()}
    checkpoint = {"encoder": encoder, "target_encoder": target, "prototypes": torch.zeros(5, 4)}
    report = load_weights(model, checkpoint)
    same(model, state)
    assert (report.layout, report.part) == ("facebookresearch/msn", "target_encoder")
    assert report.beside == ("encoder", "prototypes")
    assert set(report.ignored) == set(MSN)
    report = load_weights(model, {**checkpoint, "target_encoder": None})
    assert report.part == "encoder"
    same(model, {name: value + 1 for name, value in state.items()})


def test_weights_of_dinov2() -> None:
    state = timm_state(num_classes=0, init_values=0.1)
    token = torch.randn(1, 16)
    model = tiny(0, init_values=1.0, mask_token=True)
    assert load_weights(model, {**state, "mask_token": token}).layout == "facebookresearch/dinov2"
    same(model, {**state, "mask_token": token[None]})
    report = load_weights(tiny(0, init_values=1.0), {**state, "mask_token": token})
    assert report.ignored == ("mask_token",)


# ---------------------------------------------------------------- Hugging Face


def hugging_face(kind: str, config: str, **more: object) -> nn.Module:
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**{**HF, **more})).eval()
    redraw(model)
    return model


CASES: list[tuple[str, str, dict[str, object], str, Callable[[object], Tensor]]] = [
    ("ViTForImageClassification", "ViTConfig", {}, "ViT", lambda out: out.logits),
    ("ViTModel", "ViTConfig", {}, "ViT", lambda out: out.last_hidden_state[:, 0]),
    ("DeiTForImageClassificationWithTeacher", "DeiTConfig", {}, "DeiT", lambda out: out.logits),
    ("DeiTModel", "DeiTConfig", {}, "DeiT", lambda out: out.last_hidden_state[:, :2].mean(1)),
    ("ViTMSNModel", "ViTMSNConfig", {}, "ViT", lambda out: out.last_hidden_state[:, 0]),
    ("ViTMSNForImageClassification", "ViTMSNConfig", {}, "ViT", lambda out: out.logits),
    ("Dinov2Model", "Dinov2Config", {"mlp_ratio": 4}, "DINOv2", lambda out: out.last_hidden_state[:, 0]),
]


@pytest.mark.parametrize("saved", [False, True], ids=["in memory", "in a folder"])
@pytest.mark.parametrize(("kind", "config", "more", "layout", "read"), CASES, ids=[case[0] for case in CASES])
def test_the_same_as_hugging_face(
    kind: str,
    config: str,
    more: dict[str, object],
    layout: str,
    read: Callable[[object], Tensor],
    saved: bool,
    tmp_path: Path,
) -> None:
    theirs, x = hugging_face(kind, config, **more), images(3, 16, torch.float32)
    source: object = theirs.state_dict()
    if saved:
        theirs.save_pretrained(tmp_path)
        source = tmp_path
    sizes = {"distilled": layout == "DeiT"} | ({"init_values": 1.0} if layout == "DINOv2" else {})
    model = tiny(3 if "For" in kind else 0, **sizes).eval()
    report = load_weights(model, source)
    assert report.layout == f"Hugging Face {layout}"
    assert set(report.loaded) == set(model.state_dict())
    assert all("pooler" in name or "mask_token" in name for name in report.ignored)
    with torch.no_grad():
        expected, found = read(theirs(x)), model(x)
    assert float((found - expected).abs().max() / expected.abs().max()) <= 1e-5


def test_the_masked_autoencoder_of_hugging_face(tmp_path: Path) -> None:
    decoder = {f"decoder_{n}": 8 for n in ("hidden_size", "intermediate_size")}
    theirs = hugging_face(
        "ViTMAEForPreTraining",
        "ViTMAEConfig",
        mask_ratio=0.0,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        **decoder,
    )
    theirs.save_pretrained(tmp_path)
    x = images(2, 16, torch.float32)
    noise = torch.arange(16.0).expand(2, 16)  # every patch stays, in its place
    expected = theirs.vit(x, noise=noise).last_hidden_state
    for source in (theirs.state_dict(), tmp_path):
        model = tiny(0, positions="sincos").eval()
        report = load_weights(model, source)
        found = model(x, {"prefix", "tokens"})
        assert report.layout == "Hugging Face ViTMAE"
        assert all(name.startswith("decoder.") for name in report.ignored)
        torch.testing.assert_close(torch.cat([found.prefix, found.tokens], 1), expected, rtol=1e-5, atol=1e-5)


def test_the_usual_epsilon_of_hugging_face_hardly_shows() -> None:
    theirs, x = hugging_face("ViTForImageClassification", "ViTConfig"), images(3, 16, torch.float32)
    usual = hugging_face("ViTForImageClassification", "ViTConfig", layer_norm_eps=1e-12)
    with torch.no_grad():
        expected, found = theirs(x).logits, usual(x).logits
    assert float((found - expected).abs().max() / expected.abs().max()) <= 1e-4


def test_a_part_of_qkv_that_is_missing_is_named() -> None:
    state = hugging_face("ViTForImageClassification", "ViTConfig").state_dict()
    del state["vit.layers.1.attention.k_proj.bias"]
    line = refused(tiny(), state, r"1 missing \(blocks.1.attn.qkv.bias\)")
    assert (
        "2 not in the model (vit.layers.1.attention.q_proj.bias, vit.layers.1.attention.v_proj.bias)" in line
    )


def test_another_number_of_heads_is_told_by_the_config(tmp_path: Path) -> None:
    hugging_face("ViTModel", "ViTConfig", num_attention_heads=4).save_pretrained(tmp_path)
    refused(tiny(0), tmp_path, r"4 attention heads, this one has num_heads 2")


# ---------------------------------------------------------------- envelopes


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"model": s, "optimizer": {"state": {}}, "epoch": 3},
        lambda s: {"state_dict": {f"module.{n}": v for n, v in s.items()}},
        lambda s: {"model": {"state_dict": s}},
        lambda s: {f"_orig_mod.module.{n}": v for n, v in s.items()},
        lambda s: {f"encoder.{n}": v for n, v in s.items()},
        lambda s: {"model": s, "model_ema": {n: v + 1 for n, v in s.items()}},
    ],
)
def test_envelopes(wrap: Callable[[State], dict[str, object]]) -> None:
    state, model = timm_state(), tiny()
    report = load_weights(model, wrap(state))
    same(model, state)
    assert report.beside in ((), ("model_ema",))


def test_wrong_envelopes() -> None:
    state = timm_state()
    refused(tiny(), {"a": state, "b": state}, r"part: none of the usual ones is there; give one of: a, b")
    refused(tiny(), {"model": state}, r"part: given 'modl'; allowed: model; did you mean", part="modl")
    refused(tiny(), state, r"part: given 'teacher', but these weights have no parts", part="teacher")
    refused(tiny(), {**state, "epoch": 3}, r"1 entries are no named tensors \(epoch\)")
    refused(tiny(), {0: torch.zeros(1)}, r"1 entries are no named tensors \(0\)")
    refused(tiny(), {}, "no tensors in it")
    twice = {"backbone.head.weight": state["head.weight"], **state}
    refused(tiny(), twice, r"with and without 'backbone.' there are two of backbone.head.weight")


# ---------------------------------------------------------------- resolutions


@pytest.mark.parametrize("more", [{}, {"distilled": True}])
def test_positions_are_brought_to_another_resolution(more: dict[str, object]) -> None:
    state, model = timm_state(**more), tiny(size=24, **more)
    prefix = 2 if more else 1
    report = load_weights(model, state)
    grid = state["pos_embed"][:, prefix:].reshape(1, 4, 4, 16).permute(0, 3, 1, 2)
    fine = nn.functional.interpolate(grid, size=(6, 6), mode="bicubic", align_corners=False)
    expected = torch.cat([state["pos_embed"][:, :prefix], fine.permute(0, 2, 3, 1).flatten(1, 2)], 1)
    torch.testing.assert_close(model.pos_embed, expected, rtol=1e-6, atol=1e-6)
    assert [tuple(r) for r in report.resized] == [("pos_embed", f"1×{prefix + 16}×16", f"1×{prefix + 36}×16")]
    assert f"resized: pos_embed 1×{prefix + 16}×16 → 1×{prefix + 36}×16" in str(report)


def test_positions_that_are_no_grid_are_refused() -> None:
    refused(tiny(size=24), {**timm_state(), "pos_embed": torch.zeros(1, 16, 16)}, "pos_embed: given 1×16×16")
    refused(tiny(distilled=True), timm_state(), r"3 missing \(dist_token, head_dist.weight, head_dist.bias\)")


# ---------------------------------------------------------------- refusals


def test_all_that_does_not_fit_is_named() -> None:
    state = timm_state()
    del state["norm.bias"], state["blocks.1.mlp.fc2.bias"]
    state["patch_embed.proj.wieght"] = state.pop("patch_embed.proj.weight")
    state["blocks.0.attn.proj.weight"] = torch.zeros(16, 8)
    line = refused(tiny(), state, "the weights do not fit the model")
    assert "3 missing (patch_embed.proj.weight, blocks.1.mlp.fc2.bias, norm.bias)" in line
    assert "1 not in the model (patch_embed.proj.wieght)" in line
    assert "1 of other shape (blocks.0.attn.proj.weight: given 16×8, model 16×16)" in line


DAMAGES: list[Callable[[State, str], object]] = [
    lambda state, name: state.pop(name),
    lambda state, name: state.update({f"q{name}": state.pop(name)}),
    lambda state, name: state.update({f"{name}.x": torch.zeros(1)}),
    lambda state, name: state.update({name: torch.zeros(())}),
    lambda state, name: state.update({name: torch.zeros(0, 3)}),
    lambda state, name: state.update({name: state[name].flatten()[:2].clone()}),
]


@pytest.mark.parametrize("name", [name for name in SMALL if name != "torchvision"])
def test_damaged_weights_of_any_family_are_refused(name: str) -> None:
    model, state = small(name), small(name).state_dict()
    whole = [n for n, value in state.items() if value.numel() > 2]
    for i, damage in enumerate(DAMAGES * 3):
        harmed, victim = dict(state), whole[i * 7 % len(whole)]
        damage(harmed, victim)
        assert victim in refused(model, harmed, "the weights do not fit the model")


def test_numbers_of_another_type_are_no_weights() -> None:
    state = timm_state()
    state["blocks.0.mlp.fc1.weight"] = state["blocks.0.mlp.fc1.weight"].to(torch.int8)
    refused(
        tiny(), state, r"1 of other type \(blocks.0.mlp.fc1.weight: given torch.int8, model torch.float32\)"
    )
    half, model = {name: value.half() for name, value in timm_state().items()}, tiny()
    load_weights(model, half)
    assert torch.equal(model.norm.weight, half["norm.weight"].float())


def test_heads_of_another_number_of_classes() -> None:
    state, model = timm_state(num_classes=5), tiny()
    refused(model, state, r"head.weight: given 5×16, model 3×16.*; replace=\('head',\) starts the head fresh")
    before = model.head.weight.clone()
    report = load_weights(model, state, replace=("head",))
    assert torch.equal(model.head.weight, before)
    assert set(report.fresh) == set(report.ignored) == {"head.weight", "head.bias"}


def test_names_of_two_layouts_at_once() -> None:
    both = {**timm_state(), **hugging_face("ViTForImageClassification", "ViTConfig").state_dict()}
    refused(tiny(), both, "the names are of timm and of Hugging Face ViT at once")
    refused(tiny(0), {**timm_state(num_classes=0), **MAE, **DINO}, "mae and of facebookresearch/dino at once")


def test_names_of_no_layout() -> None:
    state = nn.Sequential(nn.Linear(2, 3)).state_dict()
    refused(tiny(), state, r"not the names of a ViT \(2 tensors: 0.weight, 0.bias\); known: timm, facebook")
    assert len(LAYOUTS[ViT]) == len({layout.source for layout in LAYOUTS[ViT]})


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".pth.tar", ".safetensors"])
def test_files(suffix: str, tmp_path: Path) -> None:
    state, model, file = timm_state(), tiny(), tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(state, file)
    else:
        torch.save({"model": state, "args": argparse.Namespace(lr=1e-3, data="/x")}, file)
    report = load_weights(model, file)
    same(model, state)
    assert report.part == ("" if suffix == ".safetensors" else "model")
    file.write_bytes(file.read_bytes()[:-2000])
    refused(tiny(), file, "damaged")
    file.write_bytes(b"")
    refused(tiny(), str(file), "damaged")


def test_a_model_folder(tmp_path: Path) -> None:
    source, model = tiny(), tiny(5)
    redraw(source)
    save_model(source, tmp_path, preprocess={}, labels=[])
    load_weights(model, tmp_path, replace=["head"])
    assert torch.equal(model.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)
    refused(tiny(num_heads=4), tmp_path, "2 attention heads, this one has num_heads 4")
    (tmp_path / "config.json").write_text("{")
    refused(model, tmp_path, r"config.json: damaged")
    (tmp_path / "model.safetensors").unlink()
    refused(model, tmp_path, "no model.safetensors in this folder")


class Hostile:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("hostile",)


@pytest.mark.parametrize("way", ["torch", "old pickle", "pickle"])
def test_no_file_runs_code(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file, content = tmp_path / "weights.pth", {"model": timm_state(), "extra": Hostile()}
    if way == "torch":
        torch.save(content, file)
    else:
        file.write_bytes(pickle.dumps(Hostile(), protocol=2 if way == "old pickle" else 5))
    line = refused(
        tiny(), file, "no checkpoint of torch" if way == "pickle" else "so that no file can run code"
    )
    assert "mkdir" in line or way == "pickle"
    assert not (tmp_path / "hostile").exists()


def test_files_that_are_none(tmp_path: Path) -> None:
    refused(tiny(), tmp_path / "none.pth", "no such file or folder; weights are read from here")
    refused(tiny(), "google/vit-base-patch16-224", "nothing is downloaded")
    (tmp_path / "weights.npz").write_bytes(b"x")
    refused(tiny(), tmp_path / "weights.npz", r"given a .npz; allowed: .safetensors, .pth")
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    refused(tiny(), tmp_path / "list.pt", "holds a list; expected tensors by name")
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as archive:
        archive.writestr("a.txt", "hello")
    refused(tiny(), tmp_path / "other.pt", "damaged, or no checkpoint of torch")


@pytest.mark.parametrize("replace", [("haed",), ("head.wei",), ("blocks.9",)])
def test_a_part_that_is_none_cannot_start_fresh(replace: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match=f"replace: given '{replace[0]}', which no tensor's name begins with"):
        load_weights(tiny(), tiny().state_dict(), replace=replace)


def test_one_part_as_plain_text() -> None:
    assert load_weights(tiny(), tiny().state_dict(), replace="head").fresh == ("head.weight", "head.bias")


def test_weights_of_another_family_are_recognised() -> None:
    vit, swin, cvt = (small(name) for name in ("vit_tiny", "swin_tiny", "cvt_13"))
    state = vit.state_dict()
    refused(
        swin, state, r"weights of a ViT \(timm\), but the model is a Swin; give weights of this one, or build"
    )
    refused(cvt, state, r"weights of a ViT \(timm\), but the model is a CvT")
    refused(vit, cvt.state_dict(), r"weights of a CvT \(microsoft/CvT\), but the model is a ViT")

"""A ViT as BEiT has it: relative positions, biases and start against transformers and the authors' rules."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import EXACT, THEIR_SIZES, images, redraw, worst
from torch import Tensor, nn
from transformers import BeitConfig, BeitForImageClassification, BeitForMaskedImageModeling

from vitlab.config import UserError
from vitlab.jobs.training import _start_from
from vitlab.models import ViT, create_model, load_model, load_weights, save_model
from vitlab.models.export import export_onnx, export_timm
from vitlab.models.layouts.beit import _hugging_face
from vitlab.models.parts.relative import RelativeBias, pairs, retabled

SIZES = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4, "init_values": 0.1}
BEIT = {**SIZES, "positions": "none", "key_bias": False, "init": "beit"}


def small(image_size: Any = 16, classes: int = 7, **more: Any) -> ViT:
    torch.manual_seed(0)
    given: dict[str, Any] = {**BEIT, "relative": "block", **more}
    model = create_model("vit_tiny", num_classes=classes, image_size=image_size, **given)
    assert isinstance(model, ViT)
    return model


def reference(kind: Any, **more: Any) -> nn.Module:
    return kind(
        BeitConfig(
            image_size=16,
            patch_size=4,
            **THEIR_SIZES,
            layer_norm_eps=1e-6,
            layer_scale_init_value=0.1,
            vocab_size=11,
            num_labels=7,
            drop_path_rate=0.0,
            **more,
        )
    )


def only(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    return {n: t for n, t in state.items() if n in model.state_dict()}


KINDS = {
    "block, mean": (
        {"use_relative_position_bias": True, "use_mean_pooling": True},
        {"relative": "block", "pool": "mean"},
    ),
    "shared, token": (
        {"use_shared_relative_position_bias": True, "use_mean_pooling": False},
        {"relative": "shared"},
    ),
    "absolute": (
        {"use_absolute_position_embeddings": True, "use_mean_pooling": True},
        {"relative": "none", "positions": "learned", "pool": "mean"},
    ),
}


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_as_transformers(kind: str, dtype: torch.dtype) -> None:
    theirs, mine = KINDS[kind]
    official, ours = reference(BeitForImageClassification, **theirs), small(**mine)
    redraw(official)
    report = load_weights(ours, official.state_dict())
    assert report.layout == "Hugging Face BEiT"
    assert not report.fresh
    ours, official, x = ours.to(dtype).eval(), official.to(dtype).eval(), images(5, 16, dtype)
    outputs = (ours(x), official(x).logits)
    for output in outputs:
        nn.functional.cross_entropy(output, torch.arange(5)).backward()
    found = {n: p.grad for n, p in ours.named_parameters()}
    converted = _hugging_face({n: p.grad for n, p in official.named_parameters()}, ours)
    figures = {
        "logits": worst({"logits": outputs[0]}, {"logits": outputs[1]}),
        "gradients": worst(found, only(converted, ours)),
    }
    print("BEiT", kind, dtype, figures)
    assert all(figure <= EXACT[dtype] for figure in figures.values()), figures


def test_the_table_written_out() -> None:
    """The authors' table: queries down, keys across, class token last."""
    grid, part = (2, 3), RelativeBias((2, 3), 2).double()
    redraw(part)
    bias, table = part(grid), part.table
    assert table.shape == (3 * 5 + 3, 2)
    for q in range(7):
        for k in range(7):
            if q and k:
                (a, b), (c, d) = divmod(q - 1, 3), divmod(k - 1, 3)
                row = (a - c + 1) * 5 + (b - d + 2)
            else:
                row = 15 + (2 if q == k else 0 if q == 0 else 1)
            assert torch.equal(bias[:, q, k], table[row]), (q, k)
    assert set(pairs(grid).flatten().tolist()) == set(range(18))


def test_attention_adds_the_bias_before_its_softmax() -> None:
    model = small().double().eval()
    redraw(model)
    x = images(2, 16, torch.float64)
    found = model(x, {"attentions", "logits"})
    torch.testing.assert_close(found.logits, model(x), rtol=1e-12, atol=1e-12)
    block = model.blocks[0]
    tokens = torch.cat([model.cls_token.expand(2, -1, -1), model.patch_embed(x)], 1)
    q, k, _ = block.attn.qkv(block.norm1(tokens))
    scores = q @ k.mT / math.sqrt(8) + model.rel_pos_bias[0]((4, 4))
    torch.testing.assert_close(found.attentions[0], scores.softmax(-1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("relative", ["shared", "block"])
def test_where_only_the_class_token_is_read_it_alone_is_computed(relative: str) -> None:
    model = small(relative=relative).double().eval()
    redraw(model)
    x = images(3, 16, torch.float64)
    torch.testing.assert_close(model(x), model(x, {"logits", "tokens"}).logits, rtol=1e-12, atol=1e-12)


def test_recomputed_blocks_give_the_same_gradients() -> None:
    x, found = images(3, 16, torch.float32), []
    for again in (False, True):
        model = small(drop_path=0.5).train()
        redraw(model)
        model.recompute = again
        model(x, seeds=torch.arange(3)).square().sum().backward()
        found.append({n: p.grad for n, p in model.named_parameters()})
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])


def test_half_precision_is_near() -> None:
    model = small().eval()
    redraw(model)
    x = images(3, 16, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        near = model(x)
    torch.testing.assert_close(near.float(), model(x), rtol=0.1, atol=0.1)


def test_images_of_another_size() -> None:
    """Distances are resampled: those of the same patches keep their place, the class token its rows."""
    table = torch.arange(7 * 7 + 3.0)[:, None].repeat(1, 2).double()
    finer = retabled(table, (4, 4), (6, 4))
    assert finer.shape == (11 * 7 + 3, 2)
    assert torch.equal(finer[-3:], table[-3:])
    assert torch.equal(retabled(table, (4, 4), (4, 4)), table)
    torch.testing.assert_close(finer[:-3, 0].view(11, 7)[5], table[:-3, 0].view(7, 7)[3])  # distance 0 down
    model = small().eval()
    redraw(model)
    larger = small(image_size=24).eval()
    report = load_weights(larger, model.state_dict())
    assert {one.name for one in report.resized} == {"rel_pos_bias.0.table", "rel_pos_bias.1.table"}
    x = images(2, 24, torch.float32)
    torch.testing.assert_close(larger(x), model(x))


def test_the_shared_table_becomes_that_of_every_block(tmp_path: Path) -> None:
    pretrained = small(relative="shared", classes=0, mask_token=True)
    redraw(pretrained)
    save_model(pretrained, tmp_path / "model", preprocess={}, labels=[])
    model = small(relative="block", pool="mean")
    head = model.head.weight.clone()
    _start_from(model, tmp_path / "model")
    for part in model.rel_pos_bias:
        assert torch.equal(part.table, pretrained.rel_pos_bias[0].table)
    assert model.rel_pos_bias[0].table is not model.rel_pos_bias[1].table
    assert torch.equal(model.blocks[1].attn.qkv.q_bias, pretrained.blocks[1].attn.qkv.q_bias)
    assert torch.equal(model.head.weight, head)
    x, same = images(2, 16, torch.float32), small(relative="block", classes=0)
    _start_from(same, tmp_path / "model")
    torch.testing.assert_close(same.eval()(x), pretrained.eval()(x))
    with pytest.raises(UserError, match=r"not in the model \(rel_pos_bias.0.table"):
        _start_from(small(relative="none"), tmp_path / "model")


def test_a_model_folder(tmp_path: Path) -> None:
    model = small().eval()
    redraw(model)
    save_model(model, tmp_path / "model", preprocess={}, labels=list("abcdefg"))
    loaded = load_model(tmp_path / "model").model.eval()
    x = images(2, 16, torch.float32)
    assert torch.equal(loaded(x), model(x))
    assert load_weights(small(), model.state_dict()).layout == "timm"


def unilm(official: dict[str, Tensor], *, shared: bool) -> dict[str, Tensor]:
    """Names of the authors' code for our tensors."""
    out = {}
    for name, value in official.items():
        name = name.replace(".attn.qkv.q_bias", ".attn.q_bias").replace(".attn.qkv.v_bias", ".attn.v_bias")
        name = name.replace(".ls1.gamma", ".gamma_1").replace(".ls2.gamma", ".gamma_2")
        if name.startswith("rel_pos_bias."):
            number = name.split(".")[1]
            place = "rel_pos_bias" if shared else f"blocks.{number}.attn"
            out[f"{place}.relative_position_index"] = pairs((4, 4))
            name = f"{place}.relative_position_bias_table"
        out[name] = value
    return out


@pytest.mark.parametrize("relative", ["shared", "block"])
def test_checkpoints_of_the_authors(relative: str) -> None:
    source = small(relative=relative, mask_token=True).eval()
    redraw(source)
    state = unilm(source.state_dict(), shared=relative == "shared")
    state |= {"lm_head.weight": torch.zeros(11, 32), "lm_head.bias": torch.zeros(11)}
    x = images(2, 16, torch.float32)
    for key_bias in (False, True):
        model = small(relative="block", key_bias=key_bias).eval()
        report = load_weights(model, {"model": state})
        assert report.layout == "microsoft/unilm beit"
        assert {"lm_head.weight", "mask_token"} <= set(report.ignored)
        torch.testing.assert_close(model(x), source(x), rtol=1e-4, atol=1e-5)


def test_files_of_hugging_face_have_other_names() -> None:
    official = reference(
        BeitForMaskedImageModeling, use_shared_relative_position_bias=True, use_mask_token=True
    )
    redraw(official)
    state = official.state_dict()
    older = {}
    for name, value in state.items():
        name = name.replace("beit.layers.", "beit.encoder.layer.")
        name = name.replace("beit.shared_position_bias.", "beit.encoder.relative_position_bias.")
        for new, old in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")):
            name = name.replace(f"attention.{new}", f"attention.attention.{old}")
        name = name.replace("attention.o_proj", "attention.output.dense")
        name = name.replace("mlp.fc1", "intermediate.dense").replace("mlp.fc2", "output.dense")
        older[name] = value
    models = [small(relative="shared", classes=0, mask_token=True) for _ in range(2)]
    for model, given in zip(models, (state, older), strict=True):
        assert load_weights(model, given).layout == "Hugging Face BEiT"
    first, second = (model.state_dict() for model in models)
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_the_start_of_the_authors() -> None:
    model = small(embed_dim=128, depth=3, relative="shared", mask_token=True, positions="learned")
    drawn = 0.02 * 0.5397  # of a normal cut at ±σ
    for name in (
        "blocks.0.attn.qkv.weight",
        "patch_embed.proj.weight",
        "blocks.2.mlp.fc1.weight",
        "pos_embed",
    ):
        value = model.get_parameter(name).detach()
        assert float(value.std()) == pytest.approx(drawn, rel=0.05), name
        assert float(value.abs().max()) <= 0.02
    for i in range(3):
        for layer in ("attn.proj", "mlp.fc2"):
            value = model.get_parameter(f"blocks.{i}.{layer}.weight").detach()
            assert float(value.std()) == pytest.approx(drawn / math.sqrt(2 * (i + 1)), rel=0.05)
    assert float(model.head.weight.detach().abs().max()) <= 2e-5
    zero = [n for n, p in model.named_parameters() if not p.any()]
    assert all(n.endswith(("bias", "table")) for n in zero)
    assert {"patch_embed.proj.bias", "rel_pos_bias.0.table", "blocks.0.attn.qkv.q_bias"} <= set(zero)


def test_layers_and_decay() -> None:
    """Tables are decayed, as every matrix in the authors' code."""
    model = small(mask_token=True)
    assert [model.layer_of(f"rel_pos_bias.{i}.table") for i in range(2)] == [1, 2]
    assert small(relative="shared").layer_of("rel_pos_bias.0.table") == 3
    assert model.layer_of("blocks.1.attn.qkv.q_bias") == 2
    assert model.no_decay() == {"cls_token", "mask_token"}
    assert sum(p.numel() for p in RelativeBias((14, 14), 12).parameters()) == 732 * 12


def test_every_parameter_learns() -> None:
    model = small(mask_token=True).train()
    redraw(model)
    mask = torch.arange(16).expand(3, -1) < 6
    model(images(3, 16, torch.float32), mask=mask).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_onnx(tmp_path: Path) -> None:
    model = small().eval()
    redraw(model)
    assert export_onnx(model, tmp_path / "model.onnx").difference < 1e-3


def test_refusals() -> None:
    with pytest.raises(UserError, match="a distilled model has two; allowed: none"):
        create_model("deit_tiny", num_classes=3, image_size=16, **{**SIZES, "relative": "shared"})
    with pytest.raises(UserError, match="keep: ViT needs every patch"):
        small()(images(1, 16, torch.float32), keep=torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(UserError, match="timm computes relative: none, the model has block"):
        export_timm(small())
    with pytest.raises(UserError, match="timm computes key_bias: True, the model has False"):
        export_timm(small(relative="none"))

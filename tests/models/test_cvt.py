"""CvT against Hugging Face's, its sizes against the paper, and what this project adds to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from parity import EXACT, gradients, images, redraw, step, worst
from torch import Tensor, nn
from transformers import CvtConfig, CvtForImageClassification
from transformers.activations import QuickGELUActivation

from vitlab.config import UserError, build, resolved
from vitlab.models import MODELS, load_state, load_weights
from vitlab.models.cvt import PRESETS, CvT, CvTConfig, Name
from vitlab.models.layouts.cvt import LAYOUTS
from vitlab.models.parts.norm import BatchNorm2d
from vitlab.models.parts.transformer import SampleDrop

SIZES: dict[str, Any] = {"embed_dims": [8, 16, 24], "num_heads": [1, 2, 3], "depths": [1, 2, 3]}
HUGGING = {"embed_dim": (8, 16, 24), "num_heads": (1, 2, 3), "depth": (1, 2, 3), "num_labels": 7}


def small(num_classes: int = 7, size: int | tuple[int, int] = 64, **more: Any) -> CvT:
    return CvT(build(CvTConfig, {"name": "cvt_13", **SIZES, **more}), num_classes, size)


def redrawn(model: nn.Module) -> Any:
    """Every tensor anew. Running variances are positive, and norms scale by about 1, the other weights less:
    with a flat softmax, or one that picks one key, small gradients are differences of large numbers.
    """
    redraw(model)
    with torch.no_grad():
        for value in model.parameters():
            value.mul_(0.6 if value.ndim > 1 else 1.0)
        for module in model.modules():
            if isinstance(module, nn.LayerNorm | nn.BatchNorm2d):
                module.weight.add_(1.0)
        for name, value in model.named_buffers():
            if name.endswith("running_var"):
                value.abs_().add_(0.5)
    return model


def hugging_face(quick: bool = False, **more: Any) -> CvtForImageClassification:
    model = CvtForImageClassification(CvtConfig(**{**HUGGING, "drop_path_rate": (0.0, 0.0, 0.0), **more}))
    if quick:
        for module in model.modules():
            if isinstance(getattr(module, "activation", None), nn.GELU):
                module.activation = QuickGELUActivation()
    return redrawn(model)


def renamed(tensors: dict[str, Tensor], model: CvT) -> dict[str, Tensor]:
    source = next(layout for layout in LAYOUTS if layout.source == "Hugging Face")
    return source.convert(tensors, model)


def seeds(n: int) -> Tensor:
    return torch.arange(n) * 1_000_003 + 5


# ---------------------------------------------------------------- the same as Hugging Face

BLOCKS = ("stage0.blocks.0", "stage1.blocks.0", "stage1.blocks.1", *(f"stage2.blocks.{i}" for i in range(3)))


def faint_gradients(pool: str, train: bool) -> list[str]:
    """Tensors whose gradient is zero in exact arithmetic, or nearly.

    The softmax does not see a number added to all keys: the bias of the dense layer, and that of the batch
    norm where no class token goes round it. The class token, which alone is read of the last block, does
    not pass the convolution of its queries. In training a batch norm takes a channel's scale and shift back
    out, but at the padded border: so little is left for the layer norm where all tokens pass.
    """
    convolved = BLOCKS if pool == "mean" else BLOCKS[:3]
    names = [f"{block}.attn.proj_k.bias" for block in BLOCKS]
    names += [f"{block}.attn.conv_proj_k.bn.bias" for block in convolved]
    names += [f"{block}.norm1.{leaf}" for block in convolved for leaf in ("weight", "bias") if train]
    if pool == "token":
        names += [f"{BLOCKS[-1]}.attn.conv_proj_q.{leaf}" for leaf in ("conv.weight", "bn.weight", "bn.bias")]
    return names


OLD = {"patch_sizes": (4, 2, 2), "patch_padding": (0, 0, 0)}


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        ({"activation": "gelu"}, {}),
        ({}, {"quick": True}),
        ({"kv_stride": 1}, {"quick": True, "stride_kv": (1, 1, 1)}),
        ({"conv_embed": False}, {"quick": True, **OLD}),
        ({"pool": "mean"}, {"quick": True, "cls_token": (False, False, False)}),
    ],
    ids=["gelu", "quick_gelu", "kv_stride", "conv_embed", "mean"],
)
def test_same_as_hugging_face(
    mine: dict[str, Any], theirs: dict[str, Any], train: bool, dtype: torch.dtype
) -> None:
    reference = hugging_face(**theirs).to(dtype).train(train)
    model = small(**mine).to(dtype).train(train)
    load_state(model, renamed(reference.state_dict(), model))
    x = images(6, 64, dtype)
    output, expected = model(x), reference(x, output_hidden_states=True).logits
    for module, logits in ((model, output), (reference, expected)):
        step(module, nn.functional.cross_entropy(logits, torch.arange(6)))
    grads, their_grads = gradients(model), renamed(gradients(reference), model)
    largest = max(float(g.abs().max()) for g in their_grads.values())
    for name in faint_gradients(model.config.pool, train):
        assert float((grads.pop(name) - their_grads.pop(name)).abs().max()) <= EXACT[dtype] * largest, name
    figures = {
        "output": worst({"logits": output}, {"logits": expected}),
        "gradients": worst(grads, their_grads),
        "step": worst(dict(model.named_parameters()), renamed(dict(reference.named_parameters()), model)),
        "buffers": worst(_running(model), renamed(_running(reference), model)),
    }
    print(dtype, train, figures)
    assert all(figure <= EXACT[dtype] for figure in figures.values()), figures


def _running(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.named_buffers() if value.is_floating_point()}


def test_feature_maps_are_those_of_hugging_face() -> None:
    reference = hugging_face(quick=True).eval()
    model = small().eval()
    load_state(model, renamed(reference.state_dict(), model))
    x = torch.randn(2, 3, 75, 50)
    found = model(x, {"pyramid", "tokens", "prefix", "pooled", "logits"})
    theirs = reference.cvt(x, output_hidden_states=True)
    assert [tuple(m.shape) for m in found.pyramid] == [(2, 8, 19, 12), (2, 16, 10, 6), (2, 24, 5, 3)]
    close = {"rtol": 1e-4, "atol": 1e-4}
    for ours, expected in zip(found.pyramid[:2], theirs.hidden_states, strict=False):
        torch.testing.assert_close(ours, expected, **close)
    last = reference.layernorm(theirs.last_hidden_state.flatten(2).mT)
    torch.testing.assert_close(found.tokens, last, **close)
    assert torch.equal(found.pyramid[2].flatten(2).mT, found.tokens)
    torch.testing.assert_close(found.prefix, reference.layernorm(theirs.cls_token_value), **close)
    assert torch.equal(found.pooled, found.prefix[:, 0])
    torch.testing.assert_close(found.logits, reference(x).logits, **close)
    assert found.attentions is None


@pytest.mark.parametrize(("name", "millions"), [("cvt_13", 20.0), ("cvt_21", 31.5), ("cvt_w24", 277.0)])
def test_parameter_counts(name: str, millions: float) -> None:
    with torch.device("meta"):
        model = CvT(build(CvTConfig, {"name": name}), 1000, 224)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)


# ---------------------------------------------------------------- weights


def test_hugging_face_and_back() -> None:
    reference, model = hugging_face(), small()
    state = reference.state_dict()
    assert [layout.source for layout in LAYOUTS if layout.fits(state, model)] == ["Hugging Face"]
    assert [layout.source for layout in LAYOUTS if layout.fits(model.state_dict(), model)] == [
        "microsoft/CvT"
    ]
    converted = renamed(state, model)
    assert set(converted) == set(model.state_dict())
    names = {renamed({name: value}, model).popitem()[0]: name for name, value in state.items()}
    load_state(model, converted)
    back = {names[name]: value for name, value in model.state_dict().items()}
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], value) for name, value in state.items())


def test_the_model_without_a_head_loads_too() -> None:
    reference, model = hugging_face(), small(3)
    report = load_weights(model, reference.cvt.state_dict(), replace=["norm", "head"])
    assert report.layout == "Hugging Face"
    assert report.fresh == ("norm.weight", "norm.bias", "head.weight", "head.bias")
    expected = reference.cvt.encoder.stages[2].cls_token
    assert torch.equal(model.stage2.cls_token, expected)


def test_names_are_those_of_the_authors() -> None:
    names = set(small().state_dict())
    attention = "stage2.blocks.1.attn"
    for name in (
        "stage0.patch_embed.proj.bias",
        "stage0.patch_embed.norm.weight",
        "stage1.blocks.0.norm1.weight",
        f"{attention}.conv_proj_q.conv.weight",
        f"{attention}.conv_proj_k.bn.running_var",
        f"{attention}.proj_v.bias",
        f"{attention}.proj.weight",
        "stage2.blocks.1.mlp.fc1.weight",
        "stage2.cls_token",
        "norm.bias",
        "head.weight",
    ):
        assert name in names


def test_initialisation() -> None:
    torch.manual_seed(0)
    model = small(embed_dims=[64, 64, 64], num_heads=[1, 1, 1], positions="learned")
    weights = model.stage1.blocks[0].mlp.fc1.weight, model.stage2.pos_embed, model.head.weight
    for weight in weights:
        assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert not model.stage1.blocks[0].attn.proj_k.bias.any()
    assert model.stage2.cls_token.any()
    assert model.head.bias.any()
    depthwise = model.stage0.blocks[0].attn.conv_proj_q.conv.weight  # uniform within ±1/√9
    assert float(depthwise.detach().std()) == pytest.approx(1 / 3 / 3**0.5, rel=0.1)


# ---------------------------------------------------------------- options


def test_linear_projections_are_convolutions_that_do_nothing() -> None:
    model = redrawn(small(conv_projection=["linear"] * 3)).double().eval()
    other = small(kv_stride=1).double().eval()
    other.load_state_dict(model.state_dict(), strict=False)
    for module in other.modules():
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            nn.init.zeros_(module.weight)
            nn.init.ones_(module.weight[:, :, 1, 1])
        if isinstance(module, BatchNorm2d):
            module.eps = 0.0
    x = images(2, 64, torch.float64)
    torch.testing.assert_close(model(x), other(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pool", ["token", "mean"])
def test_positions_are_added_after_the_patches(pool: str) -> None:
    model = redrawn(small(positions="learned", pool=pool)).double().eval()
    other = small(pool=pool).double().eval()
    state = model.state_dict()
    tables = {stage: state.pop(f"stage{stage}.pos_embed") for stage in range(3)}
    assert [t.shape[1] for t in tables.values()] == [256, 64, 16 + model.prefix]
    if pool == "token":
        state["stage2.cls_token"] = state["stage2.cls_token"] + tables[2][:, :1]
        tables[2] = tables[2][:, 1:]
    other.load_state_dict(state)
    for stage, table in tables.items():
        embed = other.get_submodule(f"stage{stage}.patch_embed")
        embed.register_forward_hook(lambda module, inputs, output, table=table: output + table)
    x = images(2, 64, torch.float64)
    torch.testing.assert_close(model(x), other(x), rtol=1e-12, atol=1e-12)


def test_positions_of_other_sizes() -> None:
    model = redrawn(small(positions="learned")).eval()
    large = small(positions="learned", size=(96, 64)).eval()
    state = model.state_dict()
    for name in ("stage0.pos_embed", "stage1.pos_embed", "stage2.pos_embed"):
        state[name] = large.resized(name, state[name])
        assert state[name].shape == large.state_dict()[name].shape
    assert large.resized("head.weight", state["head.weight"]) is None
    assert large.resized("stage0.pos_embed", torch.zeros(1, 11, 8)) is None
    assert torch.equal(state["stage2.pos_embed"][:, 0], model.stage2.pos_embed[:, 0])
    large.load_state_dict(state)
    x = torch.randn(2, 3, 96, 64)
    torch.testing.assert_close(model(x), large(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("more", "gone", "new"),
    [
        ({"pool": "mean"}, {"stage2.cls_token"}, set()),
        ({"positions": "learned"}, set(), {f"stage{i}.pos_embed" for i in range(3)}),
        ({"kv_stride": 1}, set(), set()),
        ({"conv_embed": False}, set(), set()),
        ({"activation": "gelu"}, set(), set()),
    ],
)
def test_options_change_the_tensors_they_name(more: dict[str, Any], gone: set[str], new: set[str]) -> None:
    plain, model = set(dict(small().named_parameters())), small(**more)
    names = set(dict(model.named_parameters()))
    assert (plain - names, names - plain) == (gone, new)
    model(images(2, 64, torch.float32)).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is None} == set()


@pytest.mark.parametrize("stage", range(3))
def test_projection_of_one_stage(stage: int) -> None:
    chosen = ["linear" if i == stage else "dw_bn" for i in range(3)]
    plain, model = set(small().state_dict()), small(conv_projection=chosen)
    gone = plain - set(model.state_dict())
    assert gone == {name for name in plain if name.startswith(f"stage{stage}.") and ".conv_proj_" in name}
    assert model.config.batch_norm
    assert not small(conv_projection=["linear"] * 3).config.batch_norm
    model(images(2, 64, torch.float32)).sum().backward()


@pytest.mark.parametrize("size", [(33, 47), (32, 96), (61, 61)])
@pytest.mark.parametrize("more", [{}, {"positions": "learned"}, {"conv_embed": False}])
def test_any_size(size: tuple[int, int], more: dict[str, Any]) -> None:
    model = small(**more).eval()
    found = model(torch.randn(2, 3, *size), {"tokens", "pyramid", "logits"})
    grid = model.config.grid(size)
    assert found.tokens.shape == (2, grid[0] * grid[1], 24)
    assert tuple(found.pyramid[2].shape[2:]) == grid
    assert [tuple(m.shape[2:]) for m in found.pyramid] == model.config.grids(size)
    assert found.logits.shape == (2, 7)
    assert found.logits.isfinite().all()


# ---------------------------------------------------------------- what is read


@pytest.mark.parametrize("more", [{}, {"pool": "mean"}, {"conv_projection": ["dw_bn", "dw_bn", "linear"]}])
def test_unread_tokens_change_nothing(more: dict[str, Any]) -> None:
    """The logits alone, and with tokens wanted: the same numbers, gradients and running statistics."""
    one, two = redrawn(small(**more)).double().train(), redrawn(small(**more)).double().train()
    x = images(4, 64, torch.float64)
    alone, whole = one(x), two(x, {"logits", "tokens", "pyramid", "prefix"} & two.gives).logits
    alone.square().sum().backward()
    whole.square().sum().backward()
    torch.testing.assert_close(alone, whole, rtol=1e-12, atol=1e-12)
    largest = max(float(p.grad.abs().max()) for p in two.parameters())
    for (name, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12 * largest, msg=name)
    for a, b in zip(one.buffers(), two.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_open_attention_is_the_fused_one() -> None:
    model = redrawn(small()).eval()
    x = images(2, 64, torch.float32)
    found = model(x, {"attentions", "logits"})
    assert [tuple(a.shape) for a in found.attentions] == [
        (2, 1, 256, 64),
        *[(2, 2, 64, 16)] * 2,
        *[(2, 3, 17, 5)] * 3,
    ]
    torch.testing.assert_close(found.attentions[0].sum(-1), torch.ones(2, 1, 256))
    torch.testing.assert_close(found.logits, model(x), rtol=1e-4, atol=1e-5)


def test_blocks_that_are_computed_again_give_the_same_gradients() -> None:
    kept, again = redrawn(small(drop_path=0.5)).double().train(), redrawn(small(drop_path=0.5)).double()
    again.train().recompute = True
    x = images(4, 64, torch.float64)
    for model in (kept, again):
        model(x, seeds=seeds(4)).square().sum().backward()
    for (name, p), q in zip(kept.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12, msg=name)
    for a, b in zip(kept.buffers(), again.buffers(), strict=True):
        assert torch.equal(a, b)  # running statistics move once


def test_half_precision() -> None:
    model = small().train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images(4, 64, torch.float32)).float().square().sum()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# ---------------------------------------------------------------- randomness, layers, config


def test_a_sample_is_the_same_in_any_batch() -> None:
    model = redrawn(small(drop_path=0.6)).double().train()
    for module in model.modules():
        if isinstance(module, BatchNorm2d):
            module.eval()  # its statistics are those of the batch
    x = images(6, 64, torch.float64)
    together = model(x, seeds=seeds(6))
    alone = torch.cat([model(x[i : i + 1], seeds=seeds(6)[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)
    assert torch.equal(together, model(x, seeds=seeds(6)))
    assert not torch.equal(together, model(x, seeds=seeds(6) + 1))
    assert not torch.equal(together, model.eval()(x))


def test_drop_path_grows_over_the_last_stage() -> None:
    model = small(drop_path=0.3)
    rates = [b.drop_path2.rate for i in range(3) for b in model.get_submodule(f"stage{i}.blocks")]
    assert rates == pytest.approx([0, 0, 0, 0, 0.15, 0.3])
    drops = [m for m in model.modules() if isinstance(m, SampleDrop)]
    assert len({m.purpose for m in drops}) == len(drops) == 12


def test_layers_and_decay() -> None:
    model = small(positions="learned")
    layers = {name: model.layer_of(name) for name, _ in model.named_parameters()}
    assert layers["stage0.patch_embed.proj.weight"] == layers["stage0.pos_embed"] == 0
    assert layers["stage0.blocks.0.norm1.weight"] == 1
    assert layers["stage1.patch_embed.norm.bias"] == layers["stage1.blocks.0.attn.proj.bias"] == 2
    assert layers["stage1.blocks.1.mlp.fc1.weight"] == 3
    assert layers["stage2.cls_token"] == layers["stage2.pos_embed"] == 4
    assert layers["stage2.blocks.2.mlp.fc2.weight"] == 6
    assert layers["norm.weight"] == layers["head.bias"] == model.num_layers - 1 == 7
    assert set(layers.values()) == set(range(model.num_layers))
    assert model.no_decay() == {"stage2.cls_token", *(f"stage{i}.pos_embed" for i in range(3))}
    assert small().no_decay() == {"stage2.cls_token"}


def test_presets_and_their_config() -> None:
    assert set(Name.__args__) == set(PRESETS) <= set(MODELS)
    config = build(CvTConfig, {"name": "cvt_21", "drop_path": 0.1})
    assert resolved(config)["depths"] == [1, 4, 16]
    assert build(CvTConfig, resolved(config)) == config
    assert config.grid((224, 224)) == (14, 14)
    assert config.grids((384, 224)) == [(96, 56), (48, 28), (24, 14)]
    model = small(0, (64, 96))
    assert isinstance(model.head, nn.Identity)
    assert (model.image_size, model.num_classes, model.config.num_classes) == ((64, 96), 0, 0)
    assert model.eval()(torch.zeros(1, 3, 64, 96)).shape == (1, 24)


@pytest.mark.parametrize(
    ("size", "more", "line"),
    [
        (64, {"num_heads": [1, 3, 3]}, r"embed_dims: 16 is not divisible by its num_heads 3"),
        (64, {"depths": [1, 2]}, r"depths"),
        (64, {"depths": [1, 2, 0]}, r"depths"),
        (64, {"depths": [1, 2.5, 3]}, r"depths"),
        (64, {"kv_stride": 3}, r"kv_stride: given 3; allowed: 1, 2"),
        (64, {"activation": "relu"}, r"activation: given .relu.; allowed: quick_gelu, gelu"),
        (64, {"conv_projection": ["dw_bn", "dw_bn", "avg"]}, r"conv_projection.*avg.*dw_bn, linear"),
        (64, {"drop_path": 1.0}, r"drop_path: given 1.0"),
        ((64, 2), {}, r"image_size 64×2: nothing is left in stage 0; give larger images"),
        ((8, 8), {"conv_embed": False}, r"image_size 8×8: nothing is left in stage 2"),
    ],
)
def test_wrong_configs(size: int | tuple[int, int], more: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line) as caught:
        small(size=size, **more)
    assert "\n" not in str(caught.value)


def test_wrong_calls() -> None:
    model, x = small(), torch.zeros(1, 3, 64, 64)
    with pytest.raises(UserError, match="images: given 1×1×64×64; expected B×3×height×width"):
        model(torch.zeros(1, 1, 64, 64))
    with pytest.raises(UserError, match="nothing is left"):
        model(torch.zeros(1, 3, 64, 1))
    with pytest.raises(UserError, match="keep: CvT needs every patch"):
        model(x, keep=torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(UserError, match="no mask token"):
        model(x, mask=torch.zeros(1, 16, dtype=torch.bool))
    with pytest.raises(UserError, match="given 'heads', which"):
        model(x, {"heads"})
    with pytest.raises(UserError, match="given 'prefix', which"):
        small(pool="mean")(x, {"prefix"})

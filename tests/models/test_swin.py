"""Swin against timm and Hugging Face, its sizes against the paper, and what this project adds to it."""

from __future__ import annotations

import re

import pytest
import torch
import transformers
from parity import EXACT, compare, redraw
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from vitlab.config import UserError, build, resolved
from vitlab.models import create_model
from vitlab.models.features import Features
from vitlab.models.layouts.swin import LAYOUTS
from vitlab.models.parts.transformer import SampleDrop
from vitlab.models.parts.windows import plan
from vitlab.models.swin import PRESETS, Name, Swin, SwinConfig

SMALL = {"patch_size": 2, "embed_dim": 8, "depths": (2, 1, 2), "num_heads": (1, 2, 4), "window_size": 4}
MICROSOFT, SIMMIM, HUGGING_FACE = LAYOUTS
Size = tuple[int, int]
State = dict[str, Tensor]


def small(size: int | Size = 32, classes: int = 5, **more: object) -> Swin:
    model = create_model("swin_tiny", num_classes=classes, image_size=size, **{**SMALL, **more})
    assert isinstance(model, Swin)
    return model


def redrawn(module: nn.Module) -> nn.Module:
    """With norms strong enough for the attention to matter: else its gradients are rounding."""
    redraw(module)
    for name, value in module.named_parameters():
        if re.search(r"norm", name) and name.endswith("weight"):
            value.data += 0.4
    return module


def timms(size: int | Size = 32, **more: object) -> SwinTransformer:
    sizes = {"num_classes": 5, "drop_path_rate": 0.0, **SMALL, **more}
    return redrawn(SwinTransformer(img_size=size, **sizes))


def pair(size: int | Size = 32, **more: object) -> tuple[Swin, SwinTransformer]:
    reference = timms(size, **more)
    model = small(size, padding="timm", **more)
    assert set(model.state_dict()) == set(reference.state_dict())
    model.load_state_dict(reference.state_dict())
    return model.eval(), reference.eval()


def images(batch: int, size: int | Size = 32, dtype: torch.dtype = torch.float32) -> Tensor:
    sides = (size, size) if isinstance(size, int) else size
    generator = torch.Generator().manual_seed(7)
    return torch.randn(batch, 3, *sides, generator=generator, dtype=torch.float64).to(dtype)


def seeds(n: int) -> Tensor:
    return torch.arange(n) * 1_000_003 + 5


# ---------------------------------------------------------------- the same as timm


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize(
    ("size", "more"),
    [
        (32, {"depths": (2, 2), "num_heads": (2, 2)}),
        (32, {"qkv_bias": False}),
        ((32, 48), {"depths": (1, 2), "num_heads": (2, 4)}),
        ((36, 44), {}),  # 18×22, 9×11, 5×6: zeros in every stage, odd sides
        ((12, 28), {}),  # 6×14, 3×7, 2×4: windows larger than a side or than both
        ((8, 8), {"depths": (2, 2), "num_heads": (2, 2)}),
    ],
    ids=["plain", "no_bias", "not_square", "filled", "shrunk", "one_window"],
)
@pytest.mark.parametrize("training", [True, False])
def test_same_as_timm(size: int | Size, more: dict[str, object], dtype: torch.dtype, training: bool) -> None:
    model, reference = pair(size, **more)
    x = images(3, size, dtype)

    def run(module: nn.Module) -> tuple[Tensor, Tensor]:
        output = module(x)
        return output, F.cross_entropy(output, torch.arange(3))

    compare(model.to(dtype).train(training), reference.to(dtype).train(training), run)


@pytest.mark.parametrize("size", [(32, 32), (48, 40), (44, 60), (36, 32)])
def test_another_resolution_is_timms_of_that_resolution(size: Size) -> None:
    model, _ = pair(32)
    reference = SwinTransformer(img_size=size, num_classes=5, **SMALL).eval()
    reference.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model(images(2, size)), reference(images(2, size)), rtol=1e-5, atol=1e-5)


def test_a_window_that_shrinks_further_reads_the_middle_of_its_table() -> None:
    model, reference = pair(32)  # 4×4 in the last stage
    smaller = SwinTransformer(img_size=16, num_classes=5, **SMALL).eval()  # 2×2 there
    state = reference.state_dict()
    for name in (n for n in state if n.startswith("layers.2") and n.endswith("table")):
        state[name] = state[name].view(7, 7, -1)[2:5, 2:5].flatten(0, 1)
    smaller.load_state_dict(state)
    x = images(2, 16)
    torch.testing.assert_close(model(x), smaller(x), rtol=1e-5, atol=1e-5)


def test_features_are_those_of_timm() -> None:
    model, reference = pair((36, 44))
    x = images(2, (36, 44))
    found = model(x, ["tokens", "prefix", "pooled", "pyramid", "logits"])
    whole, levels = reference.forward_intermediates(x, norm=True)
    torch.testing.assert_close(found.tokens, whole.flatten(1, 2), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.pooled, whole.mean((1, 2)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.logits, reference(x), rtol=1e-5, atol=1e-5)
    assert found.prefix.shape == (2, 0, 32)
    assert [tuple(level.shape) for level in found.pyramid] == [(2, 8, 18, 22), (2, 16, 9, 11), (2, 32, 5, 6)]
    for ours, theirs in zip(found.pyramid, levels, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_attentions_are_those_inside_timm() -> None:
    model, reference = pair(32)
    seen: list[Tensor] = []
    for block in (b for layer in reference.layers for b in layer.blocks):
        block.attn.softmax.register_forward_hook(lambda module, given, out: seen.append(out))
    x = images(2)
    reference(x)
    found = model(x, {"attentions", "logits"})
    assert [tuple(a.shape) for a in found.attentions] == [
        (2, 16, 1, 16, 16),
        (2, 16, 1, 16, 16),
        (2, 4, 2, 16, 16),
        (2, 1, 4, 16, 16),
        (2, 1, 4, 16, 16),
    ]
    for ours, theirs in zip(found.attentions, seen, strict=True):
        torch.testing.assert_close(ours.flatten(0, 1), theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.logits, model(x), rtol=1e-4, atol=1e-5)


def test_no_probability_is_subnormal() -> None:
    """Products of such numbers take a CPU many times as long."""
    model, _ = pair(32)
    for attention in model(images(2), {"attentions"}).attentions:
        assert not ((attention > 0) & (attention < torch.finfo(torch.float32).tiny)).any()


@pytest.mark.parametrize(
    ("name", "millions"),
    [("swin_tiny", 28.3), ("swin_small", 49.6), ("swin_base", 87.8), ("swin_large", 196.5)],
)
def test_parameter_counts(name: str, millions: float) -> None:
    with torch.device("meta"):
        model = create_model(name, num_classes=1000, image_size=224)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)


# ---------------------------------------------------------------- weights of others


def hugging_faces(size: Size) -> transformers.SwinForImageClassification:
    config = transformers.SwinConfig(
        image_size=list(size),
        patch_size=2,
        embed_dim=8,
        depths=[2, 1, 2],
        num_heads=[1, 2, 4],
        window_size=4,
        num_labels=5,
        attn_implementation="eager",
    )
    return redrawn(transformers.SwinForImageClassification(config)).eval()


@pytest.mark.parametrize(
    "size",
    [(32, 32), (36, 44), (32, 48), (32, 64)],  # the last two: one window spans 4 of 4×6 and 4×8
    ids=["plain", "filled", "spanned_filled", "spanned"],
)
@pytest.mark.parametrize("names", ["memory", "disk"])
def test_same_as_hugging_face(size: Size, names: str, tmp_path: object) -> None:
    reference = hugging_faces(size)
    state = reference.state_dict()
    if names == "disk":
        reference.save_pretrained(tmp_path)
        from safetensors.torch import load_file

        state = load_file(f"{tmp_path}/model.safetensors")
        assert any("attention.self.query" in name for name in state)
    model = small(size).eval()
    assert HUGGING_FACE.fits(state, model)
    assert not MICROSOFT.fits(state, model)
    model.load_state_dict(HUGGING_FACE.convert(state, model))
    with torch.no_grad():
        x = images(2, size)
        torch.testing.assert_close(model(x), reference(x).logits, rtol=1e-5, atol=1e-5)
        tokens = reference.swin(x).last_hidden_state
        torch.testing.assert_close(model(x, "tokens").tokens, tokens, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("padding", "window", "shifted"), [("official", (3, 3), False), ("timm", (3, 4), True)]
)
def test_a_window_that_spans_one_side(padding: str, window: Size, shifted: bool) -> None:
    """3 of 3×6: the authors' code shrinks both sides of a window of 4 and shifts none, timm's one of each."""
    model = small((6, 12), window_size=4, depths=(2,), num_heads=(2,), padding=padding)
    assert model.layers[0].blocks[0].attn.window == window
    (stage,) = plan("3 6", model.settings, "cpu")
    assert [order.regions is not None for order in stage.orders] == [False, shifted]


@pytest.mark.parametrize("padding", ["official", "timm"])
@pytest.mark.parametrize("depths", [(2, 2, 2), (1, 1, 1)], ids=["shifted", "plain"])
@pytest.mark.parametrize("size", [(32, 32), (36, 44), (32, 64), (24, 48), (8, 8), (20, 20)])
def test_where_timm_computes_the_same(size: Size, depths: tuple[int, ...], padding: str) -> None:
    reference = timms(size, depths=depths).eval()
    model = small(size, depths=depths, padding=padding).eval()
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    same = shapes == {name: value.shape for name, value in reference.state_dict().items()}
    if same:
        model.load_state_dict(reference.state_dict())
        same = torch.allclose(model(images(2, size)), reference(images(2, size)), rtol=1e-5, atol=1e-5)
    assert model.same_in_timm() == same


def test_weights_of_timm_there_and_back() -> None:
    reference = timms()
    state = reference.state_dict()
    model = small()
    assert not any(layout.fits(state, model) for layout in LAYOUTS)
    model.load_state_dict(state)
    assert list(model.state_dict()) == list(state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])


def microsofts(state: State) -> State:
    """As the authors save it: merging closes a stage, one head, tables and masks beside the weights."""
    out = {}
    for name, value in state.items():
        words = name.split(".")
        if "downsample" in words:
            words[1] = {"1": "0", "2": "1"}[words[1]]
        if words[0] == "head":
            words.remove("fc")
        out[".".join(words)] = value
        if words[-1].endswith("table"):
            out[".".join([*words[:-1], "relative_position_index"])] = torch.zeros(16, 16, dtype=torch.int64)
            out[".".join([*words[:4], "attn_mask"])] = torch.zeros(16, 16, 16)
    return out


@pytest.mark.parametrize("wrapped", [False, True])
def test_weights_of_microsoft(wrapped: bool) -> None:
    state = timms().state_dict()
    theirs, layout = microsofts(state), MICROSOFT
    model = small()
    if wrapped:
        theirs = {f"encoder.{name}": value for name, value in theirs.items()}
        theirs |= {"decoder.0.weight": torch.zeros(2), "encoder.mask_token": torch.zeros(1, 1, 8)}
        layout = SIMMIM
    assert [found.source for found in LAYOUTS if found.fits(theirs, model)] == [layout.source]
    left = layout.leaves(theirs, model)
    assert len(left) == 10 + 2 * wrapped
    converted = layout.convert({n: v for n, v in theirs.items() if n not in left}, model)
    assert set(converted) == set(state)
    assert all(torch.equal(value, state[name]) for name, value in converted.items())


def test_an_incomplete_layer_keeps_its_name() -> None:
    state = hugging_faces((32, 32)).state_dict()
    del state["swin.encoder.layers.0.blocks.1.attention.k_proj.bias"]
    found = HUGGING_FACE.convert(state, small())
    assert {n for n in found if "blocks.1.attn.q" in n and "layers.0" in n} == {
        "layers.0.blocks.1.attn.query.bias",
        "layers.0.blocks.1.attn.qkv.weight",
    }


# ---------------------------------------------------------------- mask, drop path, recomputation


@pytest.mark.parametrize("size", [32, (36, 44)])
def test_masked_patches_are_replaced_by_the_token(size: int | Size) -> None:
    model = redrawn(small(size, mask_token=True))
    grid = model.config.grid(model.image_size)
    x, mask = images(2, size), torch.zeros(2, grid[0] * grid[1], dtype=torch.bool)
    torch.testing.assert_close(model(x, mask=mask), model(x))
    mask[:, grid[1] + 3] = True  # second row, fourth column
    y = x.clone()
    y[:, :, 2:4, 6:8] = 9.0
    assert torch.equal(model(x, mask=mask), model(y, mask=mask))
    assert not torch.equal(model(x, mask=mask), model(x))
    model(x, mask=mask).sum().backward()
    assert model.mask_token.grad is not None


def test_a_sample_is_the_same_in_any_batch() -> None:
    model = redrawn(small(drop_path=0.6)).double().train()
    x = images(6, 32, torch.float64)
    together = model(x, seeds=seeds(6))
    alone = torch.cat([model(x[i : i + 1], seeds=seeds(6)[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)
    assert torch.equal(together, model(x, seeds=seeds(6)))
    assert not torch.equal(together, model(x, seeds=seeds(6) + 1))
    assert not torch.equal(together, model.eval()(x))


def test_drop_path_grows_over_all_stages() -> None:
    model = small(drop_path=0.4)
    blocks = [block for layer in model.layers for block in layer.blocks]
    assert [block.drop_path1.rate for block in blocks] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    purposes = {m.purpose for m in model.modules() if isinstance(m, SampleDrop)}
    assert len(purposes) == 3 * 5


def test_recomputation_changes_nothing() -> None:
    model = redrawn(small((36, 44), drop_path=0.3)).train()
    x, grads = images(2, (36, 44)), []
    for model.recompute in (False, True):
        model.zero_grad()
        model(x, seeds=seeds(2)).sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("size", [32, (36, 44)])
def test_bfloat16_is_close(size: int | Size) -> None:
    model = redrawn(small(size)).train()
    exact = model(images(2, size)).detach()
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(images(2, size))
    rough.sum().backward()
    assert float((rough.detach() - exact).abs().max()) < 0.1 * float(exact.abs().max())


# ---------------------------------------------------------------- tables, layers, names


@pytest.mark.parametrize("window", [(3, 3), (4, 6), (7, 7)])
def test_tables_of_another_window(window: Size) -> None:
    """Against bicubic weights worked out here, Keys' kernel with a = -0.75 as torch has it."""
    side = 2 * max(window)
    more = {"window_size": side, "depths": (1,), "num_heads": (2,), "padding": "timm"}
    model = small((2 * window[0], 2 * window[1]), **more)
    name = "layers.0.blocks.0.attn.relative_position_bias_table"
    value = torch.randn(81, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got = model.resized(name, value)
    down, across = (weights(9, 2 * w - 1) for w in window)
    expected = torch.einsum("yi,xj,ijh->yxh", down, across, value.view(9, 9, 2)).flatten(0, 1)
    assert got.shape == model.state_dict()[name].shape
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert model.resized("norm.weight", value) is None
    assert model.resized(name, value[:80]) is None


def weights(given: int, wanted: int) -> Tensor:
    out = torch.zeros(wanted, given, dtype=torch.float64)
    for i in range(wanted):
        place = (i + 0.5) * given / wanted - 0.5
        base = int(place // 1)
        for j in range(base - 1, base + 3):
            d, a = abs(place - j), -0.75
            near = (a + 2) * d**3 - (a + 3) * d**2 + 1
            far = a * (d**3 - 5 * d**2 + 8 * d - 4)
            out[i, min(max(j, 0), given - 1)] += near if d <= 1 else far if d < 2 else 0.0
    return out


def test_layers_and_decay() -> None:
    model = small(mask_token=True)
    layers = {name: model.layer_of(name) for name, _ in model.named_parameters()}
    assert {layers[n] for n in ("mask_token", "patch_embed.proj.bias", "patch_embed.norm.weight")} == {0}
    assert layers["layers.0.blocks.1.attn.qkv.weight"] == 2
    assert layers["layers.1.downsample.norm.bias"] == layers["layers.1.blocks.0.norm1.bias"] == 3
    assert layers["layers.2.downsample.reduction.weight"] == layers["layers.2.blocks.0.mlp.fc1.bias"] == 4
    assert layers["layers.2.blocks.1.norm2.weight"] == 5
    assert {layers[n] for n in ("norm.weight", "head.fc.bias")} == {6}
    assert set(layers.values()) == set(range(model.num_layers))
    tables = {n for n in layers if n.endswith("relative_position_bias_table")}
    assert len(tables) == 5
    assert model.no_decay() == {"mask_token", *tables}
    assert small().no_decay() == SwinTransformer(img_size=32, **SMALL).no_weight_decay()


def test_initialisation() -> None:
    torch.manual_seed(0)
    model = small(embed_dim=32, num_heads=(2, 4, 8))
    for name, value in model.state_dict().items():
        if name.endswith(("table", "qkv.weight", "fc1.weight", "reduction.weight")):
            assert float(value.std()) == pytest.approx(0.02, rel=0.15), name
        if name.endswith("bias"):
            assert value.any() == (name == "patch_embed.proj.bias"), name


def test_presets_and_their_config() -> None:
    assert set(Name.__args__) == set(PRESETS)
    config = build(SwinConfig, {"name": "swin_base", "depths": [1, 2], "num_heads": [4, 8]})
    assert (config.depths, config.num_heads) == ((1, 2), (4, 8))
    assert build(SwinConfig, resolved(config)) == config
    model = small((32, 16), classes=0)
    assert isinstance(model.head.fc, nn.Identity)
    assert model(torch.zeros(2, 3, 32, 16)).shape == (2, 32)
    assert isinstance(model(torch.zeros(2, 3, 32, 16), {"pooled"}), Features)


@pytest.mark.parametrize(
    ("size", "more", "line"),
    [
        (30, {"patch_size": 4}, r"image_size 30 is not divisible by patch_size 4; nearest: 28 or 32"),
        (32, {"num_heads": (1, 2)}, r"num_heads: given 2 numbers; expected 3, as in depths"),
        (32, {"num_heads": (1, 2, 5)}, r"num_heads: given 5 for stage 2; its width 32 is not divisible"),
        (32, {"depths": ()}, r"depths"),
        (32, {"depths": (1, 0, 1)}, r"depths"),
        (32, {"depths": (1, 2.0, 1)}, r"depths"),
        (32, {"padding": "torch"}, r'padding: given "torch"; allowed: official, timm'),
    ],
)
def test_refusals_when_made(size: int, more: dict[str, object], line: str) -> None:
    with pytest.raises(UserError, match=line) as caught:
        small(size, **more)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("shape", "call", "line"),
    [
        ((2, 1, 32, 32), {}, r"images: given 2×1×32×32; expected B×3×height×width"),
        ((2, 3, 32, 31), {}, r"image_size 31 is not divisible by patch_size 2"),
        ((2, 3, 32, 32), {"want": "heads"}, r"want: given 'heads'"),
        ((2, 3, 32, 32), {"mask": torch.zeros(2, 256, dtype=torch.bool)}, r"mask_token: true"),
        ((2, 3, 32, 32), {"keep": torch.zeros(2, 4, dtype=torch.int64)}, r"keep: Swin needs every patch"),
    ],
)
def test_refusals_of_a_call(shape: tuple[int, ...], call: dict[str, object], line: str) -> None:
    with pytest.raises(UserError, match=line) as caught:
        small()(torch.zeros(shape), **call)
    assert "\n" not in str(caught.value)

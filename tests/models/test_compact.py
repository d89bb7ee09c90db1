"""ViT-Lite, CVT and CCT against vit-pytorch and the authors' equations; their sizes against the tables."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity import EXACT, compare, gradients, images, redraw
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from vit_pytorch import cct

from vitlab.batch import uniform
from vitlab.config import UserError, build, resolved
from vitlab.models import MODELS, create_model, load_model, load_state, load_weights, save_model
from vitlab.models.compact import PRESETS, Compact, CompactConfig, Name
from vitlab.models.layouts.compact import LAYOUTS
from vitlab.models.parts.compact import along
from vitlab.models.parts.transformer import SampleDrop

SIZES = {"embed_dim": 24, "depth": 3, "num_heads": 3, "mlp_ratio": 1.5}
POSITIONS = {"learned": "learnable", "sincos": "sine", "none": "none"}


def small(name: str = "cct_6_3x2", side: int | tuple[int, int] = 16, **more: object) -> Compact:
    patches = {} if name.startswith("cct") else {"patch_size": 4}
    model = create_model(name, num_classes=7, image_size=side, **{**SIZES, **patches, **more})
    assert isinstance(model, Compact)
    return model


def seeds(n: int) -> Tensor:
    return torch.arange(n) * 1_000_003 + 5


class Reference(nn.Module):
    """vit-pytorch's parts joined as the authors join theirs; its own model is CCT alone."""

    def __init__(self, name: str, positions: str, side: int = 16) -> None:
        super().__init__()
        if name.startswith("cct"):
            layers = int(name[-1])
            window = {"kernel_size": 3, "stride": 1, "padding": 1, "activation": nn.ReLU}
            self.tokenizer = cct.Tokenizer(n_output_channels=24, n_conv_layers=layers, **window)
        else:
            window = {"kernel_size": 4, "stride": 4, "padding": 0}
            self.tokenizer = cct.Tokenizer(n_output_channels=24, max_pool=False, conv_bias=True, **window)
        self.classifier = cct.TransformerClassifier(
            seq_pool=not name.startswith("vit"),
            embedding_dim=24,
            num_layers=3,
            num_heads=3,
            mlp_ratio=1.5,
            num_classes=7,
            dropout_rate=0.0,
            attention_dropout=0.0,
            stochastic_depth_rate=0.0,
            positional_embedding=POSITIONS[positions],
            sequence_length=self.tokenizer.sequence_length(height=side, width=side),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.tokenizer(x))


def pair(name: str, positions: str = "learned") -> tuple[Compact, Reference]:
    model, reference = small(name, positions=positions), Reference(name, positions)
    redraw(reference)
    # Tokens far apart: those nearly alike leave no more than rounding to the weights of sequence pooling.
    for n, tensor in reference.state_dict().items():
        if n.endswith("norm1.weight"):
            tensor.mul_(3)
    assert set(model.state_dict()) == set(reference.state_dict())
    model.load_state_dict(reference.state_dict())
    return model, reference


def loss_of(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    output = module(x)
    return output, F.cross_entropy(output, torch.arange(len(x)))


# ---------------------------------------------------------------- the same as vit-pytorch


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("name", ["vit_lite_6_4", "cvt_6_4", "cct_6_3x1", "cct_6_3x2"])
def test_same_as_vit_pytorch(name: str, positions: str, dtype: torch.dtype) -> None:
    model, reference = pair(name, positions)
    for module in (model, reference):
        fixed = module.classifier.positional_emb
        if positions == "sincos":  # a frozen parameter there, a buffer here
            module.classifier.__dict__["_parameters"].pop("positional_emb", None)
            module.classifier.__dict__["_buffers"]["positional_emb"] = fixed.detach()
        if not name.startswith("vit"):
            # The softmax does not see a number added to all tokens: this gradient is zero, see below.
            module.classifier.attention_pool.bias.requires_grad_(False)
    run = partial(loss_of, x=images(5, 16, dtype))
    compare(model.to(dtype).train(), reference.to(dtype).train(), run)


def test_the_bias_of_sequence_pooling_has_no_gradient() -> None:
    for module in pair("cct_6_3x1"):
        loss_of(module.double(), images(5, 16, torch.float64))[1].backward()
        found = gradients(module)
        largest = max(float(g.abs().max()) for g in found.values())
        assert float(found["classifier.attention_pool.bias"].abs().max()) < 1e-10 * largest


def test_the_presets_are_those_of_vit_pytorch() -> None:
    """`cct_7` and `cct_14` with the authors' rule for stride and padding."""
    for name, side, make, kernel in [("cct_7_3x1", 32, cct.cct_7, 3), ("cct_14_7x2", 64, cct.cct_14, 7)]:
        reference = make(
            img_size=side,
            n_conv_layers=int(name[-1]),
            kernel_size=kernel,
            num_classes=10,
            positional_embedding="learnable",
        ).eval()
        model = create_model(name, num_classes=10, image_size=side).eval()
        assert load_state(model, reference.state_dict()).fresh == ()
        x = images(2, side, torch.float32)
        torch.testing.assert_close(model(x), reference(x), rtol=1e-4, atol=1e-5)


def test_fixed_positions_are_those_of_vit_pytorch() -> None:
    for count, dim in ((257, 128), (5, 7)):
        torch.testing.assert_close(along(count, dim), cct.sinusoidal_embedding(count, dim), rtol=0, atol=1e-6)
    table = along(3, 4)[0]
    assert table[0].tolist() == [0, 1, 0, 1]
    assert table[2, 2:].tolist() == pytest.approx(
        [torch.tensor(0.02).sin().item(), torch.tensor(0.02).cos().item()]
    )


# ---------------------------------------------------------------- the authors' equations, written out


def norm(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return centred / scale * w[f"{name}.weight"] + w[f"{name}.bias"]


def dense(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    out = x @ w[f"{name}.weight"].T
    return out + w[f"{name}.bias"] if f"{name}.bias" in w else out


def attention(w: dict[str, Tensor], name: str, x: Tensor, heads: int) -> Tensor:
    outs = []
    width = x.shape[-1] // heads
    q, k, v = dense(w, f"{name}.qkv", x).chunk(3, -1)
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        weights = (q[..., part] @ k[..., part].mT / width**0.5).softmax(-1)
        outs.append(weights @ v[..., part])
    return dense(w, f"{name}.proj", torch.cat(outs, -1))


def tokens_of(w: dict[str, Tensor], x: Tensor) -> Tensor:
    i = 0
    while f"tokenizer.conv_layers.{i}.0.weight" in w:
        name = f"tokenizer.conv_layers.{i}.0"
        weight = w[f"{name}.weight"]
        if f"{name}.bias" in w:
            x = F.conv2d(x, weight, w[f"{name}.bias"], stride=weight.shape[-1])
        else:
            x = F.max_pool2d(F.conv2d(x, weight, padding=1).relu(), 3, 2, 1)
        i += 1
    return x.flatten(2).mT


def written_out(w: dict[str, Tensor], x: Tensor, heads: int) -> Tensor:
    x = tokens_of(w, x)
    if "classifier.class_emb" in w:
        x = torch.cat([w["classifier.class_emb"].expand(len(x), -1, -1), x], 1)
    x = x + w["classifier.positional_emb"]
    for i in range(3):
        name = f"classifier.blocks.{i}"
        x = x + attention(w, f"{name}.self_attn", norm(w, f"{name}.pre_norm", x), heads)
        x = norm(w, f"{name}.norm1", x)  # the stream itself, not a branch
        inner = dense(w, f"{name}.linear1", x)
        x = x + dense(w, f"{name}.linear2", inner * (1 + torch.erf(inner / 2**0.5)) / 2)
    x = norm(w, "classifier.norm", x)
    if "classifier.class_emb" in w:
        return dense(w, "classifier.fc", x[:, 0])
    weights = dense(w, "classifier.attention_pool", x).softmax(1)
    return dense(w, "classifier.fc", (weights * x).sum(1))


@pytest.mark.parametrize("name", ["vit_lite_6_4", "cvt_6_4", "cct_6_3x1", "cct_6_3x2"])
def test_same_as_the_equations(name: str) -> None:
    model = small(name).double()
    redraw(model)
    weights = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    x = images(4, 16, torch.float64)
    ours, theirs = model(x), written_out(weights, x, 3)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    (ours.square().sum() + theirs.square().sum()).backward()
    largest = max(float(p.grad.abs().max()) for p in weights.values())
    for parameter, (_, own) in zip(weights.values(), model.named_parameters(), strict=True):
        torch.testing.assert_close(own.grad, parameter.grad, rtol=1e-10, atol=1e-11 * largest)


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("name", "millions", "giga"),
    [  # of the authors' tables; multiplications leave those of the attention's two products out
        ("vit_lite_6_4", 3.191, 0.205),
        ("vit_lite_7_4", 3.717, 0.239),
        ("vit_lite_7_8", 3.74, None),
        ("vit_lite_7_16", 3.89, None),
        ("cvt_6_4", 3.190, 0.202),
        ("cvt_7_4", 3.717, 0.236),
        ("cvt_7_8", 3.74, None),
        ("cct_2_3x2", 0.284, 0.033),
        ("cct_4_3x2", 0.482, 0.046),
        ("cct_6_3x1", 3.168, 0.813),
        ("cct_6_3x2", 3.327, 0.241),
        ("cct_7_3x1", 3.760, 0.947),
        ("cct_7_3x2", 3.853, 0.275),
        ("cct_14_7x2", 22.29, 5.11),
    ],
)
def test_sizes_of_the_paper(name: str, millions: float, giga: float | None) -> None:
    large = name == "cct_14_7x2"
    # The tables count learned positions, except for these two.
    more = {"positions": "sincos"} if name in ("cct_6_3x1", "cct_14_7x2") else {}
    size, classes = (224, 1000) if large else (32, 10)
    with torch.device("meta"):
        model = create_model(name, num_classes=classes, image_size=size, **more)
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 3, size, size), {"logits", "tokens"})
    count = sum(p.numel() for p in model.parameters()) / 1e6
    assert count == pytest.approx(millions, abs=0.0051 if millions in (3.74, 3.89, 22.29) else 0.00051)
    if giga is not None:
        c, (height, width) = model.config, model.classifier.grid
        t = height * width + model.classifier.prefix
        products = 2 * t * t * c.embed_dim * c.depth
        found = (counter.get_total_flops() / 2 - products) / 1e9
        assert found == pytest.approx(giga, abs=0.006 if large else 0.00061)


# ---------------------------------------------------------------- features


@pytest.mark.parametrize("name", ["vit_lite_6_4", "cvt_6_4", "cct_6_3x1"])
def test_features(name: str) -> None:
    model = small(name, (16, 24))
    redraw(model)
    x = torch.randn(2, 3, 16, 24)
    found = model(x, {"logits", "tokens", "prefix", "pooled", "pyramid", "attentions"})
    height, width = model.config.grid((16, 24))
    prefix = int(name.startswith("vit"))
    n = height * width
    assert found.tokens.shape == (2, n, 24)
    assert found.prefix.shape == (2, prefix, 24)
    assert [tuple(level.shape) for level in found.pyramid] == [(2, 24, height, width)]
    assert torch.equal(found.pyramid[0][:, :, 1, 2], found.tokens[:, width + 2])
    assert [tuple(a.shape) for a in found.attentions] == [(2, 3, n + prefix, n + prefix)] * 3
    torch.testing.assert_close(found.attentions[2].sum(-1), torch.ones(2, 3, n + prefix))
    torch.testing.assert_close(model.classifier.fc(found.pooled), found.logits)
    torch.testing.assert_close(model(x), found.logits, rtol=1e-4, atol=1e-5)
    if prefix:
        assert torch.equal(found.pooled, found.prefix[:, 0])
        torch.testing.assert_close(model(x, "prefix").prefix, found.prefix, rtol=1e-4, atol=1e-5)
    else:
        weights = model.classifier.attention_pool(found.tokens).softmax(1)
        torch.testing.assert_close(found.pooled, (weights * found.tokens).sum(1))
        assert bool((weights > 0).all())
        torch.testing.assert_close(weights.sum(1), torch.ones(2, 1))


def test_of_the_last_block_only_what_is_read() -> None:
    """With a class token, less work; gradients are those of the whole way."""
    model = small("vit_lite_6_4").double()
    redraw(model)
    x = images(3, 16, torch.float64)
    counts, grads = [], []
    for want in ((), {"logits", "tokens"}):
        model.zero_grad()
        with FlopCounterMode(display=False) as counter:
            found = model(x, want)
        (found.logits if want else found).square().sum().backward()
        counts.append(counter.get_total_flops())
        grads.append({n: g.clone() for n, g in gradients(model).items()})
    assert counts[0] < 0.9 * counts[1]
    for name, grad in grads[1].items():
        torch.testing.assert_close(grads[0][name], grad, rtol=1e-9, atol=1e-9)


def test_masked_tokens_are_replaced() -> None:
    model = small("cvt_6_4", mask_token=True)
    redraw(model)
    x, mask = images(2, 16, torch.float32), torch.zeros(2, 16, dtype=torch.bool)
    torch.testing.assert_close(model(x, mask=mask), model(x))
    mask[:, 3] = True
    y = x.clone()
    y[:, :, :4, 12:] = 9.0
    assert torch.equal(model(x, mask=mask), model(y, mask=mask))
    assert not torch.equal(model(x, mask=mask), model(x))
    assert model.no_decay() == {"classifier.mask_token", "classifier.positional_emb"}


# ---------------------------------------------------------------- other sizes, other weights


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("name", ["vit_lite_6_4", "cct_6_3x2"])
def test_other_sizes(name: str, positions: str) -> None:
    model, made = small(name, positions=positions), small(name, (24, 32), positions=positions)
    redraw(model)
    if positions == "sincos":
        model.classifier.positional_emb.copy_(along(model.classifier.positional_emb.shape[1], 24))
    state = dict(model.state_dict())
    table = state.get("classifier.positional_emb")
    if table is not None:
        state["classifier.positional_emb"] = made.resized("classifier.positional_emb", table)
    load_state(made, state)
    x = torch.randn(2, 3, 24, 32)
    torch.testing.assert_close(model(x), made(x), rtol=1e-4, atol=1e-5)
    assert made(x).shape == (2, 7)
    assert model.resized("classifier.fc.weight", state["classifier.fc.weight"]) is None
    if positions == "learned":
        assert model.resized("classifier.positional_emb", torch.zeros(1, 7, 24)) is None
        prefix = model.classifier.prefix
        old = table[:, prefix:].mT.unflatten(2, model.classifier.grid)
        new = F.interpolate(old, size=made.classifier.grid, mode="bilinear").flatten(2).mT
        expected = torch.cat([table[:, :prefix], new], 1)
        torch.testing.assert_close(made.classifier.positional_emb.detach(), expected)


def test_grids() -> None:
    config = build(CompactConfig, {"name": "cct_14_7x2"})
    assert config.grid((224, 384)) == (14, 24)
    assert build(CompactConfig, {"name": "cct_7_3x1"}).grid((28, 33)) == (14, 17)
    assert build(CompactConfig, {"name": "vit_lite_7_4"}).grid((28, 32)) == (7, 8)
    for more in ({}, {"padding": 0}, {"kernel_size": 5, "stride": 2, "padding": 1, "conv_layers": 3}):
        config = build(CompactConfig, {"name": "cct_2_3x2", **more})
        tokenizer = Compact(config, 3, 64).tokenizer
        smallest = config._smallest()
        for side in range(smallest, smallest + 12):
            height, width = config.grid((side, side + 3))
            assert tokenizer(torch.zeros(1, 3, side, side + 3)).shape[1] == height * width
        with pytest.raises(UserError, match=rf"image_size {smallest - 1} leaves no tokens; .* {smallest}$"):
            config.grid((64, smallest - 1))


def test_weights_and_folder(tmp_path: Any) -> None:
    model, reference = pair("cct_6_3x2")
    state = {f"module.{name}": value for name, value in reference.state_dict().items()}
    report = load_weights(small(), {"state_dict": state})
    assert (report.layout, report.fresh, report.resized) == ("SHI-Labs/Compact-Transformers", (), ())
    wide = small(side=32)
    (resized,) = load_weights(wide, reference.state_dict()).resized
    assert resized.name == "classifier.positional_emb"
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(wide(x), model(x), rtol=1e-4, atol=1e-5)
    load_weights(small(positions="sincos", side=32), reference.state_dict())
    assert not LAYOUTS[0].fits({"blocks.0.attn.qkv.weight": torch.zeros(1)}, model)
    save_model(model, tmp_path, preprocess={}, labels=[])
    x = images(2, 16, torch.float32)
    assert torch.equal(load_model(tmp_path).model(x), model(x))


# ---------------------------------------------------------------- randomness of a sample


@pytest.mark.parametrize("name", ["vit_lite_6_4", "cct_6_3x1"])
def test_a_sample_is_the_same_in_any_batch(name: str) -> None:
    model = small(name, drop_path=0.6, dropout=0.2, attention_dropout=0.3).double().train()
    redraw(model)
    x = images(6, 16, torch.float64)
    together = model(x, seeds=seeds(6))
    alone = torch.cat([model(x[i : i + 1], seeds=seeds(6)[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-9)
    assert torch.equal(together, model(x, seeds=seeds(6)))
    assert not torch.equal(together, model(x, seeds=seeds(6) + 1))
    assert not torch.equal(together, model.eval()(x))
    found = model.train()(x, {"logits", "tokens", "attentions"}, seeds=seeds(6))
    torch.testing.assert_close(found.logits, together, rtol=1e-9, atol=1e-9)
    assert model(x).shape == (6, 7)


def test_attention_dropout_drops_probabilities() -> None:
    model = small(attention_dropout=0.4).train()
    redraw(model)
    layer = model.classifier.blocks[1].self_attn
    x = torch.randn(3, 5, 24)
    out, found = layer(x, seeds(3), True, False)
    noise = uniform(seeds(3), "dropout/1/probabilities", 5 * 3 * 5).view(3, 5, 3, 5).transpose(1, 2)
    v = layer.qkv(x)[2]
    kept = found * (noise >= 0.4) / 0.6
    torch.testing.assert_close(out, layer.proj((kept @ v).transpose(1, 2).flatten(2)))
    torch.testing.assert_close(found.sum(-1), torch.ones(3, 3, 5))


def test_drop_path_grows_with_depth() -> None:
    model = small(drop_path=0.3)
    assert [b.drop_path1.rate for b in model.classifier.blocks] == pytest.approx([0, 0.15, 0.3])
    assert [b.drop_path2.rate for b in model.classifier.blocks] == pytest.approx([0, 0.15, 0.3])
    purposes = [m.purpose for m in model.modules() if isinstance(m, SampleDrop)]
    assert len(set(purposes)) == len(purposes) == 1 + 6 * 3


def test_presets_draw_nothing() -> None:
    model = small().train()
    x = images(2, 16, torch.float32)
    assert torch.equal(model(x), model(x))


# ---------------------------------------------------------------- layers, numbers, tools


def test_layers_and_decay() -> None:
    for name in ("vit_lite_6_4", "cct_6_3x2"):
        model = small(name, mask_token=True)
        layers = {n: model.layer_of(n) for n, _ in model.named_parameters()}
        zero = {n for n, layer in layers.items() if layer == 0}
        assert zero == {n for n in layers if n.startswith("tokenizer.")} | model.no_decay()
        assert layers["classifier.blocks.2.norm1.bias"] == 3
        last = {n.split(".")[1] for n, layer in layers.items() if layer == 4}
        assert last == {"norm", "fc"} | ({"attention_pool"} if name.startswith("cct") else set())
        assert set(layers.values()) == set(range(model.num_layers))
    tokens = {"classifier.class_emb", "classifier.positional_emb"}
    assert small("vit_lite_6_4").no_decay() == tokens
    assert small("cvt_6_4", positions="sincos").no_decay() == set()


def test_initialisation() -> None:
    torch.manual_seed(0)
    model = create_model("cct_7_3x2", num_classes=10, image_size=32)
    own = model.classifier
    assert float(own.blocks[3].linear1.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert not own.blocks[3].linear1.bias.any()
    assert float(own.positional_emb.detach().std()) == pytest.approx(0.2, rel=0.05)
    weight = model.tokenizer.conv_layers[1][0].weight.detach()
    assert float(weight.std()) == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.05)
    assert not small("vit_lite_6_4").classifier.class_emb.any()
    assert own.blocks[0].self_attn.qkv.bias is None
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-5}


@pytest.mark.parametrize("name", ["vit_lite_6_4", "cct_6_3x2"])
def test_recomputed_and_reduced(name: str) -> None:
    """Activation checkpointing changes nothing; bfloat16 comes near."""
    model = small(name, drop_path=0.5, attention_dropout=0.2).train()
    x, found = images(3, 16, torch.float32), []
    for model.recompute in (False, True):
        model.zero_grad()
        result = model(x, {"logits", "attentions"}, seeds=seeds(3))
        result.logits.square().sum().backward()
        assert len(result.attentions) == 3
        found.append(gradients(model))
    for n, grad in found[0].items():
        torch.testing.assert_close(found[1][n], grad)
    exact = model.eval()(x)
    with torch.autocast("cpu", torch.bfloat16):
        reduced = model(x)
    reduced.float().sum().backward()
    torch.testing.assert_close(reduced.float(), exact, rtol=0.1, atol=0.02)


@pytest.mark.parametrize("name", ["vit_lite_6_4", "cct_6_3x2"])
def test_traced_and_exported(name: str) -> None:
    torch._dynamo.reset()
    model = small(name).eval()
    x = images(2, 16, torch.float32)
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), model(x))
        program = torch.export.export(model, (x,), dynamic_shapes={"images": {0: torch.export.Dim("b")}})
        y = images(5, 16, torch.float32)
        torch.testing.assert_close(program.module()(y), model(y), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- configs and refusals


def test_presets_and_their_config() -> None:
    assert list(Name.__args__) == list(PRESETS)
    assert set(PRESETS) <= set(MODELS)
    config = build(CompactConfig, {"name": "cct_14_7x2", "drop_path": 0.2})
    assert (config.kernel_size, config.stride, config.padding, config.conv_layers) == (7, 2, 3, 2)
    assert build(CompactConfig, resolved(config)) == config
    model = create_model("cct_2_3x2", num_classes=0, image_size=16)
    assert model(torch.zeros(2, 3, 16, 16)).shape == (2, 128)
    assert small(in_chans=1)(torch.zeros(2, 1, 16, 16)).shape == (2, 7)
    assert model.heads == ("classifier.fc",)


@pytest.mark.parametrize(
    ("name", "size", "more", "line"),
    [
        ("vit_lite_7_4", 30, {}, r"image_size 30 is not divisible by patch_size 4; nearest: 28 or 32"),
        ("cct_7_3x1", 0, {}, r"image_size 0 leaves no tokens; smallest: 1"),
        ("cct_7_3x1", 2, {"padding": 0}, r"image_size 2 leaves no tokens; smallest: 3"),
        ("cct_7_3x1", 32, {"num_heads": 5}, r"embed_dim 256 is not divisible by num_heads 5"),
        ("cct_7_3x1", 32, {"patch_size": 4}, r"kernel_size: given beside patch_size 4"),
        ("cvt_7_4", 32, {"stride": 2}, r"stride: given beside patch_size 4"),
        (
            "cvt_7_4",
            32,
            {"patch_size": None, "stride": 2},
            r"patch_size: given null; convolutions need kernel_size, padding, conv_layers too",
        ),
        ("cct_7_3x1", 32, {"attention_dropout": 1.0}, r"attention_dropout: given 1.0"),
        ("cct_7_3x1", 32, {"pool": "mean"}, r"pool: given .*mean.*; allowed: .*token.*sequence"),
    ],
)
def test_wrong_configs(name: str, size: int, more: dict[str, object], line: str) -> None:
    with pytest.raises(UserError, match=line) as caught:
        create_model(name, num_classes=3, image_size=size, **more)
    assert "\n" not in str(caught.value)


def test_wrong_calls() -> None:
    model, x = small("vit_lite_6_4"), torch.zeros(1, 3, 16, 16)
    with pytest.raises(UserError, match="keep: Compact needs every patch"):
        model(x, keep=torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(UserError, match="the model has no mask token"):
        model(x, mask=torch.zeros(1, 16, dtype=torch.bool))
    with pytest.raises(UserError, match="want: given 'heads'"):
        model(x, {"heads"})
    with pytest.raises(UserError, match="image_size 18 is not divisible by patch_size 4"):
        model(torch.zeros(1, 3, 16, 18))

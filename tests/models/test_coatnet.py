"""CoAtNet against timm, its sizes against the paper, and what this project adds to it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from parity import EXACT, gradients, images, redraw, step, worst
from timm.layers import DropPath
from timm.models.maxxvit import MaxxVit, MaxxVitCfg, model_cfgs
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vitlab.config import UserError, build, resolved
from vitlab.models.coatnet import PRESETS, CoAtNet, CoAtNetConfig, Name
from vitlab.models.features import Size
from vitlab.models.layouts.coatnet import LAYOUTS
from vitlab.models.parts.coatnet import MBConv, Places, Transformer
from vitlab.models.parts.transformer import SampleDrop

SMALL: dict[str, Any] = {"stem_width": 16, "dims": (16, 32, 64, 96), "depths": (1, 2, 2, 1)}
HALVES = {
    "timm": {},
    "paper": {"conv_stride_mode": "1x1", "conv_pool_type": "max2", "transformer_pool_type": "max2"},
}


def make(name: str = "coatnet_0", classes: int = 7, size: int | Size = 64, **more: Any) -> CoAtNet:
    return CoAtNet(build(CoAtNetConfig, {"name": name, **more}), classes, size)


def small(**more: Any) -> CoAtNet:
    return make(**{**SMALL, **more})


def theirs_config(layout: str = "C-C-T-T") -> MaxxVitCfg:
    return MaxxVitCfg(
        embed_dim=SMALL["dims"],
        depths=SMALL["depths"],
        block_type=tuple(layout.split("-")),
        stem_width=16,
        head_hidden_size=96,
    )


def reference(size: int | Size = 64, layout: str = "C-C-T-T", **more: Any) -> MaxxVit:
    model = MaxxVit(theirs_config(layout), img_size=size, num_classes=7, **more)
    spread(model)
    return model


def spread(model: nn.Module) -> None:
    """All tensors anew; variances above 0, scales of norms and gains of layers around 1."""
    redraw(model)
    for name, value in model.state_dict().items():
        if name.endswith("running_var"):
            value.abs_().add_(0.5)
        elif name.endswith("num_batches_tracked"):
            value.zero_()
        elif "norm" in name and name.endswith("weight"):
            value.add_(1)
        elif value.ndim == 4 and "qkv" not in name:  # whose scale makes attention uneven
            value.div_(0.3 * value[0].numel() ** 0.5)


def scenes(batch: int, dtype: torch.dtype) -> Tensor:
    """Images whose quarters differ, so that tokens do."""
    coarse = images(batch, 4, dtype).repeat_interleave(16, 2).repeat_interleave(16, 3)
    return coarse * 2 + images(batch, 64, dtype)


def seeds(n: int) -> Tensor:
    return torch.arange(n) * 1_000_003 + 5


# ---------------------------------------------------------------- the same as timm


def figures(model: nn.Module, x: Tensor) -> list[dict[str, Tensor]]:
    """Output, gradients and tensors after a step; each head's Q, K and V of `qkv.bias` brought together."""
    output = model(x)
    step(model, (output * torch.linspace(-1, 1, output.numel()).view_as(output).to(x.dtype)).mean())
    found = [{"output": output.detach()}, gradients(model), dict(model.named_parameters())]
    for tensors in found[1:]:
        for name, value in tensors.items():
            if name.endswith("qkv.bias"):
                tensors[name] = value.detach().view(-1, 3, 32).transpose(0, 1).flatten()
    return found


CASES = [("C-C-T-T", "timm"), ("C-C-T-T", "paper"), ("C-T-T-T", "timm"), ("C-C-C-C", "timm")]


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(("layout", "halves"), CASES)
def test_same_as_timm(layout: str, halves: str, training: bool, dtype: torch.dtype) -> None:
    """In training and fp32 rounding can make another place the maximum: that is compared in float64."""
    if halves == "paper" and training and dtype == torch.float32:
        dtype = torch.float64
    theirs, ours = reference(layout=layout, **HALVES[halves]), small(layout=layout, downsample=halves)
    assert set(ours.state_dict()) == set(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    mine, timms = (figures(m.to(dtype).train(training), scenes(5, dtype)) for m in (ours, theirs))
    largest = max(float(g.abs().max()) for g in timms[1].values())
    for name in [n for n in timms[1] if training and n.endswith("pre_norm.bias")]:
        # a shift before a 1×1 convolution without bias, which the next batch norm takes away: exactly zero
        assert float((mine[1].pop(name) - timms[1].pop(name)).abs().max()) <= EXACT[dtype] * largest
        assert float((mine[2].pop(name) - timms[2].pop(name)).detach().abs().max()) <= EXACT[dtype] * 10
    print([worst(m, t) for m, t in zip(mine, timms, strict=True)])
    assert max(map(worst, mine, timms)) <= EXACT[dtype]
    running = [{n: b for n, b in m.named_buffers() if "running" in n} for m in (ours, theirs)]
    assert worst(*running) <= EXACT[dtype]


def test_features_are_those_of_timm() -> None:
    theirs, ours = reference().eval(), small().eval()
    ours.load_state_dict(theirs.state_dict())
    x = images(2, 64, torch.float32)
    last, levels = theirs.forward_intermediates(x)
    found = ours(x, ["tokens", "prefix", "pooled", "pyramid", "attentions", "logits"])
    for mine, level in zip(found.pyramid, levels[1:], strict=True):
        assert worst({"level": mine}, {"level": level}) <= 1e-5
    torch.testing.assert_close(found.tokens, theirs.head.norm(last).flatten(2).mT, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.pooled, theirs.forward_head(last, pre_logits=True), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.logits, ours(x), rtol=1e-4, atol=1e-5)
    assert found.prefix.shape == (2, 0, 96)
    assert [tuple(a.shape) for a in found.attentions] == [(2, 2, 16, 16)] * 2 + [(2, 3, 4, 4)]
    torch.testing.assert_close(found.attentions[0].sum(-1), torch.ones(2, 2, 16))


def test_there_and_back() -> None:
    theirs, ours = reference(), small()
    assert LAYOUTS[0].fits(theirs.state_dict(), ours)
    ours.load_state_dict(LAYOUTS[0].convert(theirs.state_dict(), ours))
    other = MaxxVit(theirs_config(), img_size=64, num_classes=7)
    other.load_state_dict(ours.state_dict())
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in other.state_dict().items())
    assert not LAYOUTS[0].fits({"blocks.0.attn.qkv.weight": torch.zeros(1)}, ours)


def test_start_is_that_of_timm() -> None:
    """Every tensor is spread as timm's: four standard errors of σ."""
    torch.manual_seed(0)
    ours = small().state_dict()
    for name, value in MaxxVit(theirs_config(), img_size=64, num_classes=7).state_dict().items():
        if value.is_floating_point() and value.numel() > 500:
            wrong = 4 * float(value.std()) / value.numel() ** 0.5
            assert float(ours[name].std()) == pytest.approx(float(value.std()), abs=wrong), name
        elif name.endswith("mlp.fc1.bias"):
            assert 0 < float(ours[name].abs().max()) < 1e-5
        elif name.endswith("bias") and "pre_logits" not in name and "head.fc" not in name:
            assert torch.equal(ours[name] != 0, value != 0), name


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("name", "millions"),
    [("coatnet_0", 25), ("coatnet_1", 42), ("coatnet_2", 75), ("coatnet_3", 168), ("coatnet_4", 275)],
)
def test_parameter_counts_are_those_of_the_paper(name: str, millions: float) -> None:
    with torch.device("meta"):
        ours, theirs = make(name, 1000, 224), MaxxVit(model_cfgs[name])
    count = sum(p.numel() for p in ours.parameters()) / 1e6
    assert count == pytest.approx(millions, rel=0.01)
    mine = {n: v.shape for n, v in ours.state_dict().items()}
    assert mine == {n: v.shape for n, v in theirs.state_dict().items()}


@pytest.mark.parametrize(("name", "billions"), [("coatnet_0", 4.2), ("coatnet_1", 8.4), ("coatnet_2", 15.7)])
def test_multiplications_are_near_those_of_the_paper(name: str, billions: float) -> None:
    found = []
    for downsample in HALVES:
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            make(name, 1000, 224, downsample=downsample)(torch.zeros(1, 3, 224, 224))
        found.append(counter.get_total_flops() / 2e9)
    assert found[0] == pytest.approx(billions, rel=0.09)  # the stride comes later than in the paper
    assert found[1] == pytest.approx(billions, rel=0.05)
    assert found[1] < found[0]


@pytest.mark.parametrize("layout", ["C-C-C-C", "C-C-C-T", "C-C-T-T", "C-T-T-T", "T-T-T-T"])
def test_layouts_run(layout: str) -> None:
    model = small(layout=layout, dims=(32, 32, 64, 96))
    kinds = [type(stage[0]) for stage in model._stages()]
    assert kinds == [MBConv if kind == "C" else Transformer for kind in layout.split("-")]
    found = model(images(2, 32, torch.float32), ["logits", "pyramid", "attentions"])
    assert [tuple(level.shape[1:]) for level in found.pyramid] == [
        (32, 8, 8), (32, 4, 4), (64, 2, 2), (96, 1, 1)
    ]  # fmt: skip
    assert len(found.attentions) == sum(
        d for d, k in zip((1, 2, 2, 1), layout.split("-"), strict=True) if k == "T"
    )
    found.logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


# ---------------------------------------------------------------- the relative term


def test_without_the_relative_term_the_count_stays() -> None:
    counts = {}
    for relative in ("bias", "absolute", "none"):
        model = small(relative=relative)
        spread(model)
        counts[relative] = sum(p.numel() for p in model.parameters())
        model(images(3, 64, torch.float32)).square().sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in model.parameters()), relative
    assert counts["absolute"] == counts["bias"]
    assert counts["none"] == counts["bias"] - (2 * 7 * 7 * 2 + 3 * 3 * 3)


def test_places_by_hand() -> None:
    """The relative bias reads the distance alone; the absolute one the key alone, and every entry of it."""
    places = {kind: Places(2, (3, 2), kind) for kind in ("bias", "absolute")}
    for module in places.values():
        redraw(module)
    table = places["bias"].relative_position_bias_table.detach().view(5, 3, 2)
    bias, absolute = (module((3, 2)) for module in places.values())
    assert bias.shape == (2, 6, 6)
    assert absolute.shape == (2, 1, 6)
    for query in range(6):
        for key in range(6):
            down, across = query // 2 - key // 2, query % 2 - key % 2
            assert torch.equal(bias[:, query, key], table[down + 2, across + 1])
    for key in range(6):
        y, x = 2 * (key // 2), 2 * (key % 2)
        mean = table[y : y + 2, x : x + 2].flatten(0, 1).mean(0)
        torch.testing.assert_close(absolute[:, 0, key], mean)


# ---------------------------------------------------------------- other sizes of image


@pytest.mark.parametrize("size", [(64, 96), (32, 64), (128, 32)])
def test_sides_that_differ_are_those_of_timm(size: tuple[int, int]) -> None:
    theirs, ours = reference(size).eval(), small(size=size).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (61, 75), (33, 1)])
@pytest.mark.parametrize("relative", ["bias", "absolute"])
def test_tables_brought_along_equal_those_stretched_while_running(size: Size, relative: str) -> None:
    source, there = small(relative=relative).eval(), small(relative=relative, size=size).eval()
    spread(source)
    state = source.state_dict()
    for name, value in state.items():
        if name.endswith("bias_table"):
            state[name] = there.resized(name, value)
        else:
            assert there.resized(name, value) is None
    there.load_state_dict(state)
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(source(x), there(x), rtol=1e-5, atol=1e-5)
    tokens = there(x, "tokens").tokens
    assert tokens.shape[1] == math.prod(there.config.grid(size)) == math.prod(-(-side // 32) for side in size)


def test_a_table_of_no_square_is_left_alone() -> None:
    name = "stages.2.blocks.0.attn.rel_pos.relative_position_bias_table"
    assert small().resized(name, torch.zeros(15, 2)) is None
    assert small().resized(name, torch.zeros(16, 2)) is None
    assert small().resized(name, torch.zeros(25, 2)).shape == (49, 2)


# ---------------------------------------------------------------- training


def test_a_dropped_path_follows_the_sample() -> None:
    model = small(drop_path=0.6).double()
    spread(model)
    for module in model.modules():
        module.training = not isinstance(module, nn.BatchNorm2d)  # whose statistics would join the samples
    x = images(6, 32, torch.float64)
    together = model(x, seeds=seeds(6))
    alone = torch.cat([model(x[i : i + 1], seeds=seeds(6)[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)
    assert not torch.equal(together, model(x, seeds=seeds(6) + 1))
    assert not torch.equal(together, model.eval()(x))


def test_drop_path_grows_with_depth() -> None:
    drops = [m for m in small(drop_path=0.5).modules() if isinstance(m, SampleDrop)]
    assert len({drop.purpose for drop in drops}) == len(drops) == 3 + 2 * 3
    theirs = [m.drop_prob for m in reference(drop_path_rate=0.5).modules() if isinstance(m, DropPath)]
    assert [drop.rate for drop in drops if drop.rate] == pytest.approx(theirs)


def test_recomputed_blocks_give_the_same_gradients() -> None:
    found = []
    for recompute in (False, True):
        model = small(drop_path=0.5).double().train()
        spread(model)
        model.recompute = recompute
        model(images(4, 32, torch.float64), seeds=seeds(4)).square().sum().backward()
        found.append(gradients(model))
    assert all(torch.allclose(found[0][n], g, rtol=1e-10, atol=1e-14) for n, g in found[1].items())


def test_half_precision_runs() -> None:
    model = small().train()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(images(4, 64, torch.float32))
    out.float().square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


# ---------------------------------------------------------------- layers, names, refusals


def test_layers_and_decay() -> None:
    model = small()
    layers = {name: model.layer_of(name) for name, _ in model.named_parameters()}
    assert layers["stem.norm1.bias"] == 0
    assert layers["stages.0.blocks.0.conv1_1x1.weight"] == 1
    assert layers["stages.2.blocks.1.attn.qkv.weight"] == 5
    assert layers["stages.3.blocks.0.norm2.weight"] == 6
    assert layers["head.norm.weight"] == layers["head.fc.bias"] == 7
    assert set(layers.values()) == set(range(model.num_layers))
    assert model.no_decay() == {n for n in layers if n.endswith("relative_position_bias_table")}
    assert len(model.no_decay()) == 3
    assert model.no_decay() == reference().no_weight_decay()
    assert all(name.startswith("head.fc.") for name in layers if name.startswith(tuple(model.heads)))


def test_presets_and_their_config() -> None:
    assert set(Name.__args__) == set(PRESETS)
    config = build(CoAtNetConfig, {"name": "coatnet_1", "drop_path": 0.2})
    assert config.depths == (2, 6, 14, 2)
    assert build(CoAtNetConfig, resolved(config)) == config
    assert config.batch_norm
    model = make(classes=0, size=(64, 32), **SMALL).eval()
    assert (model.image_size, model.num_classes, model.config.num_classes) == ((64, 32), 0, 0)
    x = torch.zeros(2, 3, 64, 32)
    assert torch.equal(model(x), model(x, "pooled").pooled)


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ({"layout": "C-T-C-T"}, r"layout: given \"?'?C-T-C-T.*; allowed: .*C-C-T-T"),
        ({"relative": "off"}, r"relative: given .*off.*; allowed: .*absolute"),
        ({"dims": (16, 32, 72, 96)}, r"dims: given 72 for a stage of attention, .* not divisible by 32"),
        ({"dims": (12, 32, 64, 96)}, r"dims: given \[12, 32, 64, 96\]; allowed: four multiples of 8 above 0"),
        ({"dims": (16, 32, 64)}, "dims"),
        ({"depths": (0, 1, 1, 1)}, r"depths: given \[0, 1, 1, 1\]; allowed: four numbers above 0"),
        ({"size": 0}, "image_size: given 0; allowed: 1 or more"),
        ({"depht": 3}, "depht: unknown key"),
    ],
)
def test_wrong_configs(more: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line) as caught:
        small(**more)
    assert "\n" not in str(caught.value)


def test_wrong_calls() -> None:
    model, x = small(), torch.zeros(1, 3, 32, 32)
    with pytest.raises(UserError, match="keep: CoAtNet needs every patch"):
        model(x, keep=torch.zeros(1, 1, dtype=torch.int64))
    with pytest.raises(UserError, match="mask: the model has no mask token"):
        model(x, mask=torch.zeros(1, 1, dtype=torch.bool))
    with pytest.raises(UserError, match="want: given 'heads', which this CoAtNet does not have"):
        model(x, "heads")
    with pytest.raises(UserError, match="images: given 1×1×32×32; expected B×3×height×width"):
        model(torch.zeros(1, 1, 32, 32))

"""ViT and DeiT against timm, their sizes against the papers, and what this project adds to them."""

from __future__ import annotations

import math

import pytest
import torch
from parity import EXACT, compare, images, redraw
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vitlab.batch import uniform
from vitlab.config import UserError, build, resolved
from vitlab.models import MODELS, Features, ViT, ViTConfig, create_model
from vitlab.models.parts.transformer import SampleDrop, sincos
from vitlab.models.vit import PRESETS, Name

SMALL = {"patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 4}
TIMM = {"img_size": 16, "num_classes": 7, "fix_init": False, **SMALL}


def small(**more: object) -> ViT:
    model = create_model("vit_tiny", num_classes=7, image_size=16, **{**SMALL, **more})
    assert isinstance(model, ViT)
    return model


def seeds(n: int) -> Tensor:
    return torch.arange(n) * 1_000_003 + 5


# ---------------------------------------------------------------- the same as timm


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        ({"pool": "token"}, {"global_pool": "token"}),
        ({"pool": "mean"}, {"global_pool": "avg"}),
        ({"init_values": 0.1}, {"init_values": 0.1}),
        ({"distilled": True}, {}),
    ],
    ids=["token", "mean", "layer_scale", "distilled"],
)
def test_same_as_timm(mine: dict[str, object], theirs: dict[str, object], dtype: torch.dtype) -> None:
    family = VisionTransformerDistilled if mine.get("distilled") else VisionTransformer
    reference = family(**TIMM, **theirs)
    redraw(reference)
    model = small(**mine)
    assert set(model.state_dict()) == set(reference.state_dict())
    model.load_state_dict(reference.state_dict())
    x = images(5, 16, dtype)

    def run(module: nn.Module) -> tuple[Tensor, Tensor]:
        output = module(x)
        return output, nn.functional.cross_entropy(output, torch.arange(5))

    compare(model.to(dtype).eval(), reference.to(dtype).eval(), run)


def test_both_heads_are_those_of_timm_in_training() -> None:
    reference = VisionTransformerDistilled(**TIMM)
    redraw(reference)
    reference.set_distilled_training(True)
    model = small(distilled=True)
    model.load_state_dict(reference.state_dict())
    found = model.train()(images(3, 16, torch.float32), {"heads"}).heads
    for ours, theirs in zip(found, reference.train()(images(3, 16, torch.float32)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_features_are_those_of_timm() -> None:
    reference = VisionTransformer(**TIMM)
    redraw(reference)
    model = small()
    model.load_state_dict(reference.state_dict())
    x = images(2, 16, torch.float32)
    found = model(x, ["tokens", "prefix", "pooled", "pyramid"])
    whole = reference.forward_features(x)
    torch.testing.assert_close(torch.cat([found.prefix, found.tokens], 1), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.pooled, whole[:, 0], rtol=1e-5, atol=1e-5)
    assert [tuple(level.shape) for level in found.pyramid] == [(2, 32, 4, 4)]
    assert torch.equal(found.pyramid[0][:, :, 1, 2], found.tokens[:, 6])
    assert found.logits is None
    assert found.attentions is None


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("deit_tiny", 5.9),  # 5.7 in the paper's table 5, which leaves the distillation parts out
        ("vit_tiny", 5.7),
        ("vit_small", 22.1),
        ("vit_base", 86.6),
        ("deit_base", 87.3),
        ("vit_large", 304.3),
        ("vit_huge", 632.0),
    ],
)
def test_parameter_counts(name: str, millions: float) -> None:
    with torch.device("meta"):
        model = create_model(name, num_classes=1000, image_size=224)
    count = sum(p.numel() for p in model.parameters()) / 1e6
    assert round(count, 1) == pytest.approx(millions, abs=0.051 if millions < 100 else 0.3)


# ---------------------------------------------------------------- keep, mask, attentions


@pytest.mark.parametrize("mode", [{}, {"positions": "sincos"}, {"distilled": True}])
def test_kept_patches_alone_equal_the_full_way(mode: dict[str, object]) -> None:
    """Without the other patches in the attention: the reference drops them after the embedding."""
    model = small(**mode)
    redraw(model)
    x, keep = images(3, 16, torch.float32), torch.rand(3, 16).argsort(1)[:, :5]
    embedded = nn.functional.conv2d(x, model.patch_embed.proj.weight, model.patch_embed.proj.bias, stride=4)
    whole = embedded.flatten(2).mT + model.pos_embed[:, model.prefix :]
    kept = torch.stack([whole[i, keep[i]] for i in range(3)])
    got = model._embed(x, model.grid, keep, None)[:, model.prefix :]
    torch.testing.assert_close(got, kept, rtol=1e-5, atol=1e-5)
    shuffled = torch.stack([torch.randperm(16) for _ in range(3)])
    torch.testing.assert_close(model(x, keep=shuffled), model(x), rtol=1e-4, atol=1e-5)


def test_what_is_not_kept_changes_nothing() -> None:
    model = small()
    redraw(model)
    x, keep = images(2, 16, torch.float32), torch.tensor([[0, 1], [0, 1]])
    y = x.clone()
    y[:, :, 4:] = 9.0
    assert torch.equal(model(x, keep=keep), model(y, keep=keep))


def test_masked_patches_are_replaced_by_the_token() -> None:
    model = small(mask_token=True)
    redraw(model)
    x, mask = images(2, 16, torch.float32), torch.zeros(2, 16, dtype=torch.bool)
    assert torch.equal(model(x, mask=mask), model(x))
    mask[:, 3] = True
    y = x.clone()
    y[:, :, :4, 12:] = 9.0
    assert torch.equal(model(x, mask=mask), model(y, mask=mask))
    assert not torch.equal(model(x, mask=mask), model(x))
    model(x, mask=mask).sum().backward()
    assert model.mask_token.grad is not None


def test_open_attention_is_the_fused_one() -> None:
    model = small()
    redraw(model)
    x = images(2, 16, torch.float32)
    found = model(x, {"attentions", "logits"})
    assert [tuple(a.shape) for a in found.attentions] == [(2, 4, 17, 17)] * 3
    torch.testing.assert_close(found.attentions[0].sum(-1), torch.ones(2, 4, 17))
    torch.testing.assert_close(found.logits, model(x), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- randomness of a sample


def test_a_sample_is_the_same_in_any_batch() -> None:
    model = small(drop_path=0.6, dropout=0.2).double().train()
    redraw(model)
    x = images(6, 16, torch.float64)
    together = model(x, seeds=seeds(6))
    alone = torch.cat([model(x[i : i + 1], seeds=seeds(6)[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)
    assert torch.equal(together, model(x, seeds=seeds(6)))
    assert not torch.equal(together, model(x, seeds=seeds(6) + 1))
    assert not torch.equal(together, model.eval()(x))


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_drop_path_drops_whole_samples_and_scales_the_rest(rate: float, given: bool) -> None:
    torch.manual_seed(0)
    drop, n = SampleDrop(rate, "drop_path/1/attn", whole=True).train(), 4000
    out = drop(torch.ones(n, 3, 2), seeds(n) if given else None)
    assert torch.equal(out, out[:, :1, :1].expand_as(out))
    kept = out[:, 0, 0] > 0
    torch.testing.assert_close(out[kept], torch.full_like(out[kept], 1 / (1 - rate)))
    assert abs(float(kept.float().mean()) - (1 - rate)) < 4 * (rate * (1 - rate) / n) ** 0.5
    if given:
        assert torch.equal(kept, uniform(seeds(n), "drop_path/1/attn", 1)[:, 0] >= rate)
    assert torch.equal(drop.eval()(out), out)


def test_drop_path_grows_with_depth() -> None:
    rates = [block.drop_path2.rate for block in small(drop_path=0.3).blocks]
    assert rates == pytest.approx([0, 0.15, 0.3])
    purposes = {m.purpose for m in small().modules() if isinstance(m, SampleDrop)}
    assert len(purposes) == 1 + 5 * 3


# ---------------------------------------------------------------- layers and names


def test_layers_and_decay() -> None:
    model = small(distilled=True, mask_token=True)
    layers = {name: model.layer_of(name) for name, _ in model.named_parameters()}
    assert {
        layers[n] for n in ("cls_token", "dist_token", "pos_embed", "mask_token", "patch_embed.proj.bias")
    } == {0}
    assert layers["blocks.0.attn.qkv.weight"] == 1
    assert layers["blocks.2.norm1.bias"] == 3
    assert {layers[n] for n in ("norm.weight", "head.bias", "head_dist.weight")} == {4}
    assert set(layers.values()) == set(range(model.num_layers))
    assert model.no_decay() == {"cls_token", "dist_token", "pos_embed", "mask_token"}
    assert small(positions="sincos").no_decay() == {"cls_token"}


def test_fixed_positions_are_saved_and_not_trained() -> None:
    model = small(positions="sincos")
    assert "pos_embed" in model.state_dict()
    assert "pos_embed" not in dict(model.named_parameters())
    assert not model.pos_embed[:, 0].any()


def test_fixed_positions_count_columns_first() -> None:
    found = sincos(8, (2, 3), 1)[0, 1:].view(2, 3, 8)
    column, row = found[..., :4], found[..., 4:]
    assert torch.equal(column[0], column[1])
    assert torch.equal(row[:, 0], row[:, 2])
    expected = torch.tensor([2.0, 0.02])  # column 2, ω = 1 and 10000^(-1/2)
    torch.testing.assert_close(column[0, 2], torch.cat([expected.sin(), expected.cos()]))
    torch.testing.assert_close(row[1, 0], torch.cat([(expected / 2).sin(), (expected / 2).cos()]))


@pytest.mark.parametrize("init", ["deit", "mae"])
def test_initialisation(init: str) -> None:
    torch.manual_seed(0)
    model = small(embed_dim=64, init=init)
    weight = model.blocks[1].mlp.fc1.weight.detach()
    assert float(weight.std()) == pytest.approx(0.02 if init == "deit" else (2 / (64 + 256)) ** 0.5, rel=0.05)
    assert not model.blocks[1].mlp.fc1.bias.any()
    assert float(model.pos_embed.detach().std()) == pytest.approx(0.02, rel=0.1)


def test_presets_and_their_config() -> None:
    assert set(Name.__args__) == set(PRESETS) <= set(MODELS)
    config = build(ViTConfig, {"name": "vit_huge", "drop_path": 0.2})
    assert resolved(config)["embed_dim"] == 1280
    assert build(ViTConfig, resolved(config)) == config
    assert build(ViTConfig, {"name": "deit_tiny", "depth": 2}).depth == 2
    model = create_model("vit_tiny", num_classes=0, image_size=(32, 16), depth=1)
    assert isinstance(model.head, nn.Identity)
    assert (model.image_size, model.num_classes, model.config.num_classes) == ((32, 16), 0, 0)
    assert model(torch.zeros(2, 3, 32, 16)).shape == (2, 192)
    assert isinstance(model(torch.zeros(2, 3, 32, 16), {"pooled"}), Features)


@pytest.mark.parametrize(
    ("name", "size", "more", "line"),
    [
        ("vit_bass", 32, {}, r"model: given 'vit_bass'; allowed: vit_tiny, .*; did you mean 'vit_base'\?"),
        (
            "vit_tiny",
            32,
            {"depht": 3},
            r"depht: unknown key \(given 3\); allowed: .*; did you mean 'depth'\?",
        ),
        ("vit_tiny", 30, {}, r"image_size 30 is not divisible by patch_size 16; nearest: 16 or 32"),
        ("vit_tiny", (32, 8), {}, r"image_size 8 is not divisible by patch_size 16; nearest: 16"),
        ("vit_tiny", 32, {"num_heads": 5}, r"embed_dim 192 is not divisible by num_heads 5"),
        ("vit_tiny", 32, {"embed_dim": 6, "positions": "sincos"}, r"embed_dim 6 is not divisible by 4"),
        ("vit_tiny", 32, {"drop_path": 1.0}, r"drop_path: given 1.0; must be at least 0 and less than 1"),
        ("deit_tiny", 32, {"pool": "mean"}, r"pool: given 'mean'; .*allowed: token"),
        ("vit_tiny", 32, {"num_classes": -1}, r"num_classes: given -1"),
    ],
)
def test_wrong_configs(name: str, size: int | tuple[int, int], more: dict[str, object], line: str) -> None:
    with pytest.raises(UserError, match=line) as caught:
        create_model(name, **{"num_classes": 3, "image_size": size, **more})
    assert "\n" not in str(caught.value)


def test_unknown_name_in_a_file() -> None:
    with pytest.raises(UserError, match=r"name: given \"vit_bass\"; allowed: .*; did you mean 'vit_base'\?"):
        build(ViTConfig, {"name": "vit_bass"})


def test_wrong_calls() -> None:
    model, x, keep = small(), torch.zeros(1, 3, 16, 16), torch.zeros(1, 2, dtype=torch.int64)
    mask = torch.zeros(1, 16, dtype=torch.bool)
    with pytest.raises(UserError, match=r"want: given 'token'; allowed: logits, .*; did you mean 'tokens'\?"):
        model(x, {"token"})
    with pytest.raises(UserError, match=r"image_size 18 is not divisible by patch_size 4; nearest: 16 or 20"):
        model(torch.zeros(1, 3, 16, 18))
    with pytest.raises(UserError, match=r"images: given 1×1×16×16; expected B×3×height×width"):
        model(torch.zeros(1, 1, 16, 16))
    with pytest.raises(UserError, match=r"images: given torch.uint8; expected normalised floating-point"):
        model(x.to(torch.uint8))
    with pytest.raises(UserError, match=r"mask: given 1×9 of torch.bool; expected 1×16 of torch.bool"):
        small(mask_token=True)(x, mask=mask[:, :9])
    with pytest.raises(UserError, match=r"mask: given 1×16 of torch.float32; expected 1×16 of torch.bool"):
        small(mask_token=True)(x, mask=mask.float())
    with pytest.raises(UserError, match=r"keep: given 2×2 of torch.int64; expected 1×2 of torch.int64"):
        model(x, keep=keep.expand(2, 2))
    with pytest.raises(UserError, match="the model has no mask token"):
        model(x, mask=mask)
    with pytest.raises(UserError, match="keep: given with a mask"):
        small(mask_token=True)(x, mask=mask, keep=keep)
    with pytest.raises(UserError, match=r"keep: .* pyramid"):
        model(x, "pyramid", keep=keep)
    with pytest.raises(
        UserError, match="given 'heads', which this ViT does not have; allowed: attentions, layers"
    ):
        model(x, {"heads"})


# ---------------------------------------------------------------- other resolutions, joined heads


@pytest.mark.parametrize("size", [(24, 24), (8, 16), (16, 28)])
def test_another_resolution_is_a_model_with_interpolated_positions(size: tuple[int, int]) -> None:
    """The table goes as in DeiT's and MAE's fine-tuning code: bicubic, the prefix tokens' part as it is."""
    model = small(distilled=True)
    redraw(model)
    state = model.state_dict()
    grid = (size[0] // 4, size[1] // 4)
    table = state["pos_embed"][:, 2:].reshape(1, 4, 4, 32).permute(0, 3, 1, 2)
    fine = nn.functional.interpolate(table, grid, mode="bicubic", align_corners=False)
    fine = torch.cat([state["pos_embed"][:, :2], fine.permute(0, 2, 3, 1).flatten(1, 2)], 1)
    reference = VisionTransformerDistilled(**{**TIMM, "img_size": size}).eval()
    reference.load_state_dict({**state, "pos_embed": fine})
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model.eval()(x), reference(x), rtol=1e-4, atol=1e-5)
    assert model(x, {"pyramid"}).pyramid[0].shape == (2, 32, *grid)
    other = create_model(
        "vit_tiny", num_classes=7, image_size=size, **{**SMALL, "distilled": True, "mask_token": False}
    )
    assert torch.equal(other.resized("pos_embed", state["pos_embed"]), fine)
    assert other.resized("pos_embed", state["pos_embed"][:, :-1]) is None
    assert other.resized("cls_token", state["cls_token"]) is None


@pytest.mark.parametrize("size", [(12, 12), (24, 24), (8, 28), (20, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_positions_are_stretched_as_in_dino_s_code(size: tuple[int, int], dtype: torch.dtype) -> None:
    """Patch i of n lies at (i + ½) · old / (n + 0.1) - ½ of the old grid; cubic convolution with a = -¾."""
    model = small(resample="dino").to(dtype)
    redraw(model)
    plain = small(resample="plain").to(dtype)
    plain.load_state_dict(model.state_dict())
    table = model.state_dict()["pos_embed"]

    def weights(new: int, old: int = 4) -> Tensor:
        """new old: what each new place takes of the old ones, those beyond the edge being the edge's."""
        found = torch.zeros(new, old, dtype=torch.float64)
        for i in range(new):
            place = (i + 0.5) * old / (new + 0.1) - 0.5
            for j in range(math.floor(place) - 1, math.floor(place) + 3):
                t, a = abs(place - j), -0.75
                near = (a + 2) * t**3 - (a + 3) * t**2 + 1
                far = a * (t**3 - 5 * t**2 + 8 * t - 4)
                found[i, min(max(j, 0), old - 1)] += near if t <= 1 else far
        return found

    rows, columns = size[0] // 4, size[1] // 4
    square = table[0, 1:].double().view(4, 4, -1)
    wanted = torch.einsum("ya,xb,abd->yxd", weights(rows), weights(columns), square).flatten(0, 1)
    other = create_model("vit_tiny", num_classes=7, image_size=size, **SMALL, resample="dino").to(dtype)
    fine = other.resized("pos_embed", table)
    near = {"rtol": 0, "atol": 1e-5 if dtype == torch.float32 else 1e-12}
    torch.testing.assert_close(fine[0, 1:].double(), wanted, **near)
    assert torch.equal(fine[:, :1], table[:, :1])

    x = images(2, 28, dtype)[..., : size[0], : size[1]]
    other.load_state_dict({**model.state_dict(), "pos_embed": fine})
    torch.testing.assert_close(model.eval()(x), other.eval()(x), **near)
    assert (model(x) - plain.eval()(x)).abs().max() > 1e-6
    own = images(2, 16, dtype)
    assert torch.equal(model(own), plain(own))


def test_positions_of_its_own_size_are_not_touched() -> None:
    model = small(positions="sincos")
    assert model.resized("pos_embed", model.pos_embed) is not None
    assert torch.equal(model.resized("pos_embed", model.pos_embed), model.pos_embed)


@pytest.mark.parametrize("combine", ["mean", "sum", "concat"])
def test_two_heads_become_one(combine: str) -> None:
    model = small(distilled=True, combine=combine).eval()
    redraw(model)
    x = images(3, 16, torch.float32)
    found = model(x, {"logits", "prefix", "pooled"})
    class_token, distillation_token = found.prefix.unbind(1)
    both = torch.cat([class_token, distillation_token], dim=1)
    if combine == "concat":
        expected, pooled = both @ model.head.weight.T + model.head.bias, both
        assert not hasattr(model, "head_dist")
        with pytest.raises(UserError, match="given 'heads'"):
            model(x, {"heads"})
    else:
        first, second = model(x, {"heads"}).heads
        scale = 0.5 if combine == "mean" else 1.0
        expected, pooled = (first + second) * scale, (class_token + distillation_token) * scale
    torch.testing.assert_close(found.logits, expected)
    torch.testing.assert_close(found.pooled, pooled)
    torch.testing.assert_close(model(x), found.logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match=r"combine: given 'sum', but there are no two heads"):
        small(combine="sum")


@pytest.mark.parametrize("mode", [{}, {"distilled": True}, {"dropout": 0.2, "drop_path": 0.3}])
def test_what_the_last_block_leaves_out_changes_nothing(mode: dict[str, object]) -> None:
    """Tokens wanted: all are computed. Logits wanted: the prefix alone. Same values, same gradients."""
    model = small(**mode).double().train()
    redraw(model)
    x, found = images(4, 16, torch.float64), []
    for want in ({"logits"}, {"logits", "tokens"}):
        model.zero_grad()
        logits = model(x, want, seeds=seeds(4)).logits
        logits.square().sum().backward()
        found.append([logits.detach(), *(p.grad.clone() for p in model.parameters())])
    for less, whole in zip(*found, strict=True):
        torch.testing.assert_close(less, whole, rtol=1e-10, atol=1e-10)

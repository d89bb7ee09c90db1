"""SimMIM against transformers' Swin and ViT and against the paper's sums written out, step by step."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from parity import EXACT, THEIR_SIZES, images, redraw, worst
from steps import halved, part, unlabelled
from torch import Tensor, nn
from transformers import SwinConfig as TheirSwin
from transformers import SwinForMaskedImageModeling, ViTForMaskedImageModeling
from transformers import ViTConfig as TheirViT

from vitlab.batch import Batch, uniform
from vitlab.config import UserError, build
from vitlab.engine.optim import OptimConfig, adamw
from vitlab.methods import SimMIM, SimMIMConfig, create_method
from vitlab.models import Backbone, create_model
from vitlab.models.layouts import LAYOUTS

SIDE = 32
SIZES: dict[str, dict[str, Any]] = {
    "swin_tiny": {"patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [1, 2], "window_size": 4},
    "vit_tiny": {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4},
    "cct_6_3x2": {"embed_dim": 24, "depth": 2, "num_heads": 3},
}
REFERENCES = {"swin_tiny": "Hugging Face", "vit_tiny": "Hugging Face ViT"}


def backbone(name: str, **more: Any) -> Backbone:
    torch.manual_seed(0)
    given = {"num_classes": 0, "image_size": SIDE, "mask_token": True, **SIZES[name], **more}
    return create_model(name, **given)


def method(name: str = "vit_tiny", model: Backbone | None = None, **more: Any) -> SimMIM:
    made = create_method(build(SimMIMConfig, {"mask_patch": 8, **more}), model or backbone(name))
    assert isinstance(made, SimMIM)
    return made


def reference(name: str) -> nn.Module:
    if name == "swin_tiny":
        sizes = {**SIZES[name], "encoder_stride": 4, "layer_norm_eps": 1e-5, "drop_path_rate": 0.0}
        return SwinForMaskedImageModeling(TheirSwin(image_size=SIDE, **sizes, attn_implementation="sdpa"))
    return ViTForMaskedImageModeling(
        TheirViT(
            **THEIR_SIZES,
            image_size=SIDE,
            patch_size=4,
            encoder_stride=4,
            layer_norm_eps=1e-6,
        )
    )


def renamed(official: dict[str, Tensor], ours: SimMIM, name: str) -> dict[str, Tensor]:
    """transformers' tensors under our names."""
    layout = next(one for one in LAYOUTS[type(ours.model)] if one.source == REFERENCES[name])
    own = {n.partition(".")[2]: t for n, t in official.items() if not n.startswith("decoder.")}
    out = {f"model.{n}": t for n, t in layout.convert(own, ours.model).items()}
    return out | {n: t for n, t in official.items() if n.startswith("decoder.")}


def batch(dtype: torch.dtype = torch.float32, n: int = 5) -> Batch:
    return unlabelled(images(n, SIDE, dtype))


def hidden(of: Batch, units: int = 4, ratio: float = 0.6) -> Tensor:
    """B U U by the authors' way: the first of a shuffled row of units."""
    count, mask = math.ceil(units**2 * ratio), torch.zeros(len(of.seeds), units**2, dtype=torch.bool)
    for row, order in zip(mask, uniform(of.seeds, "mask", units**2).argsort(1), strict=True):
        row[order[:count]] = True
    return mask.view(-1, units, units)


def blown(mask: Tensor, side: int) -> Tensor:
    return nn.functional.interpolate(mask[:, None].double(), (side, side))[:, 0] > 0


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("name", REFERENCES)
def test_three_steps_as_transformers(name: str, dtype: torch.dtype) -> None:
    official, ours, of = reference(name), method(name), batch(dtype)
    redraw(official, 1)  # of other seeds a fp32 table of biases is a sum that cancels
    state = renamed(official.state_dict(), ours, name)
    assert state.keys() == ours.state_dict().keys()
    ours.load_state_dict(state)
    ours, official = ours.to(dtype).train(), official.to(dtype).train()
    tokens = blown(hidden(of), ours.grid).flatten(1)
    eps = 1e-8 if dtype == torch.float64 else 1e-3  # below it an fp32 gradient is rounding alone
    moves = [torch.optim.AdamW(m.parameters(), lr=1e-3, eps=eps) for m in (ours, official)]
    for step in range(3):
        loss = ours(of).loss / 5
        expected = official(of.views[0], bool_masked_pos=tokens).loss
        for move, value in zip(moves, (loss, expected), strict=True):
            move.zero_grad()
            value.backward()
        mine = {n: p.grad for n, p in ours.named_parameters()}
        other = renamed({n: p.grad for n, p in official.named_parameters()}, ours, name)
        for move in moves:
            move.step()
        weights = renamed(official.state_dict(), ours, name)
        figures = {
            "loss": worst({"loss": loss}, {"loss": expected}),
            "gradients": worst(mine, other),
            "weights": worst(ours.state_dict(), weights),
        }
        print("SimMIM", name, dtype, step, figures)
        assert all(figure <= EXACT[dtype] for figure in figures.values()), figures


@pytest.mark.parametrize("name", SIZES)
def test_the_paper_written_out(name: str) -> None:
    """L = ‖y_M - x_M‖₁ / Ω(x_M), a pixel at a time."""
    ours, of = method(name).double(), batch(torch.float64)
    redraw(ours)
    loss = ours(of).loss
    loss.backward()
    mine = {n: p.grad.clone() for n, p in ours.named_parameters() if p.grad is not None}
    assert set(mine) == {n for n, p in ours.named_parameters() if p.requires_grad}
    ours.zero_grad()
    mask, image = hidden(of), of.views[0]
    last = ours.model(image, {"pyramid"}, mask=blown(mask, ours.grid).flatten(1)).pyramid[-1]
    weight, bias = ours.decoder[0].weight.flatten(1), ours.decoder[0].bias
    stride = SIDE // last.shape[2]
    numbers = torch.einsum("oc,bchw->bhwo", weight, last) + bias  # (channel, row, column) of a patch
    grid = numbers.unflatten(3, (3, stride, stride)).permute(0, 3, 1, 4, 2, 5).reshape(image.shape)
    shown = blown(mask, SIDE)
    terms = [(grid[i] - image[i])[:, shown[i]].abs().mean() for i in range(5)]
    torch.stack(terms).sum().backward()
    expected = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
    figure = max(worst({"loss": loss}, {"loss": torch.stack(terms).sum()}), worst(mine, expected))
    print("SimMIM written out", name, figure)
    assert figure < 1e-10


@pytest.mark.parametrize("name", SIZES)
def test_padded_slots_and_micro_batches_change_nothing(name: str) -> None:
    ours, of = method(name, backbone(name, drop_path=0.5)).double().train(), batch(torch.float64)
    whole = ours(of).loss
    parts = [ours(part(of, rows)).loss for rows in (slice(0, 2), slice(2, 5))]
    torch.testing.assert_close(whole, torch.stack(parts).sum(), rtol=1e-12, atol=0)
    of.weight[3] = 0
    rest = ours(part(of, slice(0, 3))).loss + ours(part(of, slice(4, 5))).loss
    torch.testing.assert_close(ours(of).loss, rest, rtol=1e-12, atol=0)
    assert float(ours.weigh(of)) == 4


def test_visible_pixels_have_no_gradient() -> None:
    """The paint of visible pixels may be anything."""
    ours, of = method("swin_tiny").double(), batch(torch.float64)
    seen = []
    ours.decoder.register_forward_hook(lambda module, given, out: seen.append(out) or out.retain_grad())
    ours(of).loss.backward()
    assert torch.equal(seen[0].grad.abs().sum(1) > 0, blown(hidden(of), SIDE))


@pytest.mark.parametrize("name", ["swin_tiny", "vit_tiny"])
def test_picture(name: str) -> None:
    ours, of = method(name).eval(), batch()
    picture, shown, image = ours(of, "picture"), blown(hidden(of), SIDE)[:, None], of.views[0]
    assert torch.equal(picture.original, image)
    assert torch.equal(picture.masked, torch.where(shown, 0.0, image))
    assert torch.equal(torch.where(shown, 0.0, picture.reconstruction), picture.masked)
    error = (picture.reconstruction - image).abs().sum((1, 2, 3)) / shown.sum((1, 2, 3)) / 3
    torch.testing.assert_close(error.sum(), ours(of).loss.detach())


def test_half_precision_products() -> None:
    halved(method().train(), batch())


@pytest.mark.parametrize(
    ("side", "name", "pixels"),
    [(192, "swin_tiny", 32), (224, "vit_tiny", 32), (224, "swin_tiny", 32), (32, "cct_6_3x2", 4)],
)
def test_units_fit_images_of_any_side(side: int, name: str, pixels: int) -> None:
    sizes = {} if name == "cct_6_3x2" else {"patch_size": 16 if name == "vit_tiny" else 4}
    with torch.device("meta"):
        model = create_model(name, num_classes=0, image_size=side, mask_token=True, **sizes)
        ours = method(model=model, mask_patch=None)
    assert side // ours.units == pixels
    assert ours.hidden == math.ceil(ours.units**2 * 0.6)


def test_only_the_loss_moves_weights() -> None:
    """Sequence pooling is not read: it is the same whether gradients are none or zero."""
    ours = method("cct_6_3x2")
    frozen = {n for n, p in ours.named_parameters() if not p.requires_grad}
    assert frozen == {f"model.classifier.attention_pool.{kind}" for kind in ("weight", "bias")}
    given = {id(p) for group in adamw(ours, build(OptimConfig, {})).param_groups for p in group["params"]}
    assert not given & {id(p) for n, p in ours.named_parameters() if n in frozen}


def test_decay_layers_and_export() -> None:
    assert method("swin_tiny").no_decay() == {"model.mask_token"}
    assert method("vit_tiny").no_decay() == {"model.cls_token", "model.pos_embed"}
    ours = method()
    assert ours.layer_of("decoder.0.weight") == 3
    assert ours.layer_of("model.mask_token") == 0
    assert ours.export() is ours.model
    assert [view.name for view in ours.views()] == ["image"]


@pytest.mark.parametrize(
    ("name", "model", "more", "line"),
    [
        ("vit_tiny", {"mask_token": False}, {}, "simmim.model.mask_token: given false; .* allowed: true"),
        ("vit_tiny", {}, {"mask_patch": 6}, "mask_patch: given 6; .* allowed: 4, 8, 16, 32"),
        (
            "vit_tiny",
            {},
            {"mask_patch": 32},
            "leaves nothing of 1 units visible; allowed: none, or a smaller",
        ),
        ("vit_tiny", {}, {"mask_ratio": 0.99}, "mask_ratio: given 0.99, .* allowed: at most 0.937"),
        ("swin_tiny", {"depths": [1] * 6, "num_heads": [1] * 6}, {}, "strides do not divide 32 pixels"),
        ("torchvision", {}, {}, "simmim cannot train it, allowed: vit_tiny"),
    ],
)
def test_wrong_configs(name: str, model: dict[str, Any], more: dict[str, Any], line: str) -> None:
    if name == "torchvision":
        made = create_model(name, num_classes=0, image_size=SIDE, arch="resnet18")
    else:
        made = backbone(name, **model)
    with pytest.raises(UserError, match=line):
        method(model=made, **more)

"""Outputs by depth: `layers`, what a teacher's insides are read from."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torchvision
from test_borrowed import borrowed, fill, redraw, theirs
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor
from zoo import SMALL, small

from vitlab.config import UserError
from vitlab.models import Backbone, Compact, ViT, create_model

BY_BLOCK = ("vit_tiny", "deit_tiny", "cct_6_3x2", "vit_lite_6_4")


def fresh(name: str, **more: Any) -> Backbone:
    torch.manual_seed(0)
    return small(name, **more).double()


def picture(name: str, batch: int = 2) -> Tensor:
    side = SMALL[name].image_size
    generator = torch.Generator().manual_seed(3)
    return torch.randn(batch, 3, side, side, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", SMALL)
def test_every_family_has_layers_and_says_their_sizes(name: str) -> None:
    model, images = fresh(name).train(), picture(name)
    sizes = model.layer_sizes()
    assert model.training
    model.eval()
    found = model(images, {"layers", "logits"})
    assert [tuple(m.shape[1:]) for m in found.layers] == sizes
    assert len(sizes) > 1
    torch.testing.assert_close(found.logits, model(images), rtol=1e-12, atol=1e-12)
    assert found.pyramid is None
    if name not in BY_BLOCK and name != "torchvision":
        both = model(images, {"layers", "pyramid"})
        assert all(a is b for a, b in zip(both.layers, both.pyramid, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(both.layers, found.layers, strict=True))


@pytest.mark.parametrize("name", BY_BLOCK)
def test_plain_transformers_have_one_a_block(name: str) -> None:
    """The outputs of the blocks themselves; the last one, normed, is what `tokens` are."""
    model, images = fresh(name).eval(), picture(name)
    assert isinstance(model, ViT | Compact)
    plain = isinstance(model, ViT)
    blocks, norm = (model.blocks, model.norm) if plain else (model.classifier.blocks, model.classifier.norm)
    prefix = model.prefix if plain else model.classifier.prefix
    seen: list[Tensor] = []
    for block in blocks:
        block.register_forward_hook(lambda _, __, out: seen.append(out if plain else out[0]))
    found = model(images, {"layers", "tokens"})
    assert len(found.layers) == len(blocks) == 2
    for layer, out in zip(found.layers, seen, strict=True):
        assert torch.equal(layer.flatten(2).mT, out[:, prefix:])
    torch.testing.assert_close(norm(found.layers[-1].flatten(2).mT), found.tokens, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", SMALL)
def test_gradients_come_from_every_layer_recomputed_or_not(name: str) -> None:
    images, kept = picture(name), []
    for recompute in (False, True):
        model = fresh(name).train()
        model.recompute = recompute
        layers = model(images, {"layers"}, seeds=torch.arange(2)).layers
        sum((i + 1) * layer.square().mean() for i, layer in enumerate(layers)).backward()
        kept.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert kept[0].keys() == kept[1].keys()
    assert all(torch.equal(kept[0][n], kept[1][n]) for n in kept[0])
    heads = tuple(fresh(name).heads)
    numbers = {model.layer_of(n) for n in kept[0] if not n.startswith(heads)}
    assert {0, model.num_layers - 2} <= numbers


def test_layers_need_every_patch() -> None:
    with pytest.raises(UserError, match=r"keep: .* layers"):
        fresh("vit_tiny")(picture("vit_tiny"), {"layers"}, keep=torch.zeros(2, 3, dtype=torch.int64))


# ---------------------------------------------------------------- nets of the libraries


def test_stages_of_torchvision() -> None:
    """The stages that torchvision's own tracer finds in a RegNet."""
    model, reference = (
        borrowed("torchvision", "regnet_y_400mf").double(),
        theirs("torchvision", "regnet_y_400mf"),
    )
    redraw(reference)
    fill(model, reference)
    names = ["stem", *(f"trunk_output.block{i}" for i in range(1, 5))]
    expected = create_feature_extractor(reference.double().eval(), names)(x := images(2))
    found = model.eval()(x, {"layers"}).layers
    assert [m.shape[2] for m in found] == [16, 8, 4, 2, 1]
    assert all(torch.equal(a, b) for a, b in zip(found, expected.values(), strict=True))


def test_stages_of_timm() -> None:
    """The stages that timm calls features."""
    model = borrowed("timm", "regnety_002").double().eval()
    reference = timm.create_model("regnety_002", features_only=True).double().eval()
    reference.load_state_dict(
        {n.removeprefix("net."): t for n, t in model.state_dict().items() if "head" not in n}
    )
    expected, found = reference(x := images(2)), model(x, {"layers"}).layers
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def images(batch: int) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("arch", ["swin_t", "vit_b_32"])
def test_nets_without_maps_have_no_layers(arch: str) -> None:
    """Channels at the end, and tokens."""
    with torch.device("meta"):
        model = create_model("torchvision", arch=arch, num_classes=3, image_size=32)
    assert model.layer_sizes() == []
    with pytest.raises(UserError, match="want: given 'layers', which this Borrowed does not have"):
        model(torch.randn(1, 3, 32, 32, device="meta"), {"layers"})


def test_hearing_leaves_nothing_behind() -> None:
    model = borrowed("torchvision", "resnet18").eval()
    assert isinstance(model.net, torchvision.models.ResNet)
    model(torch.randn(1, 3, 32, 32), {"layers"})
    with pytest.raises(RuntimeError):  # also when the net fails
        model(torch.randn(1, 3, 32, 32, dtype=torch.float64), {"layers"})
    assert not any(len(part._forward_hooks) for part in model.modules() if isinstance(part, nn.Module))

"""Nets of torchvision and timm as they are here, against themselves as they are there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from parity import EXACT, compare
from torch import Tensor, nn

from vitlab.config import UserError, build
from vitlab.models import Backbone, create_model, load_model, load_weights, save_model
from vitlab.models.borrowed import Borrowed, BorrowedConfig, NormAct
from vitlab.models.layouts.borrowed import LAYOUTS
from vitlab.models.parts.norm import BatchNorm2d

SIDE = 32
NETS = [("torchvision", "regnet_y_400mf"), ("torchvision", "resnet18"), ("timm", "regnety_002")]


def theirs(name: str, arch: str, in_chans: int = 3) -> nn.Module:
    if name == "timm":
        return timm.create_model(arch, num_classes=5, in_chans=in_chans)
    net: nn.Module = torchvision.models.get_model(arch, num_classes=5)
    return net


def borrowed(name: str, arch: str, side: int = SIDE, classes: int = 5, **more: object) -> Borrowed:
    model = create_model(name, arch=arch, num_classes=classes, image_size=side, **more)
    assert isinstance(model, Borrowed)
    return model


def redraw(module: nn.Module) -> None:
    """Every tensor near a fresh one, so that deep sums stay in range; variances and scales positive."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator) * 0.1
            positive = "running_var" in name or (tensor.ndim == 1 and name.endswith("weight"))
            tensor.copy_(
                (1 + noise).abs() if positive else noise if tensor.ndim == 1 else tensor + noise / 10
            )


def fill(model: Borrowed, net: nn.Module) -> None:
    (layout,) = LAYOUTS
    assert layout.fits(net.state_dict(), model)
    model.load_state_dict(layout.convert(net.state_dict(), model))


def images(batch: int, channels: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(batch, channels, SIDE, SIDE, generator=generator, dtype=torch.float64).to(dtype)


def as_theirs(model: Borrowed) -> nn.Module:
    """The same modules under the library's names."""
    model.net.set_submodule(model.classifier, model.head)
    return model.net


# ---------------------------------------------------------------- the same as there


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize(("name", "arch"), NETS)
def test_outputs_gradients_and_a_step_are_theirs(name: str, arch: str, dtype: torch.dtype) -> None:
    reference, model = theirs(name, arch), borrowed(name, arch)
    redraw(reference)
    fill(model, reference)
    assert torch.equal(model.eval()(images(2)), reference.eval()(images(2)))
    x = images(4, dtype=dtype)

    def run(module: nn.Module) -> tuple[Tensor, Tensor]:
        output = module(x)
        return output, nn.functional.cross_entropy(output, torch.arange(4))

    ours = as_theirs(model)
    assert set(ours.state_dict()) == set(reference.state_dict())
    compare(ours.to(dtype).eval(), reference.to(dtype).eval(), run)


def test_training_normalises_as_theirs() -> None:
    reference, model = theirs("timm", "regnety_002").double(), borrowed("timm", "regnety_002").double()
    fill(model, reference)
    x = images(6, dtype=torch.float64)
    torch.testing.assert_close(model.train()(x), reference.train()(x), rtol=1e-9, atol=1e-9)
    fill_again = LAYOUTS[0].convert(reference.state_dict(), model)
    for tensor_name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, fill_again[tensor_name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("name", "arch"), NETS)
def test_every_batch_norm_is_ours(name: str, arch: str) -> None:
    model = borrowed(name, arch)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    assert {type(norm) for norm in norms} <= {BatchNorm2d, NormAct}
    assert model.config.batch_norm


def test_plain_transformers_too() -> None:
    for name, arch in (("torchvision", "vit_b_32"), ("timm", "vit_tiny_patch16_224")):
        model = borrowed(name, arch, side=64)
        model(torch.randn(1, 3, 64, 64)).sum().backward()
        assert all(p.grad is not None for p in model.parameters())
    assert model.layer_of("net.cls_token") == model.layer_of("net.patch_embed.proj.weight") == 0
    assert model.layer_of("net.blocks.11.norm1.weight") == model.layer_of("net.blocks.1.norm1.weight") + 10


# ---------------------------------------------------------------- as a backbone


@pytest.mark.parametrize(("name", "arch"), NETS)
def test_it_trains_on_grey_images(name: str, arch: str) -> None:
    model = borrowed(name, arch, in_chans=1)
    found = model(images(4, 1), {"logits", "pooled"})
    torch.testing.assert_close(model.head(found.pooled), found.logits)
    found.logits.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert borrowed(name, arch, classes=0).eval()(images(1)).shape == found.pooled[:1].shape
    with pytest.raises(UserError, match=r"images: given 4×3×32×32; expected B×1×height×width"):
        model(images(4))
    with pytest.raises(UserError, match="given 'attentions', which this Borrowed does not have"):
        model(images(4, 1), {"attentions"})


@pytest.mark.parametrize("arch", ["efficientnet_b0", "swin_t", "densenet121", "convnext_tiny", "mnasnet0_5"])
def test_training_draws_nothing(arch: str) -> None:
    model = borrowed("torchvision", arch)
    torch.manual_seed(1)
    first = model(images(2))
    torch.manual_seed(2)
    assert torch.equal(model(images(2)), first)


@pytest.mark.parametrize(("name", "arch"), [*NETS, ("torchvision", "vgg11_bn")])
def test_layers_go_up(name: str, arch: str) -> None:
    model = borrowed(name, arch)
    numbers = [model.layer_of(n) for n, _ in model.named_parameters()]
    assert numbers == sorted(numbers)
    assert set(numbers) == set(range(model.num_layers))
    assert model.no_decay() == set()


def test_a_folder_comes_back(tmp_path: Path) -> None:
    model: Backbone = borrowed("torchvision", "resnet18", in_chans=1).eval()
    save_model(model, tmp_path, preprocess={}, labels=list("abcde"))
    loaded = load_model(tmp_path).model.eval()
    assert loaded.config.arch == "resnet18"
    assert torch.equal(loaded(images(2, 1)), model(images(2, 1)))


def test_half_precision_and_other_sizes() -> None:
    model = borrowed("torchvision", "regnet_y_400mf")
    with torch.autocast("cpu", torch.bfloat16):
        model(images(2)).float().sum().backward()
    assert model(torch.randn(2, 3, 40, 24)).shape == (2, 5)


def test_without_memory() -> None:
    with torch.device("meta"):
        assert borrowed("torchvision", "regnet_y_400mf").head.weight.is_meta


def test_an_old_densenet_file() -> None:
    model = borrowed("torchvision", "densenet121")
    (name,) = LAYOUTS[0].convert({"features.denseblock1.denselayer1.norm.1.weight": torch.zeros(64)}, model)
    assert name in model.state_dict()


def test_files_of_either_library_load() -> None:
    """Plain, in an envelope, and with auxiliary classifiers, which the report names."""
    reference = torchvision.models.googlenet(num_classes=5, init_weights=False, aux_logits=True)
    model = borrowed("torchvision", "googlenet", side=64)
    report = load_weights(model, reference.state_dict())
    assert report.layout == "torchvision or timm"
    assert {name.partition(".")[0] for name in report.ignored} == {"aux1", "aux2"}
    assert not report.fresh
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(model.eval()(x), reference.eval()(x))
    state = theirs("timm", "regnety_002").state_dict()
    report = load_weights(borrowed("timm", "regnety_002", classes=7), {"model": state}, replace=["head"])
    assert report.fresh == ("head.weight", "head.bias")
    with pytest.raises(UserError, match="1 missing"):
        load_weights(
            borrowed("timm", "regnety_002"), {n: t for n, t in state.items() if n != "stem.conv.weight"}
        )


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("name", "arch", "side", "line"),
    [
        ("torchvision", "resnet19", 32, "arch: given 'resnet19', no classifier of torchvision; did you mean"),
        ("timm", "regnety_161", 32, "arch: given 'regnety_161', no classifier of timm; did you mean"),
        (
            "torchvision",
            "squeezenet1_0",
            64,
            "arch: given 'squeezenet1_0', whose last layer is not one dense",
        ),
        ("torchvision", "inception_v3", 32, "image_size: given 32×32, which inception_v3 cannot take"),
        (
            "torchvision",
            "maxvit_t",
            96,
            "arch: maxvit_t cannot be made for images of 96×96: Input size (24, 24)",
        ),
        ("timm", "levit_128s", 224, "arch: given 'levit_128s', which normalises by BatchNorm1d; allowed"),
    ],
)
def test_refusals(name: str, arch: str, side: int, line: str) -> None:
    with pytest.raises(UserError) as error:
        borrowed(name, arch, side=side)
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_timm_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"not installed; pip install vitlab\[timm\]"):
        build(BorrowedConfig, {"name": "timm", "arch": "resnet18"})
    with pytest.raises(UserError, match="arch"):
        build(BorrowedConfig, {"name": "torchvision"})

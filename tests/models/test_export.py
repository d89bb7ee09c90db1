"""What is written for other tools gives the model's own output there."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import onnxruntime
import pytest
import timm.models
import torch
from safetensors.torch import load_file
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from zoo import PLAIN, SMALL, families_without_one, small

from vitlab import cli
from vitlab.config import UserError
from vitlab.models import Backbone, export, load_weights, save_model
from vitlab.models.export import LIKE_TIMM, export_model, export_onnx, export_timm

MORE = [(name, {}) for name in SMALL if name != "vit_lite_6_4"] + [  # another of CCT's family
    ("vit_tiny", {"pool": "mean", "init_values": 0.1})
]
Sizes = dict[str, object]


def redrawn(name: str, **more: object) -> Backbone:
    """Tensors of their usual size, but none is zero or one; running variances are positive."""
    model = small(name, **more)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand(tensor.shape, generator=generator), alpha=0.1)
    return model


def by_onnx(file: Path, images: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


# ---------------------------------------------------------------- ONNX


@pytest.mark.parametrize(("name", "more"), MORE, ids=[f"{n}-{'-'.join(m)}".strip("-") for n, m in MORE])
def test_onnx_of_every_family(name: str, more: Sizes, tmp_path: Path) -> None:
    model = redrawn(name, **more).train()
    written = export_onnx(model, tmp_path / "new" / "model.onnx")
    assert model.training
    assert [p.name for p in written.path.parent.iterdir()] == ["model.onnx"]
    assert written.bytes == written.path.stat().st_size
    images = torch.randn(4, 3, *model.image_size)
    with torch.no_grad():
        expected = model.eval()(images)
    difference = float((by_onnx(written.path, images) - expected).abs().max())
    assert expected.abs().max() > 0.01
    assert max(difference, written.difference) <= 1e-4 * float(expected.abs().max())


def test_every_family_has_a_small_model() -> None:
    assert families_without_one() == set()


def test_a_fixed_batch(tmp_path: Path) -> None:
    file = export_onnx(small("vit_tiny", depth=1), tmp_path / "two.onnx", batch=2).path
    assert by_onnx(file, torch.zeros(2, 3, 16, 16)).shape == (2, 3)
    with pytest.raises(Exception, match="Got: 3 Expected: 2"):
        by_onnx(file, torch.zeros(3, 3, 16, 16))
    with pytest.raises(UserError, match="batch: given 0; allowed: 1 or more"):
        export_onnx(small("vit_tiny"), tmp_path / "none.onnx", batch=0)


def test_weights_too_large_for_one_file_lie_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "ALONE", 0)
    model = small("vit_tiny", depth=1).eval()
    written = export_onnx(model, tmp_path / "model.onnx")
    files = sorted(p.name for p in tmp_path.iterdir())
    assert files == ["model.onnx", "model.onnx.data"]
    assert written.bytes == sum((tmp_path / name).stat().st_size for name in files)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(by_onnx(written.path, images), model(images), rtol=1e-4, atol=1e-6)


def test_a_file_that_fails_the_check_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "_trace", lambda model, file, batch: file.write_bytes(b"x"))
    with pytest.raises(UserError, match=r"model.onnx: ONNX Runtime refuses 1 images: .*nothing is left"):
        export_onnx(small("vit_tiny"), tmp_path / "model.onnx")
    for found, line in [
        (torch.zeros(1, 3), "differs from the model's by"),
        (torch.full((1, 3), float("nan")), "differs from the model's by nan"),
        (torch.zeros(1, 4), "gives 1×4, the model 1×3"),
    ]:
        monkeypatch.setattr(export, "_run", lambda file, images, found=found: found)
        with pytest.raises(UserError, match=line) as caught:
            export_onnx(redrawn("vit_tiny"), tmp_path / "model.onnx")
        assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_without_onnx_it_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        export.importlib.util, "find_spec", lambda name: None if name == "onnxscript" else found(name)
    )
    with pytest.raises(UserError, match=r"onnx: onnxscript not installed; pip install 'vitlab\[onnx\]'"):
        export_onnx(small("vit_tiny"), tmp_path / "model.onnx")


def test_names_of_files(tmp_path: Path) -> None:
    model = small("vit_tiny")
    with pytest.raises(UserError, match=r"expected a name that ends with .onnx, as model.onnx"):
        export_model(model, tmp_path / "model.pth", "onnx")
    with pytest.raises(
        UserError, match="format: given 'onx'; allowed: onnx, timm, safetensors; did you mean"
    ):
        export_model(model, tmp_path / "model.pth", "onx")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="there is one already; remove it, or name another"):
        export_model(model, tmp_path / "model.safetensors", "timm")


# ---------------------------------------------------------------- timm's names


@pytest.mark.parametrize(
    ("name", "ours", "theirs"),
    [
        ("vit_tiny", {}, {}),
        ("vit_tiny", {"pool": "mean", "positions": "sincos"}, {"global_pool": "avg"}),
        ("vit_tiny", {"mask_token": True, "init_values": 0.1}, {"init_values": 0.1}),
        ("deit_tiny", {}, {}),
    ],
)
def test_timm_computes_the_same(name: str, ours: Sizes, theirs: Sizes, tmp_path: Path) -> None:
    model = redrawn(name, **ours).eval()
    family = VisionTransformerDistilled if name == "deit_tiny" else VisionTransformer
    reference = family(img_size=16, num_classes=3, **PLAIN, **theirs).eval()
    export_model(model, tmp_path / "timm.safetensors", "timm")
    timm.models.load_checkpoint(reference, str(tmp_path / "timm.safetensors"), strict=True)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(reference(images), model(images), rtol=1e-5, atol=1e-6)


def test_timm_loads_a_swin() -> None:
    model = redrawn("swin_tiny").eval()
    size, sizes = SMALL["swin_tiny"]
    reference = timm.models.swin_transformer.SwinTransformer(img_size=size, num_classes=3, **sizes).eval()
    reference.load_state_dict(export_timm(model))
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(reference(images), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SMALL)
def test_only_families_that_timm_has(name: str) -> None:
    model = small(name)
    if type(model).__name__ in LIKE_TIMM:
        assert export_timm(model).keys() == model.state_dict().keys()
    else:
        with pytest.raises(
            UserError, match=f"no names of timm for a {type(model).__name__}; formats for it: onnx"
        ):
            export_timm(model)


def test_heads_that_timm_joins_otherwise() -> None:
    with pytest.raises(UserError, match="timm takes the mean of both heads, the model has combine: sum"):
        export_timm(small("deit_tiny", combine="sum"))


@pytest.mark.parametrize(
    ("name", "more", "line"),
    [
        ("coatnet_0", {"relative": "absolute"}, "timm computes relative: bias, the model has absolute"),
        ("coatnet_0", {"downsample": "paper"}, "timm computes downsample: timm, the model has paper"),
        ("swin_tiny", {"window_size": 3}, "timm pads after the shift, .* has padding: official"),
    ],
)
def test_what_timm_computes_otherwise(name: str, more: Sizes, line: str) -> None:
    with pytest.raises(UserError, match=line):
        export_timm(small(name, **more))


def test_timm_pads_like_padding_timm() -> None:
    assert export_timm(small("swin_tiny", window_size=3, padding="timm"))


# ---------------------------------------------------------------- from the command line


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["vitlab", "export", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.mark.parametrize("kind", ["onnx", "timm", "safetensors"])
def test_the_command(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = redrawn("vit_tiny", depth=1, mask_token=True)
    save_model(model, tmp_path / "model", preprocess={}, labels=[])
    file = tmp_path / f"out.{'onnx' if kind == 'onnx' else 'safetensors'}"
    assert run(monkeypatch, tmp_path / "model", file, "--format", kind) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "kB" in said
    assert f"read back: {'largest difference from the model' if kind == 'onnx' else 'equal'}" in said
    if kind == "safetensors":
        load_weights(small("vit_tiny", depth=1, mask_token=True), file)
        assert load_file(file).keys() == model.state_dict().keys()
    assert run(monkeypatch, tmp_path / "model", file, "--format", kind) == 2
    assert "there is one already" in " ".join(capsys.readouterr().out.split())

"""Parameters and multiply-adds against figures that papers print, and against counts by hand."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch
from zoo import SMALL, small

from vitlab import cli
from vitlab.config import build
from vitlab.models import FAMILIES, MODELS, TOKENIZERS, create_model
from vitlab.models import cost as room
from vitlab.models.borrowed import BorrowedConfig
from vitlab.models.cost import Cost, Listed, cost, cost_of, costs


class Counted(dict[str, Listed]):
    seconds: float


@pytest.fixture(scope="module")
def listed() -> Counted:
    begin = time.process_time()
    found = Counted((row.name, row) for row in costs())
    found.seconds = time.process_time() - begin
    return found


def test_every_preset_is_listed(listed: Counted) -> None:
    assert set(listed) == {name for name, config in MODELS.items() if config is not BorrowedConfig}
    assert listed.seconds < 20
    for row in listed.values():
        assert row.family == {**FAMILIES, **TOKENIZERS}[MODELS[row.name]].__name__
        assert row.params > 0
        assert row.gflops > 0


# ---------------------------------------------------------------- papers


@pytest.mark.parametrize(
    ("name", "gflops"),
    [
        ("vit_base", 17.6),  # DeiT-B, DeiT-S: Touvron et al. 2021 (2103.17239)
        ("vit_small", 4.6),
        ("swin_tiny", 4.5),  # Liu et al. 2021 (2103.14030), the last in the authors' code
        ("swin_small", 8.7),
        ("swin_base", 15.4),
        ("swin_large", 34.5),
        ("cct_2_3x2", 0.04),  # Hassani et al. 2021 (2104.05704)
        ("cct_4_3x2", 0.05),
        ("cct_6_3x2", 0.25),
        ("cct_7_3x2", 0.29),
        ("vit_lite_7_8", 0.06),
        ("vit_lite_7_16", 0.02),
    ],
)
def test_the_figures_of_the_papers(listed: Counted, name: str, gflops: float) -> None:
    digits = len(str(gflops).partition(".")[2])
    assert round(listed[name].gflops, digits) == gflops


def test_large_compact_models(listed: Counted) -> None:
    """1.19 and 5.53 in the paper: pools, norms and activations, which are not counted here, make 1 %."""
    assert 1.17 < listed["cct_7_3x1"].gflops <= 1.19
    assert 5.47 < listed["cct_14_7x2"].gflops <= 5.53
    assert listed["cct_14_7x2"].image_size == 224
    assert listed["cct_7_3x1"].image_size == 32


@pytest.mark.parametrize(("name", "at_224", "at_384"), [("cvt_13", 4.5, 16.3), ("cvt_21", 7.1, 24.9)])
def test_cvt(listed: Counted, name: str, at_224: float, at_384: float) -> None:
    """Wu et al. 2021 (2103.15808), table 3. At 384 pixels its figures are these; at 224 they are 1 to 2 %
    lower, and how they were counted the paper does not say."""
    assert round(cost(name, 384).gflops, 1) == pytest.approx(at_384, abs=0.11)
    assert at_224 <= listed[name].gflops < 1.02 * at_224


@pytest.mark.parametrize(
    ("name", "gflops"), [("coatnet_0", 4.2), ("coatnet_1", 8.4), ("coatnet_2", 15.7), ("coatnet_3", 34.7)]
)
def test_coatnet(listed: Counted, name: str, gflops: float) -> None:
    """Dai et al. 2021 (2106.04803), table 4. The paper takes the stride in the first 1×1 convolution, which
    `downsample: paper` does (1 to 2 % below); timm and the default take it after that, 3 to 8 % above."""
    paper = cost(build(MODELS[name], {"name": name, "downsample": "paper"}), 224)
    assert 0.98 * gflops < paper.gflops < gflops
    assert gflops < listed[name].gflops < 1.09 * gflops


# ---------------------------------------------------------------- by hand


def test_a_transformer_by_hand() -> None:
    """Per block 12·T·D² for dense layers and 2·T²·D for the products of attention."""
    n, d, depth, classes = 196, 192, 12, 10
    t = n + 1
    whole = n * d * 3 * 16**2 + depth * (12 * t * d**2 + 2 * t**2 * d) + d * classes
    assert cost("vit_tiny", 224, classes).gflops * 1e9 == whole
    # The last block with one query: K and V of all, and of the class token alone the rest.
    alone = whole - 10 * n * d**2 - 2 * n * t * d
    with torch.device("meta"):
        model = create_model("vit_tiny", num_classes=classes, image_size=224)
    assert cost_of(model, ("logits",)).gflops * 1e9 == alone


@pytest.mark.parametrize("name", SMALL)
def test_it_takes_models_of_every_family(name: str) -> None:
    model = small(name)
    params = sum(p.numel() for p in model.parameters())
    found = cost_of(model)
    assert found.params == params
    assert found.gflops > 0
    assert next(model.parameters()).is_meta


def test_a_net_of_torchvision() -> None:
    found = cost(build(BorrowedConfig, {"name": "torchvision", "arch": "resnet18"}), 224)
    assert found.params == 11_689_512
    assert round(found.gflops, 2) == 1.81  # torchvision's documentation


# ---------------------------------------------------------------- on the screen


def test_the_command(
    listed: Counted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(room, "costs", lambda: iter(listed.values()))
    monkeypatch.setattr(sys, "argv", ["vitlab", "models", "--json", str(tmp_path / "models.json")])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    rows = json.loads((tmp_path / "models.json").read_text())
    assert rows[0] == {
        "name": "vit_tiny",
        "family": "ViT",
        "params": 5717416,
        "gflops": 1.2537,
        "image_size": 224,
    }
    shown = capsys.readouterr().out
    assert all(name in shown for name in listed)
    assert "torchvision, timm: any classifier" in shown
    assert Cost(*cost("vit_tiny", 224)).params == rows[0]["params"]

"""Masked image modelling under the engine: on two workers, sharded, in micro-batches, recomputed
and resumed it is what one process of plain PyTorch trains."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from world import FIGURES, apart, fitted

from vitlab.batch import Batch
from vitlab.dist import World
from vitlab.engine.loop import LoopConfig
from vitlab.methods import Method, MethodConfig, create_method
from vitlab.models import create_model

STEPS, SIDE = 4, 16
SIZES: dict[str, dict[str, Any]] = {
    "vit_tiny": {"patch_size": 2, "embed_dim": 32, "depth": 2, "num_heads": 2},
    "swin_tiny": {"patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [1, 2], "window_size": 4},
    "cct_6_3x2": {"embed_dim": 24, "depth": 2, "num_heads": 3},
}
BEIT = {"positions": "none", "key_bias": False, "init": "beit", "init_values": 0.1}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "simmim, swin": ("simmim", "swin_tiny", {}),
    "simmim, cct": ("simmim", "cct_6_3x2", {}),
    "beit, shared": ("beit", "vit_tiny", {**BEIT, "relative": "shared"}),
    "beit, block": ("beit", "vit_tiny", {**BEIT, "relative": "block"}),
}
WAYS: dict[str, dict[str, Any]] = {
    "plain": {"zero": None},
    "plain, accumulated": {"zero": None, "accumulate": 3},
    "zero 3": {"zero": 3},
    "zero 3, recomputed": {"zero": 3, "recompute": True, "accumulate": 2},
    "resumed": {"zero": 3},
}


def method(case: str) -> Method:
    name, model, more = CASES[case]
    torch.manual_seed(0)
    sizes = {"drop_path": 0.3, "mask_token": True, **SIZES[model], **more}
    made = create_model(model, num_classes=0, image_size=SIDE, **sizes)
    tokenizer = None
    if name == "beit":
        small = {"vocab": 19, "groups": 2, "n_hid": 8, "n_init": 8}
        tokenizer = create_model("dvae", num_classes=0, image_size=SIDE, **small)
    return create_method(TypeAdapter(MethodConfig).validate_python({"name": name}), made, tokenizer=tokenizer)


def batches(views: Any, config: LoopConfig, world: World, start: int, stop: int) -> Any:
    for step in range(start, stop):
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(config.batch_size, 3, SIDE, SIDE, generator=generator)
        ids, weight = torch.arange(config.batch_size) + step * 100, torch.ones(config.batch_size)
        weight[4] = 0
        parts = torch.arange(world.rank, config.batch_size, world.size).chunk(config.accumulate)
        shown = [torch.nn.functional.interpolate(images, view.size) for view in views]
        yield [
            Batch([s[p] for s in shown], -torch.ones(len(p)).long(), weight[p], ids[p], ["x"] * len(p))
            for p in parts
        ]


def run(job: dict[str, Any], world: World) -> dict[str, Any]:
    made = method(job.pop("case"))
    config = {"batch_size": 12, "optim": {"lr": 1e-3}}
    return fitted(made, config, STEPS, partial(batches, made.views()), world, **job)


def jobs(folder: Path) -> dict[str, dict[str, Any]]:
    found = {f"{case}/{way}": how | {"case": case} for case in CASES for way, how in WAYS.items()}
    for case in CASES:  # the second takes up the checkpoint of the first
        for way in ("zero 3", "resumed"):
            found[f"{case}/{way}"]["kept"] = str(folder / case)
    return found


@pytest.fixture(scope="module")
def runs(together: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = together[__name__]
    return found


@pytest.mark.parametrize("way", ["plain, accumulated", "zero 3", "zero 3, recomputed"])
@pytest.mark.parametrize("case", CASES)
def test_the_same_on_any_workers(runs: dict[str, Any], case: str, way: str) -> None:
    plain, other = runs[f"{case}/plain"], runs[f"{case}/{way}"]
    assert len(plain["points"]) == len(other["points"]) == STEPS
    curve, weights = apart(other, plain, FIGURES)
    print(case, way, f"curve {curve:.1e}, weights {weights:.1e}")
    assert curve < 1e-5
    assert weights < 1e-4  # one step of AdamW moves by up to 1e-3


@pytest.mark.parametrize("case", CASES)
def test_resumed_to_the_bit(runs: dict[str, Any], case: str) -> None:
    assert len(runs[f"{case}/resumed"]["points"]) == STEPS // 2
    assert apart(runs[f"{case}/resumed"], runs[f"{case}/zero 3"], FIGURES) == (0, 0)

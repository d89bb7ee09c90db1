"""Every family under the engine: sharded, recomputed, compiled, in half precision, and resumed to the bit."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from world import FIGURES, apart, fitted
from zoo import SMALL, small

from vitlab.batch import Batch
from vitlab.dist import World
from vitlab.engine.loop import LoopConfig
from vitlab.methods import Supervised, SupervisedConfig

STEPS = 4
WAYS: dict[str, dict[str, Any]] = {
    "plain": {"zero": None},
    "plain, recomputed": {"zero": None, "recompute": True},
    "bf16": {"zero": None, "precision": "bf16"},
    "zero 0": {"zero": 0},
    "zero 3": {"zero": 3},
    "zero 3, recomputed": {"zero": 3, "recompute": True},
    "resumed": {"zero": 3},
}
# Tracing takes seconds. Batch normalisation, which only the second has, is what a repeated forward may harm.
COMPILED: dict[str, dict[str, Any]] = {
    "vit_tiny": {"zero": 1, "compile": True},
    "coatnet_0": {"zero": 1, "compile": True, "recompute": True},
}
# Twenty norms one after the other, the last over twelve values: rounding grows a thousandfold in few steps.
RESTLESS = ("torchvision",)


def batches(side: int, config: LoopConfig, world: World, start: int, stop: int) -> Any:
    for step in range(start, stop):
        generator = torch.Generator().manual_seed(step)
        labels = torch.randint(0, 3, (config.batch_size,), generator=generator)
        images = torch.randn(config.batch_size, 3, side, side, generator=generator) + labels.view(-1, 1, 1, 1)
        ids, mine = torch.arange(config.batch_size) + step * 100, slice(world.rank, None, world.size)
        yield [
            Batch([images[mine]], labels[mine], torch.ones(len(ids[mine])), ids[mine], ["x"] * len(ids[mine]))
        ]


def run(job: dict[str, Any], world: World) -> dict[str, Any]:
    torch.manual_seed(0)
    name = job.pop("model")
    side = SMALL[name].image_size
    method = Supervised(SupervisedConfig(), small(name), side)
    config = {"batch_size": 12, "optim": {"lr": 1e-3}}
    return fitted(method, config, STEPS, partial(batches, side), world, **job)


def jobs(folder: Path) -> dict[str, dict[str, Any]]:
    found = {f"{name}: {way}": how | {"model": name} for name in SMALL for way, how in WAYS.items()}
    found |= {f"{name}: compiled": how | {"model": name} for name, how in COMPILED.items()}
    for name in SMALL:  # the second takes up the checkpoint of the first
        for way in ("zero 3", "resumed"):
            found[f"{name}: {way}"]["kept"] = str(folder / name)
    return found


@pytest.fixture(scope="module")
def runs(together: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = together[__name__]
    return found


def first(found: Any) -> float:
    loss: float = found["points"][0][1]["train/loss"]
    return loss


@pytest.mark.parametrize("name", SMALL)
def test_two_workers_are_one(runs: dict[str, Any], name: str) -> None:
    plain = runs[f"{name}: plain"]
    for way in ("zero 0", "zero 3", "zero 3, recomputed"):
        found = runs[f"{name}: {way}"]
        assert abs(first(found) - first(plain)) < 1e-5
        assert max(apart(found, runs[f"{name}: zero 0"], FIGURES)) < 1e-4
        if name not in RESTLESS:
            curve, weights = apart(found, plain, FIGURES)
            assert curve < 1e-4
            assert weights < 2e-3  # Adam makes a whole step out of rounding


@pytest.mark.parametrize("name", SMALL)
def test_recomputed_to_the_bit(runs: dict[str, Any], name: str) -> None:
    assert apart(runs[f"{name}: plain, recomputed"], runs[f"{name}: plain"], FIGURES) == (0, 0)
    assert apart(runs[f"{name}: zero 3, recomputed"], runs[f"{name}: zero 3"], FIGURES) == (0, 0)


@pytest.mark.parametrize("name", SMALL)
def test_half_precision_is_near(runs: dict[str, Any], name: str) -> None:
    half = runs[f"{name}: bf16"]
    assert all(torch.isfinite(t).all() for t in half["state"].values())
    plain, most = runs[f"{name}: plain"], 0.3 if name in RESTLESS else 0.05
    assert 0 < apart(half, plain)[0] < most


@pytest.mark.parametrize("name", SMALL)
def test_resumed_to_the_bit(runs: dict[str, Any], name: str) -> None:
    assert len(runs[f"{name}: resumed"]["points"]) == STEPS // 2
    assert apart(runs[f"{name}: resumed"], runs[f"{name}: zero 3"], FIGURES) == (0, 0)


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_is_the_same(runs: dict[str, Any], name: str) -> None:
    assert max(apart(runs[f"{name}: compiled"], runs[f"{name}: zero 3"], FIGURES)) < 1e-4

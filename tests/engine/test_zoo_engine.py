"""Every family under the engine: sharded, recomputed, compiled, in half precision, and resumed to the bit."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from world import apart, divided, fitted, serve
from zoo import SMALL, small

from vitlab.batch import Batch
from vitlab.dist import World
from vitlab.engine import compiling, zero
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
COMPILES = {"compiled": {"zero": 1, "compile": True}}
COMPILES["compiled, recomputed"] = COMPILES["compiled"] | {"recompute": True}
COMPILED = ("vit_tiny", "coatnet_0")  # one with and one without batch normalisation: tracing takes seconds
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


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("zoo")
    jobs = {f"{name}: {way}": how | {"model": name} for name in SMALL for way, how in WAYS.items()}
    jobs |= {f"{name}: {way}": how | {"model": name} for name in COMPILED for way, how in COMPILES.items()}
    for name in SMALL:  # the second takes up the checkpoint of the first
        for way in ("zero 3", "resumed"):
            jobs[f"{name}: {way}"]["kept"] = str(folder / name)
    return divided(__file__, run, jobs, folder)


def first(found: Any) -> float:
    loss: float = found["points"][0][1]["train/loss"]
    return loss


@pytest.mark.parametrize("name", SMALL)
def test_two_workers_are_one(runs: dict[str, Any], name: str) -> None:
    plain = runs[f"{name}: plain"]
    for way in ("zero 0", "zero 3", "zero 3, recomputed"):
        found = runs[f"{name}: {way}"]
        assert abs(first(found) - first(plain)) < 1e-5
        assert max(apart(found, runs[f"{name}: zero 0"])) < 1e-4
        if name not in RESTLESS:
            assert apart(found, plain)[0] < 1e-4
            assert apart(found, plain)[1] < 2e-3  # Adam makes a whole step out of rounding


@pytest.mark.parametrize("name", SMALL)
def test_recomputed_to_the_bit(runs: dict[str, Any], name: str) -> None:
    assert apart(runs[f"{name}: plain, recomputed"], runs[f"{name}: plain"]) == (0, 0)
    assert apart(runs[f"{name}: zero 3, recomputed"], runs[f"{name}: zero 3"]) == (0, 0)


@pytest.mark.parametrize("name", SMALL)
def test_half_precision_is_near(runs: dict[str, Any], name: str) -> None:
    half = runs[f"{name}: bf16"]
    assert all(torch.isfinite(t).all() for t in half["state"].values())
    plain, most = runs[f"{name}: plain"], 0.3 if name in RESTLESS else 0.05
    assert 0 < apart(half, plain)[0] < most


@pytest.mark.parametrize("name", SMALL)
def test_resumed_to_the_bit(runs: dict[str, Any], name: str) -> None:
    assert len(runs[f"{name}: resumed"]["points"]) == STEPS // 2
    assert apart(runs[f"{name}: resumed"], runs[f"{name}: zero 3"]) == (0, 0)


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_is_the_same(runs: dict[str, Any], name: str) -> None:
    for way in ("compiled", "compiled, recomputed"):
        assert max(apart(runs[f"{name}: {way}"], runs[f"{name}: zero 0"])) < 1e-4


if __name__ == "__main__":
    zero.STAYS = 100  # so that matrices of these small models are really given away
    compiling.BACKEND = "aot_eager"  # traced and differentiated as ever; making C++ of it takes minutes
    serve(run)

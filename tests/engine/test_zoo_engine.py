"""Every family under the engine: sharded, recomputed, compiled, in half precision, and resumed to the bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from world import Notes
from zoo import SMALL, small

from vitlab.batch import Batch
from vitlab.dist import World, world_of_group
from vitlab.engine import compiling, zero
from vitlab.engine.loop import LoopConfig, Plan, make_strategy, train
from vitlab.methods import Supervised, SupervisedConfig

STEPS = 6
WAYS: dict[str, dict[str, Any]] = {
    "plain": {"zero": None},
    "plain, recomputed": {"zero": None, "recompute": True},
    "bf16": {"zero": None, "precision": "bf16"},
    "zero 0": {"zero": 0},
    "zero 3": {"zero": 3},
    "zero 3, recomputed": {"zero": 3, "recompute": True},
    "cut": {"zero": 3, "stop": 5, "kept": True},
    "resumed": {"zero": 3, "kept": True},
}
COMPILED = ("vit_tiny", "coatnet_0")  # one with and one without batch normalisation: tracing takes seconds
# Twenty norms one after the other, the last over twelve values: rounding grows a thousandfold in few steps.
RESTLESS = ("torchvision",)


def batches(config: LoopConfig, side: int, world: World, start: int, stop: int) -> Any:
    for step in range(start, stop):
        generator = torch.Generator().manual_seed(step)
        labels = torch.randint(0, 3, (config.batch_size,), generator=generator)
        images = torch.randn(config.batch_size, 3, side, side, generator=generator) + labels.view(-1, 1, 1, 1)
        ids, mine = torch.arange(config.batch_size) + step * 100, slice(world.rank, None, world.size)
        yield [
            Batch([images[mine]], labels[mine], torch.ones(len(ids[mine])), ids[mine], ["x"] * len(ids[mine]))
        ]


def run(name: str, world: World, folder: Path, **way: Any) -> dict[str, Any]:
    stage, stop, kept = way.pop("zero"), way.pop("stop", STEPS), way.pop("kept", False)
    torch.manual_seed(0)
    side = SMALL[name].image_size
    method = Supervised(SupervisedConfig(), small(name), side)
    base = {"epochs": 1, "batch_size": 12, "log_every": 1, "checkpoint_every": 3, "optim": {"lr": 1e-3}}
    config = LoopConfig.model_validate(base | way)
    strategy, notes = make_strategy(method, config, stage, world), Notes()
    plan = Plan(config, STEPS, lambda start: batches(config, side, world, start, stop), notes)
    plan.checkpoints = folder / name if kept else None
    try:
        train(method, strategy, plan, world)
    except StopIteration:
        assert stop < STEPS
    state = strategy.state(method)
    strategy.close()
    return {"curve": [values["train/loss"] for _, values in notes.points], "state": state}


def launch(workers: int, jobs: list[list[str]], folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", __file__]
    children = [
        subprocess.Popen(
            [*command, str(rank), str(workers), str(folder), json.dumps(jobs)],
            env=os.environ
            | {
                "OMP_NUM_THREADS": "1",
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(workers),
            },
        )
        for rank in range(workers)
    ]
    assert [child.wait(timeout=280) for child in children] == [0] * workers
    found: dict[str, Any] = torch.load(folder / f"{workers}.pt", weights_only=True)
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("zoo")
    one = [[name, way] for name in SMALL for way in WAYS if WAYS[way]["zero"] is None]
    two = [[name, way] for name in SMALL for way in WAYS if WAYS[way]["zero"] is not None]
    two += [[name, way] for name in COMPILED for way in ("compiled", "compiled, recomputed")]
    return launch(1, one, folder) | launch(2, two, folder)


def apart(a: Any, b: Any) -> tuple[float, float]:
    """Curves, and weights with buffers."""
    states = a["state"], b["state"]
    assert states[0].keys() == states[1].keys()
    weights = max(float((states[0][n].double() - t.double()).abs().max()) for n, t in states[1].items())
    shared = min(len(a["curve"]), len(b["curve"]))
    return max(abs(x - y) for x, y in zip(a["curve"][-shared:], b["curve"][-shared:], strict=True)), weights


@pytest.mark.parametrize("name", SMALL)
def test_two_workers_are_one(runs: dict[str, Any], name: str) -> None:
    plain = runs[f"{name}: plain"]
    for way in ("zero 0", "zero 3", "zero 3, recomputed"):
        found = runs[f"{name}: {way}"]
        assert abs(found["curve"][0] - plain["curve"][0]) < 1e-5
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
    assert len(runs[f"{name}: resumed"]["curve"]) == STEPS - 3
    assert apart(runs[f"{name}: resumed"], runs[f"{name}: zero 3"]) == (0, 0)


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_is_the_same(runs: dict[str, Any], name: str) -> None:
    for way in ("compiled", "compiled, recomputed"):
        assert max(apart(runs[f"{name}: {way}"], runs[f"{name}: zero 0"])) < 1e-4


if __name__ == "__main__":
    rank, workers, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    world = World()
    if workers > 1:
        store = f"file://{folder}/store"
        torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=workers)
        world = world_of_group()
    zero.STAYS = 100  # so that matrices of these small models are really given away
    compiling.BACKEND = "aot_eager"  # traced and differentiated as ever; making C++ of it takes minutes
    ways = WAYS | {"compiled": {"zero": 1, "compile": True}}
    ways["compiled, recomputed"] = ways["compiled"] | {"recompute": True}
    found = {f"{name}: {way}": run(name, world, folder, **ways[way]) for name, way in json.loads(sys.argv[4])}
    if world.first:
        torch.save(found, folder / f"{workers}.pt")
    world.barrier()

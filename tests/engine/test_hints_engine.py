"""A student of a CNN's answers and of its maps under the engine: sharded, accumulated, resumed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from world import Notes

from vitlab.batch import Batch
from vitlab.dist import World, world_of_group
from vitlab.engine import zero
from vitlab.engine.loop import LoopConfig, Plan, make_strategy, train
from vitlab.methods import Distill, DistillConfig
from vitlab.methods.hints import Hint
from vitlab.models import create_model

STEPS, SIDE = 6, 16
RANKS = ("RANK", "LOCAL_RANK")
PAIRS = [Hint(student=1, teacher=2), Hint(student=-1, teacher=1)]
WAYS: dict[str, dict[str, Any]] = {
    "plain": {"zero": None},
    "plain, accumulated": {"zero": None, "accumulate": 3},
    "zero 1": {"zero": 1},
    "zero 3": {"zero": 3},
    "zero 3, accumulated, recomputed": {"zero": 3, "accumulate": 2, "recompute": True},
    "cut": {"zero": 3, "stop": 5, "kept": True},
    "resumed": {"zero": 3, "kept": True},
}


def method() -> Distill:
    torch.manual_seed(0)
    sizes = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "distilled": True}
    student = create_model("vit_tiny", num_classes=3, image_size=SIDE, drop_path=0.2, **sizes)
    teacher = create_model("torchvision", arch="shufflenet_v2_x0_5", num_classes=3, image_size=SIDE)
    return Distill(DistillConfig(hints=PAIRS), student, SIDE, teacher)


def batches(config: LoopConfig, world: World, start: int, stop: int) -> Any:
    for step in range(start, stop):
        generator = torch.Generator().manual_seed(step)
        labels = torch.randint(0, 3, (config.batch_size,), generator=generator)
        images = torch.randn(config.batch_size, 3, SIDE, SIDE, generator=generator) + labels.view(-1, 1, 1, 1)
        ids, mine = torch.arange(config.batch_size) + step * 100, torch.arange(config.batch_size)
        yield [
            Batch([images[p]], labels[p], torch.ones(len(p)), ids[p], ["x"] * len(p))
            for p in mine[world.rank :: world.size].chunk(config.accumulate)
        ]


def run(world: World, folder: Path, **way: Any) -> dict[str, Any]:
    stage, stop, kept = way.pop("zero"), way.pop("stop", STEPS), way.pop("kept", False)
    base = {"epochs": 1, "batch_size": 12, "log_every": 1, "checkpoint_every": 3, "optim": {"lr": 1e-3}}
    config = LoopConfig.model_validate(base | way)
    strategy, notes = make_strategy(made := method(), config, stage, world), Notes()
    plan = Plan(config, STEPS, lambda start: batches(config, world, start, stop), notes)
    plan.checkpoints = folder / "kept" if kept else None
    try:
        train(made, strategy, plan, world)
    except StopIteration:
        assert stop < STEPS
    state = strategy.state(made)
    strategy.close()
    return {"curve": [(v["train/loss"], v["train/hint"]) for _, v in notes.points], "state": state}


def launch(workers: int, ways: list[str], folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", __file__]
    children = [
        subprocess.Popen(
            [*command, str(rank), str(workers), str(folder), json.dumps(ways)],
            env=os.environ
            | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(workers)}
            | dict.fromkeys(RANKS, str(rank)),
        )
        for rank in range(workers)
    ]
    assert [child.wait(timeout=280) for child in children] == [0] * workers
    found: dict[str, Any] = torch.load(folder / f"{workers}.pt", weights_only=True)
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("hints")
    one = [way for way in WAYS if WAYS[way]["zero"] is None]
    return launch(1, one, folder) | launch(2, [way for way in WAYS if way not in one], folder)


def apart(a: Any, b: Any) -> float:
    pairs = zip(a["curve"], b["curve"], strict=True)
    return max(abs(x - y) for one, other in pairs for x, y in zip(one, other, strict=True))


@pytest.mark.parametrize("way", ["plain, accumulated", "zero 1", "zero 3", "zero 3, accumulated, recomputed"])
def test_the_same_curve_in_every_way(runs: dict[str, Any], way: str) -> None:
    assert apart(runs[way], runs["plain"]) < 1e-4
    states = runs[way]["state"], runs["plain"]["state"]
    assert max(float((states[0][n] - t).abs().max()) for n, t in states[1].items()) < 2e-3


def test_projections_learn_and_the_teacher_does_not(runs: dict[str, Any]) -> None:
    start = method().state_dict()
    for way in ("plain", "zero 3"):
        state = runs[way]["state"]
        moved = {n for n in start if not torch.equal(state[n], start[n])}
        assert {f"hints.{i}.{part}" for i in (0, 1) for part in ("weight", "bias")} <= moved
        assert not any(name.startswith("teacher.") for name in moved)


def test_resumed_to_the_bit(runs: dict[str, Any]) -> None:
    resumed, whole = runs["resumed"], runs["zero 3"]
    assert resumed["curve"] == whole["curve"][-3:]
    assert all(torch.equal(resumed["state"][n], t) for n, t in whole["state"].items())


if __name__ == "__main__":
    rank, workers, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    world = World()
    if workers > 1:
        store = f"file://{folder}/store"
        torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=workers)
        world = world_of_group()
    zero.STAYS = 100  # so that matrices of this small model are really given away
    found = {way: run(world, folder, **WAYS[way]) for way in json.loads(sys.argv[4])}
    if world.first:
        torch.save(found, folder / f"{workers}.pt")
    world.barrier()

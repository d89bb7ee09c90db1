"""A student of a CNN's answers and of its maps under the engine: sharded, accumulated, resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from world import FIGURES, apart, fitted

from vitlab.batch import Batch
from vitlab.dist import World
from vitlab.engine.loop import LoopConfig
from vitlab.methods import Distill, DistillConfig
from vitlab.methods.hints import Hint
from vitlab.models import create_model

STEPS, SIDE = 6, 16
NAMES = (*FIGURES, "train/hint")
# A small `eps` would make whole steps of rounding, where a gradient is nothing else.
OPTIM = {"lr": 1e-3, "eps": 1e-6}
PAIRS = [Hint(student=1, teacher=2), Hint(student=-1, teacher=1)]
WAYS: dict[str, dict[str, Any]] = {
    "plain": {"zero": None},
    "plain, accumulated": {"zero": None, "accumulate": 3},
    "zero 1": {"zero": 1},
    "zero 3": {"zero": 3},
    "zero 3, accumulated, recomputed": {"zero": 3, "accumulate": 2, "recompute": True},
    "resumed": {"zero": 3},
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


def run(job: dict[str, Any], world: World) -> dict[str, Any]:
    return fitted(method(), {"batch_size": 12, "optim": OPTIM}, STEPS, batches, world, **job)


def jobs(folder: Path) -> dict[str, dict[str, Any]]:
    kept = {"kept": str(folder / "kept")}  # "resumed" takes up the checkpoint of "zero 3"
    return {way: how | (kept if way in ("zero 3", "resumed") else {}) for way, how in WAYS.items()}


@pytest.fixture(scope="module")
def runs(together: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = together[__name__]
    return found


@pytest.mark.parametrize("way", ["plain, accumulated", "zero 1", "zero 3", "zero 3, accumulated, recomputed"])
def test_the_same_curve_in_every_way(runs: dict[str, Any], way: str) -> None:
    curve, weights = apart(runs[way], runs["plain"], NAMES)
    print(way, f"curve {curve:.1e}, weights {weights:.1e}")
    assert curve < 1e-4
    assert weights < 1e-4  # of 3.5e-3 that a weight may travel


def test_projections_learn_and_the_teacher_does_not(runs: dict[str, Any]) -> None:
    start = method().state_dict()
    for way in ("plain", "zero 3"):
        state = runs[way]["state"]
        moved = {n for n in start if not torch.equal(state[n], start[n])}
        assert {f"hints.{i}.{part}" for i in (0, 1) for part in ("weight", "bias")} <= moved
        assert not any(name.startswith("teacher.") for name in moved)


def test_resumed_to_the_bit(runs: dict[str, Any]) -> None:
    resumed, whole = runs["resumed"], runs["zero 3"]
    assert len(resumed["points"]) == STEPS // 2
    assert apart(resumed, whole, NAMES) == (0, 0)

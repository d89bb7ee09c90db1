"""Masked image modelling under the engine: on two workers, sharded, in micro-batches, recomputed
and resumed it is what one process of plain PyTorch trains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from world import Notes

from vitlab.batch import Batch
from vitlab.dist import World, world_of_group
from vitlab.engine import zero
from vitlab.engine.loop import LoopConfig, Plan, make_strategy, train
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
    "cut": {"zero": 3, "stop": 3, "kept": True},
    "resumed": {"zero": 3, "kept": True},
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


def batches(config: LoopConfig, views: Any, world: World, start: int, stop: int) -> Any:
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


def run(case: str, world: World, folder: Path, **way: Any) -> dict[str, Any]:
    stage, stop, kept = way.pop("zero"), way.pop("stop", STEPS), way.pop("kept", False)
    base = {"epochs": 1, "batch_size": 12, "log_every": 1, "checkpoint_every": 2, "optim": {"lr": 1e-3}}
    config, made = LoopConfig.model_validate(base | way), method(case)
    views = made.views()
    strategy, notes = make_strategy(made, config, stage, world), Notes()
    plan = Plan(config, STEPS, lambda start: batches(config, views, world, start, stop), notes)
    plan.checkpoints = folder / case if kept else None
    try:
        train(made, strategy, plan, world)
    except StopIteration:
        assert stop < STEPS
    state = strategy.state(made)
    strategy.close()
    return {"curve": [values["train/loss"] for _, values in notes.points], "state": state}


def launch(workers: int, jobs: list[list[str]], folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", __file__, str(workers), str(folder), json.dumps(jobs)]
    more = {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(workers)}
    children = [
        subprocess.Popen(command, env=os.environ | more | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(workers)
    ]
    assert [child.wait(timeout=280) for child in children] == [0] * workers
    found: dict[str, Any] = torch.load(folder / f"{workers}.pt", weights_only=True)
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("masked")
    one = [[case, way] for case in CASES for way in WAYS if WAYS[way]["zero"] is None]
    two = [[case, way] for case in CASES for way in WAYS if WAYS[way]["zero"] is not None]
    return launch(1, one, folder) | launch(2, two, folder)


def apart(a: Any, b: Any) -> tuple[float, float]:
    """Curves, from where both have them, and weights."""
    assert a["state"].keys() == b["state"].keys()
    weights = max(float((a["state"][n].double() - t.double()).abs().max()) for n, t in b["state"].items())
    shared = min(len(a["curve"]), len(b["curve"]))
    return max(abs(x - y) for x, y in zip(a["curve"][-shared:], b["curve"][-shared:], strict=True)), weights


@pytest.mark.parametrize("way", ["plain, accumulated", "zero 3", "zero 3, recomputed"])
@pytest.mark.parametrize("case", CASES)
def test_the_same_on_any_workers(runs: dict[str, Any], case: str, way: str) -> None:
    plain, other = runs[f"{case}/plain"], runs[f"{case}/{way}"]
    assert len(plain["curve"]) == len(other["curve"]) == STEPS
    curve, weights = apart(plain, other)
    print(case, way, f"curve {curve:.1e}, weights {weights:.1e}")  # noqa: T201  (pytest shows it with -s)
    assert curve < 1e-5
    assert weights < 1e-4  # one step of AdamW moves by up to 1e-3


@pytest.mark.parametrize("case", CASES)
def test_resumed_to_the_bit(runs: dict[str, Any], case: str) -> None:
    assert apart(runs[f"{case}/zero 3"], runs[f"{case}/resumed"]) == (0, 0)


if __name__ == "__main__":
    workers, folder, world = int(sys.argv[1]), Path(sys.argv[2]), World()
    if workers > 1:
        store, rank = f"file://{folder}/store", int(os.environ["RANK"])
        torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=workers)
        world = world_of_group()
    zero.STAYS = 100  # so that matrices of these small models are really given away
    jobs = json.loads(sys.argv[3])
    found = {f"{case}/{way}": run(case, world, folder, **WAYS[way]) for case, way in jobs}
    if world.first:
        torch.save(found, folder / f"{workers}.pt")
    world.barrier()

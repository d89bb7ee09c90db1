"""Several real processes with a gloo group, for tests that need workers but not Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from vitlab.batch import Batch, View, uniform
from vitlab.dist import World, world_of_group
from vitlab.engine.loop import LoopConfig, Plan, make_strategy, train
from vitlab.methods.base import Losses, Method


class Toy(Method):
    """A small net with everything that strategies must handle: a frozen average, a buffer, odd sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(7, 33), torch.nn.GELU(), torch.nn.Linear(33, 5))
        self.teacher = torch.nn.Sequential(torch.nn.Linear(7, 33), torch.nn.GELU(), torch.nn.Linear(33, 5))
        self.teacher.load_state_dict(self.net.state_dict())
        self.teacher.requires_grad_(False)
        self.register_buffer("seen", torch.zeros(1))

    def views(self) -> list[View]:
        return [View("main", 7)]

    def layer_of(self, name: str) -> int:
        return 0 if name.startswith("net.0") else 1

    def no_decay(self) -> set[str]:
        return set()

    def forward(self, batch: Batch) -> Losses:
        x = batch.views[0]
        self.seen += self.training
        loss = ((self.net(x) - x[:, :5]) ** 2).mean(1) + ((self.net(x) - self.teacher(x)) ** 2).mean(1)
        return Losses((loss * batch.weight).sum(), {"far": loss.detach().sum()})

    def averages(self) -> list[tuple[torch.nn.Module, torch.nn.Module, float]]:
        return [(self.teacher, self.net, 0.9)]


class Notes:
    def __init__(self) -> None:
        self.points: list[tuple[int, dict[str, float]]] = []

    def log(self, step: int, values: dict[str, float]) -> None:
        self.points.append((step, values))

    def flush(self) -> None: ...

    def progress(self, step: int, total: int, values: dict[str, float]) -> None: ...


def batches(config: LoopConfig, world: World, start: int) -> Any:
    """Global batches that are the same on any number of workers."""
    for step in range(start, 1000):
        ids = torch.arange(config.batch_size) + step * config.batch_size
        x = uniform(ids, "x", 7)
        weight = (torch.arange(config.batch_size) % 5 > 0).float()
        mine = torch.arange(world.rank, config.batch_size, world.size)
        parts = mine.chunk(config.accumulate)
        yield [
            Batch([x[p]], torch.zeros(len(p), dtype=torch.int64), weight[p], ids[p], [str(int(i)) for i in p])
            for p in parts
        ]


def run(spec: dict[str, Any]) -> None:
    world = world_of_group()
    torch.manual_seed(0)
    method = Toy()
    config = LoopConfig.model_validate(spec["config"])
    strategy = make_strategy(method, config, spec["zero"], world)
    notes = Notes()
    plan = Plan(config, spec["steps"], lambda s: batches(config, world, s), notes, checkpoints=spec.get("checkpoints") and Path(spec["checkpoints"]))
    if spec.get("stop"):
        plan.batches = lambda s: (b for i, b in zip(range(s, spec["stop"]), batches(config, world, s), strict=False))
    try:
        train(method, strategy, plan, world)
    except StopIteration:
        assert spec.get("stop")
    state = strategy.state(method)
    if world.first:
        assert state is not None
        torch.save({"points": notes.points, "state": state}, spec["out"])
    strategy.close()


def launch(workers: int, spec: dict[str, Any]) -> Any:
    """Runs `spec` on that many processes; returns what rank 0 saved."""
    port_file = Path(spec["out"]).with_suffix(f".{os.getpid()}.store")
    port_file.unlink(missing_ok=True)
    children = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, str(rank), str(workers), str(port_file), json.dumps(spec)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(workers)
    ]
    outputs = [child.communicate(timeout=120)[0] for child in children]
    for child, output in zip(children, outputs, strict=True):
        assert child.returncode == 0, output[-4000:]
    return torch.load(spec["out"], weights_only=True)


if __name__ == "__main__":
    rank, workers, store, text = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    spec = json.loads(text)
    if spec["zero"] is not None:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(workers), LOCAL_RANK=str(rank))
        torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=workers)
    run(spec)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()

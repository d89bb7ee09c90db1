"""Trainings with and without probes, as several real processes with a gloo group or as one plain process."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent / "engine"))
from world import Notes  # type: ignore[import-not-found]

from vitlab.batch import Batch, View, uniform
from vitlab.data import ShardsConfig, open_shards
from vitlab.dist import World, world_of_group
from vitlab.engine.loop import LoopConfig, Plan, make_strategy, train
from vitlab.evaluation import ProbeConfig
from vitlab.jobs.place import Place
from vitlab.jobs.probing import feature_probes
from vitlab.methods.base import Losses, Method
from vitlab.models import Backbone, create_model
from vitlab.tracking import TrackingConfig

STEPS = 6
MODELS: dict[str, dict[str, Any]] = {
    # matrices above ZeRO-3's persistence threshold, so that they really are sharded
    "wide": {"name": "vit_tiny", "patch_size": 4, "embed_dim": 128, "depth": 1, "num_heads": 2},
    "normed": {"name": "cvt_13", "embed_dims": [8, 16, 16], "num_heads": [1, 2, 2], "depths": [1, 1, 2]},
}


class Dims(Method):
    """Learns without labels: features whose mean is the image's. It may collapse, and does at a huge rate."""

    headless = True
    one_view = False

    def __init__(self, model: Backbone) -> None:
        super().__init__()
        self.model = model
        self.keep_average(0.9)

    def views(self) -> list[View]:
        return [View("image", 8)]

    def export(self) -> Backbone:
        return self.model

    def losses(self, batch: Batch) -> Losses:
        pooled: Any = self.model(batch.views[0], {"pooled"}, seeds=batch.seeds).pooled
        loss = (pooled.mean(1) - batch.views[0].mean((1, 2, 3))).square() + 0.01 * pooled.square().mean(1)
        return Losses((loss * batch.weight).sum(), {})


def batches(config: LoopConfig, world: World, start: int) -> Any:
    for step in range(start, STEPS):
        ids = (torch.arange(config.batch_size) + step * config.batch_size)[world.rank :: world.size]
        images = uniform(ids, "image", 64).view(-1, 1, 8, 8)
        nothing = torch.zeros(len(ids), dtype=torch.int64)
        yield [Batch([images], nothing, torch.ones(len(ids)), ids, ["x"] * len(ids))]


def run(model: str, zero: int | None, probe: dict[str, Any], shards: str, world: World) -> dict[str, Any]:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    method = Dims(create_model(**MODELS[model], in_chans=1, num_classes=0, image_size=8))
    config = LoopConfig.model_validate({"epochs": 3, "batch_size": 8, "log_every": 1, "optim": {"lr": 1e-3}})
    data = ShardsConfig(path=shards, image_size=8, channels=1, streams=4)
    place = Place(Path(shards), TrackingConfig(), "", Path(shards), data, 0)
    strategy, notes = make_strategy(method, config, zero, world), Notes()
    asked: Any = config.model_copy(update={"probe": ProbeConfig.model_validate(probe)})
    probes = feature_probes(asked, place, method, open_shards(Path(shards)), world, notes.note)
    assert method.smooth is not None
    train(method, strategy, Plan(config, 2, lambda s: batches(config, world, s), notes, probes=probes), world)
    modes = [part.training for part in method.modules()]
    state = strategy.state(method)
    strategy.close()
    drawn = torch.cat([torch.rand(1), torch.tensor([random.random(), np.random.rand()])])
    return {"points": notes.points, "state": state, "modes": modes, "drawn": drawn, "probes": len(probes)}


def launch(workers: int, jobs: dict[str, list[Any]], shards: Path, folder: Path) -> dict[str, Any]:
    """name → (model, zero, probe); what rank 0 has, by name."""
    out, store = folder / f"{workers}.pt", folder / f"{workers}.store"
    command = [sys.executable, "-W", "ignore", __file__, str(workers), str(store), str(out), str(shards)]
    children = [
        subprocess.Popen(
            [*command, json.dumps(jobs), str(rank)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(workers)
    ]
    outputs = [child.communicate(timeout=300)[0] for child in children]
    for child, output in zip(children, outputs, strict=True):
        assert child.returncode == 0, output[-4000:]
    found: dict[str, Any] = torch.load(out, weights_only=True)
    return found


if __name__ == "__main__":
    workers, store, out, shards, text, rank = sys.argv[1:]
    world = World()
    if int(workers) > 1:
        os.environ.update(RANK=rank, WORLD_SIZE=workers, LOCAL_RANK=rank)
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{store}", rank=int(rank), world_size=int(workers)
        )
        world = world_of_group()
    results = {name: run(*job, shards, world) for name, job in json.loads(text).items()}
    if world.first:
        torch.save(results, out)
    world.barrier()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()

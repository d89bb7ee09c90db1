"""Probes look and do not touch: the same training to the bit with and without, on one worker and on two."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from world import Notes, divided, serve

from vitlab.batch import Batch, View, uniform
from vitlab.data import ShardsConfig, open_shards, prepare
from vitlab.dist import World
from vitlab.engine.loop import LoopConfig, Plan, make_strategy, train
from vitlab.evaluation import ProbeConfig
from vitlab.jobs.place import Place
from vitlab.jobs.probing import feature_probes
from vitlab.methods.base import Losses, Method
from vitlab.models import Backbone, create_model
from vitlab.tracking import TrackingConfig

STEPS = 6
NAMES = {"probe/knn_top1", "probe/linear_top1", "probe/rank", "probe/std"}
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


def run(job: dict[str, Any], world: World) -> dict[str, Any]:
    """Figures, weights, and whatever else a probe might have touched."""
    model, shards = job["model"], job["shards"]
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    method = Dims(create_model(**MODELS[model], in_chans=1, num_classes=0, image_size=8))
    config = LoopConfig.model_validate({"epochs": 3, "batch_size": 8, "log_every": 1, "optim": {"lr": 1e-3}})
    data = ShardsConfig(path=shards, image_size=8, channels=1, streams=4)
    place = Place(Path(shards), TrackingConfig(), "", Path(shards), data, 0)
    strategy, notes = make_strategy(method, config, job["zero"], world), Notes()
    asked: Any = config.model_copy(update={"probe": ProbeConfig.model_validate(job["probe"])})
    probes = feature_probes(asked, place, method, open_shards(Path(shards)), world, notes.note)
    assert method.smooth is not None
    train(method, strategy, Plan(config, 2, lambda s: batches(config, world, s), notes, probes=probes), world)
    modes = [part.training for part in method.modules()]
    state = strategy.state(method)
    strategy.close()
    drawn = torch.cat([torch.rand(1), torch.tensor([random.random(), np.random.rand()])])
    return {"points": notes.points, "state": state, "modes": modes, "drawn": drawn, "probes": len(probes)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every model plain and at ZeRO 3 on two workers, with and without probes."""
    folder = tmp_path_factory.mktemp("runs")
    config = ShardsConfig(source="digits", image_size=8, channels=1, streams=4)
    shards = prepare(config, folder / "shards").path
    looks = {"probed": {"every": 1, "bank": 301, "queries": 99}, "alone": {"bank": 0}}

    jobs = {
        f"{model} {zero} {name}": {"model": model, "zero": zero, "probe": probe, "shards": str(shards)}
        for model in MODELS
        for zero in (None, 3)
        for name, probe in looks.items()
    }
    return divided(__file__, run, jobs, folder)


@pytest.mark.parametrize("zero", [None, 3])
@pytest.mark.parametrize("model", MODELS)
def test_weights_are_the_same_to_the_bit(runs: dict[str, Any], model: str, zero: int | None) -> None:
    probed, alone = runs[f"{model} {zero} probed"], runs[f"{model} {zero} alone"]
    assert (probed["probes"], alone["probes"]) == (1, 0)
    assert probed["state"].keys() == alone["state"].keys()
    for name, tensor in alone["state"].items():
        assert torch.equal(probed["state"][name], tensor), name
    assert torch.equal(probed["drawn"], alone["drawn"]), "no generator has moved"
    assert probed["modes"] == alone["modes"]
    assert True in probed["modes"]


@pytest.mark.parametrize("model", MODELS)
def test_two_workers_see_what_one_sees(runs: dict[str, Any], model: str) -> None:
    one, two = (
        [point for point in runs[f"{model} {zero} probed"]["points"] if point[1].keys() >= NAMES]
        for zero in (None, 3)
    )
    assert [step for step, _ in one] == [step for step, _ in two] == [2, 4, 6]
    for (_, ours), (_, theirs) in zip(one, two, strict=True):
        assert ours["probe/rank"] == pytest.approx(theirs["probe/rank"], rel=1e-2)
        assert ours["probe/linear_top1"] == pytest.approx(theirs["probe/linear_top1"], abs=0.05)


if __name__ == "__main__":
    serve(run)

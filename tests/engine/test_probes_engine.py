"""Probes look and do not touch: the same training to the bit with and without, on one worker and on two."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from world import Notes

from vitlab.batch import Batch, View, uniform
from vitlab.data import ShardsConfig, named, open_shards, prepare
from vitlab.dist import World
from vitlab.engine.loop import LoopConfig, Plan, make_strategy, train
from vitlab.evaluation import ProbeConfig
from vitlab.evaluation.probe import COLLAPSED
from vitlab.jobs.damage import Ledger
from vitlab.jobs.place import Place
from vitlab.jobs.probing import feature_probes
from vitlab.methods.base import Losses, Method
from vitlab.models import Backbone, create_model
from vitlab.tracking import TrackingConfig

STEPS = 6
# How far two workers may see from one. The last two are shares of 99 images.
LIMITS = {"probe/rank": 3e-2, "probe/std": 1e-3, "probe/knn_top1": 0.05, "probe/linear_top1": 0.05}
MODELS: dict[str, dict[str, Any]] = {
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
    optim = {"lr": job.get("rate", 1e-3)}
    config = LoopConfig.model_validate({"epochs": 3, "batch_size": 8, "log_every": 1, "optim": optim})
    data = ShardsConfig(path=shards, image_size=8, channels=1, streams=4)
    images = open_shards(shards)
    place = Place(Path(shards), TrackingConfig(), "", named(images), data, 0)
    strategy, notes = make_strategy(method, config, job["zero"], world), Notes()
    asked: Any = config.model_copy(update={"probe": ProbeConfig.model_validate(job["probe"])})
    probes = feature_probes(asked, place, method, images, world, Ledger(place, images, world), notes.note)
    assert method.smooth is not None
    train(method, strategy, Plan(config, 2, lambda s: batches(config, world, s), notes, probes=probes), world)
    modes = [part.training for part in method.modules()]
    state = strategy.state(method)
    strategy.close()
    drawn = torch.cat([torch.rand(1), torch.tensor([random.random(), np.random.rand()])])
    found = {"points": notes.points, "notes": notes.notes, "state": state}
    return found | {"modes": modes, "drawn": drawn, "probes": len(probes)}


def jobs(folder: Path) -> dict[str, dict[str, Any]]:
    """Every model plain and at ZeRO 3 on two workers, with and without probes; and one that collapses."""
    config = ShardsConfig(source="digits", image_size=8, channels=1, streams=4)
    shards = prepare(config, folder / "shards").path
    looks = {"probed": {"every": 1, "bank": 301, "queries": 99}, "alone": {"bank": 0}}
    found: dict[str, dict[str, Any]] = {
        f"{model} {zero} {name}": {"model": model, "zero": zero, "probe": probe, "shards": str(shards)}
        for model in MODELS
        for zero in (None, 3)
        for name, probe in looks.items()
    }
    found["collapsed"] = found["wide None probed"] | {"rate": 10.0}
    return found


@pytest.fixture(scope="module")
def runs(together: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = together[__name__]
    return found


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
    one, two = (looks(runs[f"{model} {zero} probed"]) for zero in (None, 3))
    assert [step for step, _ in one] == [step for step, _ in two] == [2, 4, 6]
    for (_, ours), (_, theirs) in zip(one, two, strict=True):
        assert ours.keys() == theirs.keys() == LIMITS.keys()
        far = {name: abs(ours[name] - theirs[name]) for name in LIMITS}
        assert all(far[name] <= most for name, most in LIMITS.items()), far


def test_a_collapse_is_told_once(runs: dict[str, Any]) -> None:
    found = runs["collapsed"]
    low = [step for step, figures in looks(found) if figures["probe/rank"] < COLLAPSED]
    assert len(low) > 1  # there was more than one occasion
    (line,) = found["notes"]
    assert line.startswith(f"step {low[0]}: the features have collapsed")
    assert runs["wide None probed"]["notes"] == []


def looks(found: dict[str, Any]) -> list[tuple[int, dict[str, float]]]:
    """What the probes of a run have seen, by step."""
    points = ((step, {n: v for n, v in values.items() if n in LIMITS}) for step, values in found["points"])
    return [(step, figures) for step, figures in points if figures]

"""One evaluation on its workers: from a model folder to a published report."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitlab.cache import publish
from vitlab.config import UserError
from vitlab.data import (
    Shards,
    eval_batches,
)
from vitlab.dist import World, half
from vitlab.engine.serve import Post
from vitlab.evaluation import (
    EvaluateConfig,
    classify,
    confusion_figure,
    confusion_table,
    save_figure,
)
from vitlab.jobs.place import Place, mover, preprocess
from vitlab.models import load_model


@dataclass(frozen=True)
class EvaluateJob:
    config: EvaluateConfig
    place: Place
    model: Path
    title: str


def run_evaluation(job: EvaluateJob, world: World, post: Post) -> dict[str, Any]:
    shards, loaded = job.place.open(), load_model(job.model)
    _fits(job, shards, loaded.preprocess, loaded.labels)
    model = (
        Autocast(loaded.model, half(world.device, job.config.precision), world.device).to(world.device).eval()
    )
    to_device = mover(job.place.data, world)
    batches = eval_batches(
        shards, job.place.data, job.config.split, job.config.batch_size, world, loaders=job.place.loaders
    )
    total = -(-shards.count(job.config.split) // job.config.batch_size)
    seen = (lambda n: post("progress", (n, total, {}))) if world.first else (lambda n: None)
    tally = classify(model, (to_device(b) for b in batches), len(shards.classes), world, seen)
    if not world.first:
        return {}
    metrics, store = dict(tally.figures()), job.place.store()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        split, top1 = job.config.split.replace("_", "-"), metrics["eval/top1"]
        title = f"{job.title} · {tally.images} {split} images · top-1 {top1:.2%}"
        save_figure(confusion_figure(tally, shards.classes, title), folder / "confusion.png")
        (folder / "confusion.csv").write_text(confusion_table(tally, shards.classes), "utf8")
        by_class = dict(zip(shards.classes, tally.by_class(), strict=True))
        report = {"metrics": metrics, "accuracy_by_class": by_class, "split": job.config.split}
        (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", "utf8")
        artifact = publish(store, job.place.run_id, folder, "report")
    per_class = {f"eval/class/{name}": value for name, value in by_class.items() if value is not None}
    store.metrics(job.place.run_id, metrics | (per_class if len(per_class) <= 200 else {}))
    return {"artifact": artifact, "metrics": metrics, "seconds": {}}


def _fits(job: EvaluateJob, shards: Shards, given: dict[str, Any], labels: list[str]) -> None:
    if labels != shards.classes:
        raise UserError(
            f"evaluate: the model knows {len(labels)} classes ({', '.join(labels[:3])} …), the shards have "
            f"{len(shards.classes)} ({', '.join(shards.classes[:3])} …); the two must be the same"
        )
    wanted = preprocess(job.place.data)
    different = next((k for k in wanted if wanted[k] != given.get(k)), None)
    if different:
        raise UserError(
            f"data.{different}: given {wanted[different]}, the model was trained with {given.get(different)}"
        )


class Autocast(nn.Module):
    """A model that computes in bfloat16 where that is wanted."""

    def __init__(self, model: nn.Module, bf16: bool, device: torch.device) -> None:
        super().__init__()
        self.model, self.bf16, self.device_type = model, bf16, device.type

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(self.device_type, torch.bfloat16, enabled=self.bf16):
            logits: Tensor = self.model(images)
        return logits

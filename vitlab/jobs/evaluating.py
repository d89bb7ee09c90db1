"""One evaluation on its workers: from a model folder to a published report."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection
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
    normalisation,
)
from vitlab.dist import World, half
from vitlab.engine.serve import Post
from vitlab.evaluation import (
    EvaluateConfig,
    Tally,
    classify,
    confusion_figure,
    confusion_table,
    save_figure,
)
from vitlab.evaluation.attention import Look, layers_of, look
from vitlab.evaluation.attention_pictures import (
    attention_table,
    distance_figure,
    heads_figure,
    rollout_figure,
)
from vitlab.evaluation.pictures import shortened
from vitlab.jobs.damage import Ledger
from vitlab.jobs.judging import Judge, ways_for
from vitlab.jobs.place import Place, mover, preprocess
from vitlab.models import Backbone, load_model


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
    ledger = Ledger(job.place, shards, world, lambda text: post("note", text))
    ways, judge = ways_for(job, loaded.model), Judge(job, shards, world, ledger)
    if job.config.attention:
        layers_of(model, loaded.model)  # a model without attention is refused before any work
    tally = _classify(job, shards, model, world, ledger, post) if loaded.model.num_classes else None
    if ways.any:
        judge.look(model, post)
    bad = ledger.settle()
    if not world.first:
        return {}
    store = job.place.store()
    with tempfile.TemporaryDirectory() as scratch:
        folder, pictures = Path(scratch) / "report", Path(scratch) / "pictures"
        folder.mkdir()
        by_class = _confusion(job, shards, tally, folder) if tally else {}
        metrics = (dict(tally.figures()) if tally else {}) | (judge.figures(ways) if ways.any else {}) | bad
        report = {"metrics": metrics, "accuracy_by_class": by_class, "split": job.config.split}
        (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", "utf8")
        if ways.any:
            judge.draw(pictures)
        if job.config.attention:
            found = _attention(job, shards, model, loaded.model, world, Path(scratch))
            if found.rollout is None:
                post("note", "no rollout is drawn: the layers do not all look over one grid of patches")
            means = ((n, float(d.mean())) for n, d in enumerate(found.distances, 1))
            metrics |= {f"eval/attention_distance/layer_{n:02d}": mean for n, mean in means}
        if pictures.is_dir():
            store.upload(job.place.run_id, pictures, "pictures")
        ledger.publish()
        artifact = publish(store, job.place.run_id, folder, "report")
    per_class = {f"eval/class/{name}": value for name, value in by_class.items() if value is not None}
    store.metrics(job.place.run_id, metrics | (per_class if len(per_class) <= 200 else {}))
    return {"artifact": artifact, "metrics": metrics, "seconds": {}}


def _classify(
    job: EvaluateJob, shards: Shards, model: Autocast, world: World, ledger: Ledger, post: Post
) -> Tally:
    """The answers of the model's own head."""
    config, place = job.config, job.place
    to_device = mover(place.data, world)
    batches = eval_batches(shards, place.data, config.split, config.batch_size, world, loaders=place.loaders)
    total = -(-shards.count(config.split) // config.batch_size)
    seen = (lambda n: post("progress", (n, total, {}))) if world.first else (lambda n: None)
    watched = ledger.watch(batches, config.split)
    return classify(model, (to_device(b) for b in watched), len(shards.classes), world, seen)


def _confusion(job: EvaluateJob, shards: Shards, tally: Tally, folder: Path) -> dict[str, float | None]:
    """Writes what was taken for what; each class's share of right answers."""
    top1, split = dict(tally.figures())["eval/top1"], job.config.split.replace("_", "-")
    title = f"{job.title} · {tally.images} {split} images · top-1 {top1:.2%}"
    save_figure(confusion_figure(tally, shards.classes, title), folder / "confusion.png")
    (folder / "confusion.csv").write_text(confusion_table(tally, shards.classes), "utf8")
    return dict(zip(shards.classes, tally.by_class(), strict=True))


def _attention(
    job: EvaluateJob, shards: Shards, model: Autocast, backbone: Backbone, world: World, folder: Path
) -> Look:
    """Draws and tabulates the attention on the split's first images, which this process reads by itself."""
    data, split = job.place.data, job.config.split
    count = min(job.config.attention, shards.count(split))
    batch = mover(data, world)(next(eval_batches(shards, data, split, count, World(device=world.device))))
    found = look(model, backbone, batch.views[0])
    mean, std = normalisation(data)
    images = batch.views[0].cpu() * std + mean
    answers = found.answers if backbone.num_classes else batch.labels  # without a head there are none
    names = [_caption(shards.classes, *p) for p in zip(batch.labels.tolist(), answers.tolist(), strict=True)]
    of = f"{job.title} · {backbone.config.name} · {{}} · {split.replace('_', '-')} images"
    pictures = folder / "pictures"
    if found.heads is not None:
        title = of.format(f"where the last layer's heads look ({found.reader})")
        save_figure(heads_figure(images, found.heads, names, title), pictures / "attention.png")
    if found.rollout is not None:
        title = of.format(f"attention rollout ({found.reader})")
        save_figure(rollout_figure(images, found.rollout, names, title), pictures / "rollout.png")
    title = f"{job.title} · {backbone.config.name} · how far each head looks · mean of {count} images"
    figure = distance_figure(found.distances, found.layers[0].patch, backbone.image_size, title)
    save_figure(figure, pictures / "attention_distance.png")
    (folder / "report/attention.csv").write_text(attention_table(found), "utf8")
    return found


def _caption(classes: list[str], label: int, answer: int) -> str:
    """The true class, and beneath it what the model took it for where that is another."""
    true = "no label" if label < 0 else shortened(classes[label])
    return true if label == answer else f"{true}\ntaken for {shortened(classes[answer])}"


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

    def forward(self, images: Tensor, want: Collection[str] = ()) -> Any:
        """Logits, or the `Features` that are wanted."""
        with torch.autocast(self.device_type, torch.bfloat16, enabled=self.bf16):
            return self.model(images, want)

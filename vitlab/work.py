"""What the workers do: one job, from its inputs to a published artifact.

A job is plain data made by `vitlab.stages`; it runs the same in this process, under Ray Train, and in a
trial of a search. Rank 0 alone writes to MLflow.
"""

from __future__ import annotations

import itertools
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitlab.batch import Batch
from vitlab.cache import Artifact, Fence, publish
from vitlab.config import UserError
from vitlab.data import ReadPlan, Shards, ShardsConfig, eval_batches, normalisation, open_shards, order_of, train_batches
from vitlab.dist import World, half
from vitlab.engine.launch import Post
from vitlab.engine.loop import Plan, make_strategy, train
from vitlab.engine.strategy import Strategy
from vitlab.evaluation import (
    EvaluateConfig,
    classify,
    confusion_figure,
    confusion_table,
    reconstruction_figure,
    save_figure,
    validate,
)
from vitlab.experiment import TrainConfig
from vitlab.methods import MAE, Method, create_method
from vitlab.models import Backbone, from_config, load_model, load_state, save_model
from vitlab.tracking import Metrics, Store, TrackingConfig

PICTURED = 8  # images in a reconstruction picture
SHOW_EVERY = 0.3  # seconds between two messages to the driver


@dataclass(frozen=True)
class Place:
    """Where a job reads and writes."""

    home: Path
    tracking: TrackingConfig
    run_id: str
    shards: Path
    data: ShardsConfig
    loaders: int

    def store(self) -> Store:
        return Store(self.tracking, self.home)

    def open(self) -> Shards:
        return open_shards(self.shards)


@dataclass(frozen=True)
class TrainJob:
    stage: str
    config: TrainConfig
    seed: int
    place: Place
    zero: int | None
    checkpoints: Path
    token: str  # fence: see vitlab.cache.Fence
    init: Path | None = None  # a model folder whose backbone this one starts from
    teacher: Path | None = None


@dataclass(frozen=True)
class EvaluateJob:
    config: EvaluateConfig
    place: Place
    model: Path
    title: str


Job = TrainJob | EvaluateJob


def work(job: Job, world: World, post: Post) -> dict[str, Any]:
    """Called by every worker of a session; the result is rank 0's."""
    if isinstance(job, TrainJob):
        return _train(job, world, post)
    return _evaluate(job, world, post)


# ---------------------------------------------------------------- training


def _train(job: TrainJob, world: World, post: Post) -> dict[str, Any]:
    begin = time.perf_counter()
    shards, config = job.place.open(), job.config
    method = _method(job, shards).to(world.device)
    strategy = make_strategy(method, config, job.zero, world)
    read = ReadPlan(
        views=method.views(), batch=config.batch_size, epochs=config.epochs, seed=job.seed, rank=world.rank,
        workers=world.size, accumulate=config.accumulate, loaders=job.place.loaders, augment=config.augment,
    )
    recorder = Recorder(job.place, post) if world.first else Silent()
    fence = Fence(job.checkpoints)
    plan = Plan(
        config=config,
        steps_per_epoch=order_of(shards, job.place.data, read).steps,
        batches=lambda start: _steps(job.place, shards, read, world, start),
        recorder=recorder,
        checkpoints=job.checkpoints,
        probes=[_validation(job, method, shards, world)] if shards.count("val") else [],
        may_commit=lambda: fence.holds(job.token),
    )
    ready = time.perf_counter()
    last = train(method, strategy, plan, world)
    trained = time.perf_counter()
    state = strategy.state(method.export())
    pictures = _reconstructions(job, method, strategy, shards, world)
    strategy.close()
    if not world.first:
        return {}
    assert state is not None
    recorder.close()
    artifact = _publish_model(job, shards, method, state, pictures)
    seconds = {"start": ready - begin, "train": trained - ready, "publish": time.perf_counter() - trained}
    return {"artifact": artifact, "metrics": last, "seconds": seconds}


def _method(job: TrainJob, shards: Shards) -> Method:
    """The same start on every worker: initialisation draws from the stage's seed alone."""
    torch.manual_seed(job.seed)
    config, classes = job.config, _classes(job, shards)
    model = from_config(config.model, num_classes=classes, image_size=job.place.data.image_size)
    if job.init is not None:
        _start_from(model, job.init)
    teacher = load_model(job.teacher).model if job.teacher is not None else None
    return create_method(config.method, model, teacher=teacher)


def _classes(job: TrainJob, shards: Shards) -> int:
    if job.config.method.name == "mae":
        return 0
    given, found = job.config.model.num_classes, len(shards.classes)
    if given is not None and given != found:
        raise UserError(
            f"{job.stage}.model.num_classes: given {given}, but the shards have {found} classes; leave it out"
        )
    return found


def _start_from(model: Backbone, folder: Path) -> None:
    """All of another model's backbone. Only heads, and the norm that pooling belongs to, start fresh."""
    source = load_model(folder).model
    fresh = {"head", "head_dist"}
    if model.config.pool != source.config.pool:
        fresh |= {"norm", "fc_norm"}
    load_state(model, source.state_dict(), replace=fresh)


def _steps(
    place: Place, shards: Shards, read: ReadPlan, world: World, start: int
) -> Iterator[list[Batch]]:
    to_device = _mover(place.data, world)
    batches = train_batches(shards, place.data, read, start_step=start)
    while step := [to_device(batch) for batch in itertools.islice(batches, read.accumulate)]:
        yield step


def _mover(data: ShardsConfig, world: World) -> Callable[[Batch], Batch]:
    mean, std = (t.to(world.device) for t in normalisation(data))
    return lambda batch: batch.to(world.device, mean, std)


def _validation(job: TrainJob, method: Method, shards: Shards, world: World) -> Any:
    to_device = _mover(job.place.data, world)

    def probe(strategy: Strategy, step: int) -> Iterator[tuple[str, float]]:
        batches = eval_batches(shards, job.place.data, "val", job.config.batch_size, world)
        return validate(strategy.forward, method.weigh, (to_device(b) for b in batches), world)

    return probe


def _reconstructions(
    job: TrainJob, method: Method, strategy: Strategy, shards: Shards, world: World
) -> list[Tensor]:
    """Image, visible part and reconstruction of some held-out images, values in 0..1; empty but for MAE."""
    split = next((s for s in ("held_out", "val") if shards.count(s)), None)
    if not isinstance(method, MAE) or split is None:
        return []
    mean, std = (t.to(world.device) for t in normalisation(job.place.data))
    batch = next(iter(eval_batches(shards, job.place.data, split, PICTURED * world.size, world)))
    strategy.train(False)
    with torch.no_grad():
        pictures = strategy.forward(batch.to(world.device, mean, std), picture=True)
    return [(p.float() * std + mean).cpu() for p in pictures]


def _publish_model(
    job: TrainJob, shards: Shards, method: Method, state: dict[str, Tensor], pictures: list[Tensor]
) -> Artifact:
    store = job.place.store()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if pictures:
            title = f"MAE reconstructions of held-out images · {job.config.method.mask_ratio:.0%} hidden"  # type: ignore[union-attr]
            save_figure(reconstruction_figure(*pictures, title), folder / "pictures/reconstructions.png")
            store.upload(job.place.run_id, folder / "pictures", "pictures")
        model = method.export()
        assert isinstance(model, Backbone)
        save_model(model, folder / "model", preprocess=_preprocess(job.place.data), labels=shards.classes, state=state)
        return publish(store, job.place.run_id, folder / "model", "model")


def _preprocess(data: ShardsConfig) -> dict[str, Any]:
    mean, std = (t.flatten().tolist() for t in normalisation(data))
    return {"image_size": data.image_size, "channels": data.channels, "mean": mean, "std": std}


# ---------------------------------------------------------------- evaluation


def _evaluate(job: EvaluateJob, world: World, post: Post) -> dict[str, Any]:
    shards, loaded = job.place.open(), load_model(job.model)
    _fits(job, shards, loaded.preprocess, loaded.labels)
    model = Autocast(loaded.model, half(world.device, "auto"), world.device).to(world.device).eval()
    to_device = _mover(job.place.data, world)
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
        title = f"{job.title} · {tally.images} {job.config.split} images · top-1 {metrics['eval/top1']:.2%}"
        save_figure(confusion_figure(tally, shards.classes, title), folder / "confusion.png")
        (folder / "confusion.csv").write_text(confusion_table(tally, shards.classes), "utf8")
        by_class = dict(zip(shards.classes, tally.by_class(), strict=True))
        report = {"metrics": metrics, "accuracy_by_class": by_class, "split": job.config.split}
        (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", "utf8")
        artifact = publish(store, job.place.run_id, folder, "report")
    per_class = {f"eval/class/{name}": value for name, value in by_class.items() if value is not None}
    store.metrics(job.place.run_id, metrics | (per_class if len(per_class) <= 200 else {}))
    return {"artifact": artifact, "metrics": metrics, "seconds": {}}


def _fits(job: EvaluateJob, shards: Shards, preprocess: dict[str, Any], labels: list[str]) -> None:
    if labels != shards.classes:
        raise UserError(
            f"evaluate: the model knows {len(labels)} classes ({', '.join(labels[:3])} …), the shards have "
            f"{len(shards.classes)} ({', '.join(shards.classes[:3])} …); evaluate on data with the same classes"
        )
    wanted = _preprocess(job.place.data)
    different = next((k for k in wanted if wanted[k] != preprocess.get(k)), None)
    if different:
        raise UserError(
            f"data.{different}: given {wanted[different]}, but the model was trained with {preprocess.get(different)}"
        )


class Autocast(nn.Module):
    """A model that computes in bfloat16 where that is wanted."""

    def __init__(self, model: nn.Module, bf16: bool, device: torch.device) -> None:
        super().__init__()
        self.model, self.bf16, self.type = model, bf16, device.type

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(self.type, torch.bfloat16, enabled=self.bf16):
            logits: Tensor = self.model(images)
        return logits


# ---------------------------------------------------------------- figures on their way


class Recorder:
    """The loop's figures: to MLflow in batches, and now and then to the driver's screen."""

    def __init__(self, place: Place, post: Post) -> None:
        self.metrics, self.post, self.shown = Metrics(place.store(), place.run_id), post, 0.0

    def log(self, step: int, values: dict[str, float]) -> None:
        self.metrics.log(step, values)

    def flush(self) -> None:
        self.metrics.flush()

    def progress(self, step: int, total: int, values: dict[str, float]) -> None:
        now = time.monotonic()
        validated = any(name.startswith("val/") for name in values)
        if validated or now - self.shown > SHOW_EVERY:
            self.shown = now
            self.post("progress", (step, total, values))
        if validated:
            self.post("validated", (step / total, values))

    def close(self) -> None:
        self.metrics.close()


class Silent:
    """The recorder of every rank but the first."""

    def log(self, step: int, values: dict[str, float]) -> None: ...

    def flush(self) -> None: ...

    def progress(self, step: int, total: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


def forget(checkpoints: Path) -> None:
    """A finished stage needs its resume state no more."""
    shutil.rmtree(checkpoints, ignore_errors=True)

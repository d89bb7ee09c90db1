"""One training stage on its workers: from the inputs to a published model."""

from __future__ import annotations

import itertools
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitlab.batch import Batch
from vitlab.cache import Artifact, Fence, publish
from vitlab.config import UserError
from vitlab.data import (
    ReadPlan,
    Shards,
    eval_batches,
    normalisation,
    order_of,
    train_batches,
)
from vitlab.dist import World
from vitlab.engine.loop import Plan, Probe, make_strategy, train
from vitlab.engine.serve import Post
from vitlab.engine.strategy import Strategy
from vitlab.evaluation import (
    reconstruction_figure,
    save_figure,
    validate,
)
from vitlab.jobs.damage import Ledger
from vitlab.jobs.looking import log_views
from vitlab.jobs.place import Place, mover, preprocess
from vitlab.jobs.probing import feature_probes
from vitlab.jobs.record import Recorder, Silent
from vitlab.methods import METHODS, Method, Picture, create_method
from vitlab.models import Backbone, from_config, load_model, load_state, save_model
from vitlab.sections import TrainConfig

PICTURED = 8  # images in a reconstruction picture


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
    tokenizer: Path | None = None


def run_training(job: TrainJob, world: World, post: Post) -> dict[str, Any]:
    begin = time.perf_counter()
    shards, config = job.place.open(), job.config
    method = _method(job, shards).to(world.device)
    strategy = make_strategy(method, config, job.zero, world)
    read = ReadPlan(
        views=method.views(),
        batch=config.batch_size,
        epochs=config.epochs,
        seed=job.seed,
        rank=world.rank,
        workers=world.size,
        accumulate=config.accumulate,
        loaders=job.place.loaders,
        augment=config.augment,
    )
    fence = Fence(job.checkpoints)
    may_write = partial(fence.holds, job.token)
    recorder = Recorder(job.place, post, may_write) if world.first else Silent()
    ledger = Ledger(job.place, shards, world, recorder.note, job.checkpoints)
    plan = Plan(
        config=config,
        steps_per_epoch=order_of(shards, job.place.data, read).steps,
        batches=lambda start: _steps(job.place, shards, read, world, ledger, start),
        recorder=recorder,
        checkpoints=job.checkpoints,
        probes=[
            *_validation(job, method, shards, world, ledger),
            *feature_probes(config, job.place, method, shards, world, ledger, recorder.note),
            Probe(1, lambda strategy, step: ledger.settle().items()),
        ],
        may_commit=may_write,
    )
    if world.first and may_write():
        log_views(job.place, f"What {config.method.name} gets · {job.stage}", shards, read, world)
    ready = time.perf_counter()
    try:
        last = train(method, strategy, plan, world)
    finally:
        recorder.close()  # also after a failure: the last points tell most
    trained = time.perf_counter()
    if world.first:
        ledger.publish()
    state = strategy.state(method.exported())
    picture = _reconstructions(job, method, strategy, shards, world)
    strategy.close()
    if not world.first:
        return {}
    if not may_write():
        raise RuntimeError(f"another process has taken over this stage; run {job.place.run_id} is left to it")
    assert state is not None
    artifact = _publish_model(job, shards, method, state, picture)
    seconds = {"start": ready - begin, "train": trained - ready, "publish": time.perf_counter() - trained}
    return {"artifact": artifact, "metrics": last, "seconds": seconds}


def _method(job: TrainJob, shards: Shards) -> Method:
    """The same start on every worker: initialisation draws from the stage's seed alone."""
    torch.manual_seed(job.seed)
    config, classes = job.config, _classes(job, shards)
    model = from_config(config.model, num_classes=classes, image_size=job.place.data.image_size)
    model.normalised(*normalisation(job.place.data))
    if job.init is not None:
        try:
            _start_from(model, job.init)
        except UserError as error:  # its last words are for people who name prefixes, which a stage does not
            what = str(error).rpartition("; ")[0] or str(error)
            way = "it starts from the model of the stage before: give both the same keys"
            raise UserError(f"{job.stage}.model: {what}; {way}") from None
    guides = {"teacher": job.teacher, "tokenizer": job.tokenizer}
    method = create_method(
        config.method, model, **{name: load_model(path).model for name, path in guides.items() if path}
    )
    if config.ema:
        method.keep_average(config.ema)
    return method


def _classes(job: TrainJob, shards: Shards) -> int:
    if METHODS[job.config.method.name].headless:
        return 0
    if not shards.classes:
        name = job.config.method.name
        raise UserError(f"{job.stage}.method.name: given {name!r}, which needs labels; the shards have none")
    given, found = job.config.model.num_classes, len(shards.classes)
    if given is not None and given != found:
        raise UserError(
            f"{job.stage}.model.num_classes: given {given}, but the shards have {found} classes; leave it out"
        )
    return found


def _start_from(model: Backbone, folder: Path) -> None:
    """All of another model's backbone. Only heads, and the norm that pooling belongs to, start fresh."""
    source = load_model(folder).model
    fresh = {*model.heads, *source.heads}
    if getattr(model.config, "pool", None) != getattr(source.config, "pool", None):
        fresh |= {"norm", "fc_norm"}
    load_state(model, model.adapted(source.state_dict()), replace=fresh)


def _steps(
    place: Place, shards: Shards, read: ReadPlan, world: World, ledger: Ledger, start: int
) -> Iterator[list[Batch]]:
    to_device = mover(place.data, world, read)
    batches = ledger.watch(train_batches(shards, place.data, read, start_step=start), "train")
    while step := [to_device(batch) for batch in itertools.islice(batches, read.accumulate)]:
        yield step


def _validation(job: TrainJob, method: Method, shards: Shards, world: World, ledger: Ledger) -> list[Probe]:
    if not method.one_view or not shards.count("val"):
        return []
    to_device = mover(job.place.data, world)

    def look(strategy: Strategy, step: int) -> Iterator[tuple[str, float]]:
        size, loaders = job.config.batch_size, job.place.loaders
        batches = eval_batches(shards, job.place.data, "val", size, world, loaders=loaders)
        watched = ledger.watch(batches, "val")
        return validate(strategy.forward, method.weigh, (to_device(b) for b in watched), world)

    return [Probe(job.config.validate_every, look)]


def _reconstructions(
    job: TrainJob, method: Method, strategy: Strategy, shards: Shards, world: World
) -> Picture | None:
    """What a method that paints makes of some held-out images: values in 0..1."""
    split = next((s for s in ("held_out", "val") if shards.count(s)), None)
    if not hasattr(method, "picture") or split is None:
        return None
    mean, std = (t.to(world.device) for t in normalisation(job.place.data))
    batch = next(iter(eval_batches(shards, job.place.data, split, PICTURED * world.size, world)))
    strategy.train(False)
    with torch.no_grad():
        picture: Picture = strategy.forward(batch.to(world.device, mean, std), "picture")
    return Picture._make(None if p is None else (p.float() * std + mean).cpu() for p in picture)


def _publish_model(
    job: TrainJob, shards: Shards, method: Method, state: dict[str, Tensor], picture: Picture | None
) -> Artifact:
    store = job.place.store()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if picture is not None:
            title = f"Reconstructions of held-out images · {job.stage}, {job.config.method.name}"
            figure = reconstruction_figure(picture.original, picture.masked, picture.reconstruction, title)
            save_figure(figure, folder / "pictures/reconstructions.png")
            store.upload(job.place.run_id, folder / "pictures", "pictures")
        save_model(
            method.exported(),
            folder / "model",
            preprocess=preprocess(job.place.data),
            labels=shards.classes,
            state=state,
        )
        return publish(store, job.place.run_id, folder / "model", "model")


def forget(checkpoints: Path) -> None:
    """A finished stage needs its resume state no more."""
    shutil.rmtree(checkpoints, ignore_errors=True)

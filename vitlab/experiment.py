"""One experiment: the union of every room's config, and what must hold between them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from vitlab.config import Config, UserError, build, free, load, resolved
from vitlab.data import AugmentConfig, ShardsConfig
from vitlab.engine.launch import ClusterConfig
from vitlab.engine.loop import LoopConfig
from vitlab.evaluation import EvaluateConfig
from vitlab.methods import MethodConfig
from vitlab.models import ModelConfig
from vitlab.tracking import TrackingConfig


class TrainConfig(LoopConfig):
    """A training stage: which model, by which objective, on which views of the images."""

    model: ModelConfig
    method: MethodConfig
    augment: AugmentConfig = AugmentConfig()


class Between(Config):
    """Any number from `low` to `high`; `log` spreads the trials over orders of magnitude."""

    low: float
    high: float
    log: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> Between:
        if not self.low < self.high:
            raise ValueError(f"low {self.low} must be below high {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"low {self.low}: with log it must be above 0")
        return self


class TuneConfig(Config):
    """A search over the fine-tune stage; keys of `space` are keys of that stage, as `optim.lr`."""

    space: dict[str, Between | list[Any]]
    trials: int = Field(8, gt=0)
    metric: str = "val/top1"
    mode: Literal["max", "min"] = "max"
    grace_epochs: int = Field(1, gt=0, description="epochs before ASHA may stop a trial")
    reduction: int = Field(3, gt=1, description="ASHA keeps one of so many at each rung")
    concurrent: int = free(2, gt=0, description="trials at a time")
    workers: int = free(0, ge=0, description="workers of a trial; 0: in the trial's own process")


def changed(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of plain data with values set by dotted keys."""
    out = copy.deepcopy(dict(tree))
    for key, value in changes.items():
        *parents, leaf = key.split(".")
        at = out
        for name in parents:
            at = at.setdefault(name, {})
        at[leaf] = value
    return out


Stage = Annotated[TrainConfig | None, Field(default=None)]
TRAINING = ("pretrain", "finetune", "distill")


class Experiment(Config):
    name: str = Field(min_length=1)
    seed: int = Field(0, ge=0)
    data: ShardsConfig
    cluster: ClusterConfig = free(ClusterConfig())
    tracking: TrackingConfig = free(TrackingConfig())
    pretrain: Stage
    finetune: Stage
    distill: Stage
    evaluate: EvaluateConfig = EvaluateConfig()
    tune: TuneConfig | None = None

    @model_validator(mode="after")
    def _fits(self) -> Experiment:
        for problem in _problems(self):
            raise UserError(problem)
        return self

    def need(self, name: str) -> TrainConfig:
        """A training stage's section."""
        self.require(name)
        section: TrainConfig = getattr(self, name)
        return section

    def require(self, *names: str) -> None:
        """A pipeline says what it needs before anything starts."""
        for name in names:
            if getattr(self, name) is None:
                raise UserError(f"{name}: missing; this pipeline needs the section, see experiments/ for one")


def read(path: Path, overrides: Sequence[str] = ()) -> Experiment:
    return load(Experiment, path, overrides)


def _problems(experiment: Experiment) -> Iterator[str]:
    data, cluster = experiment.data, experiment.cluster
    if cluster.workers > 1 and data.streams % cluster.workers:
        yield (
            f"cluster.workers: given {cluster.workers}; it must divide data.streams={data.streams}, "
            f"allowed: {_divisors(data.streams)}"
        )
    if cluster.workers == 0 and cluster.zero is not None:
        yield f"cluster.zero: given {cluster.zero} with cluster.workers=0; without workers leave zero out"
    if cluster.workers == 0 and cluster.loaders and cluster.address:
        yield "cluster.address: given with cluster.workers=0, which runs in this process; leave one out"
    for name in TRAINING:
        section = getattr(experiment, name)
        if section is not None:
            yield from _stage_problems(name, section, experiment)
    if experiment.tune is not None:
        yield from _tune_problems(experiment.tune, experiment)


def _stage_problems(name: str, stage: TrainConfig, experiment: Experiment) -> Iterator[str]:
    data, workers = experiment.data, max(1, experiment.cluster.workers)
    batch, patch = stage.batch_size, stage.model.patch_size
    if data.image_size % patch:
        yield (
            f"{name}.model.patch_size: given {patch}; it must divide data.image_size={data.image_size}, "
            f"allowed: {_divisors(data.image_size)}"
        )
    if stage.model.in_chans != data.channels:
        given = stage.model.in_chans
        yield f"{name}.model.in_chans: given {given}; the images have data.channels={data.channels}"
    if batch % data.streams:
        near = max(1, round(batch / data.streams)) * data.streams
        yield f"{name}.batch_size: given {batch}; allowed: multiples of data.streams={data.streams}: {near}"
    if batch % workers:
        yield f"{name}.batch_size: given {batch}; it must be a multiple of cluster.workers={workers}"
    if batch // workers % stage.accumulate:
        yield (
            f"{name}.accumulate: given {stage.accumulate}; it must divide the {batch // workers} images that "
            f"each of {workers} workers has, allowed: {_divisors(batch // workers)}"
        )
    if stage.optim.warmup_epochs > stage.epochs:
        warmup = stage.optim.warmup_epochs
        yield f"{name}.optim.warmup_epochs: given {warmup}; allowed: at most {name}.epochs={stage.epochs}"
    if (name == "distill") != (stage.method.name == "distill"):
        allowed = "distill" if name == "distill" else "supervised, mae"
        yield f"{name}.method.name: given {stage.method.name!r}; allowed in this stage: {allowed}"


def _tune_problems(tune: TuneConfig, experiment: Experiment) -> Iterator[str]:
    if experiment.finetune is None:
        yield "tune: given without a finetune section, which is what it searches over"
        return
    if not tune.space:
        yield "tune.space: empty; name keys of finetune, as `optim.lr: {low: 1e-4, high: 1e-2, log: true}`"
    stage = resolved(experiment.finetune)
    for key, span in tune.space.items():
        for value in span if isinstance(span, list) else (span.low, span.high):
            try:
                build(TrainConfig, changed(stage, {key: value}))
            except UserError as error:
                yield f"tune.space: finetune.{error}"


def _divisors(n: int) -> str:
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)

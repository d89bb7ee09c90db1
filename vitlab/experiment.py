"""One experiment: the union of every room's config, and what must hold between them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, overload

import torch
from pydantic import Field, model_validator

from vitlab.config import Config, UserError, build, free, load, resolved
from vitlab.data import Origin, Shards, ShardsConfig, absolute, is_url, local_path, training_order
from vitlab.engine.launch import ClusterConfig
from vitlab.evaluation import EvaluateConfig
from vitlab.evaluation.attention import layers_of
from vitlab.methods import METHODS
from vitlab.models import TOKENIZERS, ModelConfig, from_config
from vitlab.sections import AdoptConfig, CompareConfig, TrainConfig, TuneConfig, changed
from vitlab.tracking import TrackingConfig

Stage = Annotated[TrainConfig | None, Field(default=None)]
# The objectives that a stage may have.
TRAINING = {
    "tokenizer": ("dvae",),
    "pretrain": ("supervised", "mae", "simmim", "beit", "dino", "msn"),
    "finetune": ("supervised",),
    "distill": ("distill",),
}
MOST_TRIED = 1000  # combinations of a search's ends that are all checked


class Experiment(Config):
    name: str = Field(min_length=1)
    seed: int = Field(0, ge=0)
    data: ShardsConfig
    cluster: ClusterConfig = free(ClusterConfig())
    tracking: TrackingConfig = free(TrackingConfig())
    adopt: AdoptConfig | None = None
    tokenizer: Stage
    pretrain: Stage
    finetune: Stage
    distill: Stage
    evaluate: EvaluateConfig = EvaluateConfig()
    tune: TuneConfig | None = None
    compare: CompareConfig | None = None

    @model_validator(mode="after")
    def _fits(self) -> Experiment:
        for problem in _problems(self):
            raise UserError(problem)
        return self

    @overload
    def need(self, name: Literal["adopt"]) -> AdoptConfig: ...
    @overload
    def need(self, name: Literal["tokenizer", "pretrain", "finetune", "distill"]) -> TrainConfig: ...
    def need(self, name: str) -> TrainConfig | AdoptConfig:
        """A stage's section."""
        self.require(name)
        section: TrainConfig | AdoptConfig = getattr(self, name)
        return section

    def require(self, *names: str) -> None:
        """A pipeline says what it needs before anything starts; `adopt or pretrain`: one of the two."""
        for name in names:
            if all(getattr(self, one) is None for one in name.split(" or ")):
                raise UserError(f"{name}: missing; this pipeline needs the section, see experiments/ for one")


def read(path: Path, overrides: Sequence[str] = ()) -> Experiment:
    return load(Experiment, path, overrides)


def _problems(experiment: Experiment) -> Iterator[str]:
    data, cluster = experiment.data, experiment.cluster
    yield from _worker_problems("cluster.workers", cluster.workers, data)
    if cluster.workers == 0 and cluster.zero is not None:
        yield f"cluster.zero: given {cluster.zero} with cluster.workers=0; without workers leave zero out"
    for name in TRAINING:
        section = getattr(experiment, name)
        if section is not None:
            yield from _stage_problems(name, section, data, max(1, cluster.workers))
    if experiment.adopt is not None:
        yield from _model_problems("adopt", experiment.adopt.model, data)
    if experiment.evaluate.attention:
        yield from _unseen(experiment)
    yield from _unguided(experiment)
    if experiment.tune is not None:
        yield from _tune_problems(experiment.tune, experiment)


def _unguided(experiment: Experiment) -> Iterator[str]:
    """A tokenizer is trained before, or it is brought."""
    stage = experiment.pretrain
    if stage is None or METHODS[stage.method.name].guide != "tokenizer":
        return
    adopt = experiment.adopt
    if experiment.tokenizer is None and (adopt is None or type(adopt.model) not in TOKENIZERS):
        yield (
            f"pretrain.method.name: given {stage.method.name!r}, which needs a tokenizer; add the section "
            "tokenizer as in experiments/digits_beit.yaml, or adopt with weights of one"
        )


def _unseen(experiment: Experiment) -> Iterator[str]:
    """Whether attention can be drawn is tried on models without memory: those that a chain evaluates."""
    ends = {name: getattr(experiment, name) for name in ("finetune", "distill", "pretrain", "adopt")}
    given = {name: section.model for name, section in ends.items() if section is not None}
    for name in [name for name in ("finetune", "distill") if name in given] or list(given)[:1]:
        try:
            with torch.device("meta"):
                made = from_config(given[name], num_classes=1, image_size=experiment.data.image_size).eval()
            layers_of(made, made)
        except UserError as error:
            yield f"{name}.model.name: given {given[name].name!r}; {error}"


def _worker_problems(key: str, workers: int, data: ShardsConfig) -> Iterator[str]:
    if workers > 1 and data.streams % workers:
        allowed = _divisors(data.streams)
        yield f"{key}: given {workers}; it must divide data.streams={data.streams}, allowed: {allowed}"


def _model_problems(name: str, model: ModelConfig, data: ShardsConfig) -> Iterator[str]:
    side, patch = data.image_size, getattr(model, "patch_size", None) or 1
    if side % patch:
        rule = f"it must divide data.image_size={side}, allowed: {_divisors(side)}"
        yield f"{name}.model.patch_size: given {patch}; {rule}"
    try:
        model.grid((side, side))
    except UserError as error:
        yield f"{name}.model: data.{error}"
    if model.in_chans != data.channels:
        yield f"{name}.model.in_chans: given {model.in_chans}; the images have data.channels={data.channels}"


def _stage_problems(name: str, stage: TrainConfig, data: ShardsConfig, workers: int) -> Iterator[str]:
    batch = stage.batch_size
    yield from _model_problems(name, stage.model, data)
    if batch % data.streams:
        near = max(1, round(batch / data.streams)) * data.streams
        yield f"{name}.batch_size: given {batch}; allowed: multiples of data.streams={data.streams}: {near}"
    if batch // workers % stage.accumulate:
        yield (
            f"{name}.accumulate: given {stage.accumulate}; it must divide the {batch // workers} images that "
            f"each of {workers} workers has, allowed: {_divisors(batch // workers)}"
        )
    if stage.model.batch_norm and stage.accumulate > 1:
        yield (
            f"{name}.accumulate: given {stage.accumulate}; {stage.model.name} normalises over a whole batch, "
            f"which micro-batches would change; allowed: 1; {name}.recompute=true saves memory too"
        )
    if stage.optim.warmup_epochs > stage.epochs:
        warmup = stage.optim.warmup_epochs
        yield f"{name}.optim.warmup_epochs: given {warmup}; allowed: at most {name}.epochs={stage.epochs}"
    if stage.method.name not in TRAINING[name]:
        allowed = ", ".join(TRAINING[name])
        yield f"{name}.method.name: given {stage.method.name!r}; allowed in this stage: {allowed}"
    method = METHODS[stage.method.name]
    if method.whole_batch(stage.method) and stage.accumulate > 1:
        yield (
            f"{name}.accumulate: given {stage.accumulate}; {stage.method.name} compares the images of a "
            "whole batch, which micro-batches would change; allowed: 1; "
            f"{name}.recompute=true saves memory too"
        )
    yield from method.problems(name, stage.method, stage.model, data.image_size)
    yield from _augment_problems(f"{name}.augment", stage, data.streams, workers)


def _augment_problems(key: str, stage: TrainConfig, streams: int, workers: int) -> Iterator[str]:
    """What the views cannot be, given the method; how images can be mixed, given the order they come in."""
    augment, method, name = stage.augment, METHODS[stage.method.name], key.removesuffix(".augment")
    if not method.one_view and not augment.crops:
        yield (
            f"{key}.name: given {augment.name!r}; {stage.method.name} compares random views of an image; "
            f"allowed: {stage.method.name}, or set {key}.crop_scale"
        )
    names = method.view_names(stage.method)
    possible = method.view_names(type(stage.method)())  # where a count of this one is 0, too
    if not method.one_view and not augment.serves([*names, *possible]):
        yield (
            f"{key}.name: given {augment.name!r}, which is for other views than {stage.method.name} has "
            f"({', '.join(names)}); allowed: {stage.method.name}, none and the like"
        )
    for view in augment.unknown_views(names):
        yield f"{key}.views: given {view!r}; {stage.method.name} has the views {', '.join(names)}"
    if not augment.mixes:
        return
    which = "mixup" if augment.mixup else "cutmix"
    if not method.mixes:
        knowing = ", ".join(n for n, other in METHODS.items() if other.mixes)
        given = f"given {getattr(augment, which):g}; {stage.method.name} has no use for mixed labels"
        yield f"{key}.{which}: {given}, allowed: 0, or a method that has: {knowing}"
    if stage.batch_size == streams:
        yield (
            f"{name}.batch_size: given {streams}; {key}.{which} mixes images of a stream in one batch, "
            f"allowed: multiples of data.streams={streams} from {2 * streams}"
        )
    if streams // workers % stage.accumulate:
        yield (
            f"{name}.accumulate: given {stage.accumulate}; {key}.{which} mixes images of a stream, which "
            f"micro-batches must not cut; with {streams} streams on {workers} workers allowed: "
            f"{_divisors(max(1, streams // workers))}"
        )


def _tune_problems(tune: TuneConfig, experiment: Experiment) -> Iterator[str]:
    data = experiment.data
    if experiment.finetune is None:
        yield "tune: given without a finetune section, which is what it searches over"
        return
    if not tune.space:
        yield "tune.space: empty; name keys of finetune, as `optim.lr: {low: 1e-4, high: 1e-2, log: true}`"
    for key, span in tune.space.items():
        if not span:
            yield f"tune.space: {key}: given []; name at least one value"
    if not data.val and all(part.source is not None for part in data.parts()):
        yield f"tune.metric: given {tune.metric!r}, but data.val=0 leaves no images for it; allowed: above 0"
    yield from _worker_problems("tune.workers", tune.workers, data)
    try:
        for stage in trial_stages(tune, experiment.finetune):
            for problem in _stage_problems("finetune", stage, data, max(1, tune.workers)):
                yield f"tune.space: {problem}"
    except UserError as error:
        yield f"tune.space: finetune.{error}"


def trial_stages(tune: TuneConfig, finetune: TrainConfig) -> Iterator[TrainConfig]:
    """The stages at the ends of a search's space: all combinations, or each end once where these are many."""
    tree = resolved(finetune)
    ends = {
        key: span if isinstance(span, list) else [span.low, span.high] for key, span in tune.space.items()
    }
    if math.prod(len(values) for values in ends.values()) <= MOST_TRIED:
        combinations: Iterable[tuple[Any, ...]] = itertools.product(*ends.values())
    else:
        longest = max(len(values) for values in ends.values())
        combinations = zip(
            *(itertools.islice(itertools.cycle(v), longest) for v in ends.values()), strict=True
        )
    for values in combinations:
        yield build(TrainConfig, changed(tree, dict(zip(ends, values, strict=True))))


# ---------------------------------------------------------------- with the images at hand


def from_anywhere(config: ShardsConfig) -> ShardsConfig:
    """The same images named by absolute paths: `folder:images` is other data in another directory."""
    sets = [one.model_copy(update=_absolute(one)) for one in config.sets]
    return config.model_copy(update={**_absolute(config), "sets": sets})


def _absolute(origin: Origin) -> dict[str, str]:
    if origin.path is not None:  # absolute and no more: a link may lead elsewhere on another node
        return {} if is_url(origin.path) else {"path": str(local_path(origin.path).absolute())}
    return {"source": absolute(origin.source)} if origin.source is not None else {}


def check_shards(experiment: Experiment, shards: Shards, *, evaluates: bool) -> None:
    """Refuses what these images cannot serve. `evaluates`: the pipeline is one that evaluates, even if the
    experiment says nothing about it."""
    for problem in _shard_problems(
        experiment, shards, evaluates or "evaluate" in experiment.model_fields_set
    ):
        raise UserError(problem)


def _shard_problems(experiment: Experiment, shards: Shards, evaluates: bool) -> Iterator[str]:
    if experiment.adopt is not None and experiment.adopt.model.num_classes != 0:  # 0: an encoder
        yield from _other_classes("adopt", experiment.adopt.model, shards)
    for name in TRAINING:
        section = getattr(experiment, name)
        if section is not None:
            yield from _unfit(name, section, experiment.data, shards)
    tune, split = experiment.tune, experiment.evaluate.split
    have = ", ".join(split for split in shards.splits if shards.count(split))
    if tune is not None and experiment.finetune is not None:
        if not shards.count("val"):
            yield f"tune.metric: given {tune.metric!r}, which needs the split val; the shards have: {have}"
        for stage in trial_stages(tune, experiment.finetune):
            for problem in _unfit("finetune", stage, experiment.data, shards):
                yield f"tune.space: {problem}"
    if evaluates and not shards.count(split):
        yield f"evaluate.split: given {split!r}; the shards have: {have}"
    if evaluates and experiment.evaluate.shots and shards.classes:
        yield from _too_many_shots(experiment.evaluate, shards)


def _too_many_shots(config: EvaluateConfig, shards: Shards) -> Iterator[str]:
    """Beyond the mean class some class has fewer images than are asked of each."""
    images, classes, asked = min(config.bank, shards.count("train")), len(shards.classes), max(config.shots)
    if asked * classes > images:
        given = f"evaluate.shots: given {asked} a class; {images} training images of {classes} classes"
        most = images // classes
        yield f"{given} have {most} on average, allowed: {f'1 to {most}' if most else 'none, leave it out'}"


def _unfit(name: str, stage: TrainConfig, data: ShardsConfig, shards: Shards) -> Iterator[str]:
    batch, images, streams = stage.batch_size, shards.count("train"), data.streams
    if batch > images:
        most = images // streams * streams
        allowed = f"multiples of data.streams={streams} up to {most}" if most else "none, lower data.streams"
        yield f"{name}.batch_size: given {batch}; the shards have {images} train images; allowed: {allowed}"
    elif data.sets:
        try:
            training_order(shards, streams, batch, 0, data.window)
        except UserError as error:
            yield f"{name}: {error}"
    if not METHODS[stage.method.name].headless:
        yield from _other_classes(name, stage.model, shards)


def _other_classes(name: str, model: ModelConfig, shards: Shards) -> Iterator[str]:
    given, found = model.num_classes, len(shards.classes)
    if found and given not in (None, found):
        yield f"{name}.model.num_classes: given {given}, but the shards have {found} classes; leave it out"


def _divisors(n: int) -> str:
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)

"""The contract between an objective and the loop."""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import deepcopy
from typing import Any, ClassVar, Literal, NamedTuple, Self, overload

import torch
from torch import Tensor, nn

from vitlab.batch import Batch, View
from vitlab.dist import summed
from vitlab.models import FAMILIES, Backbone, BackboneConfig, ViTConfig

TINY = 1e-12  # a global batch without any weight has the mean 0, not 0/0


class Losses(NamedTuple):  # a tuple, because ZeRO-3's hooks look for tensors in tuples
    """Sums over a batch's samples, each sample times its weight.

    The loop divides by the weight of the global batch, so that accumulation, the number of workers and
    padded slots do not change what is minimised.
    """

    loss: Tensor  # what is minimised
    metrics: dict[str, Tensor]  # further sums for the log, detached


class Moment(NamedTuple):
    """Where a training stands before a step: schedules are functions of this."""

    step: int
    steps: int  # of the whole training
    epoch_steps: int  # of one epoch

    @property
    def progress(self) -> float:
        """The fraction of the training that is done."""
        return self.step / self.steps

    @property
    def epoch(self) -> float:
        """Epochs done, a fraction too."""
        return self.step / self.epoch_steps


class Average(NamedTuple):
    """target ← momentum·target + (1-momentum)·source, after every step."""

    target: nn.Module
    source: nn.Module
    momentum: float
    buffers: bool = False  # buffers too: a target that never sees a batch has no statistics of its own


class Method(nn.Module):
    """An objective: owns the model it trains and everything its loss needs."""

    headless: ClassVar[bool] = False  # whether it trains a backbone without a classifier
    guide: ClassVar[Literal["", "teacher", "tokenizer"]] = ""  # the trained model that it learns from
    takes: ClassVar[tuple[type[BackboneConfig], ...]] = ()  # families it can train; empty: all classifiers
    mixes: ClassVar[bool] = False  # its loss knows images mixed of two, with two labels
    one_view: ClassVar[bool] = True  # its loss can be taken on one plain view: there is a `val/loss`

    image_size: int
    model: Backbone  # the one that is trained
    smooth: Backbone | None  # the moving average of what is exported, see `keep_average`
    smoothing: float = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.register_module("smooth", None)  # a None of the class would hide the module that comes

    @classmethod
    def problems(cls, name: str, config: Any, model: Any, side: int) -> Iterator[str]:
        """What cannot be between the configs of method and model and images of a side, a line each.

        `name` is that of the section they stand in: lines begin with a key, as `pretrain.method.token: …`.
        """
        takes = cls.takes or tuple(FAMILIES)
        if not isinstance(model, takes):
            names = ", ".join(preset for family in takes for preset in family.presets)
            yield f"{name}.model.name: given {model.name!r}; {config.name} cannot train it, allowed: {names}"

    @classmethod
    def view_names(cls, config: Any) -> list[str]:
        """What its views are called, which `augment.views` may tell apart."""
        return ["image"]

    @classmethod
    def whole_batch(cls, config: Any) -> bool:
        """Whether the loss looks at a batch as a whole, so that micro-batches would change it."""
        return bool(getattr(config, "head_batch_norm", False))

    # ------------------------------------------------------------ what the loop asks

    def views(self) -> list[View]:
        """The augmented images it needs of every sample."""
        return [View(name, self.image_size) for name in self.view_names(self.config)]

    def before_step(self, now: Moment) -> None:
        """Called before every step: temperatures, momentum."""

    def after_step(self) -> None:
        """Called after every step, on all workers: statistics that a step's micro-batches gathered."""

    def weigh(self, batch: Batch) -> Tensor:
        """How much a batch counts in the mean over the global batch: by default its real samples."""
        return batch.weight.sum()

    @overload
    def forward(self, batch: Batch) -> Losses: ...
    @overload
    def forward(self, batch: Batch, ask: str) -> Any: ...
    def forward(self, batch: Batch, ask: str = "losses") -> Any:
        """The only way in, because ZeRO-3 gathers weights inside it: `losses`, `features`, `picture` …"""
        return getattr(self, ask)(batch)

    def losses(self, batch: Batch) -> Losses:
        raise NotImplementedError

    def features(self, batch: Batch) -> Tensor:
        """B D: what the exported model's pooled features are of the first view, for probes."""
        model = self.smooth if self.smooth is not None else self.export()
        pooled: Tensor = model(batch.views[0], {"pooled"}).pooled
        return pooled

    def averages(self) -> list[Average]:
        """What follows what after every step."""
        return []

    def starts(self) -> dict[str, float]:
        """Prefix of parameters → the epoch from which they are trained; until then they stay as they are."""
        return {}

    def diagnose(self, values: dict[str, float]) -> str | None:
        """One line for a person if a point of the training curve (`train/…`) tells of trouble; the loop
        asks until there is one."""
        return None

    def export(self) -> Backbone:
        """The model that the next stage uses."""
        raise NotImplementedError

    def layer_of(self, name: str) -> int:
        """The layer of a parameter of this method, for layer-wise decay; what is not the model's is last."""
        if name.startswith("model."):
            return self.model.layer_of(name.removeprefix("model."))
        return self.model.num_layers - 1

    def no_decay(self) -> set[str]:
        """Parameters that weight decay leaves alone although they have more than one dimension."""
        return {f"model.{name}" for name in self.model.no_decay()}

    # ------------------------------------------------------------ the average that is exported

    def keep_average(self, momentum: float) -> None:
        """From now on a moving average of the exported model is kept, and exported in its place."""
        self.smooth, self.smoothing = frozen(self.export()), momentum

    def all_averages(self) -> list[Average]:
        if self.smooth is None:
            return self.averages()
        return [*self.averages(), Average(self.smooth, self.export(), self.smoothing, buffers=True)]

    def exported(self) -> Backbone:
        return self.export() if self.smooth is None else self.smooth

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.smooth is not None:
            self.smooth.eval()
        return self


def frozen(model: nn.Module) -> Any:
    """A copy that no gradient reaches: where an average of the model begins."""
    return deepcopy(model).requires_grad_(False).eval()


def batch_mean(values: Tensor, weight: Tensor) -> Tensor:
    """B … → …: the mean over the global batch. Each worker's gradient is that of its own samples, whole."""
    local: Tensor = torch.tensordot(weight.to(values.dtype), values, dims=1)
    whole = summed(local.detach()) + (local - local.detach())
    return whole / summed(weight.sum()).clamp(min=TINY)


def batch_term(term: Tensor, weight: Tensor) -> Tensor:
    """A term that every worker computed of the global batch, made into a sum over samples, as losses are.

    Its value is shared out by the weight of each worker's samples. Its gradient is not: a `batch_mean` gives
    each worker only its own samples' part.
    """
    part, whole = weight.sum(), summed(weight.sum())
    return term * whole + (term * (part - whole)).detach()


def full(x: Tensor) -> Tensor:
    """At least float32: losses and softmaxes are never computed in half precision."""
    return x.float() if x.dtype.itemsize < 4 else x


# ------------------------------------------------------------ what masked methods refuse


def relative_problems(name: str, method: str, model: Any) -> Iterator[str]:
    """Tables of relative positions are for all patches of an image, none left out."""
    relative = getattr(model, "relative", "none")
    if isinstance(model, ViTConfig) and relative != "none":
        given = f"given {relative!r}, whose tables are for all patches of an image"
        yield f"{name}.model.relative: {given}; {method} leaves some of them out, allowed: none"


def visible_at_most(parts: int) -> str:
    """The largest ratio, to three places, that leaves one of so many parts visible."""
    return f"{math.floor((1 - 1 / parts) * 1000) / 1000:g}"

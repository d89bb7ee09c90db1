"""Sections of an experiment that are no room's own: training, outside weights, search, comparison."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from vitlab.config import Config, UserError, free
from vitlab.data import AugmentConfig
from vitlab.engine.loop import LoopConfig
from vitlab.evaluation import ProbeConfig
from vitlab.methods import MethodConfig
from vitlab.models import ModelConfig
from vitlab.models.borrowed import BorrowedConfig
from vitlab.wording import show


class TrainConfig(LoopConfig):
    """A training stage: which model, by which objective, on which views of the images."""

    model: ModelConfig
    method: MethodConfig
    augment: AugmentConfig = AugmentConfig()
    probe: ProbeConfig = free(ProbeConfig())


class AdoptConfig(Config):
    """A model whose weights come from outside: a file, a folder, `runs:/ID/model`, `hub`; or `fresh` ones."""

    model: ModelConfig
    weights: str = free(..., min_length=1)  # the digest of what is there is in the key, not the place
    replace: list[str] = Field([])  # prefixes that start fresh, as `head`
    part: str | None = None  # of a checkpoint with several, as `teacher`

    @model_validator(mode="after")
    def _published(self) -> AdoptConfig:
        if self.weights == "hub" and not isinstance(self.model, BorrowedConfig):
            raise ValueError("weights: given 'hub', which models of torchvision and timm have; give a file")
        if self.weights == "fresh" and (self.replace or self.part):
            key = "replace" if self.replace else "part"
            raise ValueError(f"{key}: given {getattr(self, key)!r}; fresh weights have none; leave it out")
        return self


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
    metric: Literal["val/top1", "val/loss"] = "val/top1"
    grace_epochs: int = Field(1, gt=0, description="epochs before ASHA may stop a trial")
    reduction: int = Field(3, gt=1, description="ASHA keeps one of so many at each rung")
    concurrent: int = free(2, gt=0, description="trials at a time")
    workers: int = free(0, ge=0, description="workers of a trial; 0: in the trial's own process")

    @property
    def mode(self) -> Literal["max", "min"]:
        """Which values of the metric are better."""
        return "min" if self.metric == "val/loss" else "max"


class CompareConfig(Config):
    """The same chain again, for every variant under every seed, with a table at the end."""

    seeds: list[int] = Field([0], min_length=1)
    variants: dict[str, dict[str, Any]] = Field({})  # name → changes by dotted keys

    @model_validator(mode="after")
    def _once(self) -> CompareConfig:
        if len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds: given {self.seeds}; allowed: different numbers from 0")
        return self


def changed(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of plain data with values set by dotted keys."""
    out = copy.deepcopy(dict(tree))
    for key, value in changes.items():
        *parents, leaf = key.split(".")
        at = out
        for name in parents:
            at = at.setdefault(name, {})
            if not isinstance(at, dict):
                raise UserError(f"{key}: unknown key; {name} holds {show(at)}, no keys")
        if parents and leaf == "name" and at.get(leaf, value) != value:  # it would keep the other's values
            whole = f"{'.'.join(parents)}: {{name: {value}, …}}"
            raise UserError(f"{key}: given {value!r} in place of {at[leaf]!r}; give all of it, {whole}")
        at[leaf] = value
    return out

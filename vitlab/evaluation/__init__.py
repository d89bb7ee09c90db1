"""Evaluations: each yields (name, value) or (name, figure) on images the model was not trained on."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from vitlab.config import Config, free
from vitlab.evaluation.classify import Tally, classify
from vitlab.evaluation.judge import Ways
from vitlab.evaluation.pictures import confusion_figure, confusion_table, reconstruction_figure, save_figure
from vitlab.evaluation.probe import ProbeConfig
from vitlab.evaluation.validate import validate


class EvaluateConfig(Config):
    split: Literal["held_out", "val", "train"] = "held_out"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    attention: int = Field(0, ge=0, description="images whose attention is measured; 0: none")
    knn: int = Field(0, ge=0, description="neighbours that vote; 0: none")
    linear: bool = Field(False, description="logistic regression on frozen features")
    shots: list[Annotated[int, Field(gt=0)]] = Field([], description="labelled images a class to learn from")
    bank: int = Field(50000, gt=0, description="most training images that these learn from")
    batch_size: int = free(256, gt=0, description="images of a batch, over all workers")

    @property
    def ways(self) -> Ways:
        """How frozen features are judged."""
        return Ways(self.knn, self.linear, tuple(self.shots))

    @model_validator(mode="after")
    def _apart(self) -> EvaluateConfig:
        if self.split == "train" and self.ways.any:
            raise ValueError(
                "split: given 'train', which knn, linear and shots learn from; give held_out or val"
            )
        if len(set(self.shots)) < len(self.shots):
            raise ValueError(f"shots: given {self.shots}; allowed: different numbers")
        return self


__all__ = [
    "EvaluateConfig",
    "ProbeConfig",
    "Tally",
    "Ways",
    "classify",
    "confusion_figure",
    "confusion_table",
    "reconstruction_figure",
    "save_figure",
    "validate",
]

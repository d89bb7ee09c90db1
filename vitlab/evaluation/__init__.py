"""Evaluations: each yields (name, value) or (name, figure) on images the model was not trained on."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from vitlab.config import Config, free
from vitlab.evaluation.classify import Tally, classify
from vitlab.evaluation.pictures import confusion_figure, confusion_table, reconstruction_figure, save_figure
from vitlab.evaluation.validate import validate


class EvaluateConfig(Config):
    split: Literal["held_out", "val", "train"] = "held_out"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    attention: int = Field(0, ge=0, description="images whose attention is measured; 0: none")
    batch_size: int = free(256, gt=0, description="images of a batch, over all workers")


__all__ = [
    "EvaluateConfig",
    "Tally",
    "classify",
    "confusion_figure",
    "confusion_table",
    "reconstruction_figure",
    "save_figure",
    "validate",
]

"""Objectives by name: configs, and how one is put around a model."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import nn

from vitlab.config import UserError
from vitlab.methods.base import Losses, Method
from vitlab.methods.distill import Distill, DistillConfig
from vitlab.methods.mae import MAE, MAEConfig, Picture
from vitlab.methods.supervised import Supervised, SupervisedConfig
from vitlab.models import Backbone, ViT

METHODS: dict[str, type[Method]] = {"supervised": Supervised, "mae": MAE, "distill": Distill}
MethodConfig = Annotated[SupervisedConfig | MAEConfig | DistillConfig, Field(discriminator="name")]


def create_method(
    config: SupervisedConfig | MAEConfig | DistillConfig, model: Backbone, *, teacher: nn.Module | None = None
) -> Method:
    """The method that a config describes, training `model` on square images of the model's size."""
    height, width = model.image_size
    if height != width:
        raise UserError(f"{config.name}: trains on square images; given image_size {height}×{width}")
    if isinstance(config, DistillConfig):
        if teacher is None:
            raise UserError("distill: needs a teacher, none was given")
        return Distill(config, model, teacher, height)
    if teacher is not None:
        raise UserError(
            f"{config.name}: has no use for a teacher; of {', '.join(METHODS)}, only distill has one"
        )
    if isinstance(config, SupervisedConfig):
        return Supervised(config, model, height)
    if not isinstance(model, ViT):
        raise UserError(
            f"mae: hides patches of a plain transformer; given {type(model).__name__}, allowed: ViT"
        )
    return MAE(config, model, height)


__all__ = [
    "MAE",
    "METHODS",
    "Distill",
    "DistillConfig",
    "Losses",
    "MAEConfig",
    "Method",
    "MethodConfig",
    "Picture",
    "Supervised",
    "SupervisedConfig",
    "create_method",
]

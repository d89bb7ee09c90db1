"""Objectives by name: configs, and how one is put around a model."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field
from torch import nn

from vitlab.config import UserError
from vitlab.methods.base import Average, Losses, Method, Moment
from vitlab.methods.beit import BEiT, BEiTConfig
from vitlab.methods.dino import DINO, DINOConfig
from vitlab.methods.distill import Distill, DistillConfig
from vitlab.methods.dvae import DVAETraining, DVAETrainingConfig
from vitlab.methods.mae import MAE, MAEConfig, Picture
from vitlab.methods.msn import MSN, MSNConfig
from vitlab.methods.simmim import SimMIM, SimMIMConfig
from vitlab.methods.supervised import Supervised, SupervisedConfig
from vitlab.models import Backbone

METHODS: dict[str, Any] = {  # name → a `Method`
    "supervised": Supervised,
    "mae": MAE,
    "simmim": SimMIM,
    "beit": BEiT,
    "dino": DINO,
    "msn": MSN,
    "distill": Distill,
    "dvae": DVAETraining,
}
MethodConfig = Annotated[
    SupervisedConfig
    | MAEConfig
    | SimMIMConfig
    | BEiTConfig
    | DINOConfig
    | MSNConfig
    | DistillConfig
    | DVAETrainingConfig,
    Field(discriminator="name"),
]


def create_method(config: Any, model: Backbone, **guides: nn.Module | None) -> Method:
    """The method that a config describes, training `model` on square images of the model's size.

    `guides`: the `teacher` or the `tokenizer` of a method that learns from one.
    """
    made: Any = METHODS[config.name]
    height, width = model.image_size
    if height != width:
        raise UserError(f"{config.name}: trains on square images; given image_size {height}×{width}")
    if made.headless and model.num_classes:
        raise UserError(
            f"{config.name}: trains a model without a head; given num_classes {model.num_classes}, allowed: 0"
        )
    for problem in made.problems(config.name, config, model.config, height):
        raise UserError(problem)
    given = {name: guide for name, guide in guides.items() if guide is not None}
    if made.guide and made.guide not in given:
        way = f"give the stage one, {made.guide}=…, as the pipelines for {config.name} do"
        raise UserError(f"{config.name}: needs a {made.guide}, none was given; {way}")
    for name in given.keys() - {made.guide}:
        having = ", ".join(n for n, other in METHODS.items() if other.guide == name)
        raise UserError(f"{config.name}: has no use for a {name}; methods that have one: {having or 'none'}")
    method: Method = made(config, model, height, *given.values())
    return method


__all__ = [
    "DINO",
    "MAE",
    "METHODS",
    "MSN",
    "Average",
    "BEiT",
    "BEiTConfig",
    "DINOConfig",
    "DVAETraining",
    "DVAETrainingConfig",
    "Distill",
    "DistillConfig",
    "Losses",
    "MAEConfig",
    "MSNConfig",
    "Method",
    "MethodConfig",
    "Moment",
    "Picture",
    "SimMIM",
    "SimMIMConfig",
    "Supervised",
    "SupervisedConfig",
    "create_method",
]

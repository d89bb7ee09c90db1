"""Families, and tokenizers, by the names of their presets: which config builds which model."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from vitlab.config import UserError, build, nearest
from vitlab.models.borrowed import Borrowed, BorrowedConfig
from vitlab.models.coatnet import CoAtNet, CoAtNetConfig
from vitlab.models.compact import Compact, CompactConfig
from vitlab.models.cvt import CvT, CvTConfig
from vitlab.models.dvae import DVAE, DVAEConfig
from vitlab.models.features import Backbone, BackboneConfig, Size
from vitlab.models.swin import Swin, SwinConfig
from vitlab.models.vit import ViT, ViTConfig

FAMILIES: dict[type[BackboneConfig], type[Backbone]] = {
    ViTConfig: ViT,
    BorrowedConfig: Borrowed,
    CompactConfig: Compact,
    SwinConfig: Swin,
    CvTConfig: CvT,
    CoAtNetConfig: CoAtNet,
}
# What names codes and no classes: trained in a stage of its own, no other objective takes it.
TOKENIZERS: dict[type[BackboneConfig], type[Backbone]] = {DVAEConfig: DVAE}
ModelConfig = Annotated[
    ViTConfig | BorrowedConfig | CompactConfig | SwinConfig | CvTConfig | CoAtNetConfig | DVAEConfig,
    Field(discriminator="name"),
]
BUILT = {**FAMILIES, **TOKENIZERS}
MODELS = {name: config for config in BUILT for name in config.presets}


def create_model(name: str, *, num_classes: int, image_size: int | Size, **overrides: Any) -> Backbone:
    """A fresh model from a preset's name; `overrides` are further fields of its config."""
    if name not in MODELS:
        raise UserError(f"model: given '{name}'; allowed: {', '.join(MODELS)}{nearest(name, MODELS)}")
    config = build(MODELS[name], {"name": name, **overrides})
    return from_config(config, num_classes=num_classes, image_size=image_size)


def from_config(config: BackboneConfig, *, num_classes: int, image_size: int | Size) -> Backbone:
    """A fresh model. `num_classes` 0: no head, the logits are the pooled features."""
    if num_classes < 0:
        raise UserError(f"num_classes: given {num_classes}; allowed: 0 (no head) or more")
    return BUILT[type(config)](config, num_classes, image_size)

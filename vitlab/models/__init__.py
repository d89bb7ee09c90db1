"""Models by name: configs, presets, and how one is built."""

from __future__ import annotations

from typing import Any

from vitlab.config import UserError, build, nearest
from vitlab.models.features import Backbone, Features
from vitlab.models.vit import PRESETS, ViT, ViTConfig
from vitlab.models.weights import Loaded, Report, load_model, load_state, save_model

ModelConfig = ViTConfig
MODELS: dict[str, dict[str, Any]] = PRESETS


def create_model(
    name: str, *, num_classes: int, image_size: int | tuple[int, int], **overrides: Any
) -> Backbone:
    """A fresh model from a preset's name; `overrides` are further fields of its config."""
    if name not in MODELS:
        raise UserError(f"model: given '{name}'; allowed: {', '.join(MODELS)}{nearest(name, MODELS)}")
    config = build(ModelConfig, {"name": name, **overrides})
    return from_config(config, num_classes=num_classes, image_size=image_size)


def from_config(config: ModelConfig, *, num_classes: int, image_size: int | tuple[int, int]) -> Backbone:
    """A fresh model. `num_classes` 0: no head, the logits are the pooled features."""
    if num_classes < 0:
        raise UserError(f"num_classes: given {num_classes}; allowed: 0 (no head) or more")
    return ViT(config, num_classes, image_size)


__all__ = [
    "MODELS",
    "Backbone",
    "Features",
    "Loaded",
    "ModelConfig",
    "Report",
    "ViT",
    "ViTConfig",
    "create_model",
    "from_config",
    "load_model",
    "load_state",
    "save_model",
]

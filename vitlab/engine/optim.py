"""AdamW (Loshchilov and Hutter, 2017), its parameter groups and its schedules.

The schedule and the layer-wise decay are those of MAE's and BEiT's fine-tuning code: a linear warm-up
from zero, then half a cosine, both evaluated at every step on the fraction of an epoch that is done;
the rate of layer l of L is lr · layer_decay^(L - l). The warm-up of DINO's and BEiT's pre-training code is at
the full rate one step sooner, at its last step; their cosine is this one. Weight decay may go from one value
to another by half a cosine over the whole training, as in DINO's code.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

import torch
from pydantic import Field

from vitlab.config import Config
from vitlab.methods.base import Method

Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimConfig(Config):
    lr: float = Field(1e-3, gt=0)
    min_lr: float = Field(0.0, ge=0)
    warmup_epochs: float = Field(0.0, ge=0)
    weight_decay: float = Field(0.05, ge=0)
    weight_decay_end: float | None = Field(None, ge=0, description="the decay at the end; none: the same")
    layer_decay: float = Field(1.0, gt=0, le=1)
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), strict=False)
    eps: float = Field(1e-8, gt=0)
    clip: float = Field(0.0, ge=0, description="largest norm of the gradient; 0 does not clip")


class AdamW(torch.optim.AdamW):
    """AdamW that leaves parameters whose training begins later as they are, moments too."""

    def step(self, closure: Any = None) -> Any:
        everything = self.param_groups
        self.param_groups = [group for group in everything if not group["waits"]]
        try:
            return super().step(closure)
        finally:
            self.param_groups = everything


def groups(method: Method, config: OptimConfig) -> list[dict[str, Any]]:
    """Trainable parameters by (decayed or not, layer, first epoch).

    Vectors and the model's own list are not decayed.
    """
    never, starts = method.no_decay(), method.starts()
    found: dict[tuple[bool, int, float], dict[str, Any]] = {}
    last = max((method.layer_of(name) for name, p in method.named_parameters() if p.requires_grad), default=0)
    for name, parameter in method.named_parameters():
        if not parameter.requires_grad:
            continue
        decayed = parameter.ndim > 1 and name not in never
        layer = method.layer_of(name) if config.layer_decay < 1 else last
        start = max((epoch for prefix, epoch in starts.items() if name.startswith(prefix)), default=0.0)
        group = {
            "params": [],
            "lr": 0.0,
            "scale": config.layer_decay ** (last - layer),
            "weight_decay": config.weight_decay if decayed else 0.0,
            "decayed": decayed,
            "start": start,  # epochs until it is trained
            "first": 0,  # the step at which that is
            "waits": start > 0,
        }
        found.setdefault((decayed, layer, start), group)["params"].append(parameter)
    return list(found.values())


def adamw(method: Method, config: OptimConfig) -> AdamW:
    return AdamW(groups(method, config), lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def lr_at(config: OptimConfig, epoch: float, epochs: float) -> float:
    """The rate before layer decay, `epoch` (a fraction too) into a training of `epochs`."""
    if epoch < config.warmup_epochs:
        return config.lr * epoch / config.warmup_epochs
    rest = max(epochs - config.warmup_epochs, 1e-9)
    cosine = 0.5 * (1 + math.cos(math.pi * (epoch - config.warmup_epochs) / rest))
    return config.min_lr + (config.lr - config.min_lr) * cosine


def decay_at(config: OptimConfig, progress: float) -> float:
    """Weight decay after a fraction of the training."""
    if config.weight_decay_end is None:
        return config.weight_decay
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.weight_decay_end + (config.weight_decay - config.weight_decay_end) * cosine


def set_starts(optimizer: Any, epoch_steps: int) -> None:
    """Epochs of a beginning in steps."""
    for group in optimizer.param_groups:
        group["first"] = math.ceil(group["start"] * epoch_steps)


def set_rates(optimizer: Any, step: int, lr: float, decay: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]
        group["weight_decay"] = decay if group["decayed"] else 0.0
        group["waits"] = step < group["first"]

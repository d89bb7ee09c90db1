"""Learning from a teacher and from labels at once, of its last layer and of those before it.

Paper: Touvron et al. 2020, DeiT (arXiv 2012.12877), equations 2 (soft) and 3 (hard); soft targets are
Hinton et al. 2015 (1503.02531).

  L = (1 - α) · CE(class head, labels) + α · D(distillation head, teacher) + β · mean of H over the pairs
  hard: D = CE(student, argmax teacher)        soft: D = T² · KL(teacher/T ‖ student/T) / C

Without the distillation token both terms read the model's logits. Conventions of the authors' code: soft D is
divided by batch × classes, where equation 2 has no 1/C; the teacher sees the very view that the student sees,
mixed images too (Beyer et al. 2021, 2106.05237, call it consistent teaching); smoothing and the two labels of
a mixed image touch CE alone.

H compares layers before the last, see hints.py; β is `hint_weight`. Without `hints` there is no such term.

Departures: temperature and kind are free of each other, as is α (0.5 in equation 3, 0.1 in equation 2).

Letters: B samples, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from vitlab.batch import Batch
from vitlab.config import Config, UserError
from vitlab.methods.base import Losses, Method, full
from vitlab.methods.hints import Hint, Hints, layers_of
from vitlab.methods.supervised import correct, cross_entropy, label_loss, labelled
from vitlab.models import Backbone, ViTConfig, from_config


class DistillConfig(Config):
    name: Literal["distill"] = "distill"
    kind: Literal["hard", "soft"] = "hard"
    alpha: float = Field(0.5, ge=0, le=1)  # the teacher's part
    temperature: float = Field(3.0, gt=0)  # of soft targets
    token: bool = True  # the teacher speaks to the distillation head
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    hints: list[Hint] = Field([])  # layers before the last that are learned from, too
    hint_weight: float = Field(1.0, ge=0)


class Distill(Method):
    """Owns the student as `model` and the teacher, which is frozen and always in eval mode."""

    guide = "teacher"
    mixes = True

    def __init__(self, config: DistillConfig, model: Backbone, image_size: int, teacher: nn.Module) -> None:
        super().__init__()
        _refuse(model, teacher)
        self.config, self.model, self.image_size = config, model, image_size
        self.teacher = teacher.requires_grad_(False).eval()
        self.hints = _hints(config, model, teacher)

    @classmethod
    def problems(cls, name: str, config: DistillConfig, model: Any, side: int) -> Iterator[str]:
        yield from super().problems(name, config, model, side)
        two = isinstance(model, ViTConfig) and model.distilled and model.combine != "concat"
        if config.token and not two:
            more = "combine=mean" if getattr(model, "distilled", False) else "distilled=true"
            if not isinstance(model, ViTConfig):  # no other family has such a token
                more = "name=deit_tiny"
            yield (
                f"{name}.method.token: given true, but {name}.model has no distillation head; "
                f"give {name}.model.{more} or {name}.method.token=false"
            )
        if config.hints:
            try:
                with torch.device("meta"):
                    student = from_config(model, num_classes=1, image_size=side)
                layers_of("student", [hint.student for hint in config.hints], student)
            except UserError as error:
                yield f"{name}.method.hints: {error}"

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.teacher.eval()
        return self

    def weigh(self, batch: Batch) -> Tensor:
        return labelled(batch).sum()

    def losses(self, batch: Batch) -> Losses:
        images, weight = batch.views[0], labelled(batch)
        deep = {"layers"} if self.hints is not None else set()
        with torch.no_grad():
            known = self.teacher(images, {"logits"} | deep)
        taught = known.logits
        wanted = deep | ({"heads", "logits"} if self.config.token else {"logits"})
        model = self.model if self.training else self.exported()
        features = model(images, wanted, seeds=batch.seeds)
        by_label, by_teacher = features.heads if self.config.token else (features.logits, features.logits)
        true = label_loss(by_label, batch, self.config.label_smoothing)
        loss = (1 - self.config.alpha) * true + self.config.alpha * self._distance(by_teacher, taught)
        metrics = {
            "top1": correct(features.logits, batch.labels),
            "agreement": correct(features.logits, taught.argmax(-1)),
        }
        if self.hints is not None:
            hint = self.hints(features.layers, known.layers)
            loss, metrics["hint"] = loss + self.config.hint_weight * hint, hint.detach()
        return Losses(
            (loss * weight).sum(), {name: (value * weight).sum() for name, value in metrics.items()}
        )

    def _distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """D of the equations: B C, B C → B."""
        if self.config.kind == "hard":
            return cross_entropy(student, teacher.argmax(-1))
        t = self.config.temperature
        ours, theirs = (F.log_softmax(full(logits) / t, dim=-1) for logits in (student, teacher))
        return F.kl_div(ours, theirs, reduction="none", log_target=True).mean(-1) * t**2

    def export(self) -> Backbone:
        return self.model


def _hints(config: DistillConfig, model: Backbone, teacher: Any) -> Hints | None:
    try:
        return Hints(config.hints, model, teacher) if config.hints else None
    except UserError as error:
        raise UserError(f"distill.method.hints: {error}") from None


def _refuse(model: Backbone, teacher: nn.Module) -> None:
    mine, theirs = model.num_classes, getattr(teacher, "num_classes", None)
    if mine < 1 or mine != theirs:
        raise UserError(
            f"distill: the teacher tells {theirs} classes apart, the student {mine}; they must agree"
        )
    (height, width), size = model.image_size, getattr(teacher, "image_size", model.image_size)
    if size != model.image_size:
        given = "×".join(str(side) for side in size)
        raise UserError(
            f"distill: the teacher takes images of {given}, the student {height}×{width}; both see one view"
        )

"""What DINO and MSN share: a student with a head, and the moving average of both, which teaches them."""

from __future__ import annotations

from typing import Any, Self

from torch import nn

from vitlab.methods.base import Average, Method, frozen
from vitlab.models import Backbone
from vitlab.models.parts.norm import BatchNorm2d


class Siamese(Method):
    """Owns the student (`model`, `head`) and its average (`teacher`, `teacher_head`)."""

    headless = True
    one_view = False
    config: Any  # with `export`: teacher or student
    head: nn.Module
    momentum: float

    def add_teacher(self) -> None:
        """Where both begin they are the same."""
        self.teacher, self.teacher_head = frozen(self.model), frozen(self.head)

    def train(self, mode: bool = True) -> Self:
        """The teacher has no drop path and no dropout; its BatchNorm sees its batches, as in DINO's code."""
        super().train(mode)
        for part in (self.teacher, self.teacher_head):
            part.eval()
            for norm in part.modules():
                if isinstance(norm, BatchNorm2d):
                    norm.train(mode)
        return self

    def averages(self) -> list[Average]:
        pairs = ((self.teacher, self.model), (self.teacher_head, self.head))
        return [Average(old, new, self.momentum) for old, new in pairs]

    def export(self) -> Backbone:
        """The authors of both evaluate the teacher."""
        chosen: Backbone = self.teacher if self.config.export == "teacher" else self.model
        return chosen

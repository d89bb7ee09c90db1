"""Learning from the layers of a teacher that lie before its last.

FitNets (Romero et al. 2014, arXiv 1412.6550) call what a layer of the teacher gives a hint. The map s_i after
a layer of the student is brought to the width of a layer t_j of the teacher by P, dense at each place (1×1),
and compared by squares; ViTKD (Yang et al. 2022, 2209.02432) does so between transformers.

  H(i, j) = mean over places and channels of (norm(P s_i) - norm(t_j))²

`norm` is LayerNorm without weights, ε = 1e-6. What a CNN and a residual stream give differs by orders of
magnitude, and so would the term's weight; Wei et al. 2022 (2205.14141) norm what is learned from so. With
both normed H is 2 - 2 · cosine of the centred channels: a cosine would not be another choice.

Departures: FitNets' hints are a stage before distillation, ours one more term, as in ViTKD, whose maps are
not normed. Maps of two sizes meet on the smaller grid (adaptive means; P and means may be taken in either
order), where FitNets' regressor is a convolution that fits the sizes. Class and distillation token have no
part in it.

Letters: B samples, D width, h w grid of a map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn

from vitlab.config import Config, UserError
from vitlab.methods.base import full
from vitlab.models import Backbone


class Hint(Config):
    """Layers that are brought together: counted from 1 at the image, or from the end by -1."""

    student: int
    teacher: int

    @model_validator(mode="after")
    def _counted(self) -> Hint:
        if 0 in (self.student, self.teacher):
            raise ValueError("given layer 0; layers are counted from 1, or from the end by -1")
        return self


class Layer(NamedTuple):
    at: int  # in `Features.layers`
    width: int  # D


class Hints(nn.ModuleList):
    """The projections P, one a pair; called with the layers of both, it gives the mean of H over the pairs.

    They start as torch's dense layers do, are trained, and stay with the method: no model that is exported
    has them.
    """

    def __init__(self, hints: Sequence[Hint], model: Backbone, teacher: Backbone) -> None:
        ours = layers_of("student", [hint.student for hint in hints], model)
        theirs = layers_of("teacher", [hint.teacher for hint in hints], teacher)
        pairs = list(zip(ours, theirs, strict=True))
        super().__init__(nn.Linear(mine.width, taught.width) for mine, taught in pairs)
        self.pairs = [(mine.at, taught.at) for mine, taught in pairs]

    def forward(self, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        """Maps B D h w of both, by depth → B."""
        found = []
        for project, (i, j) in zip(self, self.pairs, strict=True):
            mine, taught = _level(student[i], teacher[j])
            found.append((_normed(project(mine)) - _normed(taught)).square().mean((1, 2, 3)))
        return torch.stack(found).mean(0)


def _level(*maps: Tensor) -> list[Tensor]:
    """B D h w each → B h w D on the smallest grid."""
    grid = min(m.shape[2] for m in maps), min(m.shape[3] for m in maps)
    return [F.adaptive_avg_pool2d(m, grid).movedim(1, -1) for m in maps]


def _normed(x: Tensor) -> Tensor:
    return F.layer_norm(full(x), x.shape[-1:], eps=1e-6)


def layers_of(who: str, numbers: Sequence[int], model: Any) -> list[Layer]:
    """Layers by their numbers; one line where the model has none, or fewer."""
    widths = [width for width, _, _ in model.layer_sizes()]
    count = len(widths)
    if not count:
        name = getattr(model.config, "arch", model.config.name)
        raise UserError(f"given, but {name}, the {who}, has no maps by depth; give [] or another {who}")
    for number in numbers:
        if not 1 <= abs(number) <= count:
            raise UserError(
                f"given {who}: {number}; the {who} has {count} layers, allowed: 1 to {count}, "
                f"or -1 to -{count} from the end"
            )
    return [Layer(at, widths[at]) for at in (n - 1 if n > 0 else count + n for n in numbers)]

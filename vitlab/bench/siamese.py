"""Pairs of objectives with a teacher that follows its student: DINO and MSN, with lightly's losses beside.

Views of one size go through an encoder in one call on both sides. A step is the student's and the teacher's
forward pass, backward, the optimizer, the teacher's move; the centre moves too.

What had to be made equal beside objectives.py: lightly's prototypes are trained, as the paper's are (its
example leaves them as they are), and its focal views are not masked.
"""

from __future__ import annotations

import warnings
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlab.batch import derived, uniform
from vitlab.bench.objectives import WIDTH, Ours, cut_views, encoder, lightly, seeds_of, versions
from vitlab.bench.peers import Pair
from vitlab.methods import DINOConfig, MSNConfig, create_method
from vitlab.models import create_model, load_weights

LOCAL = 4  # small views, of 96 pixels where the large ones have 224


class LightlySiamese(nn.Module):
    """A student, its average, and how the one follows the other."""

    def __init__(self, ours: Any, head: Any) -> None:
        """`head` makes one."""
        super().__init__()
        _, self.losses, self.utils = lightly()
        self.momentum, self.sizes = ours.momentum, [view.size for view in ours.views()]
        self.student, self.student_head = encoder(ours.image_size), head()
        self.teacher, self.teacher_head = deepcopy(self.student), head()
        self.teacher_head.load_state_dict(self.student_head.state_dict())
        for part in (self.teacher, self.teacher_head):
            self.utils.deactivate_requires_grad(part)

    def follow(self) -> None:
        self.utils.update_momentum(self.student, self.teacher, self.momentum)
        self.utils.update_momentum(self.student_head, self.teacher_head, self.momentum)


class LightlyDINO(LightlySiamese):
    def __init__(self, ours: Any) -> None:
        modules, losses, _ = lightly()
        c = ours.config
        sizes = (WIDTH, c.hidden_dim, c.bottleneck_dim, c.out_dim)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of torch, that its head's weight_norm is old
            super().__init__(ours, lambda: modules.DINOProjectionHead(*sizes))
        self.criterion = losses.DINOLoss(c.out_dim)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        views = cut_views(images, self.sizes)
        large = torch.cat(views[:2])
        with torch.no_grad():
            taught = self.teacher_head(self.teacher(large))
        parts = [large, torch.cat(views[2:])]
        said = torch.cat([self.student_head(self.student(part)) for part in parts])
        loss: Tensor = self.criterion(list(taught.chunk(2)), list(said.chunk(len(views))))
        return loss


def dino_lightly(image_size: int) -> Pair:
    """Two global and four local views, the paper's 65536 dimensions."""
    model = create_model("vit_small", num_classes=0, image_size=image_size)
    ours: Any = create_method(DINOConfig(local_crops=LOCAL), model)
    theirs = LightlyDINO(ours)
    head = {n.replace("layers.", "mlp."): t for n, t in theirs.student_head.state_dict().items()}
    _mirror(ours, theirs, head)
    return Pair(versions("lightly", "timm"), Ours(ours), theirs)


class LightlyMSN(LightlySiamese):
    def __init__(self, ours: Any) -> None:
        modules, losses, _ = lightly()
        c, self.visible = ours.config, ours.visible
        sizes = (WIDTH, c.hidden_dim, c.output_dim)
        super().__init__(ours, lambda: modules.heads.MSNProjectionHead(*sizes))
        self.prototypes = nn.Parameter(nn.Linear(c.output_dim, c.prototypes, bias=False).weight.detach())
        self.criterion = losses.MSNLoss()

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        target, anchor, *focal = cut_views(images, self.sizes)
        noise = uniform(derived(seeds_of(images), "anchor/0"), "mask", self.student.sequence_length - 1)
        keep = F.pad(noise.argsort(dim=1, stable=True)[:, : self.visible] + 1, (1, 0))
        with torch.no_grad():
            taught = self.teacher_head(self.teacher(target))
        said = self.student_head(self.student(anchor, idx_keep=keep))
        near = self.student_head(self.student(torch.cat(focal)))
        loss: Tensor = self.criterion(torch.cat([said, near]), taught, self.prototypes)
        return loss


def msn_lightly(image_size: int) -> Pair:
    """One target, one masked anchor and four focal views; 1024 prototypes."""
    model = create_model("vit_small", num_classes=0, image_size=image_size)
    ours: Any = create_method(MSNConfig(focal_crops=LOCAL), model)
    theirs = LightlyMSN(ours)
    places = {"0": "fc1", "1": "bn1", "3": "fc2", "4": "bn2", "6": "fc3"}
    head = {}
    for name, value in theirs.student_head.state_dict().items():
        _, place, rest = name.split(".")
        head[f"{places[place]}.{rest}"] = value
    none = torch.zeros(ours.config.hidden_dim)  # biases before a normalisation: lightly has none
    _mirror(ours, theirs, head | {"fc1.bias": none, "fc2.bias": none})
    ours.prototypes.weight.data.copy_(theirs.prototypes)
    return Pair(versions("lightly", "timm"), Ours(ours), theirs)


def _mirror(ours: Any, theirs: LightlySiamese, head: dict[str, Tensor]) -> None:
    """One's weights into student and teacher."""
    for model, mine in ((ours.model, ours.head), (ours.teacher, ours.teacher_head)):
        load_weights(model, theirs.student.vit.state_dict())
        mine.load_state_dict(head)

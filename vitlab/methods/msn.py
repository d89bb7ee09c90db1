"""Masked siamese networks: a masked view falls to the same prototypes as another view that is whole.

Paper: Assran et al. 2022 (arXiv 2204.07141), with the conventions of the authors' code.

  p = softmax(cos(z, q) / τ)         of anchors: masked views by the student, and focal ones, which are whole
  t = Sinkhorn(sharpen(p⁺, T))       of the target: one whole view by the teacher, the student's average
  L = mean H(t, p) - λ · H(p̄) + η · mean H(p)            p̄: the mean of all anchors of the global batch

Encoder and head run once for the large anchors and once for the focal ones, so BatchNorm has the statistics
of either group. The teacher's BatchNorm sees its own batches, and only parameters are averaged. Sharpening
comes before Sinkhorn's three rounds. Momentum and T move linearly, as if the training were a quarter longer:
the momentum ends at 1 - 0.2 · (1 - momentum). λ's term has + log K, so that 0 is its least value. Prototypes
start uniform in ±E^-½, are normalised where they are used and never decayed; tokens and positions are. The
released config is the default: ViT-S/16 with Sinkhorn. Its masks are 0.15 for S, 0.3 for B, 0.7 for L.

Departures: a view's mask comes of the sample's own seed (theirs is one for all views of a worker's batch),
and belongs to `anchor` views even where focal ones have their size. The teacher has no drop path. Of
batches without an image in some slot BatchNorm counts the slot; in training there are none. Prototypes'
gradients are clipped with the others, and are means over workers (theirs are sums, which AdamW does not
see). Sharpening is one softmax at τ · T: the same numbers, without powers that underflow. Rate and decay are
as `optim` says; their schedules too are those of a training a quarter longer. The encoder is as its config
says; theirs starts its patches Kaiming normal.

Letters: B samples, V anchor views, K prototypes, D width, E width of the head's output, N patches.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.special import entr

from vitlab.batch import Batch, View, derived, uniform
from vitlab.config import Config
from vitlab.dist import summed
from vitlab.methods.base import (
    Losses,
    Moment,
    batch_mean,
    batch_term,
    full,
    relative_problems,
    visible_at_most,
)
from vitlab.methods.crops import size_problems, small_size
from vitlab.methods.heads import pooled_width
from vitlab.methods.siamese import Siamese
from vitlab.models import ViT, ViTConfig
from vitlab.models.parts.norm import BatchNorm1d
from vitlab.models.vit import init_linears

LONGER = 1.25  # the schedules are those of a training so much longer
ROUNDS = 3  # of Sinkhorn
SETTLED = 0.1  # of the training, before which nothing is called collapsed
TELLS = 0.05  # nats: a target that tells less of its image tells nothing


class MSNConfig(Config):
    name: Literal["msn"] = "msn"
    anchors: int = Field(1, gt=0)
    focal_crops: int = Field(10, ge=0)
    focal_size: int | None = Field(None, gt=0)
    mask_ratio: float = Field(0.15, ge=0, lt=1)
    prototypes: int = Field(1024, gt=1)
    hidden_dim: int = Field(2048, gt=0)
    output_dim: int = Field(256, gt=0)
    head_batch_norm: bool = True
    temperature: float = Field(0.1, gt=0)
    start_sharpen: float = Field(0.25, gt=0, le=1)
    final_sharpen: float = Field(0.25, gt=0, le=1)
    sinkhorn: bool = True
    mean_entropy_weight: float = Field(1.0, ge=0)
    entropy_weight: float = Field(0.0, ge=0)
    momentum: float = Field(0.996, ge=0, lt=1)
    export: Literal["teacher", "student"] = "teacher"


class Prototypes(nn.Module):
    """B E → B K: cosines with each prototype, never in half precision."""

    def __init__(self, count: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, dim).uniform_(-(dim**-0.5), dim**-0.5))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.normalize(full(x), dim=-1) @ F.normalize(self.weight, dim=-1).T


class MSN(Siamese):
    takes = (ViTConfig,)
    model: ViT

    def __init__(self, config: MSNConfig, model: ViT, image_size: int) -> None:
        super().__init__()
        self.config, self.model, self.image_size = config, model, image_size
        self.patches = math.prod(model.grid)
        self.visible = int(self.patches * (1 - config.mask_ratio))
        self.head = projection(config, pooled_width(model))
        self.prototypes = Prototypes(config.prototypes, config.output_dim)
        self.add_teacher()
        self.momentum, self.sharpening, self.progress = config.momentum, config.start_sharpen, 0.0

    @classmethod
    def problems(cls, name: str, config: MSNConfig, model: Any, side: int) -> Iterator[str]:
        yield from super().problems(name, config, model, side)
        if not isinstance(model, ViTConfig):
            return
        yield from relative_problems(name, "msn", model)
        if config.focal_crops:
            yield from size_problems(name, "focal", config.focal_size, model, side)
        patches = (side // model.patch_size) ** 2
        if patches and not int(patches * (1 - config.mask_ratio)):
            given = f"given {config.mask_ratio}, which leaves no patch of {patches} visible"
            yield f"{name}.method.mask_ratio: {given}; allowed: from 0 to {visible_at_most(patches)}"

    @classmethod
    def whole_batch(cls, config: MSNConfig) -> bool:
        return True

    # ------------------------------------------------------------ what the loop asks

    @classmethod
    def view_names(cls, config: MSNConfig) -> list[str]:
        return ["target", *_names("anchor", config.anchors), *_names("focal", config.focal_crops)]

    def views(self) -> list[View]:
        small = self.config.focal_size or small_size(self.model.config, self.image_size)
        names = self.view_names(self.config)
        return [View(n, small if n.startswith("focal") else self.image_size) for n in names]

    def before_step(self, now: Moment) -> None:
        self.progress, config = now.progress, self.config
        done = now.progress / LONGER
        self.momentum = config.momentum + (1 - config.momentum) * done
        self.sharpening = config.start_sharpen + (config.final_sharpen - config.start_sharpen) * done

    def no_decay(self) -> set[str]:
        """The authors' code decays tokens and positions, as every matrix but this."""
        return {"prototypes.weight"}

    # ------------------------------------------------------------ the loss

    def losses(self, batch: Batch) -> Losses:
        config, weight = self.config, batch.weight
        with torch.no_grad():
            targets = self._targets(batch)
        logs = self._anchors(batch)
        probabilities = logs.exp()
        distance = -(targets * logs).sum(-1).mean(0)
        entropy = -(probabilities * logs).sum(-1).mean(0)
        chosen = F.one_hot(targets.argmax(-1), config.prototypes).to(targets.dtype)
        means = batch_mean(torch.stack([probabilities.mean(0), targets, chosen], dim=1), weight)
        least = torch.finfo(means.dtype).tiny  # the slope at 0 is infinite
        mean_entropy, target_mean_entropy, _ = entr(means.clamp(min=least)).sum(-1).unbind(0)
        spread = batch_term(math.log(config.prototypes) - mean_entropy, weight)
        each = distance + config.entropy_weight * entropy
        loss = (each * weight).sum() + config.mean_entropy_weight * spread
        metrics = {
            "cross_entropy": (distance * weight).sum(),
            "target_entropy": (entr(targets).sum(-1) * weight).sum(),
            "target_mean_entropy": target_mean_entropy * weight.sum(),
            "mean_entropy": mean_entropy * weight.sum(),
            "prototypes": (means[2] > 0).sum() * weight.sum(),  # that some image of the batch falls to
        }
        return Losses(loss, {name: value.detach() for name, value in metrics.items()})

    def _targets(self, batch: Batch) -> Tensor:
        """B K: what the teacher says of the whole view."""
        pooled = self.teacher(batch.views[0], {"pooled"}).pooled
        cosines = self.prototypes(self.teacher_head(pooled))
        sharp = (cosines / (self.config.temperature * self.sharpening)).softmax(-1)
        return balanced(sharp, batch.weight) if self.config.sinkhorn else sharp

    def _anchors(self, batch: Batch) -> Tensor:
        """V B K: what the student says of the other views, as logarithms."""
        large, first = self.config.anchors, 1 + self.config.anchors
        groups = [self._embed(batch, "anchor", batch.views[1:first], self.visible < self.patches)]
        if self.config.focal_crops:
            groups.append(self._embed(batch, "focal", batch.views[first:], masked=False))
        cosines = self.prototypes(torch.cat(groups))
        logs: Tensor = (cosines / self.config.temperature).log_softmax(-1)
        return logs.view(large + self.config.focal_crops, len(batch.seeds), -1)

    def _embed(self, batch: Batch, kind: str, views: list[Tensor], masked: bool) -> Tensor:
        """Views of one size → V·B E."""
        seeds = torch.cat([derived(batch.seeds, name) for name in _names(kind, len(views))])
        keep = None
        if masked:
            keep = uniform(seeds, "mask", self.patches).argsort(dim=1, stable=True)[:, : self.visible]
        embedded: Tensor = self.head(self.model(torch.cat(views), {"pooled"}, keep=keep, seeds=seeds).pooled)
        return embedded

    # ------------------------------------------------------------ trouble

    def diagnose(self, values: dict[str, float]) -> str | None:
        """Collapse, to one prototype or to all: then a target tells nothing of its image."""
        entropy, together = values["train/target_entropy"], values["train/target_mean_entropy"]
        if self.progress < SETTLED or together - entropy > TELLS:
            return None
        if entropy > math.log(self.config.prototypes) / 2:
            return (
                "msn has collapsed: every image falls evenly to all prototypes; "
                "lower method.start_sharpen and method.final_sharpen, or optim.lr"
            )
        return (
            "msn has collapsed: every image falls to the same prototypes; "
            "give method.sinkhorn=true, a larger method.mean_entropy_weight or a smaller optim.lr"
        )


def projection(config: MSNConfig, dim: int) -> nn.Module:
    """B D → B E, with the official names and initialisation."""
    norm = BatchNorm1d if config.head_batch_norm else None
    layers: list[tuple[str, nn.Module]] = []
    for i, width in ((1, dim), (2, config.hidden_dim)):
        layers.append((f"fc{i}", nn.Linear(width, config.hidden_dim)))
        layers += [(f"bn{i}", norm(config.hidden_dim))] if norm else []
        layers.append((f"gelu{i}", nn.GELU()))
    layers.append(("fc3", nn.Linear(config.hidden_dim, config.output_dim)))
    head = nn.Sequential(OrderedDict(layers))
    init_linears(head, "deit")
    return head


@torch.no_grad()
def balanced(targets: Tensor, weight: Tensor) -> Tensor:
    """B K → B K: Sinkhorn over the global batch, towards an even share for each prototype.

    The official factors 1/K and 1/B cancel, because a sample's numbers are made to sum to 1 last.
    """
    least = torch.finfo(targets.dtype).tiny  # a prototype that no sample falls to
    for _ in range(ROUNDS):
        shares = summed(weight.to(targets.dtype) @ targets)
        targets = targets / shares.clamp(min=least)
        targets = targets / targets.sum(-1, keepdim=True)
    return targets


def _names(kind: str, count: int) -> list[str]:
    return [f"{kind}/{i}" for i in range(count)]

"""Classification from labels: cross-entropy.

Papers: Dosovitskiy et al. 2020 (arXiv 2010.11929); label smoothing: Szegedy et al. 2015 (1512.00567).

A distilled model trained without a teacher: the labels go to the class head alone, as DeiT's code does with
`--distillation-type none`. The distillation head then keeps the weights it came with, while the model's
logits remain the mean of both heads: to start from nothing, take `distill` or a model with one head.

A sample without a label (-1) has no part in the loss, nor in the mean over the batch.

Where Mixup or CutMix (1710.09412, 1905.04899) made an image of two, the loss is that of both labels by their
shares, which is the cross-entropy with the mixed label; `top1` asks for the image's own label.

Letters: B samples, C classes.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from vitlab.batch import Batch
from vitlab.config import Config, UserError
from vitlab.methods.base import Losses, Method, full
from vitlab.models import Backbone


class SupervisedConfig(Config):
    name: Literal["supervised"] = "supervised"
    label_smoothing: float = Field(0.0, ge=0, lt=1)


class Supervised(Method):
    mixes = True

    def __init__(self, config: SupervisedConfig, model: Backbone, image_size: int) -> None:
        super().__init__()
        if model.num_classes < 1:
            raise UserError("supervised: the model has no head; build it with num_classes of 1 or more")
        self.config, self.model, self.image_size = config, model, image_size
        self.two_heads = "heads" in model.gives

    def weigh(self, batch: Batch) -> Tensor:
        return labelled(batch).sum()

    def losses(self, batch: Batch) -> Losses:
        model = self.model if self.training else self.exported()
        features = model(batch.views[0], {"heads" if self.two_heads else "logits"}, seeds=batch.seeds)
        logits = features.heads[0] if self.two_heads else features.logits
        weight = labelled(batch)
        loss = label_loss(logits, batch, self.config.label_smoothing)
        return Losses((loss * weight).sum(), {"top1": (correct(logits, batch.labels) * weight).sum()})

    def export(self) -> Backbone:
        return self.model


def labelled(batch: Batch) -> Tensor:
    """B: the samples' weights, 0 for those without a label."""
    return batch.weight * (batch.labels >= 0)


def cross_entropy(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """B C, B → B. A missing label (-1) gives a number that its weight of 0 takes out."""
    return F.cross_entropy(full(logits), labels.clamp(min=0), reduction="none", label_smoothing=smoothing)


def label_loss(logits: Tensor, batch: Batch, smoothing: float = 0.0) -> Tensor:
    """B C → B: the cross-entropy with the label; of a mixed image, with both labels by their shares."""
    own = cross_entropy(logits, batch.labels, smoothing)
    if batch.others is None or batch.share is None:
        return own
    share = batch.share.to(own.dtype)
    return share * own + (1 - share) * cross_entropy(logits, batch.others, smoothing)


def correct(logits: Tensor, labels: Tensor) -> Tensor:
    """B C, B → B: 1 where the largest logit is the label's."""
    return (logits.detach().argmax(-1) == labels).float()

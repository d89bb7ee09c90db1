"""The contract between an objective and the loop."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from vitlab.batch import Batch, View
from vitlab.models.features import Backbone


class Losses(NamedTuple):  # a tuple, because ZeRO-3's hooks look for tensors in tuples
    """Sums over a batch's samples, each sample times its weight.

    The loop divides by the weight of the global batch, so that accumulation, the number of workers and
    padded slots do not change what is minimised.
    """

    loss: Tensor  # what is minimised
    metrics: dict[str, Tensor]  # further sums for the log, detached


class Method(nn.Module):
    """An objective: owns the model it trains and everything its loss needs."""

    headless: ClassVar[bool] = False  # whether it trains a backbone without a classifier

    model: Backbone  # the one that is trained

    def views(self) -> list[View]:
        """The augmented images it needs of every sample."""
        raise NotImplementedError

    def before_step(self, progress: float) -> None:
        """Called before every step with the fraction of the training done: temperatures, freezing."""

    def weigh(self, batch: Batch) -> Tensor:
        """How much a batch counts in the mean over the global batch: by default its real samples."""
        return batch.weight.sum()

    def forward(self, batch: Batch) -> Losses:
        raise NotImplementedError

    def averages(self) -> list[tuple[nn.Module, nn.Module, float]]:
        """(target, source, momentum): after every step target ← momentum·target + (1-momentum)·source."""
        return []

    def export(self) -> nn.Module:
        """The model that the next stage uses."""
        raise NotImplementedError

    def layer_of(self, name: str) -> int:
        """The layer of a parameter of this method, for layer-wise decay; what is not the model's is last."""
        if name.startswith("model."):
            return self.model.layer_of(name.removeprefix("model."))
        return self.model.num_layers - 1

    def no_decay(self) -> set[str]:
        """Parameters that weight decay leaves alone although they have more than one dimension."""
        return {f"model.{name}" for name in self.model.no_decay()}


def full(x: Tensor) -> Tensor:
    """At least float32: losses and softmaxes are never computed in half precision."""
    return x.float() if x.dtype.itemsize < 4 else x

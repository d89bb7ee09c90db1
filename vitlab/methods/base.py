"""The contract between an objective and the loop."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from vitlab.batch import Batch, View


@dataclass(frozen=True)
class Losses:
    """Sums over a batch's samples, each sample times its weight.

    The loop divides by the weight of the global batch, so that accumulation, the number of workers and
    padded slots do not change what is minimised.
    """

    loss: Tensor  # what is minimised
    metrics: dict[str, Tensor] = field(default_factory=dict)  # further sums for the log, detached


class Method(nn.Module):
    """An objective: owns the model it trains and everything its loss needs."""

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

"""Classification on a whole split: every sample once, on any number of workers.

Letters: B samples, C classes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitlab.batch import Batch
from vitlab.config import UserError
from vitlab.dist import World


@dataclass(frozen=True)
class Tally:
    """Counts over a split; all figures follow from them."""

    confusion: Tensor  # C C, int64: [true, predicted]
    top5: int
    images: int
    images_per_s: float

    def figures(self) -> Iterator[tuple[str, float]]:
        right = int(self.confusion.diag().sum())
        yield "eval/top1", right / self.images
        yield "eval/top5", self.top5 / self.images
        yield "eval/images", float(self.images)
        yield "eval/images_per_s", self.images_per_s

    def by_class(self) -> list[float | None]:
        """Each class's share of right answers; None for a class without images."""
        totals = self.confusion.sum(1).tolist()
        return [
            right / n if n else None for right, n in zip(self.confusion.diag().tolist(), totals, strict=True)
        ]


@torch.inference_mode()
def classify(
    model: nn.Module, batches: Iterable[Batch], classes: int, world: World, seen: Callable[[int], None]
) -> Tally:
    """Counts the answers of a model that every rank holds whole; `seen` is told the batches done."""
    counts = torch.zeros(classes * classes + 2, dtype=torch.int64, device=world.device)
    begin = time.perf_counter()
    for number, batch in enumerate(batches, 1):
        logits = model(batch.views[0])
        real = (batch.weight > 0) & (batch.labels >= 0)  # neither padding nor images without a label
        logits, labels = logits[real].float(), batch.labels[real]
        counts[:-2] += torch.bincount(labels * classes + logits.argmax(1), minlength=classes * classes)
        best = logits.topk(min(5, classes)).indices
        counts[-2] += (best == labels[:, None]).any(1).sum()
        counts[-1] += len(labels)
        seen(number)
    counts = world.sum(counts).cpu()
    seconds = max(world.gather(time.perf_counter() - begin))
    images = int(counts[-1])
    if not images:
        raise UserError("evaluate.split: it has no image with a label; evaluate on a split that has some")
    return Tally(counts[:-2].view(classes, classes), int(counts[-2]), images, images / seconds)

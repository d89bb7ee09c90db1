"""Frozen features of a trained model, judged: figures by neighbours and regressions, and two pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from vitlab.batch import Batch
from vitlab.config import UserError
from vitlab.data import Shards, chosen, eval_batches
from vitlab.dist import World
from vitlab.engine.serve import Post
from vitlab.evaluation import Ways, save_figure
from vitlab.evaluation.feature_pictures import Row, map_figure, neighbours_figure
from vitlab.evaluation.features import collect
from vitlab.evaluation.judge import USUAL, judged
from vitlab.evaluation.knn import nearest
from vitlab.jobs.damage import Ledger
from vitlab.jobs.place import mover
from vitlab.models import Backbone

if TYPE_CHECKING:
    from vitlab.jobs.evaluating import Autocast, EvaluateJob

ROWS, NEAREST = 8, 8  # queries of the picture, and their neighbours
DOTS = 5000  # of the map


def ways_for(job: EvaluateJob, model: Backbone) -> Ways:
    """What was asked for; if nothing was, the usual for a model without a head, which answers nothing."""
    ways = job.config.ways
    if model.num_classes or ways.any:
        return ways
    if job.config.split == "train":
        raise UserError(
            "evaluate.split: given 'train'; this model has no head and is judged by what its features teach "
            "from the train split; give held_out or val"
        )
    return USUAL


class Judge:
    """The features of both splits; made by all ranks, judged by the first."""

    def __init__(self, job: EvaluateJob, shards: Shards, world: World, ledger: Ledger) -> None:
        self.job, self.shards, self.world, self.ledger = job, shards, world, ledger
        counts = {split: shards.count(split) for split in ("train", job.config.split)}
        limits = {"train": job.config.bank, job.config.split: counts[job.config.split]}
        self.numbers: dict[str, np.ndarray] = {
            split: chosen(counts[split], most) for split, most in limits.items()
        }

    def look(self, model: Autocast, post: Post) -> None:
        """Fills `bank` and `queries`."""

        def forward(batch: Batch) -> Tensor:
            pooled: Tensor = model(batch.views[0], {"pooled"}).pooled
            return pooled

        size = self.job.config.batch_size
        total = sum(-(-len(numbers) // size) for numbers in self.numbers.values())
        to_device = mover(self.job.place.data, self.world)
        tell = (lambda n: post("progress", (n, total, {}))) if self.world.first else (lambda n: None)
        done, found = 0, []
        for split, numbers in self.numbers.items():
            watched = self.ledger.watch(self._batches(split, numbers, size, self.world), split)
            batches = (to_device(b) for b in watched)
            found.append(collect(forward, _counted(batches, done, tell), self.world))
            done += -(-len(numbers) // size)
        self.bank, self.queries = found

    def figures(self, ways: Ways) -> dict[str, float]:
        bank, queries = self.bank.to(self.world.device), self.queries.to(self.world.device)
        return dict(judged(bank, queries, len(self.shards.classes), ways))

    def draw(self, folder: Path) -> None:
        """`neighbours.png` and `features.png`."""
        split = self.job.config.split.replace("_", "-")
        title = (
            f"{self.job.title} · {split} images and their nearest of {len(self.bank.labels)} training images"
        )
        save_figure(neighbours_figure(self._rows(), self.shards.classes, title), folder / "neighbours.png")
        dots = chosen(len(self.queries.labels), DOTS)
        title = f"{self.job.title} · features of {len(dots)} {split} images on their principal axes"
        features, labels = self.queries.features[dots], self.queries.labels[dots]
        save_figure(map_figure(features, labels, self.shards.classes, title), folder / "features.png")

    def _rows(self) -> list[Row]:
        """Some queries, always the same, with the images that features find alike."""
        asked = chosen(len(self.queries.labels), ROWS)
        found = nearest(self.bank.features, self.queries.features[asked], NEAREST)
        images = self._images(self.job.config.split, self.queries.places[asked])
        rows = []
        for query, image, places, alike in zip(asked, images, found.places, found.similarity, strict=True):
            like = self._images("train", self.bank.places[places])
            labels = [int(self.queries.labels[query]), *self.bank.labels[places].tolist()]
            rows.append(Row([image, *like], labels, alike.tolist()))
        return rows

    def _images(self, split: str, places: Tensor) -> list[Tensor]:
        """Read by this process alone; values in 0..1."""
        numbers = self.numbers[split][places.numpy()]
        (batch,) = self._batches(split, numbers, len(numbers), World(device=self.world.device))
        return list(batch.views[0].float() / 255)

    def _batches(self, split: str, numbers: np.ndarray, size: int, world: World) -> Iterator[Batch]:
        place = self.job.place
        loaders = place.loaders if world is self.world else 0
        return eval_batches(self.shards, place.data, split, size, world, loaders=loaders, numbers=numbers)


def _counted(batches: Iterable[Batch], done: int, tell: Callable[[int], None]) -> Iterator[Batch]:
    for number, batch in enumerate(batches, done + 1):
        yield batch
        tell(number)

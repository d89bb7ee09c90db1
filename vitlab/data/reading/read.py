"""Shards to batches: which samples a worker reads, step by step.

A worker asks for the slots of its streams; every sample is decoded and augmented from what it is and where it
stands. So the batches are the same bits with any number of loaders, on any number of workers, and from any
step on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from vitlab.batch import Batch, View
from vitlab.config import UserError
from vitlab.data.images.recipes import AugmentConfig
from vitlab.data.reading.blend import training_order
from vitlab.data.reading.fetching import Micro, Reach, fetched_ahead
from vitlab.data.reading.loading import AHEAD, Micros, Recipe, Shape, load
from vitlab.data.reading.order import Streams, exact
from vitlab.data.settings import ShardsConfig, check_classes
from vitlab.data.shards.index import Shards
from vitlab.dist import World


@dataclass(frozen=True)
class ReadPlan:
    """What one worker reads: its place, the global batch, and for how long."""

    views: Sequence[View]
    batch: int  # of all workers together, in one optimizer step
    epochs: int
    seed: int = 0
    rank: int = 0
    workers: int = 1
    accumulate: int = 1  # micro-batches in a step
    loaders: int = 0  # loader processes; 0 reads in this one
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    @property
    def micro(self) -> int:
        """Samples in one of this worker's micro-batches."""
        each = self.batch // self.workers
        if self.accumulate < 1 or each % self.accumulate:
            raise UserError(
                f"accumulate: given {self.accumulate}, but a worker has {each} of the {self.batch} samples "
                "of a batch; give a divisor of that"
            )
        return each // self.accumulate


def order_of(shards: Shards, config: ShardsConfig, plan: ReadPlan) -> Streams:
    """The order in which a plan reads the training split; its `steps` are those of one epoch."""
    return training_order(shards, config.streams, plan.batch, plan.seed, config.window)


def train_batches(
    shards: Shards, config: ShardsConfig, plan: ReadPlan, *, start_step: int = 0
) -> Iterator[Batch]:
    """This worker's micro-batches, `accumulate` for every step, from a step on to the last epoch's end."""
    check_classes(config, shards)
    names, largest = [view.name for view in plan.views], max(view.size for view in plan.views)
    for name in plan.augment.unknown_views(names):
        raise UserError(f"augment.views: given {name!r}; the method has {', '.join(names)}")
    recipes = [Recipe(View(*view), plan.augment, largest) for view in plan.views]
    requests = partial(_train_requests, shards, config, plan, start_step)
    requests()  # refuses what does not fit before anything is read
    served = config.streams // plan.workers
    early = plan.loaders * AHEAD
    reach = Reach("train", config.remote.ahead, served, plan.workers, config.window, early)
    wanted = fetched_ahead(requests, shards, reach)
    return load(Micros(shards, "train", _shape(config), plan.seed, recipes), wanted, plan.loaders)


def _train_requests(shards: Shards, config: ShardsConfig, plan: ReadPlan, start: int) -> Iterator[Micro]:
    order = order_of(shards, config, plan)
    return _cut(order, order.share(plan.rank, plan.workers), plan, plan.micro, start)


def _cut(order: Streams, slots: np.ndarray, plan: ReadPlan, micro: int, start: int) -> Iterator[Micro]:
    for number in range(start, plan.epochs * order.steps):
        epoch, step = divmod(number, order.steps)
        samples = order.part(epoch, step, plan.rank, plan.workers)
        for i in range(0, len(slots), micro):
            part = slice(i, i + micro)
            yield Micro(epoch, step * order.batch + slots[part], samples[part])


def eval_batches(
    shards: Shards,
    config: ShardsConfig,
    split: str,
    batch: int,
    world: World,
    *,
    loaders: int = 0,
    numbers: Sequence[int] | np.ndarray | None = None,
) -> Iterator[Batch]:
    """Every sample of a split once over all ranks, the same number of batches on each.

    `batch` is that of all ranks together, rounded up to their number. Empty slots at the end have a
    black image, weight 0, label -1 and no key. `numbers`: only these samples, in this order.
    """
    check_classes(config, shards)
    count = sum(info.count for info in shards.split(split))
    picked = np.arange(count) if numbers is None else np.asarray(numbers, dtype=np.int64)
    slots = exact(len(picked), batch, world.size, world.rank)
    table = np.where(slots < 0, -1, picked[slots])
    recipes = [Recipe(View("eval", config.image_size), None)]
    reach = Reach(split, config.remote.ahead, 1, world.size, early=loaders * AHEAD)
    wanted = fetched_ahead(lambda: (Micro(0, row, row) for row in table), shards, reach)
    return load(Micros(shards, split, _shape(config), 0, recipes), wanted, loaders)


def _shape(config: ShardsConfig) -> Shape:
    return Shape(config.channels, config.max_pixels)

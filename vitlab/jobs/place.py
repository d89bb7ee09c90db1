"""Where a job reads and writes, and how its images reach the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vitlab.batch import Batch
from vitlab.data import Named, ReadPlan, Shards, ShardsConfig, draw_lots, mixed, normalisation, open_named
from vitlab.data.images.on_device import paint_on_device
from vitlab.dist import World
from vitlab.tracking import Store, TrackingConfig


@dataclass(frozen=True)
class Place:
    """Where a job reads and writes."""

    home: Path
    tracking: TrackingConfig
    run_id: str
    shards: Named
    data: ShardsConfig
    loaders: int

    def store(self) -> Store:
        return Store(self.tracking, self.home)

    def open(self) -> Shards:
        return open_named(self.shards, self.data)


def mover(data: ShardsConfig, world: World, read: ReadPlan | None = None) -> Callable[[Batch], Batch]:
    """What puts a batch on this worker's device, normalised; one of `read`, for training, painted and mixed
    there if the plan says so."""
    mean, std = (t.to(world.device) for t in normalisation(data))
    if read is None:
        return lambda batch: batch.to(world.device, mean, std)
    augment, paint = read.augment, paint_on_device(read.augment, read.views)

    def move(batch: Batch) -> Batch:
        moved = batch.on(world.device)
        moved = replace(moved, views=paint(moved.views, moved.seeds)).normalised(mean, std)
        return mixed(moved, draw_lots(batch, augment, read.batch // data.streams)) if augment.mixes else moved

    return move


def preprocess(data: ShardsConfig) -> dict[str, Any]:
    """What a model needs to know to be given images as it was trained on them."""
    mean, std = (t.flatten().tolist() for t in normalisation(data))
    return {"image_size": data.image_size, "channels": data.channels, "mean": mean, "std": std}

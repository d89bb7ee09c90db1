"""Where a job reads and writes, and how its images reach the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitlab.batch import Batch
from vitlab.data import AugmentConfig, Shards, ShardsConfig, draw_lots, mixed, normalisation, open_shards
from vitlab.dist import World
from vitlab.tracking import Store, TrackingConfig


@dataclass(frozen=True)
class Place:
    """Where a job reads and writes."""

    home: Path
    tracking: TrackingConfig
    run_id: str
    shards: Path
    data: ShardsConfig
    loaders: int

    def store(self) -> Store:
        return Store(self.tracking, self.home)

    def open(self) -> Shards:
        return open_shards(self.shards, self.data.max_bad)


def mover(
    data: ShardsConfig, world: World, augment: AugmentConfig | None = None, batch_size: int = 0
) -> Callable[[Batch], Batch]:
    """What puts a batch on this worker's device, normalised; of a training batch, images mixed if asked."""
    mean, std = (t.to(world.device) for t in normalisation(data))
    if augment is None or not augment.mixes:
        return lambda batch: batch.to(world.device, mean, std)
    group = batch_size // data.streams
    return lambda batch: mixed(batch.to(world.device, mean, std), draw_lots(batch, augment, group))


def preprocess(data: ShardsConfig) -> dict[str, Any]:
    """What a model needs to know to be given images as it was trained on them."""
    mean, std = (t.flatten().tolist() for t in normalisation(data))
    return {"image_size": data.image_size, "channels": data.channels, "mean": mean, "std": std}

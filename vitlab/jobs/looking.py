"""What a stage's augmentation makes of its first images, for a person to look at before it has trained."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from vitlab.data import ReadPlan, Shards, train_batches
from vitlab.dist import World
from vitlab.evaluation.pictures import augmentation_figure, save_figure
from vitlab.jobs.place import Place, mover

ROWS = 6  # images in the picture


def log_views(place: Place, title: str, shards: Shards, read: ReadPlan, world: World) -> None:
    """`pictures/augmentation.png` in the stage's run: the first images, each in all its views."""
    few = replace(read, loaders=0, accumulate=_cut(read, place.data.streams))
    batch = mover(place.data, world, read)(next(train_batches(shards, place.data, few)))
    views = {view.name: batch.pixels(i)[:ROWS] for i, view in enumerate(read.views)}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "pictures"
        save_figure(augmentation_figure(views, title), folder / "augmentation.png")
        place.store().upload(place.run_id, folder, "pictures")


def _cut(read: ReadPlan, streams: int) -> int:
    """Into how many micro-batches, that no more images are made than are shown, or than are mixed as one."""
    each, group = read.batch // read.workers, read.batch // streams if read.augment.mixes else 1
    sizes = (each // n for n in range(each, 0, -1) if each % n == 0)
    return each // next(size for size in sizes if size >= min(ROWS, each) and size % group == 0)

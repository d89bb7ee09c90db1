"""Images for a person to look at before anything has trained: the data, and what augmentation makes of it."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from vitlab.data import ReadPlan, Shards, examples, sets_of, train_batches
from vitlab.dist import World
from vitlab.evaluation.data_pictures import contact_sheet
from vitlab.evaluation.pictures import augmentation_figure, save_figure
from vitlab.home import locked
from vitlab.jobs.place import Place, mover
from vitlab.tracking import Store

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


def log_data(store: Store, run_id: str, shards: Shards, folder: Path) -> None:
    """The digest and `pictures/data.png`, some images of some classes, in the pipeline's run.

    It is drawn once for the same data, and not of shards at a URL, which would be fetched for it alone.
    """
    store.tag(run_id, {"vitlab.data_digest": shards.digest})
    if any(part.cache is not None for part in sets_of(shards)):
        return
    with locked(folder / f"{shards.digest[:16]}.lock"):
        drawn = folder / shards.digest[:16] / "data.png"
        if not drawn.is_file():
            images, labels = examples(shards)
            part = drawn.with_name("partial.png")
            save_figure(contact_sheet(images, labels, shards.classes, f"{shards.counted} images"), part)
            part.replace(drawn)
        store.upload_file(run_id, drawn, "pictures")

"""`vitlab bench data`: from image files to batches that a model can take, against what else people use.

All sides read the same JPEG files (see photos.py) from the page cache and deliver the same thing: batches of
a random crop, scaled to a square and perhaps mirrored, as normalised floats. `vitlab` does so from shards,
`torchvision` from a folder, `webdataset` from the same shards, `datasets` from its Arrow files, each as its
documentation shows. What they deliver is compared before anything is timed. The floor below all of them is
`simplejpeg`, which decodes whole files that lie in memory and does nothing else.

One core: one thread, each side in a process of its own (turns.py). Loader processes are measured by
loaders.py. A first batch from the middle of an epoch is asked of as many images as ImageNet has: the same
tars, named again and again.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitlab.batch import View
from vitlab.bench.loaders import Start, grown
from vitlab.bench.photos import photos
from vitlab.bench.report import Row
from vitlab.bench.turns import Turns, apart, in_turns
from vitlab.config import UserError
from vitlab.data import (
    AugmentConfig,
    ReadPlan,
    Shards,
    ShardsConfig,
    WriteOptions,
    folder,
    normalisation,
    open_shards,
    order_of,
    train_batches,
    write_shards,
)

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # ImageNet's
CROP = [0.08, 1.0]
CLASSES = 10
TARS = 4
IMAGENET = 1_281_167
EPOCHS = 1_000_000  # as good as endless
TARGETS = {"torchvision": 0.5, "webdataset": 0.67, "simplejpeg": 1 / 0.7}  # ratios: at most
FIRST = 2.0  # seconds to a first batch: at most
Endless = Generator[Tensor, None, None]
APART = 6.0  # how far two sides' means and spreads may be apart, over the root of the number of images


@dataclass(frozen=True)
class DataOptions:
    images: int = 512
    batch: int = 64
    image_size: int = 224
    rounds: int = 5
    loaders: tuple[int, ...] = (0, 1, 2)

    @property
    def steps(self) -> int:
        """Whole batches of the images."""
        return self.images // self.batch


def bench_data(options: DataOptions, say: Callable[[str], None] = lambda text: None) -> list[Row]:
    """Rows of one core, of loader processes and of the first batch; `say` hears what is being done."""
    for key in ("batch", "image_size", "rounds"):
        if getattr(options, key) < 1:
            raise UserError(f"bench data: {key}: given {getattr(options, key)}; allowed: 1 or more")
    if options.images < options.batch:
        raise UserError(
            f"bench data: images: given {options.images}; allowed: a batch, {options.batch}, or more"
        )
    if min(options.loaders, default=0) < 0:
        raise UserError(f"bench data: loaders: given {min(options.loaders)}; allowed: 0 or more")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory(prefix="vitlab-bench-") as place:
            return list(_rows(Path(place), options, say))
    finally:
        torch.set_num_threads(threads)


def _rows(place: Path, options: DataOptions, say: Callable[[str], None]) -> Iterator[Row]:
    say(f"writing {options.images} photographs, as files, tars and Arrow")
    size = write(place, options.images)
    yield from _one_core(place, options, size, say)
    starts: list[Start] = [partial(side, place, options) for side in (vitlab_side, torchvision_side)]
    rounds = max(1, options.rounds // 2)
    yield from grown(starts, f"torchvision {version('torchvision')}", options, rounds, say)
    say("the first batch")
    yield _first(place, options)


def write(place: Path, count: int) -> float:
    """The same files as a folder, as shards and as a dataset of `datasets`; their mean size in bytes."""
    for number in range(CLASSES):
        (place / "images" / f"class-{number}").mkdir(parents=True)
    rows: dict[str, list[Any]] = {"image": [], "label": []}
    total = 0
    for i, data in enumerate(photos(count)):
        (place / "images" / f"class-{i % CLASSES}" / f"{i:06d}.jpg").write_bytes(data)
        rows["image"].append({"bytes": data, "path": None})
        rows["label"].append(i % CLASSES)
        total += len(data)
    each = math.ceil(count / TARS)
    how = WriteOptions(held_out=0.0, val=0.0, shard_samples=each)
    write_shards(folder(place / "images"), place / "shards", how)
    _save(rows, place / "arrow")
    return total / count


def _save(rows: dict[str, list[Any]], dest: Path) -> None:
    import datasets

    shown = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=CLASSES)}
        datasets.Dataset.from_dict(rows, datasets.Features(kinds)).save_to_disk(dest)
    finally:
        if shown:
            datasets.enable_progress_bars()


# ---------------------------------------------------------------- the sides: batches without an end


def vitlab_side(place: Path, options: DataOptions, loaders: int = 0) -> Endless:
    shards, config = _shards(place, options)
    mean, std = normalisation(config)
    for batch in train_batches(shards, config, _plan(options, loaders)):
        yield batch.to(torch.device("cpu"), mean, std).views[0]


def _shards(place: Path, options: DataOptions) -> tuple[Shards, ShardsConfig]:
    path = place / "shards"
    config = ShardsConfig(
        path=str(path),
        image_size=options.image_size,
        streams=math.gcd(8, options.batch),
        mean=MEAN,
        std=STD,
    )
    return open_shards(path), config


def _plan(options: DataOptions, loaders: int) -> ReadPlan:
    augment = AugmentConfig(crop_scale=CROP, flip=True)
    views = [View("crop", options.image_size)]
    return ReadPlan(views, options.batch, EPOCHS, loaders=loaders, augment=augment)


def torchvision_side(place: Path, options: DataOptions, loaders: int = 0) -> Endless:
    """One epoch after another without a pause between them, which loader processes would otherwise make."""
    from torch.utils.data import DataLoader, RandomSampler
    from torchvision.datasets import ImageFolder

    dataset = ImageFolder(place / "images", _transform(options.image_size))
    endless = RandomSampler(dataset, num_samples=EPOCHS * len(dataset))
    for images, _ in DataLoader(dataset, options.batch, sampler=endless, num_workers=loaders):
        yield images


def webdataset_side(place: Path, options: DataOptions) -> Endless:
    import webdataset

    tars = [str(tar) for tar in sorted((place / "shards").glob("*.tar"))]
    dataset = (
        webdataset.WebDataset(tars, shardshuffle=len(tars))
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg", "cls")
        .map_tuple(_transform(options.image_size), int)
        .batched(options.batch, partial=False)
    )
    while True:
        for images, _ in dataset:
            yield images


def datasets_side(place: Path, options: DataOptions) -> Endless:
    import datasets
    from torch.utils.data import DataLoader

    transform = _transform(options.image_size)

    def ready(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        rows["image"] = [transform(image.convert("RGB")) for image in rows["image"]]
        return rows

    dataset = datasets.load_from_disk(str(place / "arrow"))
    dataset.set_transform(ready)
    loader: Any = DataLoader(dataset, options.batch, shuffle=True, drop_last=True)
    while True:
        for rows in loader:
            yield rows["image"]


def decoded(place: Path, options: DataOptions) -> Iterator[None]:
    """Whole files that lie in memory, decoded and thrown away, a batch at a time."""
    import simplejpeg

    files = [file.read_bytes() for file in sorted((place / "images").rglob("*.jpg"))]
    while True:
        for i in range(0, options.steps * options.batch, options.batch):
            for data in files[i : i + options.batch]:
                simplejpeg.decode_jpeg(data)
            yield


def _transform(size: int) -> Any:
    from torchvision import transforms as t

    steps = [
        t.RandomResizedCrop(size, tuple(CROP)),
        t.RandomHorizontalFlip(),
        t.ToTensor(),
        t.Normalize(MEAN, STD),
    ]
    return t.Compose(steps)


# ---------------------------------------------------------------- one core


def _one_core(place: Path, options: DataOptions, size: float, say: Callable[[str], None]) -> Iterator[Row]:
    say("comparing what the sides deliver")
    sides = {
        "vitlab": vitlab_side,
        "torchvision": torchvision_side,
        "webdataset": webdataset_side,
        "datasets": datasets_side,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves tars to the garbage collector
        alike({name: side(place, options) for name, side in sides.items()}, options)
    say("one core: a process for each side")
    starts = {name: partial(side, place, options) for name, side in (*sides.items(), ("simplejpeg", decoded))}
    with apart(starts, options.steps) as turns:
        found = in_turns(turns, Turns(options.rounds, options.steps, options.batch), say)
    ours = found.pop("vitlab")
    for name, theirs in found.items():
        more = {"images/s": 1 / ours, "MB/s": size / ours / 1e6}
        more |= {"theirs images/s": 1 / theirs, "theirs MB/s": size / theirs / 1e6, "file kB": size / 1e3}
        more |= {"target ratio": TARGETS[name]} if name in TARGETS else {}
        what = "decoding alone" if name == "simplejpeg" else "image, one core"
        ratio = ours / theirs
        yield Row(
            what, f"{name} {version(name)}", 1e3 * ours, 1e3 * theirs, "ms", ratio, options.rounds, more
        )


def alike(sides: Mapping[str, Iterator[Tensor]], options: DataOptions) -> None:
    """Else different things would be timed."""
    shape = (options.batch, 3, options.image_size, options.image_size)
    wanted: Tensor | None = None
    for name, batches in sides.items():
        figures = []
        for batch in islice(batches, options.steps):
            if batch.shape != shape or batch.dtype != torch.float32:
                raise RuntimeError(
                    f"{name}: delivers {batch.dtype} {tuple(batch.shape)}, not float32 {shape}"
                )
            figures.append(torch.stack([batch.mean((0, 2, 3)), batch.std((0, 2, 3))]))
        figure = torch.stack(figures).mean(0)  # mean and spread of each colour
        wanted = figure if wanted is None else wanted
        if (figure - wanted).abs().max() > APART / math.sqrt(options.images):
            raise RuntimeError(
                f"{name}: means and spreads of the colours are {figure}, of the first {wanted}"
            )


# ---------------------------------------------------------------- the first batch


def _first(place: Path, options: DataOptions) -> Row:
    """Half-way and from the start: nothing is read that is not needed."""
    shards, config = _shards(place, options)
    many = replace(shards, splits={"train": shards.split("train") * math.ceil(IMAGENET / options.images)})
    plan = _plan(options, 0)
    half = order_of(many, config, plan).steps // 2

    def seconds(step: int) -> float:
        begin = time.perf_counter()
        next(train_batches(many, config, plan, start_step=step))
        return time.perf_counter() - begin

    pairs = [(seconds(half), seconds(0)) for _ in range(options.rounds)]
    ours, theirs = (statistics.median(times) for times in zip(*pairs, strict=True))
    more = {"images": float(many.count("train")), "step": float(half), "target s": FIRST}
    return Row("start half-way", "from step 0", ours, theirs, "s", ours / theirs, options.rounds, more)

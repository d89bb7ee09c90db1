"""Shards to batches: every sample decoded and augmented from what it is and where it stands.

A worker asks for the slots of its streams, step by step; a loader process gets (epoch, slots, sample
numbers) and needs nothing else. So the batches are the same bits with any number of loaders, on any
number of workers, and from any step on.

Loader processes come from a fork server that has torch loaded already and no threads or devices of
ours. They live for the whole stage: the sampler runs across epochs, nothing stops at their borders.
A killed parent cannot stop them (the fork server outlives it as long as they do, and they it), so each
watches the pipe to its parent and ends when that closes.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vitlab.batch import Batch, View, sample_seeds
from vitlab.config import UserError
from vitlab.data.augment import Transform, eval_transform, train_transform
from vitlab.data.index import ShardInfo, Shards
from vitlab.data.order import Order, exact
from vitlab.data.recipes import AugmentConfig
from vitlab.data.settings import ShardsConfig, check_classes
from vitlab.data.tars import NO_LABEL, Columns, read_member
from vitlab.dist import World

OPEN_TARS = 64  # at most so many stay open in one process
MODES = {1: "L", 3: "RGB"}


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


class Micro(NamedTuple):
    """The request for one micro-batch. Samples of -1 are empty slots."""

    epoch: int
    positions: np.ndarray  # places in the epoch's order, for the random numbers
    samples: np.ndarray


class Parts(NamedTuple):
    """A `Batch` in a form that the loader's pinning thread knows how to walk through."""

    views: list[Tensor]
    labels: Tensor
    weight: Tensor
    seeds: Tensor
    keys: list[str]


# ---------------------------------------------------------------- one sample


def decode(data: bytes, channels: int) -> Tensor:
    """The bytes of an image file → uint8 C H W, upright."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    if image.mode.startswith("I"):  # 16 bits: Pillow's own conversion would cut all above 255 off
        image = Image.fromarray((np.asarray(image).astype(np.float64) / 257).round().astype(np.uint8))
    image = image.convert(MODES[channels])
    pixels = torch.from_numpy(np.array(image))
    return pixels[None] if channels == 1 else pixels.permute(2, 0, 1).contiguous()


class _Tar(NamedTuple):
    fd: int
    columns: Columns


class Reader:
    """Samples of a split by number. Keeps the tars that were read last open."""

    def __init__(self, shards: Shards, split: str) -> None:
        self.shards, self.infos = shards, shards.split(split)
        self.ends = np.cumsum([info.count for info in self.infos])
        self.tars: OrderedDict[int, _Tar] = OrderedDict()

    def __del__(self) -> None:
        for tar in self.tars.values():
            os.close(tar.fd)

    def read(self, number: int, channels: int) -> tuple[Tensor, int, str]:
        """Sample number → image, label, key."""
        shard = int(np.searchsorted(self.ends, number, side="right"))
        fd, columns = self._open(shard)
        info = self.infos[shard]
        row = number - (int(self.ends[shard]) - info.count)
        data = read_member(fd, columns.offsets[row], columns.sizes[row])
        try:
            image = decode(data, channels)
        except Exception as error:  # decoders raise anything on broken data; it becomes one named line
            raise _broken(self.shards, info, columns.keys[row], error) from error
        return image, columns.labels[row], columns.keys[row]

    def _open(self, shard: int) -> _Tar:
        if shard in self.tars:
            self.tars.move_to_end(shard)
            return self.tars[shard]
        while len(self.tars) >= OPEN_TARS:
            os.close(self.tars.popitem(last=False)[1].fd)
        info = self.infos[shard]
        columns = self.shards.columns(info)
        self.tars[shard] = _Tar(os.open(self.shards.path / info.file, os.O_RDONLY), columns)
        return self.tars[shard]


def _broken(shards: Shards, info: ShardInfo, key: str, error: Exception) -> UserError:
    path = shards.path / info.file
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return UserError(
        f"{path}: sample {key} cannot be decoded: {reason}; copy the shard again or write it without"
    )


# ---------------------------------------------------------------- many samples


class Micros(Dataset[Any]):
    """Request → parts of a batch. Travels to loader processes; opens files only where it is used."""

    def __init__(
        self, shards: Shards, split: str, channels: int, seed: int, recipes: Sequence[_Recipe]
    ) -> None:
        self.shards, self.split, self.channels, self.seed, self.recipes = (
            shards,
            split,
            channels,
            seed,
            recipes,
        )
        self.reader: Reader | None = None
        self.transforms: list[Transform] = []

    def __getitem__(self, request: Micro) -> Parts | UserError:
        """An error is handed over, not raised: on its way between processes it would grow to many lines."""
        try:
            return self._build(request)
        except UserError as error:
            return error

    def _build(self, request: Micro) -> Parts:
        if self.reader is None:
            self.reader = Reader(self.shards, self.split)
            self.transforms = [recipe.transform() for recipe in self.recipes]
        seeds = torch.from_numpy(sample_seeds(self.seed, request.epoch, request.positions))
        rows = [self._sample(number) for number in request.samples.tolist()]
        images, labels, keys = zip(*rows, strict=True)
        weight = torch.from_numpy((request.samples >= 0).astype(np.float32))
        views = [transform(images, seeds) for transform in self.transforms]
        return Parts(views, torch.tensor(labels), weight, seeds, list(keys))

    def _sample(self, number: int) -> tuple[Tensor, int, str]:
        if number < 0:
            side = self.recipes[0].view.size
            return torch.zeros((self.channels, side, side), dtype=torch.uint8), NO_LABEL, ""
        assert self.reader is not None
        return self.reader.read(number, self.channels)


class _Recipe(NamedTuple):
    """What makes a view, as plain data: closures cannot travel to another process."""

    view: View
    augment: AugmentConfig | None
    largest: int = 0  # side of the largest view beside it

    def transform(self) -> Transform:
        if self.augment is None:
            return eval_transform(self.view.size)
        return train_transform(self.augment, self.view, self.largest)


def order_of(shards: Shards, config: ShardsConfig, plan: ReadPlan) -> Order:
    """The order in which a plan reads the training split; its `steps` are those of one epoch."""
    sizes = tuple(info.count for info in shards.split("train"))
    return Order(sizes, config.streams, plan.batch, plan.seed, config.window)


def train_batches(
    shards: Shards, config: ShardsConfig, plan: ReadPlan, *, start_step: int = 0
) -> Iterator[Batch]:
    """This worker's micro-batches, `accumulate` for every step, from a step on to the last epoch's end."""
    check_classes(config, shards)
    order = order_of(shards, config, plan)
    requests = _train_requests(
        order, order.share(plan.rank, plan.workers), plan.micro, plan.epochs, start_step
    )
    names, largest = [view.name for view in plan.views], max(view.size for view in plan.views)
    for name in plan.augment.unknown_views(names):
        raise UserError(f"augment.views: given {name!r}; the method has {', '.join(names)}")
    recipes = [_Recipe(View(*view), plan.augment, largest) for view in plan.views]
    return _run(Micros(shards, "train", config.channels, plan.seed, recipes), requests, plan.loaders)


def _train_requests(order: Order, slots: np.ndarray, micro: int, epochs: int, start: int) -> Iterator[Micro]:
    for number in range(start, epochs * order.steps):
        epoch, step = divmod(number, order.steps)
        samples = order.batch_indices(epoch, step)[slots]
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
    recipes = [_Recipe(View("eval", config.image_size), None)]
    dataset = Micros(shards, split, config.channels, 0, recipes)
    return _run(dataset, (Micro(0, row, row) for row in table), loaders)


# ---------------------------------------------------------------- processes


def _run(dataset: Micros, requests: Iterator[Micro], loaders: int) -> Iterator[Batch]:
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_size=None,  # a request is a whole micro-batch already
        sampler=_Requests(requests),
        collate_fn=_as_it_is,
        num_workers=loaders,
        worker_init_fn=_watch_parent if loaders else None,
        multiprocessing_context=_fork_server() if loaders else None,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # or it would draw from the process's own
    )
    return _batches(loader)


def _batches(loader: DataLoader[Any]) -> Iterator[Batch]:
    for parts in loader:
        if isinstance(parts, UserError):
            raise parts
        yield Batch(*parts)


class _Requests:
    """An iterable of no stated length, as the loader wants its sampler."""

    def __init__(self, requests: Iterator[Micro]) -> None:
        self.requests = requests

    def __iter__(self) -> Iterator[Micro]:
        return self.requests


def _as_it_is(parts: Any) -> Any:
    return parts


def _fork_server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torchvision.transforms.v2"])
    return context


def _watch_parent(number: int) -> None:
    """Runs in a new loader process: end at once when the process that wanted it is gone."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)

"""Requests for micro-batches to batches, in this process or in loader processes.

A loader process gets (epoch, positions, sample numbers) and needs nothing else, so the batches are the same
bits with any number of loaders. At most two micro-batches a loader process are ready or in the making: that,
and the image that is being decoded, bounds the memory.

Loader processes come from a fork server that has torch loaded already and no threads or devices of
ours. They live for the whole stage: the sampler runs across epochs, nothing stops at their borders.
A killed parent cannot stop them (the fork server outlives it as long as they do, and they it), so each
watches the pipe to its parent and ends when that closes.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Iterator, Sequence
from multiprocessing.connection import wait
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vitlab.batch import Bad, Batch, View, sample_seeds
from vitlab.config import UserError
from vitlab.data.images.augment import Transform, eval_transform, train_transform
from vitlab.data.images.recipes import AugmentConfig
from vitlab.data.images.views import make_views
from vitlab.data.reading.fetching import Micro
from vitlab.data.reading.reader import EMPTY, Reader, Stored
from vitlab.data.shards.index import Shards
from vitlab.data.shards.tars import NO_LABEL

AHEAD = 2  # micro-batches that a loader process has ready or in the making


class Parts(NamedTuple):
    """A `Batch` in a form that the loader's pinning thread knows how to walk through."""

    views: list[Tensor]
    labels: Tensor
    weight: Tensor
    seeds: Tensor
    keys: list[str]
    bad: list[Bad]


class Recipe(NamedTuple):
    """What makes a view, as plain data: closures cannot travel to another process."""

    view: View
    augment: AugmentConfig | None
    largest: int = 0  # side of the largest view beside it

    def transform(self) -> Transform:
        if self.augment is None:
            return eval_transform(self.view.size)
        return train_transform(self.augment, self.view, self.largest)


class Shape(NamedTuple):
    """How images are decoded."""

    channels: int
    max_pixels: int


class Micros(Dataset[Any]):
    """Request → parts of a batch. Travels to loader processes; opens files only where it is used."""

    def __init__(
        self, shards: Shards, split: str, shape: Shape, seed: int, recipes: Sequence[Recipe]
    ) -> None:
        self.shards, self.split, self.shape, self.seed, self.recipes = shards, split, shape, seed, recipes
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
        raws: list[Stored] = []
        files = _read(self.reader, request.samples.tolist(), raws)
        views, wrong = make_views(files, seeds, self.transforms, *self.shape)
        self.reader.release()
        bad = [_named(raw, error) for raw, error in zip(raws, wrong, strict=True)]
        real = [raw.data is not None and error is None for raw, error in zip(raws, wrong, strict=True)]
        labels = [raw.label if there else NO_LABEL for raw, there in zip(raws, real, strict=True)]
        return Parts(
            views,
            torch.tensor(labels),
            torch.tensor(real, dtype=torch.float32),
            seeds,
            [raw.key for raw in raws],
            [one for one in bad if one is not None],
        )


def _read(reader: Reader, numbers: list[int], seen: list[Stored]) -> Iterator[bytes | None]:
    """One file after another: those of a batch never lie in memory together. `seen` keeps none."""
    for number in numbers:
        raw = EMPTY if number < 0 else reader.read(number)
        seen.append(raw if raw.data is None else raw._replace(data=b""))
        yield raw.data


def _named(raw: Stored, error: Any) -> Bad | None:
    return Bad(error.kind, raw.shard, raw.key, error.reason) if error is not None else raw.bad


# ---------------------------------------------------------------- processes


def load(dataset: Micros, requests: Iterator[Micro], loaders: int) -> Iterator[Batch]:
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_size=None,  # a request is a whole micro-batch already
        sampler=_Requests(requests),
        collate_fn=_as_it_is,
        num_workers=loaders,
        prefetch_factor=AHEAD if loaders else None,
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

"""Small images, shards and comparisons for the tests of this room."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vitlab.batch import Batch, View
from vitlab.data import Raw, ReadPlan, Shards, ShardsConfig, Source, WriteOptions, write_shards
from vitlab.data.images import augment
from vitlab.data.images.decode import Box, Region
from vitlab.data.making.sources import png

VIEWS = (View("one", 8), View("two", 6))


def images(n: int, seed: int = 0, channels: int = 1) -> list[np.ndarray]:
    shape = (n, 8, 8) if channels == 1 else (n, 8, 8, channels)
    return list(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def photo(channels: int = 3, side: int = 64) -> Tensor:
    """A part of a real photograph, uint8 C H W: colours that lie beside one another as colours do."""
    from sklearn.datasets import load_sample_image
    from torchvision.transforms.v2 import functional as F

    whole = torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1).contiguous()
    part = F.resized_crop(whole, 60, 100, 300, 300, [side, side], antialias=True)
    return F.rgb_to_grayscale(part, 1) if channels == 1 else part


def source(pictures: Iterable[np.ndarray], classes: int = 3) -> Source:
    made = [png(x) for x in pictures]

    def samples(start: int) -> Iterator[Raw]:
        for i in range(start, len(made)):
            yield Raw(f"s{i:04d}", i % classes, lambda i=i: made[i])  # type: ignore[misc]

    return Source("test", samples, [str(i) for i in range(classes)], len(made), str(len(made)))


def shards(dest: Path, n: int = 100, size: int = 16) -> Shards:
    return write_shards(source(images(n)), dest, WriteOptions(shard_samples=size))


def config(path: Path, **more: object) -> ShardsConfig:
    return ShardsConfig(
        **{"path": str(path), "image_size": 8, "channels": 1, "streams": 4, "window": 8} | more
    )


def plan(**more: object) -> ReadPlan:
    return ReadPlan(**{"views": VIEWS, "batch": 16, "epochs": 2, "seed": 3} | more)


def same(a: Batch, b: Batch) -> bool:
    tensors = [*zip(a.views, b.views, strict=True)]
    tensors += [(a.labels, b.labels), (a.weight, b.weight), (a.seeds, b.seeds)]
    return a.keys == b.keys and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in tensors)


def all_same(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(map(same, a, b))


def stored(made: Shards, split: str) -> list[tuple[str, bytes, int]]:
    """Key, bytes and label of every sample, as they lie on disk."""
    found = []
    for info in made.splits[split]:
        columns, data = made.columns(info), (made.path / info.file).read_bytes()
        places = zip(columns.keys, columns.offsets, columns.sizes, columns.labels, strict=True)
        found += [(key, data[offset : offset + size], label) for key, offset, size, label in places]
    return found


def raw_tar(path: Path, members: Iterable[tuple[str, bytes]], fmt: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=fmt) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def one_line(error: BaseException) -> str:
    text = str(error)
    assert text
    assert "\n" not in text
    return text


def region_of(image: Tensor, top: int = 0, left: int = 0, scale: int = 1) -> Region:
    """Of an image C H W, as its memory lies."""
    return Region(image.permute(1, 2, 0).numpy(), top, left, scale)


def resampled(region: Region, box: Box, how: str) -> Tensor:
    """C rows columns."""
    return torch.from_numpy(augment.resampled(region, box, how)).permute(2, 0, 1)

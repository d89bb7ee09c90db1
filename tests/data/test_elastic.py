"""Whoever reads, with any loaders, stopped and begun anew anywhere: the batches are the same, bit for bit."""

from __future__ import annotations

import itertools
import random
import shutil
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from samples import config, images, shards, source

from vitlab.batch import Batch, View
from vitlab.config import UserError
from vitlab.data import (
    AugmentConfig,
    ReadPlan,
    Shards,
    ShardsConfig,
    WriteOptions,
    eval_batches,
    named,
    open_named,
    open_shards,
    order_of,
    train_batches,
    write_shards,
)
from vitlab.data.reading.blend import blend, sets_of
from vitlab.dist import World

EPOCHS = 3
AUGMENT = AugmentConfig(crop_scale=[0.5, 1.0], flip=True)


class Slot(NamedTuple):
    """A sample in its place of a global batch: which, as what, and what the model is shown."""

    key: str
    label: int
    weight: float
    seed: int
    pixels: int  # their checksum


class Stint(NamedTuple):
    """A part of a run: up to a step, by so many workers with so many loader processes each."""

    stop: int
    workers: int
    loaders: int


def plan_of(stint: Stint, rank: int) -> ReadPlan:
    views = [View("image", 8)]
    return ReadPlan(views, 16, EPOCHS, 3, rank, stint.workers, loaders=stint.loaders, augment=AUGMENT)


def steps_of(made: Shards, settings: ShardsConfig) -> int:
    return EPOCHS * order_of(made, settings, plan_of(Stint(0, 1, 0), 0)).steps


def read(made: Shards, settings: ShardsConfig, stints: Iterable[Stint]) -> list[list[Slot]]:
    """The global batches of a run, each put together in the order of its slots."""
    run: list[list[Slot]] = []
    for stint in stints:
        start = len(run)
        table: list[list[Any]] = [[None] * 16 for _ in range(start, stint.stop)]
        for rank in range(stint.workers):
            plan = plan_of(stint, rank)
            share = order_of(made, settings, plan).share(rank, stint.workers)
            batches = train_batches(made, settings, plan, start_step=start)
            for row, batch in zip(table, batches, strict=False):
                for place, slot in zip(share, slots(batch), strict=True):
                    assert row[place] is None
                    row[place] = slot
            if stint.stop == steps_of(made, settings):
                assert list(batches) == [], "reading goes on after the last epoch"
        assert all(slot is not None for row in table for slot in row), "a worker had no work"
        run += table
    return run


def slots(batch: Batch) -> Iterator[Slot]:
    pixels = [zlib.crc32(image.numpy().tobytes()) for image in batch.views[0]]
    columns = (batch.keys, batch.labels.tolist(), batch.weight.tolist(), batch.seeds.tolist(), pixels)
    return itertools.starmap(Slot, zip(*columns, strict=True))


def check_elastic(made: Shards, settings: ShardsConfig, loaders: Iterable[int] = (0, 1, 3)) -> None:
    """Epochs read by 1, 2 and 4 workers with some loaders each are the same, bit for bit."""
    last = steps_of(made, settings)
    whole = read(made, settings, [Stint(last, 1, 0)])
    assert len(whole) == last
    for workers, each in itertools.product((1, 2, 4), loaders):
        assert read(made, settings, [Stint(last, workers, each)]) == whole, (
            f"{workers} workers, {each} loaders"
        )


def check_schedules(made: Shards, settings: ShardsConfig, schedules: int, seed: int = 0) -> None:
    """Runs stopped at random steps and continued by others are the undisturbed one."""
    last = steps_of(made, settings)
    whole = read(made, settings, [Stint(last, 1, 0)])
    rng = random.Random(seed)
    for number in range(schedules):
        stops = [*sorted(rng.sample(range(1, last), rng.randint(1, 4))), last]
        stints = [Stint(stop, rng.choice((1, 2, 4)), int(rng.random() < 0.1)) for stop in stops]
        assert read(made, settings, stints) == whole, f"schedule {number}: {stints}"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return shards(tmp_path_factory.mktemp("data") / "a", n=94, size=9)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more of them than cores
def test_any_workers_and_loaders(made: Shards) -> None:
    settings = config(made.path)
    assert steps_of(made, settings) == 12
    assert made.count("train") % 16, "an epoch leaves some out"
    check_elastic(made, settings)


def test_stopped_on_two_workers_gone_on_with_on_four_finished_on_one(made: Shards) -> None:
    settings = config(made.path)
    last = steps_of(made, settings)
    first, second = sorted(random.Random(7).sample(range(1, last), 2))
    whole = read(made, settings, [Stint(last, 1, 0)])
    stints = [Stint(first, 2, 1), Stint(second, 4, 0), Stint(last, 1, 1)]
    assert read(made, settings, stints) == whole


def test_twenty_random_schedules(made: Shards) -> None:
    check_schedules(made, config(made.path), 20)


def test_what_is_compared_differs_where_it_should(made: Shards) -> None:
    """Keys come once an epoch; another epoch shows the same samples in another order and other crops."""
    settings = config(made.path)
    whole = read(made, settings, [Stint(12, 1, 0)])
    epochs = np.array([[slot.key for slot in row] for row in whole]).reshape(EPOCHS, -1)
    assert all(len(set(epoch)) == 64 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == EPOCHS
    assert len({slot.seed for row in whole for slot in row}) == 12 * 16
    shown: dict[str, set[int]] = {}
    for slot in itertools.chain(*whole):
        shown.setdefault(slot.key, set()).add(slot.pixels)
    assert np.mean([len(crops) for crops in shown.values()]) > 2


@pytest.fixture(scope="module")
def both(made: Shards, tmp_path_factory: pytest.TempPathFactory) -> Shards:
    """Twice as much of a set that is half as large, and has a class more, numbered before the others."""
    pictures = source(images(40, seed=5), classes=4)
    options = WriteOptions(shard_samples=9)
    other = write_shards(
        replace(pictures, classes=["new", "2", "1", "0"]), tmp_path_factory.mktemp("b") / "b", options
    )
    return blend([made, other], [1, 2])


def test_a_blend_is_as_elastic(both: Shards) -> None:
    settings = config(Path("both"))
    check_elastic(both, settings, loaders=(0, 1))
    check_schedules(both, settings, 8)


def test_a_blend_names_sets_classes_in_common(both: Shards) -> None:
    """An image has the class that its own shards name; in evaluation each comes once."""
    assert both.classes == ["0", "1", "2", "new"]
    for split in both.splits:
        world = World(0, 1, torch.device("cpu"))
        named = Counter(name for part in sets_of(both) for name in classes_of(part, split))
        batches = list(eval_batches(both, config(Path("both")), split, 8, world))
        assert Counter(both.classes[i] for b in batches for i in b.labels.tolist() if i >= 0) == named
        assert sum(float(b.weight.sum()) for b in batches) == both.count(split) == named.total()


def classes_of(part: Shards, split: str) -> Iterator[str]:
    for tar in part.tars(split):
        yield from (part.classes[label] for label in part.columns(tar.info).labels)


def test_bad_samples_of_sets_stay_apart(tmp_path: Path) -> None:
    """Tars of two sets have the same names, and so have their keys."""
    made = [shards(tmp_path / name, n=40, size=9) for name in "ab"]
    for part in made:
        info = part.split("train")[0]
        columns = part.columns(info)
        with (part.path / info.file).open("r+b") as tar:
            tar.seek(columns.offsets[0] + 40)
            tar.write(bytes(columns.sizes[0] - 40))
    both = blend([open_shards(part.path) for part in made], [None, None])
    batches = eval_batches(both, config(Path("both")), "train", 8, World(0, 1, torch.device("cpu")))
    bad = [one for batch in batches for one in batch.bad]
    assert len({one.key for one in bad}) == 1
    assert {one.shard for one in bad} == {f"{part.where}/{part.split('train')[0].file}" for part in made}


def test_what_is_lost_is_in_the_digest_and_what_was_exchanged_is_refused(tmp_path: Path) -> None:
    made = shards(tmp_path / "a", n=60, size=9)
    name = named(made)
    settings = config(made.path, max_bad=0.5)
    assert open_named(name, settings).digest == made.digest
    lost = made.split("train")[1]
    (made.path / lost.file).unlink()
    found = open_named(name, settings)
    assert found.content == made.content
    assert found.digest != made.digest
    assert blend([found, made], [None, None]).digest != blend([made, made], [None, None]).digest
    shutil.rmtree(made.path)
    shards(tmp_path / "a", n=61, size=9)
    with pytest.raises(UserError, match=r"a: holds other shards than when this began"):
        open_named(name, settings)

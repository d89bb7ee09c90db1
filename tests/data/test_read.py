"""Batches are the same bits for any loaders, workers and start; errors name the sample."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from samples import all_same, config, images, one_line, plan, raw_tar, shards

from vitlab.batch import Batch, sample_seeds
from vitlab.config import UserError
from vitlab.data import (
    AugmentConfig,
    Shards,
    eval_batches,
    index_existing,
    open_shards,
    order_of,
    train_batches,
)
from vitlab.data.images.decode import decode
from vitlab.data.making.sources import png
from vitlab.data.reading import reader as reader_module
from vitlab.data.reading.reader import Reader
from vitlab.dist import World

AUGMENT = AugmentConfig(crop_scale=[0.5, 1.0], pad=1, flip=True, rotate=10)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return shards(tmp_path_factory.mktemp("data") / "a")


def test_any_number_of_loaders(made: Shards) -> None:
    settings = config(made.path)
    state = torch.get_rng_state()
    runs = [list(train_batches(made, settings, plan(augment=AUGMENT, loaders=n))) for n in (0, 1, 2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert all_same(runs[0], runs[1])
    assert all_same(runs[0], runs[2])
    assert len(runs[0]) == 2 * order_of(made, settings, plan()).steps
    world = World(0, 1, torch.device("cpu"))
    evaluations = [list(eval_batches(made, settings, "held_out", 8, world, loaders=n)) for n in (0, 1)]
    assert all_same(*evaluations)


def by_slot(parts: list[list[Batch]], epoch_steps: int) -> dict[tuple[int, int], tuple[object, ...]]:
    """(step, seed) → everything of that sample, over all workers and micro-batches of each."""
    out: dict[tuple[int, int], tuple[object, ...]] = {}
    for batches in parts:
        per_step = len(batches) // epoch_steps
        for number, b in enumerate(batches):
            for i, seed in enumerate(b.seeds.tolist()):
                pixels = tuple(view[i].numpy().tobytes() for view in b.views)
                out[number // per_step, seed] = (b.keys[i], int(b.labels[i]), float(b.weight[i]), *pixels)
    return out


@pytest.mark.parametrize(("workers", "accumulate"), [(1, 4), (2, 1), (2, 2), (4, 1), (4, 4)])
def test_any_number_of_workers(made: Shards, workers: int, accumulate: int) -> None:
    settings = config(made.path)
    steps = 2 * order_of(made, settings, plan()).steps
    whole = by_slot([list(train_batches(made, settings, plan(augment=AUGMENT)))], steps)
    plans = [plan(augment=AUGMENT, workers=workers, rank=r, accumulate=accumulate) for r in range(workers)]
    parts = [list(train_batches(made, settings, p)) for p in plans]
    assert {len(part) for part in parts} == {steps * accumulate}
    assert {len(b.keys) for part in parts for b in part} == {16 // workers // accumulate}
    assert by_slot(parts, steps) == whole
    assert len(whole) == steps * 16


def test_batches_are_what_the_order_says(made: Shards) -> None:
    settings = config(made.path)
    order, reader = order_of(made, settings, plan()), Reader(made, "train")
    batches = list(train_batches(made, settings, plan()))
    for number, batch in enumerate(batches):
        epoch, step = divmod(number, order.steps)
        wanted = [reader.read(int(i)) for i in order.batch_indices(epoch, step)]
        assert batch.keys == [one.key for one in wanted]
        assert batch.labels.tolist() == [one.label for one in wanted]
        assert torch.equal(batch.views[0], torch.stack([decode(one.data or b"", 1) for one in wanted]))
        assert batch.views[1].shape == (16, 1, 6, 6)
        positions = step * 16 + np.arange(16)
        assert batch.seeds.tolist() == sample_seeds(3, epoch, positions).tolist()
        assert batch.weight.tolist() == [1.0] * 16


@pytest.mark.parametrize("loaders", [0, 1])
def test_resume_is_the_tail(made: Shards, loaders: int) -> None:
    settings = config(made.path)
    whole = list(train_batches(made, settings, plan(augment=AUGMENT, accumulate=2)))
    for start in (1, order_of(made, settings, plan()).steps + 1)[: 2 - loaders]:
        again = plan(augment=AUGMENT, accumulate=2, loaders=loaders)
        tail = list(train_batches(made, settings, again, start_step=start))
        assert all_same(tail, whole[2 * start :])
    assert list(train_batches(made, settings, plan(), start_step=len(whole))) == []


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_evaluation_sees_every_sample_once(made: Shards, workers: int) -> None:
    for split in ("train", "val", "held_out"):
        worlds = [World(rank, workers, torch.device("cpu")) for rank in range(workers)]
        parts = [list(eval_batches(made, config(made.path), split, 8, world)) for world in worlds]
        assert len({len(part) for part in parts}) == 1
        batches = [b for part in parts for b in part]
        keys = [key for b in batches for key in b.keys if key]
        assert len(keys) == len(set(keys)) == made.count(split)
        for b in batches:
            empty = b.weight == 0
            assert [key == "" for key in b.keys] == empty.tolist()
            assert (b.labels[empty] == -1).all()
            assert not b.views[0][empty].any()
            assert b.views[0].shape[1:] == (1, 8, 8)


@pytest.mark.parametrize("workers", [1, 2])
def test_evaluation_of_chosen_samples(made: Shards, workers: int) -> None:
    """Side by side by rank they are in the order that was asked for."""
    world = World(0, 1, torch.device("cpu"))
    keys = [key for b in eval_batches(made, config(made.path), "train", 8, world) for key in b.keys if key]
    numbers = [20, 3, 11, 4, 0, 9, 1, 30, 2]
    worlds = [World(rank, workers, torch.device("cpu")) for rank in range(workers)]
    parts = [list(eval_batches(made, config(made.path), "train", 4, w, numbers=numbers)) for w in worlds]
    assert [len(part) for part in parts] == [3] * workers
    found = [key for step in zip(*parts, strict=True) for b in step for key in b.keys if key]
    assert found == [keys[number] for number in numbers]


@pytest.mark.parametrize("loaders", [0, 1])
def test_a_broken_image_keeps_its_slot(tmp_path: Path, loaders: int) -> None:
    good = [png(image) for image in images(6)]

    def written(folder: Path, broken: int | None) -> Shards:
        folder.mkdir()
        names = [
            (f"k{i}.png", data if i != broken else data[: len(data) // 2]) for i, data in enumerate(good)
        ]
        raw_tar(folder / "train-0.tar", names)
        return index_existing(folder)

    whole, cut = (
        list(train_batches(s, config(s.path, streams=1), plan(batch=2, loaders=loaders)))
        for s in (written(tmp_path / "whole", None), written(tmp_path / "cut", 2))
    )
    assert [b.keys for b in whole] == [b.keys for b in cut]
    for a, b in zip(whole, cut, strict=True):
        lost = [key == "k2" for key in b.keys]
        assert b.weight.tolist() == [0.0 if gone else 1.0 for gone in lost]
        assert [bad.key for bad in b.bad] == ["k2"] * sum(lost)
        assert all(bad.kind == "cut_image" and bad.shard == "train-0.tar" for bad in b.bad)
        for i, gone in enumerate(lost):
            for one, other in zip(a.views, b.views, strict=True):
                assert not other[i].any() if gone else torch.equal(one[i], other[i])


def test_plans_refused(made: Shards) -> None:
    for more, text in [
        ({"accumulate": 3}, "accumulate: given 3, but a worker has 16"),
        ({"workers": 3}, "workers: given 3"),
        ({"batch": 18}, "batch size: given 18"),
        ({"batch": 400}, "batch size: given 400, but there are only"),
    ]:
        with pytest.raises(UserError, match=text) as caught:
            train_batches(made, config(made.path), plan(**more))
        one_line(caught.value)
    with pytest.raises(UserError, match="num_classes"):
        train_batches(made, config(made.path, num_classes=9), plan())


def test_open_tars_are_bounded(made: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "OPEN_TARS", 2)
    gc.collect()  # readers of earlier tests
    reader = Reader(made, "train")
    keys = [reader.read(i).key for i in range(made.count("train"))]
    assert len(set(keys)) == made.count("train")
    assert open_tars(made.path) == 2
    assert [reader.read(i).key for i in range(3)] == keys[:3]
    del reader
    assert open_tars(made.path) == 0


def open_tars(path: Path) -> int:
    links = [link for link in Path("/proc/self/fd").iterdir() if link.exists()]
    return sum(link.resolve().parent == path.resolve() for link in links)


PARENT = """
import multiprocessing, sys, time
from pathlib import Path
from vitlab.batch import View
from vitlab.data import ReadPlan, ShardsConfig, open_shards, train_batches

if __name__ == "__main__":
    path = sys.argv[1]
    config = ShardsConfig(path=path, image_size=8, channels=1, streams=4)
    batches = train_batches(open_shards(Path(path)), config, ReadPlan([View("a", 8)], 16, 1000, loaders=2))
    next(batches)
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    time.sleep(100)
"""


def test_loaders_do_not_outlive_a_killed_parent(made: Shards, tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    command = [sys.executable, str(script), str(made.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as parent:
        assert parent.stdout is not None
        loaders = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(loaders) == 2
        servers = {ancestor(pid) for pid in loaders}
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while any(map(alive, [*loaders, *servers])) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in [*loaders, *servers] if alive(pid)]


def ancestor(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_reopened_shards_read_the_same(made: Shards) -> None:
    again = open_shards(made.path)
    runs = [list(train_batches(s, config(made.path), plan(epochs=1))) for s in (made, again)]
    assert all_same(*runs)

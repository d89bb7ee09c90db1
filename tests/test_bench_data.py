"""The benchmark of the data: what is written, that the sides do the same, rows, table and file."""

from __future__ import annotations

import io
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from vitlab.bench import DataOptions, Row, bench_data, data, print_data
from vitlab.bench.data_table import sentences
from vitlab.bench.loaders import grown, held, tree
from vitlab.bench.photos import photos
from vitlab.bench.turns import Turns, apart, in_turns
from vitlab.config import UserError
from vitlab.data import open_shards

TINY = DataOptions(images=24, batch=8, image_size=32, rounds=1, loaders=())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench")
    data.write(path, TINY.images)
    return path


def test_photographs_are_those_of_a_seed_and_like_imagenets() -> None:
    some = list(photos(8))
    assert some == list(photos(8))
    assert some[:2] != list(photos(2, seed=1))
    assert 50_000 < np.mean([len(one) for one in some]) < 130_000
    for one in some:
        image = Image.open(io.BytesIO(one))
        assert (image.format, image.size, image.mode) == ("JPEG", (500, 375), "RGB")
        luma, *chroma = [layer[1:3] for layer in image.layer]  # type: ignore[attr-defined]
        assert (luma, chroma) == ((2, 2), [(1, 1), (1, 1)])  # 4:2:0


def test_grain_is_in_the_brightness() -> None:
    """Colours differ smoothly: what is left beside a neighbour's is a fraction of the brightness's."""
    pixels = np.asarray(Image.open(io.BytesIO(next(photos(1)))).convert("YCbCr"), dtype=float)
    grain = np.abs(np.diff(pixels[:40], axis=1)).mean((0, 1))  # of the sky
    assert grain[0] > 4 * max(grain[1:]), grain


def test_every_side_reads_the_same_files(place: Path) -> None:
    import datasets

    files = sorted(file.read_bytes() for file in (place / "images").rglob("*.jpg"))
    assert len(files) == 24
    arrow = datasets.load_from_disk(str(place / "arrow")).cast_column("image", datasets.Image(decode=False))
    assert sorted(row["image"]["bytes"] for row in arrow) == files
    shards, found = open_shards(place / "shards"), []
    for info in shards.split("train"):
        columns = shards.columns(info)
        whole = (place / "shards" / info.file).read_bytes()
        found += [whole[o : o + n] for o, n in zip(columns.offsets, columns.sizes, strict=True)]
    assert sorted(found) == files


def test_sides_that_deliver_something_else_are_not_timed() -> None:
    def side(batch: torch.Tensor) -> Iterator[torch.Tensor]:
        return itertools.repeat(batch)

    many = DataOptions(images=256, batch=8, image_size=32)
    good = torch.randn(8, 3, 32, 32)
    data.alike({"a": side(good), "b": side(good + 0.1)}, many)
    with pytest.raises(RuntimeError, match=r"b: means and spreads of the colours are"):
        data.alike({"a": side(good), "b": side(good / 4 + 0.5)}, many)  # not normalised
    with pytest.raises(RuntimeError, match=r"b: delivers torch.uint8 \(8, 3, 32, 32\), not float32"):
        data.alike({"a": side(good), "b": side(good.byte())}, many)


def test_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    clock = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)) * 24)

    def side(name: str) -> Iterator[None]:
        while True:
            yield order.append(name)

    found = in_turns({name: side(name) for name in "abc"}, Turns(2, 3, 8))
    assert "".join(order) == "aaabbbccccccbbbaaa"  # three batches a turn
    assert found == {"a": 1.0, "b": 1.0, "c": 1.0}  # 24 seconds of 24 images


def test_sides_in_processes_of_their_own() -> None:
    with apart({"a": partial(itertools.count, 5)}, 2) as turns:
        found = in_turns(turns, Turns(2, 3, 8))
    assert 0 < found["a"] < 1


@contextmanager
def together(starts: Mapping[str, Callable[[], Any]], warm: int) -> Iterator[dict[str, Any]]:
    """Seconds sooner than with processes."""
    yield {name: start() for name, start in starts.items()}


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves its tar open
def test_rows_and_what_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "apart", together)
    threads = torch.get_num_threads()
    said: list[str] = []
    rows = bench_data(TINY, said.append)
    assert torch.get_num_threads() == threads
    assert [(row.case, row.peer.partition(" ")[0]) for row in rows] == [
        ("image, one core", "torchvision"),
        ("image, one core", "webdataset"),
        ("image, one core", "datasets"),
        ("decoding alone", "simplejpeg"),
        ("start half-way", "from"),
    ]
    for row in rows:
        assert 0 < row.ours < 1000
        assert 0 < row.theirs < 1000
        assert row.ratio == pytest.approx(row.ours / row.theirs)
    first = rows[0].more
    assert first["images/s"] == pytest.approx(1000 / rows[0].ours)
    assert first["MB/s"] == pytest.approx(first["images/s"] * first["file kB"] / 1000)
    assert rows[-1].more == {"images": 1_281_168.0, "step": 80_073.0, "target s": 2.0}
    assert json.loads(json.dumps([asdict(row) for row in rows]))[0]["unit"] == "ms"
    assert said[0] == "writing 24 photographs, as files, tars and Arrow"
    assert "one core: round 1 of 1" in said


def row(case: str, peer: str, ours: float, theirs: float, unit: str = "ms", **more: float) -> Row:
    figures = {name.replace("_", " "): value for name, value in more.items()}
    if unit == "ms":
        figures |= {"images/s": 1000 / ours, "theirs images/s": 1000 / theirs}
    if case in ("image, one core", "decoding alone"):
        figures |= {"MB/s": 88 / ours, "theirs MB/s": 88 / theirs, "file kB": 88.0}
    return Row(case, peer, ours, theirs, unit, ours / theirs, 5, figures)


def test_what_was_wanted_is_said() -> None:
    rows = [
        row("image, one core", "torchvision 0.29.2", 2.0, 5.0, target_ratio=0.5),
        row("decoding alone", "simplejpeg 1.9.0", 2.0, 1.25, target_ratio=1.43),
        row("image, 2 loaders", "torchvision 0.29.2", 1.0, 2.5),
        row("memory, 2 loaders", "torchvision 0.29.2", 1112.0, 1500.0, "MB"),
        row("start half-way", "from step 0", 0.5, 0.4, "s", target_s=2.0),
    ]
    assert sentences(rows, DataOptions()) == [
        "512 photographs of 500×375, 88 kB each, to batches of 64 of 224 pixels; medians of 5 rounds",
        "images/s, one core (1 thread, no loaders): vitlab 500 (44.0 MB/s), torchvision 200 (17.6 MB/s), "
        "simplejpeg, which only decodes, 800 (70.4 MB/s)",
        "images/s, vitlab: 2 loaders 1,000",
        "images/s, torchvision: 2 loaders 400",
        "peers: torchvision 0.29.2, simplejpeg 1.9.0",
        "2 of 3 targets met",
    ]
    out = io.StringIO()
    print_data(rows, DataOptions(), Console(file=out, width=80))
    table = [" ".join(line.split()) for line in out.getvalue().splitlines()]
    assert "image, one core torchvision 2 ms 5 ms 0.400 0.50 met" in table
    assert "decoding alone simplejpeg 2 ms 1.25 ms 1.600 1.43 missed" in table
    assert "memory, 2 loaders torchvision 1,112 MB 1,500 MB 0.741" in table
    assert "start half-way from step 0 0.5 s 0.4 s 1.250 2.00 s met" in table


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (DataOptions(batch=0), "bench data: batch: given 0; allowed: 1 or more"),
        (DataOptions(images=63), "bench data: images: given 63; allowed: a batch, 64, or more"),
        (DataOptions(loaders=(0, -1)), "bench data: loaders: given -1; allowed: 0 or more"),
    ],
)
def test_what_cannot_be_measured(options: DataOptions, problem: str) -> None:
    with pytest.raises(UserError) as error:
        bench_data(options)
    assert str(error.value) == problem


# ---------------------------------------------------------------- processes


def test_what_a_process_and_its_children_hold() -> None:
    """100 MB of its own in a child; the libraries of both are counted once."""
    child = "import time; held = b'x' * 100_000_000; print('ready', flush=True); time.sleep(60)"
    before, me = held(os.getpid())
    with subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        both, again = held(os.getpid())
        assert process.pid in tree(os.getpid())
        assert tree(process.pid) == [process.pid]
        process.kill()
    assert 100e6 < both - before < 150e6
    assert again == pytest.approx(me, rel=0.05)


def test_loader_processes_are_measured(place: Path) -> None:
    starts = [partial(side, place, TINY) for side in (data.vitlab_side, data.torchvision_side)]
    one = DataOptions(24, 8, 32, 1, loaders=(1,))
    found = list(grown(starts, "torchvision", one, 1, lambda text: None))
    assert [(row.case, row.unit) for row in found] == [("image, 1 loader", "ms"), ("memory, 1 loader", "MB")]
    for row in found:
        assert 0 < row.ours < 10_000
        assert 0 < row.theirs < 10_000
    assert 10 < found[1].more["of loaders"] < found[1].ours  # the loaders are there while it is measured
    assert 10 < found[1].more["theirs of loaders"] < found[1].theirs

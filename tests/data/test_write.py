"""Writing shards: the same bytes however often it was interrupted, by however many threads; settings."""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from samples import config, images, one_line, shards, source, stored

from vitlab.commands import shards as command
from vitlab.config import UserError, build, deciding
from vitlab.data import (
    Raw,
    Shards,
    ShardsConfig,
    Source,
    WriteOptions,
    arrays,
    check_classes,
    digits,
    normalisation,
    open_shards,
    prepare,
    write_shards,
)
from vitlab.data.bad import BadInputError
from vitlab.data.making import journal, progress
from vitlab.data.making import write as write_module
from vitlab.data.making.sources import png


def test_digits(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    made = write_shards(digits(), tmp_path / "d", WriteOptions(shard_samples=200))
    counts = {name: made.count(name) for name in made.splits}
    assert counts == {"train": 1261, "val": 183, "held_out": 353}
    assert len(made.split("train")) >= 5
    assert made.classes == [str(i) for i in range(10)]
    pixels, labels = load_digits(return_X_y=True)
    for key, data, label in stored(made, "val"):
        number = int(key.removeprefix("digits-"))
        assert label == labels[number]
        image = np.asarray(Image.open(io.BytesIO(data)))
        assert np.array_equal(image.reshape(-1), np.round(pixels[number] * 255 / 16))
    assert open_shards(tmp_path / "d") == made


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def samples(start: int) -> Iterator[Raw]:
        yield from source(images(10)).samples(start)
        raise UserError("the disk is full")

    with pytest.raises(UserError, match="disk is full"):
        write_shards(Source("x", samples), tmp_path / "a")
    assert os.listdir(tmp_path) == []
    shards(tmp_path / "a")
    with pytest.raises(UserError, match="is there already and not empty"):
        shards(tmp_path / "a")
    with pytest.raises(UserError, match="cannot be named so"):
        write_module._name(tmp_path / "gone", tmp_path / "a")
    with pytest.raises(UserError, match="no samples for training"):
        write_shards(Source("x", lambda start: iter(())), tmp_path / "b")
    with pytest.raises(UserError, match="no samples for training"):
        write_shards(source(images(9)), tmp_path / "b", WriteOptions(held_out=0.99, val=0.0))
    assert os.listdir(tmp_path) == ["a"]


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a directory."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def mended(at: int, n: int = 60, bad: Sequence[int] = ()) -> Source:
    """The same images every time; the power goes off at a position, if that is reached."""
    pictures = [png(x) for x in images(n)]

    def read(i: int) -> bytes:
        if i in bad:
            raise BadInputError("broken_image", f"number {i}")
        return pictures[i]

    def samples(start: int) -> Iterator[Raw]:
        for i in range(start, n):
            if i == at:
                raise RuntimeError("power")
            yield Raw(f"s{i:04d}", i % 3, partial(read, i))

    return Source("test", samples, (), n, "60 pictures")


FEW = WriteOptions(shard_samples=4, max_bad=0.1, write_workers=2)
BAD = (3, 17, 40, 59)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    made = write_shards(mended(-1, bad=BAD), tmp_path_factory.mktemp("whole") / "a", FEW)
    assert [bad.key for bad in made.bad] == ["s0003", "s0017", "s0040", "s0059"]
    assert sum(map(made.count, made.splits)) == 56
    return tree(made.path)


@pytest.mark.parametrize("stops", [[0], [7], [23], [58], [12, 13, 30, 31, 57]])
def test_it_goes_on_where_it_stopped(tmp_path: Path, undisturbed: dict[str, bytes], stops: list[int]) -> None:
    done = 0
    for stop in stops:
        with pytest.raises(RuntimeError, match="power"):
            write_shards(mended(stop, bad=BAD), tmp_path / "a", FEW)
        kept = len(list(tmp_path.glob("a.partial/*.tar")))
        assert kept >= done
        done = kept
    assert (done > 0) == (tmp_path / "a.partial").exists() == (stops != [0] and stops != [7])
    write_shards(mended(-1, bad=BAD), tmp_path / "a", FEW)
    assert os.listdir(tmp_path) == ["a"]
    assert tree(tmp_path / "a") == undisturbed


@pytest.mark.parametrize("number", [1, 2, 6, 13])
@pytest.mark.parametrize("torn", [False, True])
def test_it_goes_on_after_a_torn_line(
    tmp_path: Path, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, number: int, torn: bool
) -> None:
    """The tar is there, its line in the journal is not, or only half of it."""
    append, lines = journal._append, itertools.count()

    def failing(path: Path, data: dict[str, object]) -> None:
        if next(lines) == number:
            if torn:
                with path.open("a") as file:
                    file.write(json.dumps(data, default=str)[:20])
            raise RuntimeError("power")
        append(path, data)

    monkeypatch.setattr(journal, "_append", failing)
    with pytest.raises(RuntimeError, match="power"):
        write_shards(mended(-1, bad=BAD), tmp_path / "a", FEW)
    monkeypatch.undo()
    seen: list[int] = []
    again = mended(-1, bad=BAD)
    again = replace(again, samples=lambda start: seen.append(start) or mended(-1, bad=BAD).samples(start))
    write_shards(again, tmp_path / "a", FEW)
    assert seen[0] > 0 or number < 6
    assert tree(tmp_path / "a") == undisturbed


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import test_write as t
from vitlab.data.making import journal, write

at, append, count = int(sys.argv[3]), journal._append, [0]

def lethal(path, data):
    count[0] += 1
    if count[0] == at:
        os.kill(os.getpid(), signal.SIGKILL)
    append(path, data)

journal._append = lethal
t.write_shards(t.mended(-1, bad=t.BAD), t.Path(sys.argv[2]), t.FEW)
"""


def test_a_killed_process_goes_on(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    here = str(Path(__file__).parent)
    done = subprocess.run([sys.executable, "-c", KILLED, here, str(tmp_path / "a"), "7"], check=False)
    assert done.returncode == -signal.SIGKILL
    assert len((tmp_path / "a.partial" / "journal.jsonl").read_bytes().splitlines()) == 6
    write_shards(mended(-1, bad=BAD), tmp_path / "a", FEW)
    assert os.listdir(tmp_path) == ["a"]
    assert tree(tmp_path / "a") == undisturbed


def test_other_commands_do_not_go_on(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="power"):
        write_shards(mended(50), tmp_path / "a", FEW)
    other = FEW.model_copy(update={"held_out": 0.3, "write_workers": 1, "max_bad": 0.5})
    with pytest.raises(
        UserError, match=r"another command \(held_out 0.2, now 0.3\); go on with that"
    ) as caught:
        write_shards(mended(-1), tmp_path / "a", other)
    one_line(caught.value)
    changed = replace(mended(-1), fingerprint="others")
    with pytest.raises(UserError, match=r"\(images 60 pictures, now others\)"):
        write_shards(changed, tmp_path / "a", FEW)
    part = tmp_path / "a.partial"
    kept = (part / "train-000000.tar").read_bytes()
    (part / "train-000000.tar").write_bytes(kept[:-1])
    with pytest.raises(UserError, match=r"train-000000.tar: was written, but is missing or cut; remove"):
        write_shards(mended(-1), tmp_path / "a", FEW)
    (part / "train-000000.tar").write_bytes(kept)
    lines = (part / "journal.jsonl").read_text()
    for text in ("no json\n" + lines, lines + "{}\n"):
        (part / "journal.jsonl").write_text(text)
        with pytest.raises(UserError, match=r"damaged|not as this version writes it"):
            write_shards(mended(-1), tmp_path / "a", FEW)
    (part / "journal.jsonl").write_text(lines)
    write_shards(mended(-1), tmp_path / "a", FEW.model_copy(update={"write_workers": 1, "max_bad": 0.5}))
    assert os.listdir(tmp_path) == ["a"]


def test_two_writers_do_not_clash(tmp_path: Path) -> None:
    refused: list[str] = []

    def samples(start: int) -> Iterator[Raw]:
        with pytest.raises(UserError, match="another process is writing it; wait for that one") as caught:
            shards(tmp_path / "a")
        refused.append(one_line(caught.value))
        yield from mended(-1).samples(start)

    made = write_shards(replace(mended(-1), samples=samples), tmp_path / "a", FEW)
    assert len(refused) == 1
    assert open_shards(tmp_path / "a") == made
    assert os.listdir(tmp_path) == ["a"]


def test_a_flood_of_bad_images_ends_the_work_early(tmp_path: Path) -> None:
    read: list[int] = []
    flood = mended(-1, bad=range(30, 60))
    counted = replace(flood, samples=lambda start: (read.append(raw) or raw for raw in flood.samples(start)))
    text = r"^test: at least 7 of 60 images cannot become samples \(7 broken_image\), max_bad allows 10"
    with pytest.raises(UserError, match=text) as caught:
        write_shards(counted, tmp_path / "a", FEW)
    one_line(caught.value)
    assert len(read) < 60
    made = write_shards(flood, tmp_path / "a", FEW.model_copy(update={"max_bad": 0.5}))
    assert [bad.key for bad in made.bad] == [f"s{i:04d}" for i in range(30, 60)]
    assert open_shards(made.path).bad == made.bad
    with pytest.raises(UserError, match="test: 30 of 60 images"):
        write_shards(replace(flood, total=None), tmp_path / "b", FEW)


@pytest.mark.parametrize("workers", [1, 3, 16])
def test_threads_do_not_change_a_byte(tmp_path: Path, undisturbed: dict[str, bytes], workers: int) -> None:
    how = FEW.model_copy(update={"write_workers": workers})
    write_shards(mended(-1, bad=BAD), tmp_path / "a", how)
    assert tree(tmp_path / "a") == undisturbed


def test_sizes_by_bytes(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 40), np.uint8)
    pixels[7] = 0  # a small one
    how = WriteOptions(held_out=0.0, val=0.0, shard_bytes=20_480)
    made = write_shards(arrays(pixels, np.zeros(40, int)), tmp_path / "a", how)
    sizes = [info.bytes for info in made.split("train")]
    assert set(sizes) <= {10_240, 20_480}
    assert sum(info.count for info in made.split("train")) == 40
    assert {info.count for info in made.split("train")[:-1]} <= {5, 6}
    both = how.model_copy(update={"shard_samples": 3})
    counts = [
        info.count
        for info in write_shards(arrays(pixels, np.zeros(40, int)), tmp_path / "b", both).split("train")
    ]
    assert counts == [3] * 13 + [1]
    tiny = how.model_copy(update={"shard_bytes": 1})
    assert len(write_shards(arrays(pixels, np.zeros(40, int)), tmp_path / "c", tiny).split("train")) == 40


def test_to_an_address(
    tmp_path: Path, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every shard is copied when it is full, the index last; what was copied is not made again."""
    fsspec = pytest.importorskip("fsspec")
    monkeypatch.setenv("VITLAB_HOME", str(tmp_path / "home"))
    store = fsspec.filesystem("memory")
    url = "memory://written/shards"
    with pytest.raises(RuntimeError, match="power"):
        write_shards(mended(40, bad=BAD), url, FEW)
    there = {Path(name).name for name in store.ls("/written/shards", detail=False)}
    assert {"train-000000.tar", "train-000000.idx.json"} <= there
    assert "index.json" not in there
    copied: list[str] = []
    upload = write_module.upload
    monkeypatch.setattr(write_module, "upload", lambda file, to: copied.append(file.name) or upload(file, to))
    write_shards(mended(-1, bad=BAD), url, FEW)
    assert not there & set(copied)
    assert copied[-1] == "index.json"
    names = store.ls("/written/shards", detail=False)
    assert {Path(name).name: store.cat(name) for name in names} == undisturbed
    assert list((tmp_path / "home" / "uploads").iterdir()) == []
    with pytest.raises(UserError, match="memory://written/shards: has shards already"):
        write_shards(mended(-1), url, FEW)


def test_long_writes_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shards(tmp_path / "a")
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(progress, "SHOW_AFTER", 0.0)
    shards(tmp_path / "b")
    out, err = capsys.readouterr()
    assert out == ""
    first, last = err.splitlines()
    assert re.fullmatch(r"  writing shards: 1/100 · [\d,]+ images/s( · 0 MB)? · .* left", first)
    assert re.fullmatch(r"  writing shards: 100/100 · [\d,]+ images/s · 0 MB", last)


def test_a_line_that_moves(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SHOW_AFTER", 0.0)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "140")
    with progress.Meter("reading", "rows", 40, begin=10) as meter:
        for _ in range(30):
            meter.add(1_000_000)
    err = capsys.readouterr().err
    assert "40/40" in err
    assert "30 MB" in err
    assert list(progress.shown(range(3), "counting", "things")) == [0, 1, 2]


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({}, "exactly one of source .* given neither"),
        ({"source": "digits", "path": "x"}, "given both"),
        ({"source": "digits", "held_out": 0.6, "val": 0.5}, r"held_out \+ val: given 0.6 \+ 0.5"),
        ({"source": "digits", "mean": [0.5]}, "mean: given 1 numbers; expected one per channel, 3"),
        ({"source": "digits", "std": [0.5, 0.0, 1.0]}, "std: given .* above 0"),
        ({"source": "digits", "channels": 2}, "channels: given 2; allowed: 1, 3"),
        ({"source": "digits", "steams": 2}, "did you mean 'streams'"),
    ],
)
def test_settings_refused(given: dict[str, object], text: str) -> None:
    with pytest.raises(UserError, match=text) as caught:
        build(ShardsConfig, {"image_size": 8} | given)
    one_line(caught.value)


def test_settings(tmp_path: Path) -> None:
    mean, std = normalisation(ShardsConfig(source="digits", image_size=8))
    assert mean.shape == std.shape == (3, 1, 1)
    assert set(mean.reshape(-1).tolist()) == set(std.reshape(-1).tolist()) == {0.5}
    given = build(ShardsConfig, {"source": "digits", "image_size": 8, "channels": 1, "mean": [0], "std": [1]})
    assert normalisation(given)[0].item() == 0
    assert deciding(config(tmp_path / "a")) == deciding(config(tmp_path / "b"))


def test_number_of_classes(tmp_path: Path) -> None:
    made = shards(tmp_path / "a")
    assert prepare(config(made.path, num_classes=3), tmp_path / "none") == made
    with pytest.raises(
        UserError, match=r"data.num_classes: given 7, but the shards hold 3 classes; leave it out"
    ):
        check_classes(config(made.path, num_classes=7), made)


def test_shards_are_equal_wherever_they_lie(tmp_path: Path) -> None:
    made = shards(tmp_path / "a")
    moved = Shards(tmp_path / "b", made.classes, made.splits)
    made.path.rename(moved.path)
    assert open_shards(moved.path).digest == made.digest


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    command.add(parser.add_subparsers())
    np.savez(tmp_path / "x.npz", pixels=np.zeros((9, 30, 20), np.uint8), kind=np.arange(9), more=np.arange(9))
    words = f"shards npy:{tmp_path / 'x.npz'} {tmp_path / 'a'} --limit 8 --held-out 0 --val 0"
    words += " --shard-bytes 20.48KB --shard-samples 5 --resize 10 --quality 80 --max-bad 0.5 --workers 2"
    given = parser.parse_args([*words.split(), "--image-column", "pixels", "--label-column", "kind"])
    given.action(given)
    assert "8 train, 0 val, 0 held_out images of 9 classes in" in capsys.readouterr().out
    made = open_shards(tmp_path / "a")
    assert [info.count for info in made.split("train")] == [5, 3]
    assert (made.made["shard_bytes"], made.made["resize"], made.made["quality"]) == (20_480, 10, 80)
    assert [command._size(text) for text in ("7", "256MB", "1.5GiB", "2 kb")] == [
        7,
        256 * 10**6,
        3 * 2**29,
        2000,
    ]
    with pytest.raises(argparse.ArgumentTypeError, match="given '3XB'; allowed: bytes, as 256MB"):
        command._size("3XB")

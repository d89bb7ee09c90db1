"""Tars and their index: the same bytes for the same input, readable by anyone, whole or refused."""

from __future__ import annotations

import io
import json
import os
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from samples import images, one_line, raw_tar, shards, source

from vitlab.config import UserError
from vitlab.data import Shards, WriteOptions, index_existing, open_shards, write_shards
from vitlab.data.images.decode import decode
from vitlab.data.making.packing import side
from vitlab.data.making.sources import png
from vitlab.data.reading.reader import Reader
from vitlab.data.shards.index import SPLITS, columns_path
from vitlab.data.shards.tars import Columns, read_member

PICTURE = png(images(1)[0])


def content(found: Shards) -> dict[str, list[bytes]]:
    """The image bytes of every split."""
    out: dict[str, list[bytes]] = {name: [] for name in SPLITS}
    for name, infos in found.splits.items():
        for info in infos:
            columns = found.columns(info)
            with (found.path / info.file).open("rb") as file:
                places = zip(columns.offsets, columns.sizes, strict=True)
                out[name] += [read_member(file.fileno(), offset, size) for offset, size in places]
    return out


def test_same_input_same_bytes(tmp_path: Path) -> None:
    a, b = shards(tmp_path / "a"), shards(tmp_path / "b")
    names = sorted(os.listdir(a.path))
    assert names == sorted(os.listdir(b.path))
    assert len([n for n in names if n.endswith(".tar")]) > 5
    assert all((a.path / n).read_bytes() == (b.path / n).read_bytes() for n in names)
    assert a.digest == b.digest == open_shards(a.path).digest
    assert a.digest != shards(tmp_path / "c", n=101).digest
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "c"]


def test_splits_are_disjoint_whole_and_stable(tmp_path: Path) -> None:
    pictures = [*images(120), *images(40)]  # 40 of them twice
    small, large = (
        shards(tmp_path / "a"),
        write_shards(source(pictures), tmp_path / "b", WriteOptions(shard_samples=16)),
    )
    few, many = content(small), content(large)
    assert sum(map(len, many.values())) == 160
    assert sorted(data for part in many.values() for data in part) == sorted(map(png, pictures))
    sides = [set(part) for part in many.values()]
    assert sum(map(len, sides)) == len(set.union(*sides))
    assert all(set(few[name]) <= set(many[name]) for name in SPLITS)
    assert json.loads((large.path / "index.json").read_text())["made"]["held_out"] == 0.2


def test_split_fractions() -> None:
    sides = [side(str(i).encode(), 0.2, 0.1) for i in range(4000)]
    assert abs(sides.count("held_out") / 4000 - 0.2) < 0.02
    assert abs(sides.count("val") / 4000 - 0.1) < 0.02


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves its tar open
def test_anyone_reads_them(tmp_path: Path) -> None:
    made = shards(tmp_path / "a")
    info = made.split("train")[0]
    tar = made.path / info.file
    rows = list(webdataset.WebDataset(str(tar), shardshuffle=False, empty_check=False))
    columns = made.columns(info)
    assert [row["__key__"] for row in rows] == columns.keys
    assert [int(row["cls"]) for row in rows] == columns.labels
    reader = Reader(made, "train")
    decoded = [np.array(Image.open(io.BytesIO(row["png"]))) for row in rows]
    assert all(
        np.array_equal(x, decode(reader.read(i).data or b"", 1)[0].numpy()) for i, x in enumerate(decoded)
    )
    listed = subprocess.run(
        ["tar", "tf", str(tar)], capture_output=True, text=True, check=True
    ).stdout.split()
    assert listed == [f"{key}.{end}" for key in columns.keys for end in ("cls", "png")]
    with tarfile.open(tar) as members:
        assert {member.mtime for member in members} == {0}


def test_reads_what_others_write(tmp_path: Path) -> None:
    with webdataset.ShardWriter(str(tmp_path / "train-%06d.tar"), maxcount=3, verbose=0) as writer:
        for i in range(5):
            writer.write({"__key__": f"a/{i:03d}", "png": PICTURE, "cls": i, "json": {"i": i}})
    raw_tar(tmp_path / "test-0.tar", [("./x.PNG", PICTURE), ("./x.cls", b"7\n"), ("./README", b"hi")])
    raw_tar(tmp_path / "val-0.tar", [("long/" * 40 + "x.png", PICTURE)])
    made = index_existing(tmp_path)
    assert {name: [i.count for i in infos] for name, infos in made.splits.items()} == {
        "train": [3, 2],
        "val": [1],
        "held_out": [1],
    }
    assert made.classes == [str(i) for i in range(8)]
    assert open_shards(tmp_path) == made
    assert made.columns(made.split("val")[0]).labels == [-1]
    assert Reader(made, "held_out").read(0)[1:3] == (7, "./x")
    named = index_existing(tmp_path, list("abcdefgh"))
    assert index_existing(tmp_path).classes == named.classes  # an earlier index keeps its names


def test_gnu_tar_program(tmp_path: Path) -> None:
    (tmp_path / "n1.png").write_bytes(PICTURE)
    (tmp_path / "n1.cls").write_bytes(b"1")
    (tmp_path / "d").mkdir()
    command = ["tar", "--sort=name", "-cf", "d/any.tar", "n1.cls", "n1.png"]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert index_existing(tmp_path / "d").splits["train"][0].count == 1


def test_directories_that_hold_no_shards(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    with pytest.raises(UserError, match=r"shard: no such directory.*did you mean 'shards'"):
        open_shards(tmp_path / "shard")
    with pytest.raises(UserError, match=r"no index\.json.*vitlab shards index"):
        open_shards(tmp_path / "shards")
    with pytest.raises(UserError, match=r"no \.tar file"):
        index_existing(tmp_path / "shards")
    with pytest.raises(UserError, match="no such directory"):
        index_existing(tmp_path / "none")


def test_damage_is_named(tmp_path: Path) -> None:
    made = shards(tmp_path / "a")
    info = made.split("train")[0]
    tar, index = made.path / info.file, made.path / "index.json"
    whole, text = tar.read_bytes(), index.read_text()
    for data, words in [(whole + b"x", "bytes in the index|bytes, but"), (None, "it is missing")]:
        tar.unlink() if data is None else tar.write_bytes(data)
        with pytest.raises(UserError, match=words) as caught:
            open_shards(made.path)
        assert str(tar) in one_line(caught.value)
    tar.write_bytes(whole)
    other = json.loads(text)
    for change, words in [
        ({"format": "x/9"}, "format is 'x/9'"),
        ({"classes": ["cat"]}, "changed by hand"),
        ({"splits": 3}, "not as this version writes it"),
        ({"splits": {"train": [{"file": "../x", "count": 1, "bytes": 1, "sha256": ""}]}}, "changed by hand"),
    ]:
        index.write_text(json.dumps(other | change))
        with pytest.raises(UserError, match=words) as caught:
            open_shards(made.path)
        assert "vitlab shards index" in one_line(caught.value)
    index.write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        open_shards(made.path)
    assert index_existing(made.path).splits == made.splits
    with pytest.raises(UserError, match=r"no split 'vall'; there are: .*did you mean 'val'"):
        made.split("vall")


def test_names_in_an_index_stay_inside(tmp_path: Path) -> None:
    made = shards(tmp_path / "a")
    data = json.loads((made.path / "index.json").read_text())
    data["splits"]["train"][0]["file"] = "../a/train-000000.tar"
    (made.path / "index.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match="no plain file name"):
        open_shards(made.path)


def test_columns_that_do_not_fit(tmp_path: Path) -> None:
    made = shards(tmp_path / "a")
    info = made.split("train")[0]
    path = columns_path(made.path / info.file)
    data = json.loads(path.read_text())
    for change in ({"sizes": [10**9] * info.count}, {"labels": [1]}, {"offsets": [-5] * info.count}):
        path.write_text(json.dumps(data | change))
        with pytest.raises(UserError, match=f"does not fit {info.file}"):
            made.columns(info)
    path.write_text("{}")
    with pytest.raises(UserError, match="expected the columns keys, offsets"):
        made.columns(info)
    path.unlink()
    with pytest.raises(UserError, match="no such file"):
        made.columns(info)


def test_columns_add_in_step() -> None:
    columns = Columns()
    columns.add("k", 512, 9, "png", 3)
    assert columns.plain() == {
        "keys": ["k"],
        "offsets": [512],
        "sizes": [9],
        "extensions": ["png"],
        "labels": [3],
    }
    assert len(columns) == 1

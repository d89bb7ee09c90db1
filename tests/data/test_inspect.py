"""Shards looked at: each damage is named for what it is and where, and figures are those of numpy."""

from __future__ import annotations

import io
import json
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from samples import images, one_line, raw_tar, shards

from vitlab.batch import Bad
from vitlab.config import UserError
from vitlab.data import Shards, index_existing, open_shards
from vitlab.data.making.sources import png
from vitlab.data.reading.blend import blend
from vitlab.data.shards.index import columns_path, save_index
from vitlab.data.shards.inspect import MEANING, Verdict, verify
from vitlab.data.shards.statistics import examples, spread, statistics

PICTURE = png(images(1)[0])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return shards(tmp_path_factory.mktemp("whole") / "data", n=60)


@pytest.fixture
def copy(whole: Shards, tmp_path: Path) -> Shards:
    return open_shards(Path(shutil.copytree(whole.path, tmp_path / "data")))


def tar(found: Shards, number: int = 0) -> Path:
    return found.path / found.split("train")[number].file


def told(verdict: Verdict) -> list[tuple[str, str, str]]:
    assert {one.kind for one in (*verdict.bad, *verdict.warnings)} <= MEANING.keys()
    return [(one.kind, one.shard, one.key) for one in verdict.bad]


def change_columns(found: Shards, name: str, row: int, value: object) -> str:
    """Returns the key of the row."""
    path = columns_path(tar(found))
    columns = json.loads(path.read_text("utf8"))
    columns[name][row] = value
    path.write_text(json.dumps(columns), "utf8")
    return str(columns["keys"][row])


# ---------------------------------------------------------------- verify


def test_whole_shards_are_well(whole: Shards) -> None:
    steps: list[int] = []
    lock = threading.Lock()

    def step(more: int) -> None:
        with lock:
            steps.append(more)

    found = verify(whole.path, step=step)
    infos = [info for some in whole.splits.values() for info in some]
    assert found == Verdict(len(infos), 60, sum(info.bytes for info in infos))
    assert sum(steps) == 60


def test_a_missing_tar(copy: Shards) -> None:
    tar(copy).unlink()
    assert told(verify(copy.path)) == [("missing_shard", tar(copy).name, "")]
    assert verify(copy.path).bad[0].reason == "the file is missing, and with it 16 samples"


def test_a_flipped_byte_of_an_image(copy: Shards) -> None:
    columns = copy.columns(copy.split("train")[0])
    data = bytearray(tar(copy).read_bytes())
    data[columns.offsets[3] + columns.sizes[3] // 2] ^= 0xFF
    tar(copy).write_bytes(data)
    name, key = tar(copy).name, columns.keys[3]
    kinds = told(verify(copy.path))
    assert kinds[0] == ("changed_tar", name, "")
    assert [(shard, where) for _, shard, where in kinds[1:]] == [(name, key)]
    assert kinds[1][0] in ("broken_image", "cut_image")
    assert told(verify(copy.path, decodes=False)) == kinds[:1]


def test_a_flipped_byte_between_the_images(copy: Shards) -> None:
    columns = copy.columns(copy.split("train")[0])
    data = bytearray(tar(copy).read_bytes())
    data[columns.offsets[3] + columns.sizes[3]] ^= 1  # it fills the block up
    tar(copy).write_bytes(data)
    assert told(verify(copy.path)) == [("changed_tar", tar(copy).name, "")]


def test_a_flipped_byte_of_a_header(copy: Shards) -> None:
    """The sample is lost to other readers, though the columns know where it is."""
    columns = copy.columns(copy.split("train")[0])
    data = bytearray(tar(copy).read_bytes())
    data[columns.offsets[3] - 512] ^= 1
    tar(copy).write_bytes(data)
    found = told(verify(copy.path))
    assert found[0] == ("changed_tar", tar(copy).name, "")
    assert "broken_header" in {kind for kind, _, _ in found}
    assert len(found) <= 3


def test_a_cut_tar(copy: Shards) -> None:
    columns = copy.columns(copy.split("train")[0])
    os.truncate(tar(copy), columns.offsets[10] + 5)
    found = verify(copy.path)
    assert {(kind, shard) for kind, shard, _ in told(found)} == {("cut_tar", tar(copy).name)}
    assert found.bad[0].reason.endswith("6 of 16 samples are not whole")


def test_a_tar_of_another_size(copy: Shards) -> None:
    with tar(copy).open("ab") as file:
        file.write(bytes(512))
    assert told(verify(copy.path)) == [("changed_tar", tar(copy).name, "")]


def test_what_is_no_tar(copy: Shards) -> None:
    size = tar(copy).stat().st_size
    tar(copy).write_bytes(b"x" * size)
    found = told(verify(copy.path))
    assert ("changed_tar", tar(copy).name, "") in found
    assert {shard for _, shard, _ in found} == {tar(copy).name}


def test_another_tar_under_the_name(copy: Shards) -> None:
    shutil.copy(tar(copy, 1), tar(copy, 0))
    found = verify(copy.path)
    assert told(found)[0] == ("changed_tar", tar(copy).name, "")
    reasons = {one.reason for one in found.bad[1:] if one.kind == "changed_columns"}
    assert {"is in the columns, but not in the tar", "is in the tar, but not in the columns"} <= reasons


@pytest.mark.parametrize(
    ("name", "value"), [("offsets", 512), ("sizes", 3), ("labels", 1), ("extensions", "jpg")]
)
def test_columns_that_do_not_fit_the_tar(copy: Shards, name: str, value: object) -> None:
    key = change_columns(copy, name, 3, value)
    found = [one for one in verify(copy.path, decodes=False).bad if one.kind == "changed_columns"]
    assert [(one.shard, one.key) for one in found] == [(tar(copy).name, key)]
    assert found[0].reason.startswith(f"{name[:-1]} {value} in the columns, ")


@pytest.mark.parametrize("text", ["{", "[]", '{"keys": 3}', "missing"])
def test_columns_that_are_none(copy: Shards, text: str) -> None:
    path = columns_path(tar(copy))
    path.unlink() if text == "missing" else path.write_text(text, "utf8")
    found = verify(copy.path)
    assert told(found) == [("changed_columns", tar(copy).name, "")]
    assert "\n" not in found.bad[0].reason
    assert str(copy.path) not in found.bad[0].reason


def test_columns_of_words_for_numbers(copy: Shards) -> None:
    change_columns(copy, "labels", 3, "two")
    assert told(verify(copy.path)) == [("changed_columns", tar(copy).name, "")]


def test_a_label_out_of_range(tmp_path: Path) -> None:
    members = [(f"{i}.{end}", data) for i in range(3) for end, data in (("png", PICTURE), ("cls", b"%d" % i))]
    raw_tar(tmp_path / "train-0.tar", members)
    made = index_existing(tmp_path)
    save_index(Shards(made.path, ["a", "b"], made.splits))
    found = verify(tmp_path)
    assert found.bad == [Bad("wrong_label", "train-0.tar", "2", "label 2, but there are 2 classes")]


def broken(i: int) -> bytes:
    data = bytearray(png(images(1, seed=i)[0]))
    if i in (5, 9):
        data[len(data) // 2] ^= 0xFF
    return bytes(data)


def test_broken_images(tmp_path: Path) -> None:
    members = [(f"s{i}.{end}", data) for i in range(12) for end, data in (("png", broken(i)), ("cls", b"0"))]
    raw_tar(tmp_path / "train-0.tar", members)
    index_existing(tmp_path)
    assert [key for _, _, key in told(verify(tmp_path))] == ["s5", "s9"]
    assert told(verify(tmp_path, decodes=False)) == []


def test_a_key_that_is_there_twice(copy: Shards) -> None:
    other = copy.columns(copy.split("train")[0]).keys[4]
    change_columns(copy, "keys", 3, other)
    assert ("duplicate_key", tar(copy).name, other) in told(verify(copy.path, decodes=False))


def test_no_label_among_others(tmp_path: Path) -> None:
    raw_tar(tmp_path / "train-0.tar", [("a.png", PICTURE), ("a.cls", b"0")])
    raw_tar(tmp_path / "train-1.tar", [("b.png", png(images(2)[1]))])
    made = index_existing(tmp_path)
    found = verify(tmp_path)
    assert told(found) == ([("no_label", "train-1.tar", "b")] if not made.bad else [])


def test_equal_images_on_both_sides(tmp_path: Path) -> None:
    """Bad where the split follows from the image's hash; else it is for a person to know."""
    for split in ("train", "val"):
        members = [(f"{split}.png", PICTURE), (f"{split}.cls", b"0")]
        raw_tar(tmp_path / f"{split}-0.tar", members)
    made = index_existing(tmp_path)
    leak = Bad("split_leak", "val-0.tar", "val", "equal to one of train")
    assert (verify(tmp_path).bad, verify(tmp_path).warnings) == ([], [leak])
    rule = {"rule": "u = sha256(image bytes) / 2^256"}
    save_index(Shards(made.path, made.classes, made.splits, rule))
    assert (verify(tmp_path).bad, verify(tmp_path).warnings) == ([leak], [])


def test_what_the_index_knows_is_not_told_again(copy: Shards) -> None:
    tar(copy).unlink()
    save_index(Shards(copy.path, copy.classes, copy.splits, copy.made, verify(copy.path).bad))
    found = verify(copy.path)
    assert (found.bad, found.known) == ([], 1)


def test_a_tar_that_the_index_does_not_name(copy: Shards) -> None:
    shutil.copy(tar(copy), copy.path / "more.tar")
    found = verify(copy.path)
    assert found.bad == []
    assert found.warnings == [Bad("stray_tar", "more.tar", "", "is in the folder, but not in the index")]


def test_all_damages_at_once(copy: Shards) -> None:
    """What one tar has hides nothing of another."""
    tar(copy, 0).unlink()
    os.truncate(tar(copy, 1), 1000)
    columns_path(tar(copy, 2)).unlink()
    kinds = {(kind, shard) for kind, shard, _ in told(verify(copy.path))}
    names = [tar(copy, i).name for i in range(3)]
    assert kinds == set(zip(("missing_shard", "cut_tar", "changed_columns"), names, strict=True))


@pytest.mark.parametrize("change", [{"digest": "0"}, {"format": "2"}, {"classes": None}])
def test_an_index_that_was_changed(copy: Shards, change: dict[str, object]) -> None:
    path = copy.path / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf8")) | change), "utf8")
    assert told(verify(copy.path)) == [("broken_index", "index.json", "")]


def test_a_file_that_leads_out(copy: Shards) -> None:
    path = copy.path / "index.json"
    data = json.loads(path.read_text("utf8"))
    data["splits"]["train"][0]["file"] = "../other.tar"
    path.write_text(json.dumps(data), "utf8")
    assert ("unsafe_name", "../other.tar", "") in told(verify(copy.path))


def test_no_shards_at_all(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        verify(tmp_path)
    assert one_line(caught.value).startswith(f"{tmp_path}: no index.json in it")


# ---------------------------------------------------------------- statistics


def colours(n: int, side: int = 8) -> list[np.ndarray]:
    return list(np.random.default_rng(5).integers(0, 256, (n, side, side, 3), dtype=np.uint8))


def of(pictures: list[np.ndarray], dest: Path, classes: int = 3) -> Shards:
    """Tars of 8 images; every fifth is for validation."""
    dest.mkdir()
    for number, start in enumerate(range(0, len(pictures), 8)):
        members = []
        for i in range(start, min(start + 8, len(pictures))):
            members += [(f"s{i:04d}.png", png(pictures[i])), (f"s{i:04d}.cls", str(i % classes).encode())]
        raw_tar(dest / f"{'val' if number % 5 == 4 else 'train'}-{number}.tar", members)
    return index_existing(dest, [f"class {i}" for i in range(classes)])


def training(found: Shards) -> np.ndarray:
    """All training images, N H W 3, by another way."""
    pixels = []
    for info in found.split("train"):
        columns, data = found.columns(info), (found.path / info.file).read_bytes()
        for offset, size in zip(columns.offsets, columns.sizes, strict=True):
            pixels.append(np.asarray(Image.open(io.BytesIO(data[offset : offset + size])).convert("RGB")))
    return np.stack(pixels)


def test_figures_are_those_of_numpy(tmp_path: Path) -> None:
    made = of(colours(40), tmp_path / "data")
    found, values = statistics(made), training(made).astype(np.float64) / 255
    assert found.seen.mean == pytest.approx(values.mean((0, 1, 2)), abs=1e-12)
    assert found.seen.std == pytest.approx(values.std((0, 1, 2)), abs=1e-12)
    assert (found.chosen, found.of, found.seen.broken) == (len(values), len(values), 0)
    total = sum(split.counts for split in found.splits.values())
    assert total.tolist() == [14, 13, 13]
    assert {name: split.images for name, split in found.splits.items()} == {
        name: made.count(name) for name in made.splits
    }
    assert found.splits["train"].counts.sum() == len(values)
    assert found.formats == {"png": 1.0}
    assert json.loads(json.dumps(found.plain()))["mean"] == found.seen.mean


def test_images_weigh_the_same_whatever_their_size(tmp_path: Path) -> None:
    black, white = np.zeros((20, 30, 3), np.uint8), np.full((5, 10, 3), 255, np.uint8)
    made = of([black, white], tmp_path / "data", classes=1)
    found = statistics(made)
    assert (found.seen.mean, found.seen.std) == ([0.5], [0.5])  # grey: one channel
    assert (spread(found.seen.widths), spread(found.seen.heights)) == ((10, 20, 30), (5, 12.5, 20))


def test_a_choice_is_fixed_and_bounded(tmp_path: Path) -> None:
    made = of(colours(40), tmp_path / "data")
    steps: list[int] = []
    a, b = statistics(made, 10, steps.append), statistics(made, 10)
    assert a.seen == b.seen
    assert (a.chosen, len(steps), len(a.seen.widths)) == (10, 10, 10)
    assert a.seen.mean != statistics(made, None).seen.mean


def test_broken_images_are_counted(tmp_path: Path) -> None:
    members = [(f"s{i}.{end}", data) for i in range(12) for end, data in (("png", broken(i)), ("cls", b"0"))]
    raw_tar(tmp_path / "train-0.tar", members)
    found = statistics(index_existing(tmp_path))
    assert (found.chosen, found.seen.broken, len(found.seen.widths)) == (12, 2, 10)


def test_examples_are_spread_and_fixed(tmp_path: Path) -> None:
    made = of(colours(90), tmp_path / "data", classes=9)
    pictures, labels = examples(made, classes=5, each=3)
    assert labels == [label for label in (0, 2, 4, 6, 8) for _ in range(3)]
    assert all(tuple(picture.shape) == (3, 8, 8) for picture in pictures)
    again, _ = examples(made, classes=5, each=3)
    assert all((a == b).all() for a, b in zip(pictures, again, strict=True))
    small, _ = examples(made, classes=1, each=1, side=4)
    assert tuple(small[0].shape) == (3, 4, 4)


def test_examples_of_several_sets(tmp_path: Path) -> None:
    """A class has its number in all of them together, whatever it has in its own set."""
    pictures = [np.full((8, 8, 3), 40 * i, np.uint8) for i in range(6)]
    a, b = (of(pictures[i : i + 3], tmp_path / str(i)) for i in (0, 3))
    save_index(Shards(b.path, ["class 2", "class 1", "new"], b.splits))
    both = blend([a, open_shards(b.path)], [None, None])
    found = [(int(image[0, 0, 0]) // 40, label) for image, label in zip(*examples(both), strict=True)]
    names = [(picture, both.classes[label]) for picture, label in found]
    assert sorted(names) == [
        (0, "class 0"), (1, "class 1"), (2, "class 2"), (3, "class 2"), (4, "class 1"), (5, "new")
    ]  # fmt: skip

"""The words of `vitlab shards` as a person types them: what is said, what is written, the exit code."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitlab import cli
from vitlab.commands import inspecting
from vitlab.data import index_existing
from vitlab.data.making.sources import png
from vitlab.evaluation.data_pictures import GAP, TILE, contact_sheet, data_figure, tile
from vitlab.evaluation.pictures import save_figure

Said = Callable[..., tuple[int, str]]


@pytest.fixture
def vitlab(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Said:
    """Words → exit code and what was said."""

    def run(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["vitlab", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert isinstance(end.value.code, int)
        return end.value.code, capsys.readouterr().out

    return run


def write(dest: Path, n: int = 60, classes: int = 4) -> Path:
    """Tars of 16 images, most of them for training, and their index."""
    dest.mkdir()
    pictures = np.random.default_rng(0).integers(0, 256, (n, 8, 8, 3), dtype=np.uint8)
    for number, start in enumerate(range(0, n, 16)):
        split = ("train", "train", "val", "held_out")[number % 4]
        with tarfile.open(dest / f"{split}-{number:06d}.tar", "w") as tar:
            for i in range(start, min(n, start + 16)):
                for end, data in (("png", png(pictures[i])), ("cls", str(i % classes).encode())):
                    member = tarfile.TarInfo(f"s{i:04d}.{end}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    index_existing(dest, [f"class {i}" for i in range(classes)])
    return dest


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("whole") / "data")


# ---------------------------------------------------------------- verify


def test_all_well(whole: Path, vitlab: Said) -> None:
    code, said = vitlab("shards", "verify", whole)
    assert code == 0
    assert re.fullmatch(
        rf"{re.escape(str(whole))}: all well: 60 images in \d tars, 0\.\d MB, \d\.\d s\n", said
    )
    code, said = vitlab("shards", "verify", whole, "--fast")
    assert code == 0
    assert said.endswith(" s, images not decoded\n")


def test_what_is_bad_is_told(whole: Path, tmp_path: Path, vitlab: Said) -> None:
    path = Path(shutil.copytree(whole, tmp_path / "data"))
    (path / "train-000000.tar").unlink()
    with (path / "train-000001.tar").open("ab") as file:
        file.write(bytes(512))
    code, said = vitlab("shards", "verify", path, "--json", tmp_path / "bad.json")
    assert code == 1
    assert re.search(r"missing_shard +a shard's file is missing +1 *\n", said)
    assert "missing_shard: train-000000.tar: the file is missing, and with it 16 samples\n" in said
    line = rf"vitlab: {re.escape(str(path))}: 2 bad things found in 60 images in \d tars"
    assert re.search(line, said.splitlines()[-1])
    written = json.loads((tmp_path / "bad.json").read_text("utf8"))
    assert written["counts"] == {"missing_shard": 1, "changed_tar": 1}
    assert [one["shard"] for one in written["bad"]] == ["train-000000.tar", "train-000001.tar"]
    assert (written["images"], written["warnings"]) == (60, [])


def test_ten_are_named(tmp_path: Path, vitlab: Said) -> None:
    path = write(tmp_path / "data", n=400)
    tars = sorted(path.glob("*.tar"))
    for file in tars:
        file.unlink()
    code, said = vitlab("shards", "verify", path)
    assert code == 1
    assert said.count("the file is missing") == 10
    assert f"… and {len(tars) - 10} more; --json FILE writes all" in said


def test_an_address(vitlab: Said) -> None:
    code, said = vitlab("shards", "verify", "s3://bucket/flowers")
    assert code == 2
    assert said.startswith("vitlab: s3://bucket/flowers: verify looks at folders of this machine; ")


def test_no_shards(tmp_path: Path, vitlab: Said) -> None:
    code, said = vitlab("shards", "verify", tmp_path)
    assert code == 2
    assert said.startswith(f"vitlab: {tmp_path}: no index.json in it; ")


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        (("stats", "--fast"), "--fast"),
        (("digits", "--all"), "--all"),
        (("verify", "--picture", "x.png"), "--picture"),
    ],
)
def test_flags_of_another_word(words: tuple[str, ...], flag: str, tmp_path: Path, vitlab: Said) -> None:
    code, said = vitlab("shards", words[0], tmp_path / "there", *words[1:])
    assert code == 2
    assert said.startswith(f"vitlab: {flag}: is for `vitlab shards ")
    assert not (tmp_path / "there").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("folder:/none.max_bad.d",), "SOURCE: /none.max_bad.d: no such directory"),
        (("digits", "--held-out", "0.5", "--val", "0.6"), "--held-out + --val: given 0.5 + 0.6"),
        (("digits", "--quality", "0"), "--quality: given 0"),
        (("digits", "--workers", "-1"), "--workers: given -1"),
        (("digits", "--max-pixels", "9"), "--max-pixels allows 9 in all"),
        (("digits", "--max-pixels", "9"), "--max-bad allows 0.10%"),
    ],
)
def test_settings_are_called_as_flags(
    words: tuple[str, ...], message: str, tmp_path: Path, vitlab: Said
) -> None:
    code, said = vitlab("shards", words[0], tmp_path / "there", *words[1:])
    assert code == 2
    assert message in said
    assert said.count("\n") == 1


# ---------------------------------------------------------------- stats


def test_stats(whole: Path, tmp_path: Path, vitlab: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, said = vitlab("shards", "stats", whole, "--json", "stats.json")
    assert code == 0
    written = json.loads(Path("stats.json").read_text("utf8"))
    assert sum(split["images"] for split in written["splits"].values()) == 60
    for name in ("mean", "std"):
        assert f"  {name}: [{', '.join(f'{value:.4f}' for value in written[name])}]\n" in said
        assert len(written[name]) == 3
    train = written["splits"]["train"]
    assert re.search(rf"\n *train +{train['images']} +[\d.]+ +4 *\n", said)
    assert re.search(rf"\n *class 2 +{train['counts'][2]} ", said)
    assert f"sizes, mean and spread are of all {train['images']} training images\n" in said
    assert said.endswith("picture: shards-stats.png\n")
    with Image.open("shards-stats.png") as picture:
        assert min(picture.size) > 500
    assert sorted(p.name for p in whole.iterdir() if p.suffix == ".png") == []


def test_a_choice_is_said(whole: Path, tmp_path: Path, vitlab: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitlab.data.shards.statistics.LOOKED", 10)
    monkeypatch.setattr(inspecting, "_draw", lambda *given: None)
    picture = tmp_path / "x.png"
    said = vitlab("shards", "stats", whole, "--picture", picture)[1]
    assert re.search(r"are of 10 of \d+ training images, a fixed random choice; --all takes all\n", said)
    assert re.search(
        r"of all \d+ training", vitlab("shards", "stats", whole, "--picture", picture, "--all")[1]
    )


def test_many_classes_are_cut(tmp_path: Path, vitlab: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspecting, "CLASSES", 2)
    monkeypatch.setattr(inspecting, "_draw", lambda *given: None)
    path = write(tmp_path / "data")
    said = vitlab("shards", "stats", path, "--picture", tmp_path / "x.png")[1]
    assert "class 1 " in said
    assert "class 2 " not in said
    assert "… and 2 more; all of them have 15 images\n" in said
    path = write(tmp_path / "more", n=62)
    said = vitlab("shards", "stats", path, "--picture", tmp_path / "x.png")[1]
    assert "… and 2 more; the smallest: class 2 (15), the largest: class 0 (16)\n" in said


def test_a_picture_that_cannot_be_written(whole: Path, tmp_path: Path, vitlab: Said) -> None:
    code, said = vitlab("shards", "stats", whole, "--picture", tmp_path / "none" / "x.png")
    assert code == 2
    assert said.startswith("vitlab: --picture: ")


# ---------------------------------------------------------------- pictures


def test_a_sheet_has_a_tile_for_every_image() -> None:
    images = [torch.full((3, 20, 30), 10 * i, dtype=torch.uint8) for i in range(5)]
    axes = contact_sheet(
        images, [7, 2, 7, 7, 2], list("abcdefgh"), "title", [0, 0, 1, 0, 0, 0, 0, 1234]
    ).axes[0]
    canvas = axes.images[0].get_array()
    assert canvas is not None
    assert canvas.shape == (2 * TILE + GAP, 3 * TILE + 2 * GAP, 3)
    middles = canvas[TILE // 2 :: TILE + GAP, TILE // 2 :: TILE + GAP, 0]
    assert middles.tolist() == [
        [10, 40, 255],
        [0, 20, 30],
    ]  # by class, in the order given; one place is empty
    names = [name.get_text() for name in axes.get_yticklabels()]
    assert names == ["c\n1 image", "h\n1,234 images"]


def test_a_sheet_is_bounded() -> None:
    image = torch.zeros(1, 4, 4, dtype=torch.uint8)
    labels = [i // 10 for i in range(200)]
    canvas = (
        contact_sheet([image] * 200, labels, list(map(str, range(20))), "many").axes[0].images[0].get_array()
    )
    assert canvas is not None
    assert canvas.shape[:2] == (12 * (TILE + GAP) - GAP, 8 * (TILE + GAP) - GAP)


def test_small_images_keep_their_pixels() -> None:
    image = torch.tensor([[[0, 50], [100, 150]]], dtype=torch.uint8)
    shown = tile(image, 8)
    assert shown.shape == (8, 8, 3)
    assert np.array_equal(shown[..., 0], image[0].numpy().repeat(4, 0).repeat(4, 1))
    assert tile(torch.zeros(3, 500, 300, dtype=torch.uint8)).shape == (TILE, TILE, 3)


@pytest.mark.parametrize(("classes", "side"), [(1, 8), (12, 8), (300, 3000)])
def test_a_picture_of_few_and_many_classes(classes: int, side: int, tmp_path: Path) -> None:
    sheet = ([torch.zeros(3, 8, 8, dtype=torch.uint8)] * 2, [0, classes - 1])
    counts = {"train": list(range(1, classes + 1)), "val": [0] * classes}
    figure = data_figure(sheet, [f"class {i}" for i in range(classes)], counts, ([8, side], [8, 9]), "title")
    save_figure(figure, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 5000
    legends = [
        text.get_text()
        for axes in figure.axes
        if (legend := axes.get_legend())
        for text in legend.get_texts()
    ]
    assert legends == ["train"]  # a split without images has no entry

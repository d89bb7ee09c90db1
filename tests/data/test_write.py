"""Sources and settings: what comes in is what lies on disk, and every refusal is one clear line."""

from __future__ import annotations

import gzip
import io
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from samples import config, images, one_line, shards, source

from vitlab.config import UserError, build, deciding
from vitlab.data import (
    Raw,
    Sample,
    Shards,
    ShardsConfig,
    Source,
    WriteOptions,
    check_classes,
    digits,
    folder,
    hugging_face,
    normalisation,
    open_shards,
    open_source,
    prepare,
    progress,
    write_shards,
)
from vitlab.data import write as write_module
from vitlab.data.bad import BadInputError
from vitlab.data.packing import packed
from vitlab.data.read import Reader
from vitlab.data.sources import png

FEATURES = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})


def jpeg(image: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).save(out, "JPEG")
    return out.getvalue()


def table(n: int = 20) -> datasets.Dataset:
    rows = {
        "image": [{"bytes": jpeg(x), "path": None} for x in images(n)],
        "label": [i % 2 for i in range(n)],
    }
    return datasets.Dataset.from_dict(rows, features=FEATURES)


def rows_of(src: Source, start: int = 0) -> list[Sample]:
    """The samples as they are copied, by the writer's own way."""
    how = WriteOptions()
    return [Sample(raw.key, *packed(raw.read(), how), raw.label) for raw in src.samples(start)]


def write_idx(path: Path, array: np.ndarray, packed: bool) -> None:
    data = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()
    path.write_bytes(gzip.compress(data) if packed else data)


def test_the_files_of_mnist(tmp_path: Path) -> None:
    wanted = []
    for name, count, zipped in (("train", 5, True), ("t10k", 3, False)):
        pixels = np.random.default_rng(count).integers(0, 256, (count, 4, 6), np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 3
        end = ".gz" if zipped else ""
        write_idx(tmp_path / f"{name}-images-idx3-ubyte{end}", pixels, zipped)
        write_idx(tmp_path / f"{name}-labels-idx1-ubyte{end}", labels, zipped)
        wanted += list(zip(pixels, labels.tolist(), strict=True))
        if zipped:  # beside its unpacked self it is no second file, and half a download is none
            write_idx(tmp_path / f"{name}-images-idx3-ubyte", pixels, packed=False)
            write_idx(tmp_path / f"{name}-labels-idx1-ubyte", labels, packed=False)
            (tmp_path / f"{name}-images-idx3-ubyte.gz.part").write_bytes(b"")
    found = open_source(f"idx:{tmp_path}")
    assert (found.total, list(found.classes)) == (8, ["0", "1", "2"])
    for sample, (pixels, label) in zip(rows_of(found), wanted, strict=True):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(sample.data))), pixels)
        assert sample.label == label
    few = prepare(
        ShardsConfig(source=f"idx:{tmp_path}", limit=6, held_out=0.0, val=0.0, image_size=4),
        tmp_path / "shards",
    )
    assert few.count("train") == 6


def test_broken_files_of_mnist(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no NAME-images-idx3-ubyte"):
        open_source(f"idx:{tmp_path}")
    file, labels = tmp_path / "a-images-idx3-ubyte.gz", tmp_path / "a-labels-idx1-ubyte.gz"
    write_idx(file, np.zeros((2, 3, 3), np.uint8), True)
    with pytest.raises(UserError, match=r"put a-labels-idx1-ubyte.gz beside it"):
        open_source(f"idx:{tmp_path}")
    write_idx(labels, np.zeros(3, np.uint8), True)
    with pytest.raises(UserError, match=r"\(2, 3, 3\) images, \(3,\) labels"):
        open_source(f"idx:{tmp_path}")
    whole = gzip.decompress(file.read_bytes())
    for data in (whole[:-1], whole[:6], b"", b"GIF89a" + whole):
        file.write_bytes(gzip.compress(data))
        with pytest.raises(UserError, match="are not idx bytes"):
            open_source(f"idx:{tmp_path}")
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(UserError, match="cannot be unpacked"):
        open_source(f"idx:{tmp_path}")


def test_digits(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    made = write_shards(digits(), tmp_path / "d", WriteOptions(shard_samples=200))
    counts = {name: made.count(name) for name in made.splits}
    assert sum(counts.values()) == 1797
    assert len(made.split("train")) >= 5
    assert made.classes == [str(i) for i in range(10)]
    reader, (pixels, labels) = Reader(made, "val"), load_digits(return_X_y=True)
    for i in range(counts["val"]):
        image, label, key = reader.read(i, 1)
        number = int(key.removeprefix("digits-"))
        assert label == labels[number]
        assert np.array_equal(image.reshape(-1).numpy(), np.round(pixels[number] * 255 / 16))
    assert open_shards(tmp_path / "d") == made


def test_folder(tmp_path: Path) -> None:
    for i, picture in enumerate(images(30)):
        place = tmp_path / "in" / ("dog" if i % 2 else "cat")
        place.mkdir(parents=True, exist_ok=True)
        (place / f"pic.{i}.jpeg").write_bytes(jpeg(picture))
    (tmp_path / "in" / "cat" / "notes.txt").write_text("no image")
    found = open_source(str(tmp_path / "in"))
    samples = rows_of(found)
    assert list(found.classes) == ["cat", "dog"]
    assert found.total == len(samples) == 30
    assert sorted(s.data for s in samples) == sorted(map(jpeg, images(30)))
    assert all(s.extension == "jpg" and "." not in s.key and found.classes[s.label] in s.key for s in samples)
    assert len({s.key for s in samples}) == 30
    assert sum(a.label != b.label for a, b in itertools.pairwise(samples)) > 5
    assert rows_of(folder(tmp_path / "in")) == samples
    made = prepare(ShardsConfig(source=f"folder:{tmp_path / 'in'}", image_size=8), tmp_path / "out")
    assert made.classes == ["cat", "dog"]


def test_folders_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such directory"):
        open_source(f"folder:{tmp_path / 'none'}")
    with pytest.raises(UserError, match="no images in it"):
        folder(tmp_path)
    (tmp_path / "a.png").write_bytes(png(images(1)[0]))
    with pytest.raises(UserError, match="lie flat in it; move them into one sub-folder for every class"):
        folder(tmp_path)
    (tmp_path / "cat").mkdir()
    (tmp_path / "dog").mkdir()
    (tmp_path / "cat" / "a.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match="no images in the class folder dog"):
        folder(tmp_path)
    (tmp_path / "dog").rmdir()
    with pytest.raises(BadInputError, match="begins with b'not an i'; allowed: PNG, JPEG") as caught:
        rows_of(folder(tmp_path))
    assert caught.value.kind == "unknown_format"


@pytest.mark.parametrize("streaming", [False, True])
def test_hugging_face_bytes_are_copied(tmp_path: Path, streaming: bool) -> None:
    data = table().to_iterable_dataset() if streaming else table()
    found = hugging_face(data)
    samples = rows_of(found)
    assert found.total == (None if streaming else 20)
    given = {jpeg(x): i % 2 for i, x in enumerate(images(20))}
    assert {s.data: s.label for s in samples} == given
    assert {s.extension for s in samples} == {"jpg"}
    made = write_shards(hugging_face(data), tmp_path / "h", WriteOptions(shard_samples=4))
    assert made.classes == ["cat", "dog"]


def test_hugging_face_pixels_files_and_names(tmp_path: Path) -> None:
    pictures = images(4, channels=3)
    file = tmp_path / "x.png"
    file.write_bytes(png(pictures[0]))
    rows = {"img": [str(file), *[Image.fromarray(x) for x in pictures[1:]]], "kind": ["b", "a", "b", "c"]}
    features = datasets.Features({"img": datasets.Image(), "kind": datasets.Value("string")})
    found = hugging_face(datasets.Dataset.from_dict(rows, features=features))
    samples = rows_of(found)
    assert list(found.classes) == ["a", "b", "c"]
    decoded = {np.array(Image.open(io.BytesIO(s.data))).tobytes(): s.label for s in samples}
    assert decoded == {x.tobytes(): label for x, label in zip(pictures, [1, 0, 1, 2], strict=True)}


def test_hugging_face_stream_of_pixels_with_numbers(tmp_path: Path) -> None:
    pictures = images(3)

    def rows() -> Iterator[dict[str, object]]:
        yield from ({"image": Image.fromarray(x), "label": i * 2} for i, x in enumerate(pictures))

    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    found = hugging_face(datasets.IterableDataset.from_generator(rows, features=features))
    decoded = [np.array(Image.open(io.BytesIO(s.data))) for s in rows_of(found)]
    assert all(map(np.array_equal, decoded, pictures))
    assert write_shards(found, tmp_path / "s", WriteOptions(held_out=0.0, val=0.0)).classes == list("01234")


def test_hugging_face_directory(tmp_path: Path) -> None:
    datasets.DatasetDict({"train": table(), "test": table(6)}).save_to_disk(tmp_path / "saved")
    assert open_source(f"hf:{tmp_path / 'saved'}:test").total == 6
    assert open_source(f"hf:{tmp_path / 'saved'}").total == 20
    with pytest.raises(UserError, match=r"no split 'tests'; there are: train, test; did you mean 'test'"):
        open_source(f"hf:{tmp_path / 'saved'}:tests")
    with pytest.raises(UserError, match="cannot be loaded") as caught:
        open_source(f"hf:{tmp_path / 'nothing'}")
    one_line(caught.value)


def test_hugging_face_refused() -> None:
    with pytest.raises(UserError, match="given list; allowed"):
        hugging_face([1])
    with pytest.raises(UserError, match="which column is the image"):
        hugging_face(datasets.Dataset.from_dict({"label": [1]}))
    with pytest.raises(UserError, match=r"data\.label_column: given 'labl'.*did you mean 'label'"):
        hugging_face(table(), label="labl")
    two = table().add_column("other", [0] * 20).cast_column("other", datasets.ClassLabel(names=["x"]))
    assert list(hugging_face(two).classes) == ["cat", "dog"]
    assert list(hugging_face(two, label="other").classes) == ["x"]
    with pytest.raises(UserError, match="which column is the label"):
        hugging_face(two.rename_column("label", "first"))
    rows = {"image": [None], "label": [0]}
    with pytest.raises(BadInputError, match="no image in this row"):
        rows_of(hugging_face(datasets.Dataset.from_dict(rows, features=FEATURES)))
    rows = {"image": [Image.fromarray(images(1)[0])], "label": [None]}
    assert [
        row.label for row in hugging_face(datasets.Dataset.from_dict(rows, features=FEATURES)).samples(0)
    ] == [-1]


def test_unknown_source() -> None:
    with pytest.raises(UserError, match=r"given 'digit'; allowed: digits, .*did you mean 'digits'"):
        open_source("digit")


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


def test_long_writes_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shards(tmp_path / "a")
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(progress, "SHOW_AFTER", 0.0)
    shards(tmp_path / "b")
    out, err = capsys.readouterr()
    assert out == ""
    assert "100/100" in err
    assert "images/s" in err


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

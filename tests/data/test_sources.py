"""Sources: what comes in is what lies on disk, from any position on, and every refusal is one clear line."""

from __future__ import annotations

import gzip
import io
import itertools
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from samples import images, one_line, raw_tar, shards, stored

from vitlab.config import UserError
from vitlab.data import (
    Sample,
    ShardsConfig,
    Source,
    WriteOptions,
    arrays,
    folder,
    hugging_face,
    limited,
    open_source,
    prepare,
    write_shards,
)
from vitlab.data.bad import BadInputError
from vitlab.data.making.opening import absolute
from vitlab.data.making.packing import packed
from vitlab.data.making.sources import png

TRAIN = WriteOptions(held_out=0.0, val=0.0)

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


def test_hugging_face_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    datasets.DatasetDict({"train": table(), "test": table(6)}).save_to_disk(tmp_path / "saved")
    assert open_source(f"hf:{tmp_path / 'saved'}:test").total == 6
    assert open_source(f"hf:{tmp_path / 'saved'}:train").total == 20
    capsys.readouterr()
    assert open_source(f"hf:{tmp_path / 'saved'}").total == 20
    name = f"hf:{tmp_path / 'saved'}"
    assert capsys.readouterr().out == f"  {name}: its split train is read; beside it there is {name}:test\n"
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
    with pytest.raises(UserError, match=r"hf-stream:NAME\[:split\]; did you mean 'folder'"):
        open_source("foldr:x")


# ---------------------------------------------------------------- a table


def written(path: Path, text: str) -> Path:
    path.write_text(text, "utf8")
    return path


def pictures_in(path: Path, n: int = 6) -> list[np.ndarray]:
    path.mkdir(parents=True, exist_ok=True)
    made = images(n)
    for i, picture in enumerate(made):
        (path / f"{i}.png").write_bytes(png(picture))
    return made


def test_a_table_with_names(tmp_path: Path) -> None:
    made = pictures_in(tmp_path / "in")
    rows = "".join(f'in/{i}.png,"{name}",7\n' for i, name in enumerate(["ox", "ass, grey"] * 3))
    found = open_source(f"csv:{written(tmp_path / 'x.csv', 'file,label,fold' + chr(10) + rows)}")
    assert (list(found.classes), found.total) == (["ass, grey", "ox"], 6)
    assert {s.data: s.label for s in rows_of(found)} == {png(x): 1 - i % 2 for i, x in enumerate(made)}
    assert [raw.origin for raw in found.samples(0)] != [f"in/{i}.png" for i in range(6)]
    assert rows_of(found, 4) == rows_of(found)[4:]


def test_a_table_with_numbers_and_tabs(tmp_path: Path) -> None:
    pictures_in(tmp_path)
    place = written(tmp_path / "x.tsv", "\ufeffwhere\tkind\tother\n0.png\t0\ta\n1.png\t4\tb\n")
    with pytest.raises(UserError, match=r"which column is the label\? .*kind, other; name it in data.label"):
        open_source(f"csv:{place}")
    with pytest.raises(UserError, match=r"data.image_column: given 'wher'; .*did you mean 'where'"):
        open_source(f"csv:{place}", "wher", "kind")
    found = open_source(f"csv:{place}", "where", "kind")
    assert sorted(s.label for s in rows_of(found)) == [0, 4]
    assert write_shards(found, tmp_path / "s", TRAIN).classes == list("01234")


def test_rows_that_lack_something(tmp_path: Path) -> None:
    pictures_in(tmp_path / "in")
    inside = tmp_path / "in" / "5.png"
    names = [
        "in/0.png",
        "../x.png",
        "in/../../x.png",
        "/etc/hostname",
        "in/none.png",
        "",
        "in/1.png",
        str(inside),
    ]
    rows = "".join(f"{name},{'' if name == 'in/1.png' else 3}\n" for name in names) + "in/2.png\n"
    found = open_source(f"csv:{written(tmp_path / 'x.csv', 'path,label' + chr(10) + rows)}")
    made = write_shards(found, tmp_path / "s", TRAIN.model_copy(update={"max_bad": 0.8}))
    assert made.count("train") == 2
    assert sorted(bad.kind for bad in made.bad) == ["no_image"] * 2 + ["no_label"] * 2 + ["unsafe_name"] * 3
    assert all(bad.shard == f"csv:{tmp_path / 'x.csv'}" for bad in made.bad)
    out = next(bad for bad in made.bad if bad.key == "../x.png")
    assert out.reason == f"it leads out of {tmp_path}"
    with pytest.raises(
        UserError, match=r"of 9 images cannot become samples \(.*max_bad allows 0.10%; the fir"
    ):
        write_shards(found, tmp_path / "t", TRAIN)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "its header has 0 columns"),
        (b"a.png 1\n", "its header has 1 columns; give a first line that names"),
        (b"path,label\n", "no rows below its header"),
        (b"path,label\n\xff\xfe,1\n", "no CSV in UTF-8"),
        (b'path,label\n"a,1\n', "no CSV in UTF-8"),
    ],
)
def test_tables_refused(tmp_path: Path, data: bytes, text: str) -> None:
    (tmp_path / "x.csv").write_bytes(data)
    with pytest.raises(UserError, match=text) as caught:
        open_source(f"csv:{tmp_path / 'x.csv'}")
    one_line(caught.value)
    with pytest.raises(UserError, match="No such file or directory; give a file with a header"):
        open_source(f"csv:{tmp_path / 'y.csv'}")


# ---------------------------------------------------------------- arrays


@pytest.mark.parametrize("channels", [None, 1, 3, 4])
def test_arrays(tmp_path: Path, channels: int | None) -> None:
    shape = (7, 5, 4) if channels is None else (7, 5, 4, channels)
    pixels = np.random.default_rng(1).integers(0, 256, shape, np.uint8)
    labels = np.arange(7) % 3
    np.savez(tmp_path / "x.npz", images=pixels, labels=labels, more=np.zeros(2, np.float32))
    (tmp_path / "x").mkdir()
    np.save(tmp_path / "x" / "images.npy", pixels)
    np.save(tmp_path / "x" / "labels.npy", labels)
    memory = rows_of(arrays(pixels, labels))
    assert sorted(s.key for s in memory) == [f"row-{i:07d}" for i in range(7)]
    assert [s.key for s in memory] != sorted(s.key for s in memory)
    for sample in memory:
        row = int(sample.key.removeprefix("row-"))
        assert sample.label == labels[row]
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(sample.data))), pixels[row].squeeze())
    for name in (f"npy:{tmp_path / 'x.npz'}", f"npy:{tmp_path / 'x'}"):
        found = open_source(name, None, "labels")
        assert (rows_of(found), found.total, list(found.classes)) == (memory, 7, [])
        assert rows_of(found, 5) == memory[5:]
    named = write_shards(arrays(pixels, labels, ["x", "y", "z", "none"]), tmp_path / "s", TRAIN)
    assert named.classes == ["x", "y", "z", "none"]


def test_labels_of_arrays_that_are_none(tmp_path: Path) -> None:
    found = arrays(np.zeros((4, 2, 2), np.uint8), [0, -1, 5, -2], ["a", "b"])
    made = write_shards(found, tmp_path / "s", TRAIN.model_copy(update={"max_bad": 0.75}))
    wanted = {
        ("no_label", "row 1", "it has no label"),
        ("wrong_label", "row 2", "it has the label 5; allowed: 0 to 1"),
        ("wrong_label", "row 3", "it has the label -2; allowed: 0 to 1"),
    }
    assert {(bad.kind, bad.key, bad.reason) for bad in made.bad} == wanted
    ids = write_shards(arrays(np.zeros((2, 2, 2), np.uint8), [0, 10**9]), tmp_path / "t",
                       TRAIN.model_copy(update={"max_bad": 0.5}))  # fmt: skip
    assert (ids.classes, ids.bad[0].kind) == (["0"], "wrong_label")


def test_arrays_refused(tmp_path: Path) -> None:
    good, labels = np.zeros((3, 2, 2), np.uint8), np.zeros(3, int)
    for pixels, text in [
        (good.astype(np.float32), r"images are float32 of shape \(3, 2, 2\); allowed: uint8 of N H W"),
        (good[0], r"of shape \(2, 2\)"),
        (np.zeros((3, 2, 2, 2), np.uint8), "with 1, 3 or 4 colours"),
        (good[:0], r"labels are int64 of shape \(3,\); allowed: integers of shape \(0,\)"),
    ]:
        with pytest.raises(UserError, match=text):
            arrays(pixels, labels)
    with pytest.raises(UserError, match="labels are float64"):
        arrays(good, labels.astype(float))
    with pytest.raises(UserError, match="no images in it"):
        arrays(good[:0], labels[:0])
    with pytest.raises(UserError, match="no such file"):
        open_source(f"npy:{tmp_path / 'none.npz'}")
    np.save(tmp_path / "one.npy", good)
    with pytest.raises(UserError, match="holds a single array; give the directory"):
        open_source(f"npy:{tmp_path / 'one.npy'}")


def test_nothing_pickled_is_opened(tmp_path: Path) -> None:
    bomb = np.array([{"a": 1}], dtype=object)
    np.savez(tmp_path / "x.npz", images=bomb, labels=np.zeros(1, int))
    (tmp_path / "x").mkdir()
    np.save(tmp_path / "x" / "images.npy", bomb, allow_pickle=True)
    (tmp_path / "y.npz").write_bytes(b"\x80\x04K\x01.")
    for name in ("x.npz", "x", "y.npz"):
        with pytest.raises(UserError, match=r"cannot be opened: .*save it again with numpy.save") as caught:
            open_source(f"npy:{tmp_path / name}")
        one_line(caught.value)


# ---------------------------------------------------------------- tars


def test_foreign_tars_keep_every_sample_and_label(tmp_path: Path) -> None:
    place, wanted = tmp_path / "in", []
    place.mkdir()
    for number in range(2):  # the same keys in both
        members: list[tuple[str, bytes]] = []
        for i, picture in enumerate(images(12, seed=number)):
            data = jpeg(picture)
            members += [(f"a/{i}.JPEG", data), (f"a/{i}.json", b"{}"), (f"a/{i}.cls", b"%d" % (i % 5))]
            wanted.append((data, i % 5))
        raw_tar(place / f"shard-{number}.tar", members)
    raw_tar(place / "odd.tar", [("x.cls", b"1"), ("y.png", png(images(1)[0])), ("y.cls", b"2")])
    found = open_source(f"tars:{place}")
    assert found.total == 25
    assert rows_of(found, 20) == rows_of(found)[20:]
    made = write_shards(found, tmp_path / "s", WriteOptions(shard_samples=4, max_bad=0.1))
    split = {name: stored(made, name) for name in made.splits}
    assert min(map(len, split.values())) > 0
    kept = sorted((data, label) for rows in split.values() for _, data, label in rows)
    assert kept[1:] == sorted(wanted)
    assert len({key for rows in split.values() for key, _, _ in rows}) == 25
    assert sorted((s.data, s.label) for s in rows_of(found))[1:] == sorted(wanted)
    assert (made.classes, [bad.kind for bad in made.bad]) == (list("01234"), ["no_image"])


def test_tars_that_are_split_stay_split(tmp_path: Path) -> None:
    first = shards(tmp_path / "a")
    how = WriteOptions(held_out=0.5, val=0.3)
    again = write_shards(open_source(f"tars:{first.path}"), tmp_path / "b", how)
    assert again.classes == first.classes
    assert [again.count(split) for split in again.splits] == [first.count(s) for s in first.splits]
    assert again.made["rule"] == "the tars' own splits"
    (first.path / "index.json").unlink()
    named = open_source(f"tars:{first.path}")
    assert {raw.split for raw in named.samples(0)} == {"train", "val", "held_out"}
    other = write_shards(named, tmp_path / "c")
    assert [other.count(split) for split in other.splits] == [first.count(s) for s in first.splits]


def test_tars_without_labels_stay_without(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    raw_tar(tmp_path / "in" / "x.tar", [(f"{i}.png", png(x)) for i, x in enumerate(images(6))])
    made = write_shards(open_source(f"tars:{tmp_path / 'in'}"), tmp_path / "s", TRAIN)
    assert ([label for _, _, label in stored(made, "train")], made.classes, made.bad) == ([-1] * 6, [], [])
    raw_tar(tmp_path / "in" / "y.tar", [("a.png", png(images(1)[0])), ("a.cls", b"1")])
    found = open_source(f"tars:{tmp_path / 'in'}")
    with pytest.raises(UserError, match=r"at least 4 of 7 images cannot become samples \(4 no_label\)"):
        write_shards(found, tmp_path / "t", TRAIN.model_copy(update={"max_bad": 0.5}))


def test_tars_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such directory"):
        open_source(f"tars:{tmp_path / 'none'}")
    with pytest.raises(UserError, match=r"no .tar file in it"):
        open_source(f"tars:{tmp_path}")
    tar = raw_tar(tmp_path / "x.tar", [(f"{i}.{end}", data) for i in range(8) for end, data in
                                       (("cls", b"1"), ("png", png(images(8, seed=2)[i])))])  # fmt: skip
    found = open_source(f"tars:{tmp_path}")
    tar.write_bytes(tar.read_bytes()[:6000])
    made = write_shards(found, tmp_path / "s", TRAIN.model_copy(update={"max_bad": 0.9}))
    assert {bad.kind for bad in made.bad} == {"cut_tar"}
    assert made.count("train") + len(made.bad) == 8
    tar.unlink()
    with pytest.raises(UserError, match=r"8 of 8 images cannot become samples \(8 missing_shard\)"):
        write_shards(found, tmp_path / "t", TRAIN.model_copy(update={"max_bad": 0.99}))


# ---------------------------------------------------------------- all of them


def test_a_stream_by_its_name(tmp_path: Path) -> None:
    datasets.DatasetDict({"train": table(), "test": table(6)}).save_to_disk(tmp_path / "saved")
    found = open_source(f"hf-stream:{tmp_path / 'saved'}:test")
    assert found.total is None
    assert [s.label for s in rows_of(found)] == [0, 1] * 3
    assert rows_of(found, 4) == rows_of(found)[4:]
    whole = open_source(f"hf:{tmp_path / 'saved'}")
    assert rows_of(whole, 15) == rows_of(whole)[15:]


def test_a_limit(tmp_path: Path) -> None:
    found = limited(hugging_face(table()), 5)
    assert (len(rows_of(found)), len(rows_of(found, 3)), len(rows_of(found, 9)), found.total) == (5, 2, 0, 5)
    assert found.fingerprint != hugging_face(table()).fingerprint == hugging_face(table()).fingerprint


def test_a_changed_source_has_another_fingerprint(tmp_path: Path) -> None:
    pictures_in(tmp_path / "in" / "a")
    before = folder(tmp_path / "in").fingerprint
    assert folder(tmp_path / "in").fingerprint == before
    (tmp_path / "in" / "a" / "0.png").write_bytes(png(images(1, seed=9)[0]))
    assert folder(tmp_path / "in").fingerprint != before


def test_names_by_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").mkdir()
    for kind in ("folder", "csv", "npy", "idx", "tars"):
        assert absolute(f"{kind}:x") == f"{kind}:{tmp_path / 'x'}"
    assert absolute("x") == str(tmp_path / "x")
    assert absolute("hf-stream:x:test") == f"hf-stream:{tmp_path / 'x'}:test"
    assert (absolute("hf:user/name:train"), absolute("digits")) == ("hf:user/name:train", "digits")

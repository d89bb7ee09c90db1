"""Tars that may be broken: each kind of damage is named, all good samples are found, whoever wrote them."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import random
import subprocess
import tarfile
import time
import tracemalloc
from pathlib import Path

import pytest
import webdataset
from broken import ALL, BLOCK, Files, cut_payload, files, jpeg, labels, pack, png, v7
from samples import one_line, raw_tar

from vitlab.config import UserError
from vitlab.data import open_shards
from vitlab.data.bad import KINDS
from vitlab.data.shards import indexing, scan
from vitlab.data.shards.index import columns_path
from vitlab.data.shards.indexing import index_existing
from vitlab.data.shards.scan import Member, from_memory, parse, sweep, walk
from vitlab.data.shards.tars import Examined, examine, examine_bytes, index_tar, sha256_file


def found(data: bytes) -> Examined:
    return examine_bytes(from_memory(data), Path("x.tar"))


def by_key(got: Examined) -> dict[str, int]:
    return dict(zip(got.columns.keys, got.columns.labels, strict=True))


def named(got: Examined) -> list[tuple[str, str]]:
    return [(bad.kind, bad.key) for bad in got.bad]


def whole(got: Examined, data: bytes, wanted: dict[str, bytes]) -> bool:
    """All samples are there, byte for byte, and nothing is bad."""
    columns = got.columns
    places = zip(columns.keys, columns.offsets, columns.sizes, strict=True)
    return not got.bad and {key: data[o : o + s] for key, o, s in places} == wanted


# ---------------------------------------------------------------- what is bad


@pytest.mark.parametrize("name", ALL)
def test_each_bad_thing_is_named(tmp_path: Path, name: str) -> None:
    bad_tar = ALL[name](tmp_path / "x.tar")
    columns, bad = index_tar(bad_tar.path)
    assert dict(zip(columns.keys, columns.labels, strict=True)) == bad_tar.labels
    assert [(one.kind, one.shard, one.key) for one in bad] == [(k, "x.tar", key) for k, key, _ in bad_tar.bad]
    for one, (_, _, part) in zip(bad, bad_tar.bad, strict=True):
        assert part in one.reason
        assert str(one).isprintable()
        assert one.kind in KINDS


def test_every_image_is_where_the_index_says(tmp_path: Path) -> None:
    for make in ALL.values():
        made = make(tmp_path / "x.tar")
        columns, _ = index_tar(made.path)
        data = made.path.read_bytes()
        for key, offset, size in zip(columns.keys, columns.offsets, columns.sizes, strict=True):
            assert data[offset : offset + size] == png(9 if key == "x" else int(key))


@pytest.mark.parametrize("pack_it", [gzip.compress, bz2.compress, lzma.compress])
def test_compressed_tars_are_refused(tmp_path: Path, pack_it: object) -> None:
    (tmp_path / "x.tar").write_bytes(pack_it(pack(files(3))))
    with pytest.raises(UserError, match=r"x\.tar: compressed with (gzip|bzip2|xz), .* unpack it") as caught:
        index_existing(tmp_path)
    one_line(caught.value)
    assert os.listdir(tmp_path) == ["x.tar"]


def test_a_folder_of_compressed_tars_says_so(tmp_path: Path) -> None:
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(pack(files(3))))
    with pytest.raises(
        UserError, match=r"no \.tar file in it, only compressed ones such as x\.tar\.gz; unpack"
    ):
        index_existing(tmp_path)


def test_zstd_is_told_by_its_first_bytes() -> None:
    with pytest.raises(UserError, match="compressed with zstd"):
        found(b"\x28\xb5\x2f\xfd" + bytes(100))


def test_of_two_samples_with_one_key_the_first_with_a_label_stays() -> None:
    data = pack([("a.png", png(1)), *files(2), ("a.png", png(2)), ("a.cls", b"4"), ("a.png", png(3))])
    got = found(data)
    assert by_key(got) == {"000": 0, "001": 1, "a": 4}
    assert data[got.columns.offsets[2] :].startswith(png(2))
    assert got.columns.offsets == sorted(got.columns.offsets)
    assert named(got) == [("duplicate_key", "a"), ("duplicate_key", "a")]
    assert "this one has a label" in got.bad[0].reason


def test_without_any_label_none_is_missed() -> None:
    got = found(pack([("a.png", png(1)), ("b.jpg", jpeg(2))]))
    assert by_key(got) == {"a": -1, "b": -1}
    assert not got.bad


def test_one_bad_member_is_one_bad_thing() -> None:
    """A sample that has lost a member under one name is not named again for lacking it."""
    data = pack([*files(2), ("/x/y.png", png(1)), ("/x/y.cls", b"1")])
    assert named(found(data)) == [("unsafe_name", "/x/y")]


def test_what_is_said_is_printable_and_short() -> None:
    key = "é" * 70 + "\u202e" * 20
    got = found(pack([(f"{key}.cls", b"1")], tarfile.PAX_FORMAT))
    assert got.bad[0].kind == "no_image"
    assert len(got.bad[0].key) == 80
    assert str(got.bad[0]).isprintable()


def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    data = pack([("\udce9a.png", png(1)), ("\udce9a.cls", b"2")], tarfile.GNU_FORMAT)
    (tmp_path / "x.tar").write_bytes(data)
    made = index_existing(tmp_path)
    assert open_shards(tmp_path).columns(made.split("train")[0]).keys == ["\\xe9a"]


# ---------------------------------------------------------------- tars of others


FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


@pytest.mark.parametrize("form", FORMATS)
def test_tarfile(form: str) -> None:
    long = "/".join(["folder"] * 20)
    names = ["a", "./b", "c/d", f"{long}/e", "ü", "n01440764_18", "x-y z"]
    members = [(f"{name}.{end}", png(i) if end == "PNG" else b"3\n") for i, name in enumerate(names)
               for end in ("PNG", "cls")]  # fmt: skip
    data = pack(members, FORMATS[form])
    got = found(data)
    assert whole(got, data, {name: png(i) for i, name in enumerate(names)})
    assert set(got.columns.labels) == {3}


@pytest.mark.parametrize("form", ["gnu", "v7", "ustar", "posix"])
def test_tar_program(tmp_path: Path, form: str) -> None:
    folder = tmp_path / "in" / ("deep-" * 12)
    folder.mkdir(parents=True)
    for name, data in files(4):
        (folder / name).write_bytes(data)
    command = ["tar", f"--format={form}", "--sort=name", "-cf", "x.tar", "-C", "in", "."]
    subprocess.run(command, cwd=tmp_path, check=True)
    data = (tmp_path / "x.tar").read_bytes()
    assert whole(found(data), data, {f"./{folder.name}/{i:03d}": png(i) for i in range(4)})


def test_tar_program_with_long_names_links_and_holes(tmp_path: Path) -> None:
    folder = tmp_path / "in" / ("deep-" * 40)
    folder.mkdir(parents=True)
    for name, data in files(3):
        (folder / name).write_bytes(data)
    os.link(folder / "000.png", folder / "003.png")
    with (folder / "004.png").open("wb") as file:
        file.truncate(1 << 20)
    for form in ("gnu", "posix"):
        command = ["tar", f"--format={form}", "-S", "--sort=name", "-cf", "x.tar", "-V", "label", "in"]
        subprocess.run(command, cwd=tmp_path, check=True)
        got = found((tmp_path / "x.tar").read_bytes())
        assert [key[-3:] for key in got.columns.keys] == ["000", "001", "002"]
        assert [bad.kind for bad in got.bad] == ["not_a_file", "not_a_file"]


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves its tar open
def test_shard_writer_and_the_same_samples_as_webdataset(tmp_path: Path) -> None:
    with webdataset.ShardWriter(str(tmp_path / "%d.tar"), maxcount=9, verbose=0) as writer:
        for i in range(9):
            writer.write({"__key__": f"a/{i}", "jpg": jpeg(i), "cls": i, "json": {"i": i}, "seg.png": png(i)})
    data = (tmp_path / "0.tar").read_bytes()
    assert whole(found(data), data, {f"a/{i}": jpeg(i) for i in range(9)})
    rows = webdataset.WebDataset(str(tmp_path / "0.tar"), shardshuffle=False, empty_check=False)
    assert {row["__key__"]: row["jpg"] for row in rows} == {f"a/{i}": jpeg(i) for i in range(9)}


def test_layouts_of_hugging_face() -> None:
    members: Files = [("__meta__/info.png", png(0)), ("README.md", b"# Images"), ("._000.png", b"of a Mac")]
    for i in range(3):
        members += [(f"n0_{i}.cls", b"%d" % i), (f"n0_{i}.JPEG", jpeg(i)), (f"n0_{i}.json", b"{}")]
    for i in range(3):
        members += [(f"train/{i}.jpg", jpeg(i)), (f"train/{i}.txt", b"a cat"), (f"train/{i}.cls", b" 1\n")]
    data = pack(members)
    got = found(data)
    assert whole(
        got, data, {f"n0_{i}": jpeg(i) for i in range(3)} | {f"train/{i}": jpeg(i) for i in range(3)}
    )
    assert got.columns.labels == [0, 1, 2, 1, 1, 1]
    lost = found(pack([*members, ("n0_3.json", b"{}"), ("LICENSE.md", b"free")]))
    assert named(lost) == [("no_image", "n0_3")]  # samples have a json, but no md


def test_tars_laid_end_to_end() -> None:
    """Others stop at the first end mark; here all is found, and that it is so is named once a seam."""
    data = pack(files(3)) + pack(files(3, 3))
    got = found(data)
    assert by_key(got) == labels(6)
    assert named(got) == [("broken_header", "002")]
    assert "zeros; the next header is at byte 10240" in got.bad[0].reason


def test_tars_within_a_tar() -> None:
    data = pack([*files(2), ("x.tar", pack(files(2, 7))), ("x.zip", pack(files(1, 5))), *files(1, 2)])
    got = found(data)
    assert by_key(got) == labels(3)
    assert not got.bad


# ---------------------------------------------------------------- headers


def test_every_header_of_tarfile_is_parsed() -> None:
    for form in FORMATS.values():
        info = tarfile.TarInfo("a/b.png")
        for info.size in (0, 7, 8**11 - 1, 8**11, 1 << 60):
            if info.size < 8**11 or form == tarfile.GNU_FORMAT:
                block = info.tobuf(form)[-BLOCK:]
                assert parse(block) == (b"a/b.png", info.size, b"0")
                for at in (0, 124, 130, 148, 400, 511):
                    assert parse(block[:at] + bytes([block[at] ^ 1]) + block[at + 1 :]) is None
    assert parse(bytes(BLOCK)) is None
    assert parse(b"") is None


def test_signed_sums_of_old_programs() -> None:
    block = bytearray(tarfile.TarInfo("é" * 20 + ".png").tobuf(tarfile.GNU_FORMAT))
    block[148:156] = b" " * 8
    total = sum(block)
    block[148:156] = b"%06o\0 " % (total - 256 * 40)
    assert parse(bytes(block)) == ("é".encode() * 20 + b".png", 0, b"0")


def test_pax_size_counts_and_nonsense_for_all_does_not() -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", pax_headers={"path": "all.png", "size": "9"}) as tar:
        info = tarfile.TarInfo("a.png")
        info.pax_headers, info.size = {"size": "00000", "path": "b.png"}, 600
        tar.addfile(info, io.BytesIO(png(1).ljust(600)))
    data = bytearray(out.getvalue())
    at = data.index(b"a.png")
    assert parse(bytes(data[at : at + BLOCK])) == (b"a.png", 600, b"0")
    data = data.replace(b"size=00000\n", b"size=00600\n")
    got = found(bytes(data))
    assert (got.columns.keys, got.columns.sizes) == (["b"], [600])
    assert named(got) == [("broken_header", "")]
    assert "one name or size for all members" in got.bad[0].reason


def test_a_torn_extended_header_is_named() -> None:
    data = bytearray(pack([("ü.png", png(1)), ("ü.cls", b"1"), *files(1)], tarfile.PAX_FORMAT))
    data[BLOCK] = ord("9")
    got = found(bytes(data))
    assert by_key(got)["000"] == 0
    assert named(got)[0] == ("broken_header", "")
    assert "an extended header that is none" in got.bad[0].reason


def test_sizes_are_not_believed() -> None:
    """A member of many exabytes costs nothing, and what lies behind its header is still found."""
    info = tarfile.TarInfo("x.png")
    info.size = 1 << 80
    for name in ("x.png", "x.tar"):
        info.name = name
        data = info.tobuf(tarfile.GNU_FORMAT) + pack(files(3))
        got = found(data)
        assert by_key(got) == ({} if name == "x.tar" else labels(3))  # an archive's inside is its own
        assert named(got)[0] == ("cut_tar", "x")


@pytest.mark.parametrize("chunk", [512, 700, 1023, 4096])
def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    data = (
        b"?" * 300
        + pack([("long/" * 30 + "a.png", png(1)), *files(9)], tarfile.GNU_FORMAT)
        + v7(pack(files(3)))
    )
    once = sweep(from_memory(data))
    monkeypatch.setattr(scan, "CHUNK", chunk)
    assert sweep(from_memory(data)) == once
    assert len(once.headers) == 2 + 18 + 6
    assert once.size == len(data)
    assert once.content == len(data.rstrip(b"\0"))


def test_memory_and_time_are_bounded(tmp_path: Path) -> None:
    """Forty megabytes cost a few of memory, and no content makes it slow."""
    tar = tmp_path / "x.tar"
    with tar.open("wb") as file:
        file.write(pack([("x.bin", bytes(10 << 20)), *files(3)]))
        file.truncate(40 << 20)
    tracemalloc.start()
    try:
        assert by_key(examine(tar)) == labels(3)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 6 * scan.CHUNK
    sparse = tarfile.TarInfo("x.png")
    sparse.type = tarfile.GNUTYPE_SPARSE
    more = bytearray(sparse.tobuf(tarfile.GNU_FORMAT))
    more[482], more[148:156] = 1, b" " * 8
    more[148:156] = b"%06o\0 " % sum(more)
    for piece in (
        b"ustar",
        b"0123456\0 ",
        b"0123456\0 ".ljust(400, b"\0"),
        bytes(more),
        b"\0 ",
        b"1234567",
        bytes(more) + b"\1" * BLOCK,
    ):
        data = piece * (1_000_000 // len(piece))
        begin = time.perf_counter()
        list(walk(from_memory(data), sweep(from_memory(data))))
        assert time.perf_counter() - begin < 5


def test_the_hash_is_of_the_same_reading(tmp_path: Path) -> None:
    tar = raw_tar(tmp_path / "x.tar", files(3))
    assert examine(tar).sha256 == sha256_file(tar)
    assert examine(tar).bytes == tar.stat().st_size


def test_the_walk_gives_what_the_standard_library_gives() -> None:
    data = pack([(f"{'d/' * (i % 80)}{i}.png", random.Random(i).randbytes(i)) for i in range(600)],
                tarfile.GNU_FORMAT)  # fmt: skip
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        wanted = [Member(info.name.encode(), info.offset_data, info.size, True) for info in tar]
    assert list(walk(from_memory(data), sweep(from_memory(data)))) == wanted


# ---------------------------------------------------------------- a directory of them


def test_a_bad_thing_below_the_bound_is_written_down(tmp_path: Path) -> None:
    raw_tar(tmp_path / "train-0.tar", files(40))
    cut_payload(tmp_path / "train-1.tar")
    raw_tar(tmp_path / "train-2.tar", [])
    made = index_existing(tmp_path, max_bad=0.05)
    assert [info.count for info in made.split("train")] == [40, 5]
    assert [(bad.kind, bad.shard, bad.key) for bad in made.bad] == [
        ("cut_tar", "train-1.tar", "x"),
        ("empty_shard", "train-2.tar", ""),
    ]
    assert open_shards(tmp_path) == made


def test_a_flood_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    raw_tar(tmp_path / "train-0.tar", files(40))
    cut_payload(tmp_path / "train-1.tar")
    with pytest.raises(UserError, match=r"1 of 46 samples cannot be read \(1 cut_tar\)") as caught:
        index_existing(tmp_path)
    assert "allows 0.10%; the first: train-1.tar: x: byte " in one_line(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["train-0.tar", "train-1.tar"]


def test_no_sample_in_any_tar(tmp_path: Path) -> None:
    raw_tar(tmp_path / "a.tar", [("a.cls", b"1")])
    raw_tar(tmp_path / "b.tar", [])
    with pytest.raises(UserError, match=r"no sample in 2 tars; the first: a\.tar: a: .*no image, only cls"):
        index_existing(tmp_path, max_bad=1)


def test_the_same_index_again_and_without_a_tar_that_is_gone(tmp_path: Path) -> None:
    for i in range(6):
        raw_tar(tmp_path / f"train-{i}.tar", files(20, 20 * i))
    cut_payload(tmp_path / "val-0.tar")
    (tmp_path / "a-folder.tar").mkdir()

    def content() -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in tmp_path.glob("*.json")}

    index_existing(tmp_path, max_bad=0.05)
    first = content()
    assert len(first) == 8
    index_existing(tmp_path, max_bad=0.05)
    assert content() == first
    (tmp_path / "train-3.tar").unlink()
    made = index_existing(tmp_path, max_bad=0.05)
    assert made.count("train") == 100
    (tmp_path / "train-3.tar").symlink_to("nowhere.tar")
    assert index_existing(tmp_path, max_bad=0.05).bad[0][:2] == ("missing_shard", "train-3.tar")


def test_labels_that_no_class_has(tmp_path: Path) -> None:
    raw_tar(tmp_path / "a.tar", [*files(20), ("x.png", png(1)), ("x.cls", b"7")])
    made = index_existing(tmp_path, list("abcde"), max_bad=0.1)
    assert made.columns(made.split("train")[0]).labels[-1] == -1
    assert [(bad.kind, bad.key) for bad in made.bad] == [("wrong_label", "x")]
    assert "its label is 7, but there are 5 classes, from 0" in made.bad[0].reason
    again = index_existing(tmp_path, max_bad=0.1)
    assert (again.classes, again.bad) == (list("abcde"), made.bad)  # an earlier index keeps its names
    with pytest.raises(UserError, match=r"1 of 21 samples cannot be read \(1 wrong_label\)"):
        index_existing(tmp_path)


def test_without_names_the_classes_are_numbers(tmp_path: Path) -> None:
    raw_tar(tmp_path / "a.tar", files(20))
    assert index_existing(tmp_path).classes == list("01234")
    raw_tar(tmp_path / "b.tar", [("x.png", png(1)), ("x.cls", b"6"), ("y.png", png(1)), ("y.cls", b"100001")])
    made = index_existing(tmp_path, max_bad=0.1)
    assert made.classes == list("0123456")  # numbers of an earlier index are no names
    assert [(bad.kind, bad.key) for bad in made.bad] == [("wrong_label", "y")]


def test_one_that_cannot_be_read_stops_all(tmp_path: Path) -> None:
    for i in range(5):
        raw_tar(tmp_path / f"{i}.tar", files(3))
    (tmp_path / "2.tar").write_bytes(gzip.compress(pack(files(3))))
    with pytest.raises(UserError, match=r"2\.tar: compressed with gzip"):
        index_existing(tmp_path)
    assert not list(tmp_path.glob("*.json"))


def test_progress_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raw_tar(tmp_path / "a.tar", files(3))
    index_existing(tmp_path)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(indexing, "SHOW_AFTER", -1.0)
    index_existing(tmp_path)
    shown = capsys.readouterr().err
    assert "reading tars" in shown
    assert "10.2/10.2 kB" in shown


def test_columns_hold_what_the_reader_needs(tmp_path: Path) -> None:
    raw_tar(tmp_path / "a.tar", files(2))
    index_existing(tmp_path)
    data = json.loads(columns_path(tmp_path / "a.tar").read_text())
    assert data == {
        "keys": ["000", "001"],
        "offsets": [512, 2560],
        "sizes": [len(png(0)), len(png(1))],
        "extensions": ["png", "png"],
        "labels": [0, 1],
    }

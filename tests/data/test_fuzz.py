"""Ten thousand damaged tars: nothing crashes, nothing hangs, and no good sample is lost.

Every tar is made of one of twelve whole ones by one to three edits. What is still good follows from the
whole tar's layout, as the standard library tells it, and from the bytes of the result, not from the scanner:

GOOD is a sample of which
- the image's and the label's headers (with those for long names) and payloads are there with all their bytes,
  each header directly before its payload;
- the two are still neighbours: no header of another key lies between them;
- no other header of its key is in the result (edits repeat pieces, and bring in pieces of another tar that
  has the same keys);
- no foreign header for a long name lies before one of the two so that its payload, by its size, ends where
  that begins: by the format, it renames.
A good sample must be found with exactly its bytes, its key and its label.

TWIN is a sample that is good but for further headers of its key. Which of them was meant cannot be known, so
its key must be found, once; and where every header of the key belongs to a good pair, with the right bytes.
"""

from __future__ import annotations

import io
import itertools
import random
import tarfile
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from broken import jpeg, png, v7
from webdataset import TarWriter
from webdataset.tariterators import base_plus_ext

from vitlab.config import UserError
from vitlab.data.bad import KINDS
from vitlab.data.shards.scan import from_memory
from vitlab.data.shards.tars import Examined, examine_bytes, index_tar, read_member

CASES = 10_000
SAMPLES = 6
BLOCK = 512


class Place(NamedTuple):
    """A member of a whole tar: its first header, the one before its payload, and the payload."""

    key: str
    extension: str
    first: int
    header: int
    payload: int
    end: int


class Whole(NamedTuple):
    data: bytes
    members: list[Place]
    labels: dict[str, int]


class Found(NamedTuple):
    """A member's header in the result; `whole` with all before it and its payload."""

    at: int
    key: str
    extension: str
    first: int
    end: int
    whole: bool


def content(prefix: str, order: str, extension: str = "png") -> list[tuple[str, bytes]]:
    picture = png if extension == "png" else jpeg
    out = []
    for i in range(SAMPLES):
        parts = {"i": (extension, picture(i)), "l": ("cls", str(7 * i).encode()), "j": ("json", b"{}" * 300)}
        out += [(f"{prefix}{i}.{name}", data) for name, data in (parts[letter] for letter in order)]
    return out


def pack(files: list[tuple[str, bytes]], form: int, **more: object) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form, **more) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1_700_000_000
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def wds(prefix: str) -> bytes:
    out = io.BytesIO()
    with TarWriter(out, mtime=0, encoder=False) as tar:
        for i in range(SAMPLES):
            tar.write({"__key__": f"{prefix}{i}", "jpg": jpeg(i), "cls": str(7 * i).encode()})
    return out.getvalue()


def layout(data: bytes) -> Whole:
    """Where everything lies, by the standard library."""
    members, labels = [], {}
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for info in tar:
            key, extension = base_plus_ext(info.name)
            end = info.offset_data + info.size
            members.append(
                Place(key, extension, info.offset, info.offset_data - BLOCK, info.offset_data, end)
            )
            if extension == "cls":
                labels[key] = int(data[info.offset_data : end])
    return Whole(data, members, labels)


def whole_tars() -> list[Whole]:
    ustar, gnu, pax = tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT
    long = "a-long-folder/" * 9
    datas = [
        pack(content("a", "li"), ustar),
        pack(content("p" * 70 + "/" + "q" * 60 + "/b", "il", "jpg"), ustar),
        pack(content("c/", "il"), gnu),
        pack(content(long + "d", "li", "jpg"), gnu),
        pack(content("e", "lij"), gnu),
        pack(content("f/ü", "li"), pax),
        pack(content(long + "g", "il", "jpg"), pax),
        pack(content("h", "ijl"), pax, pax_headers={"comment": "all of them"}),
        v7(pack(content("i", "li", "jpg"), ustar)),
        v7(pack(content("j", "jil"), ustar)),
        wds("k/k/"),
        pack(content("a", "il", "jpg"), gnu),  # the keys of the first
    ]
    return [layout(data) for data in datas]


# ---------------------------------------------------------------- edits


EDITS = ("flip", "cut_end", "cut", "insert", "splice", "repeat", "zeros")


def edit(data: bytes, kind: str, other: bytes, lot: random.Random) -> bytes:
    n = len(data)
    step = lot.choice((1, 1, BLOCK))
    a, b = between(lot, n, step)
    if kind == "flip":
        out = bytearray(data)
        for place in lot.sample(range(n), min(n, lot.randint(1, 20))):
            out[place] ^= lot.randint(1, 255)
        return bytes(out)
    if kind == "zeros":
        b = min(b, a + lot.choice((5, 300, 512, 1024, 3000)))
        return data[:a] + bytes(b - a) + data[b:]
    if kind == "cut_end":
        return data[:a]
    if kind == "cut":
        return data[:a] + data[min(b, a + lot.choice((1, 100, 512, 700, 1024, 4000))) :]
    if kind == "insert":
        return data[:a] + lot.randbytes(lot.choice((1, 3, 300, 512, 700, 1024))) + data[a:]
    if kind == "repeat":
        c, d = between(lot, n, step)
        return data[:a] + data[c:d] + data[a:]
    c, d = between(lot, len(other), step)
    return data[:a] + other[c:d] + data[lot.choice((a, b)) :]


def between(lot: random.Random, n: int, step: int) -> tuple[int, int]:
    one, two = (lot.randrange(n // step + 1) * step for _ in "ab")
    return min(one, two), max(one, two)


# ---------------------------------------------------------------- what is still good


def places(data: bytes, piece: bytes) -> list[int]:
    found, at = [], data.find(piece)
    while at >= 0:
        found.append(at)
        at = data.find(piece, at + 1)
    return found


def headers(data: bytes, wholes: list[Whole]) -> list[Found]:
    """All headers of members of these tars that stand in the data, those for long names with them."""
    found = []
    for whole in wholes:
        for m in whole.members:
            for at in places(data, whole.data[m.header : m.payload]):
                first, end = at - (m.header - m.first), at + m.end - m.header
                same = first >= 0 and data[first:end] == whole.data[m.first : m.end]
                found.append(Found(at, m.key, m.extension, first, end, same))
            names, header = whole.data[m.first : m.header], whole.data[m.header : m.payload]
            for at in places(data, names) if names else ():
                if not data.startswith(header, at + len(names)):  # it names what follows
                    found.append(Found(at, m.key, m.extension, at, at + len(names), False))
    return sorted(found)


def renamed(data: bytes, one: Found, wholes: list[Whole]) -> bool:
    """Whether a header for a long name stands before this one's first, and its payload ends there."""
    before = [whole.data[m.first : m.header] for whole in wholes for m in whole.members if m.first < m.header]
    return any(data.startswith(name[:BLOCK], max(one.first - len(name), 0)) for name in before)


def pairs(data: bytes, key: str, found: list[Found], wholes: list[Whole]) -> list[tuple[Found, Found]]:
    """The image and the label of every untouched occurrence of a sample."""
    out = []
    mine = [one for one in found if one.key == key and one.extension != "json"]
    for one, two in itertools.pairwise(mine):
        foreign = any(one.at < other.at < two.at and other.key != key for other in found)
        usable = one.whole and two.whole and one.end <= two.first
        if not usable or (one.extension == "cls") == (two.extension == "cls") or foreign:
            continue
        if not renamed(data, one, wholes) and not renamed(data, two, wholes):
            out.append((one, two) if two.extension == "cls" else (two, one))
    return out


def check(whole: Whole, wholes: list[Whole], data: bytes, got: Examined) -> tuple[int, int]:
    """Numbers of good samples and of twins, all of them found."""
    columns = got.columns
    rows = {}
    for key, o, s, label in zip(columns.keys, columns.offsets, columns.sizes, columns.labels, strict=True):
        rows[key] = (data[o : o + s], label)
        assert len(data[o : o + s]) == s
    assert len(rows) == len(columns)
    assert columns.offsets == sorted(columns.offsets)
    for bad in got.bad:
        assert bad.kind in KINDS
        assert len(bad.key) <= 80
        assert str(bad).isprintable()
    found = headers(data, wholes)
    good = twins = 0
    for key in whole.labels:
        untouched = pairs(data, key, found, wholes)
        if not untouched:
            continue
        claims = {one for one in found if one.key == key and one.extension != "json"}
        assert key in rows
        if claims == {one for pair in untouched for one in pair}:
            assert rows[key] in [
                (data[i.at + BLOCK : i.end], int(data[c.at + BLOCK : c.end])) for i, c in untouched
            ]
        good += len(claims) == 2
        twins += len(claims) > 2
    return good, twins


def case(wholes: list[Whole], seed: int) -> tuple[list[Whole], bytes]:
    """The whole tars that the pieces of a damaged one come from, its own first, and its bytes."""
    lot = random.Random(seed)
    two = lot.sample(wholes, 2) if lot.random() < 0.8 else [wholes[0], wholes[-1]]
    data = two[0].data
    kinds = lot.choices(EDITS, k=lot.choice((1, 1, 1, 2, 3)))
    for kind in kinds:
        data = edit(data, kind, two[1].data, lot)
    return two if "splice" in kinds else two[:1], data


def test_no_good_sample_is_lost() -> None:
    wholes = whole_tars()
    for whole in wholes:
        got = examine_bytes(from_memory(whole.data), Path("x.tar"))
        assert not got.bad
        assert dict(zip(got.columns.keys, got.columns.labels, strict=True)) == whole.labels
    good = twins = named = compressed = 0
    slowest = 0.0
    for seed in range(CASES):
        two, data = case(wholes, seed)
        begin = time.perf_counter()
        try:
            got = examine_bytes(from_memory(data), Path("x.tar"))
        except UserError as error:
            assert "compressed with" in str(error), seed  # noqa: PT017
            compressed += 1
            continue
        slowest = max(slowest, time.perf_counter() - begin)
        try:
            numbers = check(two[0], two, data, got)
        except AssertionError as error:
            pytest.fail(f"case {seed}: {error}\n{got.bad}")
        good, twins, named = good + numbers[0], twins + numbers[1], named + bool(got.bad)
    print(f"{good} good samples, {twins} twins, {named} tars with bad things, slowest {slowest:.3f} s")
    assert good > 2.5 * CASES
    assert twins > CASES / 50
    assert named > 0.8 * CASES
    assert compressed < 10
    assert slowest < 2


def test_files_give_the_same(tmp_path: Path) -> None:
    wholes, tar = whole_tars(), tmp_path / "x.tar"
    rows = 0
    for seed in range(60):
        _, data = case(wholes, seed)
        tar.write_bytes(data)
        columns, bad = index_tar(tar)
        got = examine_bytes(from_memory(data), tar)
        assert (columns, bad) == (got.columns, got.bad)
        with tar.open("rb") as file:
            for offset, size in zip(columns.offsets, columns.sizes, strict=True):
                assert read_member(file.fileno(), offset, size) == data[offset : offset + size]
                rows += 1
    assert rows > 180

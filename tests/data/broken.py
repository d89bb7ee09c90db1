"""Tars with one bad thing each, and what an index must say of it.

Every function writes a tar with `n` good samples and one bad thing, and returns what to expect. `ALL` has
them by name.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

from PIL import Image

BLOCK = 512
Files = list[tuple[str, bytes]]


class Broken(NamedTuple):
    """A tar, its samples' labels by key, and what is named: (kind, key, part of the reason)."""

    path: Path
    labels: dict[str, int]
    bad: list[tuple[str, str, str]]


@cache
def encoded(i: int, form: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (3, 2), (40 * i % 256, 17 * i % 256, 99)).save(out, form)
    return out.getvalue()


def png(i: int) -> bytes:
    """A tiny picture, another one for every number."""
    return encoded(i, "png")


def jpeg(i: int) -> bytes:
    return encoded(i, "jpeg")


def v7(data: bytes) -> bytes:
    """A ustar file without its magic, as programs of old wrote it."""
    out, place = bytearray(data), 0
    while out[place : place + 512].strip(b"\0"):
        size = int(out[place + 124 : place + 135], 8)
        out[place + 257 : place + 512] = bytes(255)
        out[place + 148 : place + 156] = b" " * 8
        out[place + 148 : place + 156] = b"%06o\0 " % sum(out[place : place + 512])
        place += 512 + -(-size // 512) * 512
    return bytes(out)


def files(n: int, first: int = 0) -> Files:
    """Image and label of n samples."""
    pairs = (
        ((f"{i:03d}.png", png(i)), (f"{i:03d}.cls", str(i % 5).encode())) for i in range(first, first + n)
    )
    return [one for pair in pairs for one in pair]


def labels(n: int, but: int | None = None) -> dict[str, int]:
    return {f"{i:03d}": i % 5 for i in range(n) if i != but}


def pack(members: Files, form: int = tarfile.USTAR_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def place(data: bytes, name: str) -> int:
    """Where a member's header is."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return tar.getmember(name).offset


def write(path: Path, data: bytes, n: int, *bad: tuple[str, str, str], **more: int) -> Broken:
    path.write_bytes(data)
    return Broken(path, labels(n) | more, list(bad))


def with_files(path: Path, n: int, more: Files, *bad: tuple[str, str, str], **labelled: int) -> Broken:
    """The good samples with more members among them."""
    half = n // 2
    return write(path, pack([*files(half), *more, *files(n - half, half)]), n, *bad, **labelled)


def broken_header(path: Path, n: int = 5) -> Broken:
    """A flipped bit in the header of an image; its label is left alone."""
    bad = [("x.png", png(9)), ("x.cls", b"3")]
    data = bytearray(pack([*files(n // 2), *bad, *files(n - n // 2, n // 2)]))
    at = place(data, "x.png")
    data[at + 30] ^= 4
    last = f"{n // 2 - 1:03d}" if n > 1 else ""
    reason = f"byte {at}: no header; the next header is at byte {at + 2 * BLOCK}"
    return write(path, bytes(data), n, ("broken_header", last, reason), ("no_image", "x", "only cls"))


def inserted_bytes(path: Path, n: int = 5) -> Broken:
    """Foreign bytes between two samples: all behind them is out of step."""
    data = pack(files(n))
    at = place(data, f"{n - 1:03d}.png")
    reason = f"byte {at}: no header; the next header is at byte {at + 77}"
    return write(path, data[:at] + b"?" * 77 + data[at:], n, ("broken_header", f"{n - 2:03d}", reason))


def zeroed_header(path: Path, n: int = 5) -> Broken:
    """Zeros over a whole member that is no part of a sample; other readers take them for the tar's end."""
    data = bytearray(pack([("README", b"text"), *files(n)]))
    data[: 2 * BLOCK] = bytes(2 * BLOCK)
    return write(
        path, bytes(data), n, ("broken_header", "", "byte 0: zeros; the next header is at byte 1024")
    )


def spliced(path: Path, n: int = 5) -> Broken:
    """In the midst of an image begins a piece of another tar."""
    first, half = pack([*files(n // 2), ("x.png", png(9)), ("x.cls", b"3")]), n // 2
    data = first[: place(first, "x.png") + BLOCK + 20] + pack(files(n - half, half))
    return write(path, data, n, ("cut_tar", "x", "only 20 of its"))


def cut_payload(path: Path, n: int = 5) -> Broken:
    """The file ends within an image."""
    data = pack([*files(n), ("x.png", png(9))])
    cut = place(data, "x.png") + BLOCK + 20
    return write(path, data[:cut], n, ("cut_tar", "x", "only 20 of its"))


def cut_header(path: Path, n: int = 5) -> Broken:
    """The file ends within a header."""
    data = pack([*files(n), ("x.png", png(9))])
    cut = place(data, "x.png") + 300
    return write(path, data[:cut], n, ("cut_tar", "", "the file ends within a header"))


def no_end(path: Path, n: int = 5) -> Broken:
    """The zeros at the end are missing, and those behind the last payload too."""
    data = pack(files(n))
    cut = place(data, f"{n - 1:03d}.cls") + BLOCK + 1
    return write(path, data[:cut], n, ("cut_tar", "", f"byte {cut}: the file ends without the mark"))


def unsafe_name(path: Path, n: int = 5, name: str = "../x", reason: str = "leads out of the tar") -> Broken:
    more = [(f"{name}.png", png(9)), (f"{name}.cls", b"3")]
    return with_files(path, n, more, ("unsafe_name", name.replace("\n", "\\n"), reason))


def not_a_file(path: Path, n: int = 5, kind: bytes = tarfile.SYMTYPE) -> Broken:
    """A link, a pipe, a device or a sparse file where an image should be."""
    data = bytearray(pack([*files(n), ("x.png", b""), ("x.cls", b"3")]))
    at = place(data, "x.png")
    info = tarfile.TarInfo("x.png")
    info.type, info.linkname = kind, "000.png"
    data[at : at + BLOCK] = info.tobuf(tarfile.GNU_FORMAT)
    return write(path, bytes(data), n, ("not_a_file", "x", "no plain file"))


def duplicate_key(path: Path, n: int = 5) -> Broken:
    """The first key once more, at the end."""
    again = [("000.png", png(9)), ("000.cls", b"3")]
    return write(path, pack([*files(n), *again]), n, ("duplicate_key", "000", "the first stays"))


def duplicate_member(path: Path, n: int = 5) -> Broken:
    """A second label beside the last one."""
    return write(
        path,
        pack([*files(n), (f"{n - 1:03d}.cls", b"9")]),
        n,
        ("duplicate_key", f"{n - 1:03d}", "a second cls"),
    )


def no_image(path: Path, n: int = 5) -> Broken:
    return with_files(path, n, [("x.cls", b"3"), ("x.json", b"{}")], ("no_image", "x", "only cls, json"))


def no_label(path: Path, n: int = 5) -> Broken:
    """It stays a sample."""
    return with_files(path, n, [("x.png", png(9))], ("no_label", "x", "no cls file"), x=-1)


def wrong_label(path: Path, n: int = 5, label: bytes = b"cat") -> Broken:
    """It stays a sample."""
    more = [("x.png", png(9)), ("x.cls", label)]
    return with_files(path, n, more, ("wrong_label", "x", "expected a class number from 0"), x=-1)


def empty_shard(path: Path, n: int = 0) -> Broken:
    """No member at all; the good samples are in other tars."""
    return write(path, pack([]), 0, ("empty_shard", "", "no samples; expected members such as 000001.png"))


def empty_file(path: Path, n: int = 0) -> Broken:
    return write(path, b"", 0, ("empty_shard", "", "no samples"))


def no_tar(path: Path, n: int = 0) -> Broken:
    """Something else under a tar's name."""
    bad = ("broken_header", "", "byte 0: no header, and none behind it"), ("empty_shard", "", "no samples")
    return write(path, b"Not a tar at all. " * 100, 0, *bad)


ALL: dict[str, Callable[..., Broken]] = {
    "broken_header": broken_header,
    "inserted_bytes": inserted_bytes,
    "zeroed_header": zeroed_header,
    "spliced": spliced,
    "cut_payload": cut_payload,
    "cut_header": cut_header,
    "no_end": no_end,
    "name_up": unsafe_name,
    "name_absolute": partial(unsafe_name, name="/etc/x"),
    "name_within": partial(unsafe_name, name="a/../../x"),
    "name_backslash": partial(unsafe_name, name="\\\\host\\x"),
    "name_drive": partial(unsafe_name, name="C:\\x"),
    "name_control": partial(unsafe_name, name="a\nx", reason="control characters"),
    "link": not_a_file,
    "hard_link": partial(not_a_file, kind=tarfile.LNKTYPE),
    "pipe": partial(not_a_file, kind=tarfile.FIFOTYPE),
    "device": partial(not_a_file, kind=tarfile.CHRTYPE),
    "sparse": partial(not_a_file, kind=tarfile.GNUTYPE_SPARSE),
    "duplicate_key": duplicate_key,
    "duplicate_member": duplicate_member,
    "no_image": no_image,
    "no_label": no_label,
    "wrong_label": wrong_label,
    "label_empty": partial(wrong_label, label=b""),
    "label_negative": partial(wrong_label, label=b"-1"),
    "label_huge": partial(wrong_label, label=b"1234567890"),
    "label_long": partial(wrong_label, label=b" " * 100 + b"1"),
    "label_arabic": partial(wrong_label, label="٣".encode()),
    "empty_shard": empty_shard,
    "empty_file": empty_file,
    "no_tar": no_tar,
}

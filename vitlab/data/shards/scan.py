"""A walk over a tar file that goes on after damage: every whole member is found, every torn place named.

`tarfile`, and with it most readers, loses everything behind the first bad header. Here a first pass reads
the file once from end to end and notes where, at any byte, a valid header stands (and hashes the file on
the way). The walk then steps from member to member; where a header is broken it goes on at the next valid
one, and a payload in which a header stands was torn, so the walk goes on at that header.

A header is valid when its checksum is (unsigned or signed), whatever its format: v7, ustar, GNU (long names,
sizes in base 256, sparse files) or pax (`path` and `size` of one member; of all at once they are nonsense).
Archives within the archive (`.tar`, `.zip`) may hold headers of their own; they are stepped over.

Memory: one chunk of 4 MiB and eight bytes a member, however large the file; no size from a header is ever
allocated. Time: linear in the file's size, two searches and one hash of every byte.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

BLOCK = 512
CHUNK = 1 << 22
EXTENDED_AT_MOST = 1 << 20  # bytes of a long name or a pax header that are read
MAGIC, MAGIC_AT, SUM_AT = b"ustar", 257, 148
# A checksum as nearly all programs write it. The text comes first, so that the search is a fast one.
SUM = re.compile(rb"\0 (?<=[0-7 ]{6}\0 )")
LOW = bytes(range(128))
# Without magic: a name, then numbers for mode, owner, group, size and date, none of them left out.
V7 = re.compile(rb"[^\0].{99}(?: *[0-7]+[ \0]+){3}(?:[ 0-7]{11}[ \0]|\x80.{11})[ 0-7]{11}[ \0]", re.DOTALL)
# What a name's field looks like where a header is looked for, and not just expected.
NAME = re.compile(rb"[^\0]+\0*")
OCTAL = re.compile(rb"[ \0]*([0-7]*)[ \0]*")
RECORD = re.compile(rb"([0-9]{1,9}) ([^=\n]+)=")
ARCHIVES = (b".tar", b".zip")
EXTENDED = {b"L": "long name", b"K": "long name", b"x": "extended", b"X": "extended", b"g": "global"}
SILENT = {b"5", b"D", b"V", b"N"}  # directories, their lists, labels of volumes, old lists of names
WITHOUT_PAYLOAD = {b"2", b"3", b"4", b"5", b"6"}  # whatever size they give
COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x04\x22\x4d\x18": "lz4",
}

Read = Callable[[int, int], bytes]  # (place, at most so many bytes); fewer at the end


class Header(NamedTuple):
    """What one block of 512 bytes says of a member."""

    name: bytes
    size: int
    kind: bytes


class Member(NamedTuple):
    """A whole member that is no directory: where its payload lies."""

    name: bytes
    place: int
    size: int
    plain: bool  # a file; not a link, a sparse file or a device


class Damage(NamedTuple):
    """A torn place, by a kind of `vitlab.data.bad`; `name` where it is a member that is torn."""

    kind: str
    place: int
    reason: str
    name: bytes | None = None


@dataclass(frozen=True)
class Swept:
    """What the first pass has seen of a file."""

    headers: array[int]  # the places of all valid headers, ascending
    size: int
    content: int  # behind the last byte that is not zero
    sha256: str

    def header_from(self, place: int) -> int | None:
        """The first valid header at this place or behind it."""
        i = bisect_left(self.headers, place)
        return self.headers[i] if i < len(self.headers) else None


def from_memory(data: bytes) -> Read:
    return lambda place, size: data[place : place + size]


def parse(block: bytes) -> Header | None:
    """The header in a block of 512 bytes, or nothing where its checksum or its size is none."""
    if len(block) < BLOCK:
        return None
    name, magic = block[:100].split(b"\0", 1)[0], block[MAGIC_AT : MAGIC_AT + 6]
    old = not magic.startswith(MAGIC)
    if old and (magic.strip(b"\0") or not (V7.match(block) or block[156:157] == b"V")):
        return None  # a sum alone may be right by chance, as in a header that has moved by a byte
    given = _number(block[SUM_AT : SUM_AT + 8])
    if not given:
        return None
    rest = block[:SUM_AT] + b" " * 8 + block[SUM_AT + 8 : 256]
    # The low half of adler32 is the sum of bytes plus one, exact for up to 256 of them, and far faster.
    total = (zlib.adler32(rest) & 0xFFFF) + (zlib.adler32(block[256:]) & 0xFFFF) - 2
    high = len((rest + block[256:]).translate(None, LOW))
    size, kind = _number(block[124:136]), block[156:157]
    if size is None or given not in (total, total if old else total - 256 * high):  # a sum of signed bytes
        return None
    if magic == b"ustar\0":  # GNU has no prefix, but dates in its place
        prefix = block[345:500].split(b"\0", 1)[0]
        name = prefix + b"/" + name if prefix else name
    if kind == b"\0" and name.endswith(b"/"):
        kind = b"5"  # as v7 marked directories
    return Header(name, size, kind)


def _number(field: bytes) -> int | None:
    """Octal digits, or a base-256 number of GNU; nothing where it is neither, or below zero."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    match = OCTAL.fullmatch(field)
    return int(match[1] or b"0", 8) if match else None


def compressed(head: bytes) -> str | None:
    """The program that has compressed a file which begins like this."""
    return next((name for magic, name in COMPRESSED.items() if head.startswith(magic)), None)


def sweep(read: Read, seen: Callable[[int], object] = lambda count: None) -> Swept:
    """The first pass: all valid headers, at any byte; `seen` is told how many bytes were read."""
    headers, sha = array("Q"), hashlib.sha256()
    size = content = 0
    tail = b""  # a header may lie across two chunks
    while chunk := read(size, CHUNK):
        sha.update(chunk)
        used = len(chunk.rstrip(b"\0"))
        content = size + used if used else content
        window, base = tail + chunk, size - len(tail)
        headers.extend(base + place for place in _headers(window))
        tail, size = window[-BLOCK + 1 :], size + len(chunk)
        seen(len(chunk))
    return Swept(headers, size, content, sha.hexdigest())


def _headers(window: bytes) -> list[int]:
    found = {match.start() - SUM_AT - 6 for match in SUM.finditer(window)}
    at = window.find(MAGIC)
    while at >= 0:
        found.add(at - MAGIC_AT)
        at = window.find(MAGIC, at + 1)
    last = len(window) - BLOCK
    blocks = ((p, window[p : p + BLOCK]) for p in sorted(found) if 0 <= p <= last)
    return [p for p, block in blocks if NAME.fullmatch(block, 0, 100) and parse(block) is not None]


def walk(read: Read, swept: Swept) -> Iterator[Member | Damage]:
    """All whole members and all torn places of a tar, in the order in which they lie there."""
    walker = _Walker(read, swept)
    while not walker.ended:
        yield from walker.step()


class _Walker:
    """Where the walk is, and what extended headers have said of the next member."""

    def __init__(self, read: Read, swept: Swept) -> None:
        self.read, self.swept = read, swept
        self.place = 0
        self.own: dict[bytes, bytes] = {}
        self.ended = False

    def step(self) -> Iterator[Member | Damage]:
        """One header with its payload, or one place where there should be a header and is none."""
        header = parse(self.read(self.place, BLOCK))
        if header is None:
            yield from self._lost()
            return
        first, size = self.place + BLOCK, header.size
        if header.kind not in EXTENDED:
            header, size = self._told(header)
        if header.kind == b"S":
            first = self._behind_map(first)
        if header.kind in WITHOUT_PAYLOAD or (header.kind == b"1" and not self._has_payload(first)):
            size = 0
        end, following = first + size, first + -(-size // BLOCK) * BLOCK
        inside = header.kind not in EXTENDED and header.name.lower().endswith(ARCHIVES)
        inner = self.swept.header_from(end if inside else self.place + BLOCK)
        if inner is not None and inner < end:
            there = f"only {max(inner - first, 0)} of its {size} bytes are there, then another header follows"
            yield self._torn(header, there)
            following = inner
        elif end > self.swept.size:
            there = (
                f"only {max(self.swept.size - first, 0)} of its {size} bytes are there, then the file ends"
            )
            yield self._torn(header, there)
            self.ended = True
        else:
            yield from self._whole(header, first, size)
            if inner is not None and inner < following:
                yield Damage(
                    "broken_header", inner, f"byte {inner}: this header comes {following - inner} early"
                )
                self.own, following = {}, inner
        self.place = following

    def _torn(self, header: Header, there: str) -> Damage:
        self.own = {}
        name = None if header.kind in EXTENDED else header.name
        return Damage("cut_tar", self.place, f"byte {self.place}: {there}", name)

    def _whole(self, header: Header, first: int, size: int) -> Iterator[Member | Damage]:
        """A member, or what an extended header says of the next."""
        if header.kind not in EXTENDED:
            self.own = {}
            if header.kind not in SILENT:
                plain = header.kind in (b"0", b"\0", b"7")
                yield Member(header.name, first, size, plain)
            return
        data = self.read(first, min(size, EXTENDED_AT_MOST))
        if header.kind == b"L":
            self.own[b"path"] = data.split(b"\0", 1)[0]
        elif header.kind != b"K":
            found = _records(data)
            if found is None:
                self.own = {}
                yield Damage(
                    "broken_header", self.place, f"byte {self.place}: an extended header that is none"
                )
            elif header.kind == b"g":  # of all that follow: nothing in it matters here
                if found.keys() & {b"path", b"size"}:
                    where = f"byte {self.place}"
                    yield Damage("broken_header", self.place, f"{where}: one name or size for all members")
            else:
                self.own |= found

    def _told(self, header: Header) -> tuple[Header, int]:
        """The header as the extended headers before it correct it."""
        told = {key: value for key, value in self.own.items() if value}
        name, kind, size = told.get(b"path", header.name), header.kind, header.size
        if kind in (b"0", b"\0") and any(key.startswith(b"GNU.sparse") for key in told):
            kind = b"s"  # a sparse file of pax, whose payload begins with a map
            name = told.get(b"GNU.sparse.name", name)
        if re.fullmatch(rb"[0-9]{1,19}", told.get(b"size", b"")):
            size = int(told[b"size"])
        return Header(name.rstrip(b"/") if b"path" in told else name, size, kind), size

    def _has_payload(self, first: int) -> bool:
        """Whether a hard link's size is that of data in the tar (pax allows it), not that of its target."""
        return self.swept.header_from(first) != first and self.read(first, BLOCK).strip(b"\0") != b""

    def _behind_map(self, first: int) -> int:
        """Behind the blocks that continue the map of a sparse file, of which the header holds the start."""
        more = self.read(first - BLOCK + 482, 1) != b"\0"
        while more and first < self.swept.size and self.swept.header_from(first) != first:
            more = self.read(first + 504, 1) not in (b"\0", b"")
            first += BLOCK
        return first

    def _lost(self) -> Iterator[Damage]:
        """No header where one should be: go on at the next that is valid, else end."""
        place, block = self.place, self.read(self.place, BLOCK)
        following = self.swept.header_from(place + 1)
        zeros = not block.strip(b"\0")
        self.own = {}
        if following is not None:
            what = "zeros" if zeros else "no header"
            yield Damage(
                "broken_header", place, f"byte {place}: {what}; the next header is at byte {following}"
            )
            self.place = following
            return
        self.ended = True
        if not zeros and len(block) < BLOCK:
            yield Damage("cut_tar", place, f"byte {place}: the file ends within a header")
        elif not zeros or self.swept.content > place:
            yield Damage("broken_header", place, f"byte {place}: no header, and none behind it")
        elif (
            self.swept.size and self.swept.size - max(self.swept.content, min(place, self.swept.size)) < BLOCK
        ):
            size = self.swept.size
            yield Damage("cut_tar", size, f"byte {size}: the file ends without the mark of a tar's end")


def _records(data: bytes) -> dict[bytes, bytes] | None:
    """The records `LENGTH KEY=VALUE` of a pax header; nothing where they are torn."""
    found: dict[bytes, bytes] = {}
    at = 0
    while match := RECORD.match(data, at):
        end = at + int(match[1])
        if not match.end() < end <= len(data) or data[end - 1 : end] != b"\n":
            return None
        found[match[2]] = data[match.end() : end - 1]
        at = end
    return None if data[at:].strip(b"\0") else found

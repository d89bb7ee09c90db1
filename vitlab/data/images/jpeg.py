"""A JPEG's header: what must be known of the picture before any of its pixels is decoded (ITU T.81, annex B).

It costs some microseconds, so it is read for every sample. A file without a last marker ends early: libjpeg
would fill what is missing with grey and say nothing.
"""

from __future__ import annotations

import re
import struct
from typing import NamedTuple

from vitlab.data.bad import BadInputError

TURNS = {  # EXIF's orientation: rows become columns; then top and bottom, left and right change places
    1: (False, False, False),
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # markers of a frame; the three are tables
_BARE = {0x00, 0x01, *range(0xD0, 0xD9)}  # markers without a length
_CUT = "ends before its last pixels"


class JpegHeader(NamedTuple):
    height: int  # as it is stored, before it is turned
    width: int
    plain: bool  # Huffman codes, 8 bits, grey or three colours: what libjpeg-turbo reads
    streams: bool  # read from top to bottom in one go; else all coefficients are held at full size
    unit: int  # rows that are decoded together
    height_at: int  # where the height stands in the file
    orientation: int


def read_header(data: bytes) -> JpegHeader:
    """What stands before the pixels."""
    frame, exif, xmp, at = 0, b"", b"", 2
    try:
        while True:
            if data[at] != 0xFF:
                at = data.index(b"\xff", at)
            marker = data[at + 1]
            if marker == 0xFF or marker in _BARE:
                at += 1 if marker == 0xFF else 2
                continue
            size = data[at + 2] << 8 | data[at + 3]
            if marker == 0xE1:
                part = data[at + 4 : at + 2 + size]
                exif = exif or (part[6:] if part.startswith(b"Exif\0\0") else b"")
                xmp = xmp or (part if b"tiff:Orientation" in part else b"")
            elif marker in _FRAMES:
                frame = at
            elif marker in (0xDA, 0xD9) or size < 2:
                break
            at += 2 + size
        if marker != 0xDA or not frame:
            raise BadInputError("broken_image", "a JPEG without pixels")
        return _frame(data, frame, at, _orientation(exif) or _xmp_orientation(xmp) or 1)
    except (IndexError, ValueError):
        raise BadInputError("cut_image", _CUT) from None


def _frame(data: bytes, frame: int, scan: int, orientation: int) -> JpegHeader:
    """What the frame's segment says, and the first scan's."""
    marker, bits, components = data[frame + 1], data[frame + 4], data[frame + 9]
    height, width = (data[at] << 8 | data[at + 1] for at in (frame + 5, frame + 7))
    if not height or not width:
        raise BadInputError("broken_image", f"a JPEG of {height}×{width} pixels")
    if data.rfind(b"\xff\xd9", scan) < 0:
        raise BadInputError("cut_image", _CUT)
    plain = marker in (0xC0, 0xC1, 0xC2) and bits == 8 and components in (1, 3)
    unit = 8 * max(data[frame + 11 + 3 * i] & 15 for i in range(components)) if plain else 0
    streams = unit > 0 and marker != 0xC2 and data[scan + 4] == components
    return JpegHeader(height, width, plain, streams, unit, frame + 5, orientation)


def _orientation(tiff: bytes) -> int:
    """EXIF's; 0 where it has none."""
    try:
        order = {b"II": "<", b"MM": ">"}[tiff[:2]]
        (at,) = struct.unpack_from(f"{order}I", tiff, 4)
        (count,) = struct.unpack_from(f"{order}H", tiff, at)
        for entry in range(at + 2, at + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(f"{order}HH", tiff, entry)
            if tag == 0x0112:
                value = struct.unpack_from(order + {1: "B", 3: "H", 4: "I"}[kind], tiff, entry + 8)[0]
                return value if value in TURNS else 0
    except (KeyError, struct.error):
        pass
    return 0


def _xmp_orientation(xmp: bytes) -> int:
    found = re.search(rb'tiff:Orientation(?:="|>)([1-8])', xmp)
    return int(found[1]) if found else 0

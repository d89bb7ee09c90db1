"""Tars with one bad thing each, and what an index must say of it."""

from __future__ import annotations

import io
from functools import cache

from PIL import Image


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

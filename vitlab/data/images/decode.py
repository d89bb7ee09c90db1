"""Bytes of an image file → pixels: no more of them than a crop needs, never more than memory is meant for.

A JPEG is opened by its header alone. Then the crop is known, and decoding does the least that serves it:

- It stops after the crop's last row. A baseline JPEG is read from top to bottom, so a smaller height in a
  copy of its header ends it early; the rows above are the same bits.
- It decodes at 1/2, 1/4 or 1/8 of the size, where the crop keeps `MARGIN` times the pixels of its view, along
  each side. Other scales take longer than the whole.

At full scale, all is what Pillow decodes, bit by bit. At a smaller one, it is this far (PSNR in dB, median
and minimum) from crop and antialiased resize of the whole: random crops of photos of 2000×1500, some
enlarged, some tiled of photos with detail in every pixel, to 224; the worse of bilinear and bicubic.

  margin      1            1.5          2
  enlarged    46.4  35.6   50.9  43.4   53.4  47.0
  detailed    44.0  33.5   47.2  40.4   52.0  45.6

One channel of a coloured JPEG is its luma as it is stored. Pillow's `L` has the same weights, but goes by way
of rounded colours cut to 0..255: 59 dB apart, at least 47.

A broken file becomes `BadInputError` and nothing else, whatever the decoders raise. What libjpeg can mend (a
few broken bytes in the middle) passes as it does with Pillow; a file that ends early does not.

Letters: C channels, H W image. Pixels are arrays H W C of bytes, as decoders write them.
"""

from __future__ import annotations

import functools
import importlib
import io
import struct
import threading
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from vitlab.data.bad import BadInputError
from vitlab.data.images.jpeg import TURNS, JpegHeader, read_header

MARGIN = 2.0  # pixels of a scaled crop for each of the view's, along a side
SCALES = (8, 4, 2)
MAX_PIXELS = 100_000_000
MODES = {1: "L", 3: "RGB"}
PLUGINS = {"JPEG": "Jpeg", "WEBP": "WebP"}  # of Pillow, where it writes its formats' names otherwise
SPACES = {1: "GRAY", 3: "RGB"}
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # Pillow's names; PGM is a PPM


class Box(NamedTuple):
    """A part of an image, and the rows and columns that it becomes."""

    top: int
    left: int
    height: int
    width: int
    rows: int
    columns: int


class Region(NamedTuple):
    """Pixels of a part of an image, upright; one stands for `scale`² pixels of the image.

    `top` and `left` are where the first begins, in pixels of the image (below 0 where it overlaps the edge).
    """

    pixels: np.ndarray  # h w C, uint8
    top: int = 0
    left: int = 0
    scale: int = 1


class Picture:
    """An image that was decoded whole. Its size is that of the upright image."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = pixels
        self.height, self.width = pixels.shape[:2]

    def region(self, *boxes: Box) -> Region:
        """What serves all these boxes."""
        return Region(self.pixels)


def open_picture(data: bytes, channels: int, max_pixels: int = MAX_PIXELS) -> Picture:
    """A JPEG is not decoded yet. `max_pixels`: the most that decoding may hold; see `JpegPicture` for its."""
    if data.startswith(b"\xff\xd8\xff"):
        header = read_header(data)
        if header.plain:
            return JpegPicture(data, header, channels, max_pixels)
    return Picture(_by_pillow(data, channels, max_pixels))


def decode(data: bytes, channels: int, max_pixels: int = MAX_PIXELS) -> Tensor:
    """The bytes of an image file → uint8 C H W: the whole image, upright."""
    picture = open_picture(data, channels, max_pixels)
    _check_size(picture.height, picture.width, max_pixels)
    whole = picture.region(Box(0, 0, picture.height, picture.width, picture.height, picture.width))
    return torch.from_numpy(whole.pixels).permute(2, 0, 1)


# ---------------------------------------------------------------- JPEG


class JpegPicture(Picture):
    """A JPEG whose header alone was read.

    One that is read in one go counts at the scale at which it is decoded, and is decoded at a smaller scale
    where it would hold more than `max_pixels`. Others (progressive ones) count at full size.
    """

    def __init__(self, data: bytes, header: JpegHeader, channels: int, max_pixels: int) -> None:
        self.data, self.header, self.channels, self.max_pixels = data, header, channels, max_pixels
        self.height, self.width = header.height, header.width
        if TURNS[header.orientation][0]:
            self.height, self.width = header.width, header.height
        least = SCALES[0] if header.streams else 1
        _check_size(-(-self.height // least), -(-self.width // least), max_pixels)

    def region(self, *boxes: Box) -> Region:
        scale = min([_scale(box) for box in boxes])
        bottom = max([box.top + box.height for box in boxes])
        if self.header.orientation != 1:
            return self._turned(boxes, bottom, scale)
        pixels, scale = self._decode(bottom, scale)
        return Region(pixels, 0, 0, scale)

    def _turned(self, boxes: Sequence[Box], bottom: int, scale: int) -> Region:
        """Upright, and no more than the boxes: the rest need not be copied."""
        top, left = min(box.top for box in boxes), min(box.left for box in boxes)
        right = max(box.left + box.width for box in boxes)
        turned, upside_down, mirrored = TURNS[self.header.orientation]
        if turned:
            last = self.width - left if mirrored else right
        else:
            last = self.height - top if upside_down else bottom
        pixels, scale = self._decode(last, scale)
        pixels = pixels.swapaxes(0, 1) if turned else pixels
        pixels = pixels[:: -1 if upside_down else 1, :: -1 if mirrored else 1]
        first_row = self.height - len(pixels) * scale if upside_down else 0
        first_column = self.width - pixels.shape[1] * scale if mirrored else 0
        rows = slice((top - first_row) // scale, -((first_row - bottom) // scale))
        columns = slice((left - first_column) // scale, -((first_column - right) // scale))
        part = np.ascontiguousarray(pixels[rows, columns])
        return Region(part, first_row + rows.start * scale, first_column + columns.start * scale, scale)

    def _decode(self, last: int, scale: int) -> tuple[np.ndarray, int]:
        """H W C of the rows before the last, as they are stored, and the scale that it came to."""
        header, data = self.header, self.data
        while True:
            height = self._rows(last, scale)
            rows, columns = -(-height // scale), -(-header.width // scale)
            if rows * columns <= self.max_pixels or scale == SCALES[0] or not header.streams:
                break
            scale *= 2
        if height < header.height:
            at = header.height_at
            data = b"".join((data[:at], height.to_bytes(2, "big"), data[at + 2 :]))
        least = {"min_height": rows, "min_width": columns, "min_factor": scale} if scale > 1 else {}
        try:
            pixels = simplejpeg.decode_jpeg(data, SPACES[self.channels], strict=False, **least)
        except Exception as error:  # decoders raise anything on broken data
            raise _broken(error) from error
        if pixels.shape[:2] != (rows, columns):
            raise BadInputError("broken_image", f"decoded to {pixels.shape[:2]}, expected {(rows, columns)}")
        return pixels, scale

    def _rows(self, last: int, scale: int) -> int:
        """How many to decode: rows beside the last have a share in its colours, where these are coarser."""
        if not self.header.streams:
            return self.header.height
        unit = self.header.unit
        return min(self.header.height, -(-(last + 2 * scale) // unit) * unit)


def _scale(box: Box) -> int:
    for scale in SCALES:
        if box.height >= scale * MARGIN * box.rows and box.width >= scale * MARGIN * box.columns:
            return scale
    return 1


# ---------------------------------------------------------------- everything else


class _Quiet:
    """Without Pillow's warnings, and without its own bound: ours is checked before pixels are decoded.

    Both belong to the whole process: the first of several threads switches them off, the last one on.
    """

    def __init__(self) -> None:
        self.lock, self.inside = threading.Lock(), 0

    def __enter__(self) -> None:
        with self.lock:
            if not self.inside:
                self.bound, self.warnings = Image.MAX_IMAGE_PIXELS, warnings.catch_warnings()
                self.warnings.__enter__()
                warnings.simplefilter("ignore")
                Image.MAX_IMAGE_PIXELS = None
            self.inside += 1

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside:
                self.warnings.__exit__(None, None, None)
                Image.MAX_IMAGE_PIXELS = self.bound


_quiet = _Quiet()
_TURNED = (b"Exif", b"eXIf", b"exif", b"tiff:Orientation", b"II*\0", b"MM\0*")  # one stands in what is


def _by_pillow(data: bytes, channels: int, max_pixels: int) -> np.ndarray:
    """H W C, upright: the first picture of the file."""
    with _quiet:
        try:
            image: Any = _opened(data)
            _check_size(image.height, image.width, max_pixels)
            image.load()
            if any(mark in data for mark in _TURNED):
                image = _upright(image)
            image = _eight_bits(image)
            pixels = np.array(image if image.mode == MODES[channels] else image.convert(MODES[channels]))
        except BadInputError:
            raise
        except Exception as error:
            raise _broken(error) from error
    return pixels[..., None] if channels == 1 else pixels


_MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"BM", b"GIF8", b"II*\0", b"MM\0*")


@functools.cache
def _learn_formats() -> None:
    """Without its own search for plugins, which loads dozens of them."""
    for name in FORMATS:
        importlib.import_module(f"PIL.{PLUGINS.get(name, name.title())}ImagePlugin")


def _opened(data: bytes) -> Image.Image:
    _learn_formats()
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        if data.startswith(_MAGIC):
            raise BadInputError("broken_image", "its header makes no sense") from None
        what = f"begins with {data[:8]!r}" if data else "is empty"
        raise BadInputError("unknown_format", f"{what}; known: {', '.join(FORMATS)}") from None


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except (SyntaxError, ValueError, KeyError, TypeError, struct.error):  # what it says of itself is broken
        return image


def _eight_bits(image: Image.Image) -> Image.Image:
    """Pillow's own conversion would cut all values above 255 off."""
    if image.mode == "F":
        raise BadInputError(
            "unknown_format", "pixels are floats, which have no fixed white; write 8 or 16 bits"
        )
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    if values.dtype.itemsize > 2 and (values.min() < 0 or values.max() > 0xFFFF):
        raise BadInputError("unknown_format", "pixels have 32 bits; write 8 or 16")
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))


def _check_size(height: int, width: int, most: int) -> None:
    if height * width > most:
        raise BadInputError(
            "too_large", f"decodes to {height}×{width} pixels, data.max_pixels allows {most} in all"
        )


def _broken(error: Exception) -> BadInputError:
    reason = (str(error).splitlines() or [""])[0] or type(error).__name__
    if isinstance(error, EOFError) or "truncated" in reason.lower():
        return BadInputError("cut_image", reason)
    return BadInputError("broken_image", reason)

"""What becomes of one image on its way into a shard: looked at, and made smaller where that was asked for.

Without `resize` and `quality` the bytes are copied, and the check is cheap: the header is read, and whether
the file has its end, not the pixels. One that is broken in between is found when it is read. With either,
pixels are decoded:

- `resize`: what has a longer shorter side is scaled down (Lanczos). A JPEG stays one, of quality 95; other
  formats become PNG. What is small enough is copied.
- `quality`: every image becomes a JPEG of this quality, colours at half the resolution (4:2:0).

A decoded image is turned as its EXIF orientation says. EXIF, colour profiles and further frames are left out.
Its bytes are the same every time, with the same versions of Pillow and of its codecs.

The split follows from the hash of the bytes as they came, so that no such option moves a sample to another
side.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vitlab.data.bad import BadInputError
from vitlab.data.images.jpeg import read_header
from vitlab.data.settings import WriteOptions

EXTENSIONS = {"PNG": "png", "JPEG": "jpg", "MPO": "jpg", "WEBP": "webp", "BMP": "bmp", "GIF": "gif"}
EXTENSIONS |= {"TIFF": "tif", "PPM": "ppm"}
OPENED = tuple(kind for kind in EXTENSIONS if kind != "MPO")  # which Pillow opens as JPEG
KEPT_QUALITY = 95  # of a JPEG that is only made smaller


def side(data: bytes, held_out: float, val: float) -> str:
    """The split of an image: its hash as a number in [0, 1), so always the same one."""
    u = int.from_bytes(hashlib.sha256(data).digest(), "big") / 2**256
    return "held_out" if u < held_out else "val" if u < held_out + val else "train"


@contextmanager
def pillow_at_work() -> Iterator[None]:
    """Without Pillow's warnings and its own bound of pixels: they belong to the process, not to a thread."""
    bound = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Image.MAX_IMAGE_PIXELS = None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = bound


def packed(data: bytes, how: WriteOptions) -> tuple[str, bytes]:
    """The bytes of an image file → extension and bytes of the file in the shard."""
    image = _opened(data)
    smaller = how.resize is not None and min(image.size) > how.resize
    if how.quality is None and not smaller:
        _check_copied(image, data, how.max_pixels)
        return EXTENSIONS[str(image.format)], data
    lossy = how.quality is not None or image.format in ("JPEG", "MPO")
    out = io.BytesIO()
    drawn = _drawn(image, how, lossy)
    if lossy:
        drawn.save(out, "JPEG", quality=how.quality or KEPT_QUALITY)
    else:
        drawn.save(out, "PNG")
    return "jpg" if lossy else "png", out.getvalue()


def _check_copied(image: Image.Image, data: bytes, max_pixels: int) -> None:
    """What can be seen without decoding: a size that no reader will take, and a file that ends early."""
    if image.format in ("JPEG", "MPO"):
        read_header(data)
        least = 8  # the reader decodes a JPEG at an eighth, if need be
    else:
        least = 1
    if -(-image.width // least) * -(-image.height // least) > max_pixels:
        size = f"{image.height}×{image.width} pixels"
        raise BadInputError("too_large", f"has {size}, data.max_pixels allows {max_pixels} in all")
    if image.format == "PNG" and b"IEND" not in data[-64:]:
        raise BadInputError("cut_image", "the PNG ends before its end mark")


def _opened(data: bytes) -> Image.Image:
    from PIL import TiffImagePlugin, WebPImagePlugin  # noqa: F401  (they tell Pillow of themselves)

    try:
        return Image.open(io.BytesIO(data), formats=OPENED)
    except UnidentifiedImageError:
        kinds = [kind for kind in OPENED if _claims(kind, data)]
    except Exception as error:  # decoders raise anything on broken data
        raise _broken(error) from None
    if kinds:
        raise BadInputError("broken_image", f"its header makes no sense for {kinds[0]}")
    what = f"begins with {data[:8]!r}" if data else "is empty"
    raise BadInputError("unknown_format", f"{what}; allowed: {', '.join(EXTENSIONS)}")


def _claims(kind: str, data: bytes) -> bool:
    accept = Image.OPEN[kind][1]
    return accept is not None and accept(data[:16]) is True


def _drawn(image: Image.Image, how: WriteOptions, lossy: bool) -> Image.Image:
    """The pixels of the file in the shard: upright, in 8 bits, no larger than asked for."""
    width, height = image.size
    scale = min(1.0, (how.resize or min(image.size)) / min(image.size))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    image.draft(None, (2 * size[0], 2 * size[1]))  # a JPEG is decoded at 1/2, 1/4 or 1/8 where that suffices
    if image.width * image.height > how.max_pixels:
        raise BadInputError(
            "too_large", f"{width}x{height} pixels, data.max_pixels allows {how.max_pixels} in all"
        )
    try:
        image.load()
        upright = ImageOps.exif_transpose(image)
        plain = _plain(upright, lossy)
        if (upright.width > upright.height) != (image.width > image.height):
            size = size[::-1]
        return plain if plain.size == size else plain.resize(size, Image.Resampling.LANCZOS)
    except BadInputError:
        raise
    except Exception as error:
        raise _broken(error) from None


def _plain(image: Image.Image, lossy: bool) -> Image.Image:
    """In a mode that can be scaled and saved."""
    if image.mode == "F":
        raise BadInputError("unknown_format", "its pixels are floats, which have no fixed white")
    if image.mode.startswith("I"):  # 16 bits: Pillow's own conversion would cut all above 255 off
        values: Any = np.asarray(image)
        return Image.fromarray(((values.clip(0, 0xFFFF).astype(np.uint32) + 128) // 257).astype(np.uint8))
    if image.mode in ("L", "RGB") or (not lossy and image.mode in ("LA", "RGBA")):
        return image
    if not lossy and image.has_transparency_data:
        return image.convert("RGBA")
    return image.convert("L" if image.mode in ("1", "LA") else "RGB")


def _broken(error: Exception) -> BadInputError:
    reason = (str(error).splitlines() or [""])[0] or type(error).__name__
    cut = isinstance(error, EOFError) or "truncated" in reason.lower()
    return BadInputError("cut_image" if cut else "broken_image", reason)

"""Decoding does less than the whole and gives the same pixels; whatever the bytes, nothing else comes out."""

from __future__ import annotations

import functools
import io
import math
import resource
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from samples import one_line, region_of, resampled
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from vitlab.data.bad import BadInputError
from vitlab.data.images.decode import Box, JpegPicture, Picture, Region, open_picture
from vitlab.data.images.decode import decode as decode_whole

MODES = {1: "L", 3: "RGB"}


@functools.cache
def photo(height: int = 150, width: int = 201, name: str = "china.jpg") -> Image.Image:
    from sklearn.datasets import load_sample_image

    return Image.fromarray(load_sample_image(name)).resize((width, height), Image.Resampling.LANCZOS)


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def jpeg(height: int = 150, width: int = 201, mode: str = "RGB", **options: Any) -> bytes:
    return encoded(photo(height, width).convert(mode), quality=90, **options)


def plain(data: bytes, channels: int = 3) -> Tensor:
    """Pillow's pixels."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert(MODES[channels])
    pixels = torch.from_numpy(np.array(image))
    return pixels[None] if channels == 1 else pixels.permute(2, 0, 1)


def psnr(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    error = float((a.float() - b.float()).square().mean())
    return 10 * math.log10(255**2 / error) if error else math.inf


def shown(region: Region, box: Box) -> Tensor:
    """The box of a region at full scale."""
    assert region.scale == 1
    top, left = box.top - region.top, box.left - region.left
    return torch.from_numpy(region.pixels[top : top + box.height, left : left + box.width]).permute(2, 0, 1)


def boxes(height: int, width: int, n: int = 12) -> list[Box]:
    drawn = np.random.default_rng(0)
    out = []
    for _ in range(n):
        h, w = int(drawn.integers(1, height + 1)), int(drawn.integers(1, width + 1))
        out.append(
            Box(int(drawn.integers(height - h + 1)), int(drawn.integers(width - w + 1)), h, w, 224, 224)
        )
    return out


def refused(data: bytes, channels: int = 3, most: int = 10**8) -> BadInputError:
    with pytest.raises(BadInputError) as caught:
        decode_whole(data, channels, most)
    one_line(caught.value)
    return caught.value


# ---------------------------------------------------------------- the same pixels


JPEGS: dict[str, dict[str, Any]] = {
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "4:2:0": {"subsampling": 2},
    "4:2:0, optimized": {"subsampling": 2, "optimize": True},
    "4:2:0, restarts": {"subsampling": 2, "restart_marker_rows": 1},
    "progressive": {"subsampling": 2, "progressive": True},
    "progressive 4:4:4": {"subsampling": 0, "progressive": True},
    "grey": {"mode": "L"},
    "colours as they are": {"subsampling": 0, "keep_rgb": True},
}


@pytest.mark.parametrize("name", JPEGS)
def test_a_crop_of_a_jpeg_is_pillow_s_bit_by_bit(name: str) -> None:
    data = jpeg(**JPEGS[name])
    whole, picture = plain(data), open_picture(data, 3)
    assert (picture.height, picture.width) == (150, 201)
    assert torch.equal(decode_whole(data, 3), whole)
    for box in boxes(150, 201):
        assert torch.equal(shown(picture.region(box), box), shown(region_of(whole), box))


def test_rows_below_the_crop_are_not_decoded() -> None:
    for name, rows in (("4:2:0", 32), ("4:4:4", 24), ("progressive", 150)):
        region = open_picture(jpeg(**JPEGS[name]), 3).region(Box(3, 5, 16, 50, 224, 224))
        assert region.pixels.shape == (rows, 201, 3)


@pytest.mark.parametrize("how", ["bilinear", "bicubic"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_crop_and_its_resampling_are_the_plain_path_s(how: str, channels: int) -> None:
    data = jpeg(mode=MODES[channels])
    whole, picture = plain(data, channels), open_picture(data, channels)
    for box in boxes(150, 201):
        box = box._replace(rows=64, columns=48)
        theirs = F.resized_crop(whole, *box[:4], [64, 48], interpolation=F.InterpolationMode(how))
        assert torch.equal(resampled(picture.region(box), box, how), theirs)


def test_one_region_serves_several_boxes() -> None:
    data = jpeg()
    picture, whole = open_picture(data, 3), plain(data)
    several = boxes(100, 201, 6)
    region = picture.region(*several)
    assert region.pixels.shape[0] < 150
    assert all(torch.equal(shown(region, box), shown(region_of(whole), box)) for box in several)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_crops_of_turned_pictures(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = jpeg(exif=exif.tobytes())
    whole, picture = plain(data), open_picture(data, 3)
    assert isinstance(picture, JpegPicture)
    assert (picture.height, picture.width) == ((150, 201) if orientation < 5 else (201, 150))
    assert torch.equal(decode_whole(data, 3), whole)
    for box in boxes(picture.height, picture.width):
        region = picture.region(box)
        assert torch.equal(shown(region, box), shown(region_of(whole), box))
        assert orientation == 1 or region.pixels.shape[:2] == (box.height, box.width)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_scaled_crops_of_turned_pictures_lie_where_they_should(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(photo(403, 613), quality=92, exif=exif.tobytes())
    whole, picture = plain(data), open_picture(data, 3)
    for top, left in ((0, 0), (37, 21), (53, 70)):
        box = Box(top, left, 330, 330, 40, 41)
        region = picture.region(box)
        assert region.scale == 4
        theirs = F.resized_crop(whole, *box[:4], [40, 41], antialias=True)
        assert psnr(resampled(region, box, "bilinear"), theirs) > 40
        apart = torch.roll(theirs, 1, 1)[:, 1:]  # were it a row too low
        assert psnr(resampled(region, box, "bilinear")[:, 1:], apart) < 30


@pytest.mark.parametrize(("mark", "orientation"), [(b'tiff:Orientation="6"', 6), (b"tiff:Orientation>3<", 3)])
def test_orientation_of_xmp_as_pillow_reads_it(mark: bytes, orientation: int) -> None:
    data = jpeg(xmp=b"<x:xmpmeta>" + mark + b"</x:xmpmeta>")
    assert torch.equal(decode_whole(data, 3), plain(data))
    assert open_picture(data, 3).height == {6: 201, 3: 150}[orientation]


@pytest.mark.parametrize(
    "tiff",
    [b"", b"II", b"XX*\0\x08\0\0\0", b"II*\0\xff\xff\0\0", b"II*\0\x08\0\0\0\xff\xff"]
    + [
        b"II*\0\x08\0\0\0\1\0\x12\1" + kind + b"\1\0\0\0" + value
        for kind, value in ((b"\3\0", b"\x09\0\0\0"), (b"\x0c\0", b"\6\0\0\0"), (b"\3\0", b""))
    ],
)
def test_senseless_exif_turns_nothing(tiff: bytes) -> None:
    data = jpeg()
    part = b"Exif\0\0" + tiff
    marked = data[:2] + b"\xff\xe1" + struct.pack(">H", len(part) + 2) + part + data[2:]
    assert torch.equal(decode_whole(marked, 3), plain(data))


def test_a_scaled_decode_is_seen_by_nobody() -> None:
    """Crops of 2000×1500 to 224, at least 40 dB from crop and resize of the whole."""
    data = encoded(photo(1500, 2000), quality=90)
    whole, picture = plain(data), open_picture(data, 3)
    for height, width, scale in ((1400, 1900, 2), (896, 897, 2), (895, 1500, 1)):
        box = Box(51, 67, height, width, 224, 224)
        region = picture.region(box)
        assert region.scale == scale
        for how in ("bilinear", "bicubic"):
            theirs = F.resized_crop(whole, *box[:4], [224, 224], interpolation=F.InterpolationMode(how))
            ours = resampled(region, box, how)
            assert psnr(ours, theirs) > 40
            assert torch.equal(ours, theirs) == (scale == 1)


def test_the_most_demanding_box_decides_the_scale() -> None:
    picture = open_picture(encoded(photo(800, 800), quality=90), 3)
    large, small = Box(0, 0, 800, 800, 48, 48), Box(100, 100, 200, 200, 48, 48)
    assert [picture.region(*b).scale for b in ([large], [small], [large, small])] == [8, 2, 2]
    assert picture.region(Box(0, 0, 800, 800, 800, 800)).scale == 1


def test_one_channel() -> None:
    data = jpeg(subsampling=2)
    assert psnr(decode_whole(data, 1), plain(data, 1)) > 45
    grey = jpeg(mode="L")
    assert torch.equal(decode_whole(grey, 1), plain(grey, 1))
    assert torch.equal(decode_whole(grey, 3), plain(grey, 1).expand(3, -1, -1))


# ---------------------------------------------------------------- formats


def palette(transparent: bool = False) -> bytes:
    image = photo(30, 40).quantize(13)
    return encoded(image, "PNG", **({"transparency": bytes(range(0, 130, 10))} if transparent else {}))


def alpha(mode: str = "RGBA") -> Image.Image:
    image = photo(30, 40).convert(mode)
    image.putalpha(Image.linear_gradient("L").resize((40, 30)))
    return image


def frames() -> dict[str, Any]:
    return {"save_all": True, "append_images": [photo(30, 40, "flower.jpg")]}


def marked(orientation: int = 6) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


FILES: dict[str, Callable[[], bytes]] = {
    "png": lambda: encoded(photo(30, 40), "PNG"),
    "png, 1 bit": lambda: encoded(photo(30, 40).convert("1"), "PNG"),
    "png, 2 bits": lambda: encoded(photo(30, 40).quantize(4), "PNG", bits=2),
    "png, 4 bits": lambda: encoded(photo(30, 40).quantize(16), "PNG", bits=4),
    "png, palette": palette,
    "png, palette with alpha": lambda: palette(True),
    "png, grey": lambda: encoded(photo(30, 40).convert("L"), "PNG"),
    "png, grey and alpha": lambda: encoded(alpha("LA"), "PNG"),
    "png, alpha": lambda: encoded(alpha(), "PNG"),
    "png, turned": lambda: encoded(photo(30, 40), "PNG", exif=marked()),
    "apng": lambda: encoded(photo(30, 40), "PNG", **frames()),
    "webp": lambda: encoded(photo(30, 40), "WEBP"),
    "webp, alpha": lambda: encoded(alpha(), "WEBP", lossless=True),
    "webp, animated": lambda: encoded(photo(30, 40), "WEBP", **frames()),
    "webp, turned": lambda: encoded(photo(30, 40), "WEBP", exif=marked()),
    "gif": lambda: encoded(photo(30, 40), "GIF"),
    "gif, animated": lambda: encoded(photo(30, 40), "GIF", **frames()),
    "bmp": lambda: encoded(photo(30, 40), "BMP"),
    "tiff": lambda: encoded(photo(30, 40), "TIFF"),
    "tiff, deflated": lambda: encoded(photo(30, 40), "TIFF", compression="tiff_adobe_deflate"),
    "tiff, turned": lambda: encoded(photo(30, 40), "TIFF", exif=marked()),
    "ppm": lambda: encoded(photo(30, 40), "PPM"),
    "pgm": lambda: encoded(photo(30, 40).convert("L"), "PPM"),
    "jpeg, cmyk": lambda: jpeg(30, 40, "CMYK"),
    "jpeg": lambda: jpeg(30, 40),
    "jpeg, grey": lambda: jpeg(30, 40, "L"),
    "jpeg, progressive": lambda: jpeg(30, 40, progressive=True),
    "jpeg, turned": lambda: jpeg(30, 40, exif=marked()),
}


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")  # Pillow's, of the plain path
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", FILES)
def test_every_format_is_what_pillow_makes_of_it(name: str, channels: int) -> None:
    data = FILES[name]()
    ours, theirs = decode_whole(data, channels), plain(data, channels)
    assert ours.dtype == torch.uint8
    assert ours.shape == (channels, *((40, 30) if "turned" in name else (30, 40)))
    assert psnr(ours, theirs) > (45 if name.startswith("jpeg") and channels == 1 else 1000)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bits(kind: str) -> None:
    values = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    file = encoded(Image.fromarray(values), kind)
    expected = torch.from_numpy((values / 257).round().astype(np.uint8))
    assert torch.equal(decode_whole(file, 1)[0], expected)
    assert torch.equal(decode_whole(file, 3), expected.expand(3, -1, -1))


def test_32_bits_are_refused() -> None:
    wide = np.arange(16, dtype=np.int32).reshape(4, 4) * 10_000
    assert str(refused(encoded(Image.fromarray(wide), "TIFF"))) == "pixels have 32 bits; write 8 or 16"
    floats = encoded(Image.fromarray(wide.astype(np.float32)), "TIFF")
    assert str(refused(floats)) == "pixels are floats, which have no fixed white; write 8 or 16 bits"
    assert refused(floats).kind == "unknown_format"
    narrow = encoded(Image.fromarray(wide // 3), "TIFF")  # these are 16 bits in a wider cell
    assert decode_whole(narrow, 1).max() == round(150_000 // 3 / 257)


# ---------------------------------------------------------------- too large


def png_header(height: int, width: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


def sized(data: bytes, height: int, width: int) -> bytes:
    """A JPEG that says that it has this size."""
    at = next(data.find(bytes((0xFF, marker))) for marker in (0xC0, 0xC2) if bytes((0xFF, marker)) in data)
    return data[: at + 5] + struct.pack(">HH", height, width) + data[at + 9 :]


@pytest.mark.parametrize(
    ("data", "size"),
    [
        (png_header(50_000, 50_000), "50000×50000"),
        (b"P6 50000 50000 255\n" + bytes(100), "50000×50000"),
        (encoded(photo(30, 40), "GIF").replace(b"\x28\0\x1e\0", b"\xff\xff\xff\xff", 1), "65535×65535"),
        (sized(jpeg(progressive=True), 65_000, 65_000), "65000×65000"),
        (sized(jpeg(30, 40, "CMYK"), 65_000, 65_000), "65000×65000"),
    ],
)
def test_a_bomb_is_refused_by_its_header(data: bytes, size: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    error = refused(data)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # in KB
    assert error.kind == "too_large"
    assert str(error) == f"decodes to {size} pixels, data.max_pixels allows 100000000 in all"
    assert grown < 20_000
    assert Image.MAX_IMAGE_PIXELS == 89478485  # Pillow's own is as it was


def test_a_jpeg_counts_at_the_scale_of_its_decoding() -> None:
    data = encoded(photo(800, 800), quality=90)
    box = Box(0, 0, 800, 800, 400, 400)
    scales = [open_picture(data, 3, most).region(box).scale for most in (640_000, 639_999, 40_000, 10_000)]
    assert scales == [1, 2, 4, 8]
    low = Box(0, 0, 100, 800, 400, 400)  # 112 rows are decoded
    assert open_picture(data, 3, 89_600).region(low).scale == 1
    for most in (9_999, 10_000):  # not even at 1/8; and all callers of `decode` want the whole
        assert refused(data, 3, most).kind == "too_large"
    with pytest.raises(BadInputError, match="decodes to 100×100 pixels"):
        open_picture(data, 3, 9_999)


def test_the_bound_is_ours_not_pillow_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # it warns from here on, and refuses from twice that
    assert decode_whole(FILES["png"](), 3, 1200).shape == (3, 30, 40)
    assert refused(FILES["png"](), 3, 1199).kind == "too_large"
    assert Image.MAX_IMAGE_PIXELS == 100


# ---------------------------------------------------------------- broken


@pytest.mark.parametrize(
    "name", ["jpeg", "jpeg, progressive", "jpeg, cmyk", "png", "webp", "gif", "tiff", "ppm"]
)
def test_a_file_that_ends_early_is_found(name: str) -> None:
    data = FILES[name]()
    for share in (0.3, 0.6, 0.95):
        error = refused(data[: int(share * len(data))])
        assert error.kind in ("cut_image", "broken_image")
        assert error.kind == "cut_image" or not name.startswith("jpeg")


def test_a_cut_jpeg_is_found_whatever_the_crop() -> None:
    data = jpeg()
    for end in (3, 20, 200, len(data) // 2, len(data) - 2):
        with pytest.raises(BadInputError, match="ends before its last pixels"):
            open_picture(data[:end], 3)
    trailing = data + b"\0junk" * 50
    assert torch.equal(decode_whole(trailing, 3), plain(data))


@pytest.mark.parametrize(
    ("data", "kind", "text"),
    [
        (b"", "unknown_format", "is empty; known: PNG, JPEG"),
        (b"hello, world", "unknown_format", "begins with b'hello, w'; known"),
        (b"%PDF-1.4\n" + bytes(99), "unknown_format", "begins with"),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), "broken_image", ""),
        (b"\xff\xd8\xff\xd9" + bytes(9), "broken_image", "a JPEG without pixels"),
        (sized(jpeg(), 0, 40), "broken_image", "a JPEG of 0×40 pixels"),
        (jpeg().replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c"), "broken_image", ""),  # 12 bits
        (jpeg().replace(b"\xff\xc0", b"\xff\xc3"), "broken_image", ""),  # lossless
        (jpeg().replace(b"\xff\xdb", b"\xff\xee"), "broken_image", ""),  # no tables
    ],
)
def test_what_is_no_image(data: bytes, kind: str, text: str) -> None:
    error = refused(data)
    assert error.kind == kind
    assert text in str(error)


def test_a_broken_exif_block_costs_no_image() -> None:
    data = encoded(photo(30, 40), "PNG", exif=b"Exif\0\0XX*\0" + bytes(20))
    assert torch.equal(decode_whole(data, 3), plain(encoded(photo(30, 40), "PNG")))


def test_any_exception_of_a_decoder_is_a_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*given: object, **more: object) -> None:
        raise MemoryError

    monkeypatch.setattr("simplejpeg.decode_jpeg", fails)
    monkeypatch.setattr(Image, "open", fails)
    for name in ("jpeg", "png"):
        assert (refused(FILES[name]()).kind, str(refused(FILES[name]()))) == ("broken_image", "MemoryError")


@pytest.mark.parametrize("name", FILES)
def test_mutated_files(name: str) -> None:
    """Bytes changed, cut out, put in and cut off: a tensor of the right shape or `BadInputError`."""
    data, drawn, good = FILES[name](), np.random.default_rng(len(name)), 0
    for _ in range(120):
        mutated = bytearray(data)
        for _ in range(int(drawn.integers(1, 4))):
            at, size = int(drawn.integers(min(len(mutated), 700))), int(drawn.integers(0, 5))
            mutated[at : at + int(drawn.integers(0, 5))] = drawn.bytes(size)
        if drawn.random() < 0.2:
            del mutated[int(drawn.integers(len(mutated))) :]
        try:
            picture = open_picture(bytes(mutated), 3, 2_000_000)
            h, w = picture.height, picture.width
            box = Box(h // 3, w // 4, h - h // 3, w - w // 4, 16, 16)
            out = resampled(picture.region(box), box, "bilinear")
        except BadInputError as error:
            one_line(error)
            continue
        good += 1
        assert out.shape == (3, 16, 16)
        assert out.dtype == torch.uint8
    assert good < 120


def test_a_picture_is_its_pixels() -> None:
    pixels = np.zeros((5, 7, 3), np.uint8)
    picture = Picture(pixels)
    assert (picture.height, picture.width) == (5, 7)
    assert picture.region(Box(1, 1, 2, 2, 9, 9)) == Region(pixels, 0, 0, 1)

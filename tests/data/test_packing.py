"""What is done to an image on its way into a shard: nothing, or what was asked for, the same every time."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from samples import photo, stored

from vitlab.data import WriteOptions, arrays, write_shards
from vitlab.data.bad import BadInputError
from vitlab.data.making.packing import packed, side
from vitlab.data.making.sources import png

PHOTO = Image.fromarray(photo(side=96).permute(1, 2, 0).numpy()).crop((0, 0, 96, 64))
ORIENTATION = 274  # the tag of EXIF


def encoded(image: Image.Image, kind: str, **more: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **more)
    return out.getvalue()


def turned(orientation: int, kind: str = "JPEG") -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return encoded(PHOTO, kind, exif=exif)


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def difference(a: Image.Image, b: Image.Image) -> float:
    return float(np.abs(np.asarray(a, dtype=float) - np.asarray(b, dtype=float)).mean())


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
def test_without_options_bytes_are_copied(kind: str) -> None:
    data = encoded(PHOTO, kind)
    extension = {"JPEG": "jpg", "TIFF": "tif"}.get(kind, kind.lower())
    assert packed(data, WriteOptions()) == (extension, data)
    assert packed(data, WriteOptions(resize=64)) == (extension, data)  # no larger than asked for
    if kind in ("PNG", "JPEG"):  # which tell their end
        with pytest.raises(BadInputError) as cut:
            packed(data[:-20], WriteOptions())
        assert cut.value.kind == "cut_image"
        with pytest.raises(BadInputError) as large:
            packed(data, WriteOptions(max_pixels=95))
        assert large.value.kind == "too_large"
    elif kind != "WEBP":  # Pillow looks at all of it
        assert packed(data[:-20], WriteOptions())[1] == data[:-20]  # its header is well
    extension, smaller = packed(data, WriteOptions(resize=32))
    assert extension == ("jpg" if kind == "JPEG" else "png")
    assert opened(smaller).size == (48, 32)
    assert difference(opened(smaller).convert("RGB"), PHOTO.resize((48, 32), Image.Resampling.LANCZOS)) < 8
    extension, lossy = packed(data, WriteOptions(quality=80))
    assert (extension, opened(lossy).format, opened(lossy).size) == ("jpg", "JPEG", (96, 64))


@pytest.mark.parametrize(
    ("size", "resize", "wanted"),
    [((96, 64), 32, (48, 32)), ((64, 96), 32, (32, 48)), ((90, 60), 7, (10, 7)), ((50, 1), 1, (50, 1)),
     ((640, 480), 33, (44, 33)), ((30, 30), 29, (29, 29)), ((300, 2), 1, (150, 1))],
)  # fmt: skip
def test_the_shorter_side_is_as_asked_for(
    size: tuple[int, int], resize: int, wanted: tuple[int, int]
) -> None:
    for kind in ("PNG", "JPEG"):
        assert (
            opened(packed(encoded(PHOTO.resize(size), kind), WriteOptions(resize=resize))[1]).size == wanted
        )


def test_quality_decides_the_size() -> None:
    data = encoded(PHOTO, "PNG")
    low, high = (packed(data, WriteOptions(quality=quality))[1] for quality in (20, 95))
    assert len(low) < len(high) / 2
    assert difference(opened(high), PHOTO) < 4 < difference(opened(low), PHOTO)
    assert packed(data, WriteOptions(quality=20))[1] == low
    assert b"Exif" not in packed(turned(1), WriteOptions(quality=20))[1]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_a_decoded_image_is_upright(orientation: int, kind: str) -> None:
    from PIL import ImageOps

    data = turned(orientation, kind)
    upright = ImageOps.exif_transpose(opened(data)).convert("RGB")
    for how in (WriteOptions(quality=95), WriteOptions(resize=32), WriteOptions(resize=32, quality=95)):
        made = opened(packed(data, how)[1])
        wanted = (64, 96) if orientation > 4 else (96, 64)
        assert made.size == tuple(n // 2 if how.resize else n for n in wanted)
        assert made.getexif().get(ORIENTATION, 1) == 1
        assert difference(made, upright.resize(made.size, Image.Resampling.LANCZOS)) < 6
        raw = PHOTO.resize(made.size)
        assert orientation == 1 or difference(made, raw) > 12
    assert packed(data, WriteOptions())[1] == data


@pytest.mark.parametrize(
    ("mode", "resized", "lossy"),
    [("1", "L", "L"), ("L", "L", "L"), ("LA", "LA", "L"), ("RGB", "RGB", "RGB"), ("RGBA", "RGBA", "RGB"),
     ("P", "RGB", "RGB"), ("CMYK", "RGB", "RGB"), ("I;16", "L", "L"), ("I", "L", "L")],
)  # fmt: skip
def test_modes(mode: str, resized: str, lossy: str) -> None:
    wide = mode.startswith("I")
    image = (
        Image.fromarray(np.asarray(PHOTO.convert("L")).astype(np.uint16) * 257)
        if wide
        else PHOTO.convert(mode)
    )
    data = encoded(image, "TIFF")
    small, flat = (
        opened(packed(data, WriteOptions(resize=32))[1]),
        opened(packed(data, WriteOptions(quality=95))[1]),
    )
    assert (small.mode, flat.mode) == (resized, lossy)
    if mode not in ("1", "P"):
        assert difference(flat, PHOTO.convert(lossy)) < 5


def test_a_palette_keeps_what_is_transparent() -> None:
    image = Image.new("P", (80, 40))
    image.putpalette([0, 0, 0, 200, 100, 50])
    image.paste(1, (40, 0, 80, 40))
    small = opened(packed(encoded(image, "PNG", transparency=0), WriteOptions(resize=20))[1])
    assert (small.mode, small.size) == ("RGBA", (40, 20))
    assert (small.getpixel((2, 9))[3], small.getpixel((38, 9))) == (0, (200, 100, 50, 255))


@pytest.mark.parametrize(
    ("data", "how", "kind", "text"),
    [
        (b"", {}, "unknown_format", "is empty; allowed: PNG, JPEG"),
        (b"<svg/>", {}, "unknown_format", "begins with b'<svg/>'"),
        (b"\xff\xd8\xff\xe0", {}, "broken_image", "its header makes no sense for JPEG"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 40, {}, "broken_image", "header makes no sense for PNG"),
        (encoded(PHOTO, "JPEG")[:700], {"quality": 90}, "cut_image", "truncated"),
        (encoded(PHOTO, "PNG")[:900], {"resize": 8}, "cut_image", "truncated"),
        (
            encoded(PHOTO, "PNG"),
            {"quality": 90, "max_pixels": 6143},
            "too_large",
            "96x64 pixels, data.max_pi",
        ),
        (encoded(PHOTO.convert("F"), "TIFF"), {"quality": 90}, "unknown_format", "pixels are floats"),
    ],
)
def test_what_is_no_image(data: bytes, how: dict[str, int], kind: str, text: str) -> None:
    with pytest.raises(BadInputError, match=text) as caught:
        packed(data, WriteOptions(**how))
    assert caught.value.kind == kind
    assert "\n" not in caught.value.reason


def test_a_jpeg_counts_as_it_is_decoded() -> None:
    """At an eighth it is no more than it becomes, twice over."""
    large = encoded(PHOTO.resize((960, 640)), "JPEG")
    assert opened(packed(large, WriteOptions(resize=32, max_pixels=10_000))[1]).size == (48, 32)


def test_no_option_moves_a_sample_to_another_side(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 12, 12, 3), np.uint8)
    source, sides = arrays(pixels, np.zeros(60, int)), []
    for i, how in enumerate([{}, {"quality": 50}, {"resize": 6}, {"resize": 5, "quality": 50}]):
        made = write_shards(source, tmp_path / str(i), WriteOptions(**how))
        again = write_shards(source, tmp_path / f"{i}-again", WriteOptions(**how))
        assert again.digest == made.digest
        assert made.made["quality"] == how.get("quality")
        sides.append({key: split for split in made.splits for key, _, _ in stored(made, split)})
    assert sides[0] == {f"row-{i:07d}": side(png(x), 0.2, 0.1) for i, x in enumerate(pixels)}
    assert all(one == sides[0] for one in sides)
    assert set(sides[0].values()) == {"train", "val", "held_out"}

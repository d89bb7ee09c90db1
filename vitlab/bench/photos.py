"""Photographs to measure on: JPEG files with the sizes and the texture of ImageNet's, made without a network.

Each is a part of one of the two photographs that scikit-learn carries: a random crop, enlarged or reduced,
sharpened as cameras do, darker or brighter, perhaps mirrored, with grain. The grain is a sensor's after a
camera's own processing: in the brightness, pixel by pixel, and smooth in the colours, which a JPEG stores at
half the resolution anyway. The files have some 88 kB on average, ImageNet's 110 kB, of which a few are very
large. The same seed gives the same files.
"""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageFilter

WIDTH, HEIGHT = 500, 375  # ImageNet's most frequent size
SIDES = (0.45, 1.0)  # of the crop, as fractions of the largest that fits
LIGHT = (0.75, 1.2)  # factors of the brightness
SHARPEN = ImageFilter.UnsharpMask(radius=1.5, percent=150, threshold=0)
GRAIN = (4.0, 10.0)  # spread of the brightness's noise, in steps of 255
COLOURED = 0.4  # spread of the colours' noise, as a fraction of that
COARSE = 8  # pixels from one independent value of it to the next
QUALITY = (85, 95)


def photos(count: int, seed: int = 0) -> Iterator[bytes]:
    """JPEG files, 4:2:0, each drawn for itself."""
    from sklearn.datasets import load_sample_images

    whole = [Image.fromarray(image) for image in load_sample_images().images]
    for i in range(count):
        yield _photo(whole[i % len(whole)], np.random.default_rng((seed, i)))


def _photo(whole: Image.Image, rng: np.random.Generator) -> bytes:
    pixels = _part(whole, rng).astype(np.float32) * np.float32(rng.uniform(*LIGHT))
    pixels += _grain(rng, rng.uniform(*GRAIN))
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    out = io.BytesIO()
    image = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
    image.save(out, "JPEG", quality=int(rng.integers(QUALITY[0], QUALITY[1] + 1)), subsampling="4:2:0")
    return out.getvalue()


def _part(whole: Image.Image, rng: np.random.Generator) -> np.ndarray:
    """H W 3: a crop of the shape of the file to be, scaled to its size."""
    largest = min(whole.width / WIDTH, whole.height / HEIGHT)
    scale = largest * rng.uniform(*SIDES)
    width, height = int(WIDTH * scale), int(HEIGHT * scale)
    left, top = (
        int(rng.integers(0, whole.width - width + 1)),
        int(rng.integers(0, whole.height - height + 1)),
    )
    box = (left, top, left + width, top + height)
    return np.asarray(whole.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC, box).filter(SHARPEN))


def _grain(rng: np.random.Generator, spread: float) -> np.ndarray:
    """H W 3: the same for the three colours, but for a smooth part of each."""
    bright = rng.standard_normal((HEIGHT, WIDTH, 1), dtype=np.float32)
    coarse = 128 + 32 * rng.standard_normal((HEIGHT // COARSE, WIDTH // COARSE, 3), dtype=np.float32)
    small = Image.fromarray(coarse.round().clip(0, 255).astype(np.uint8))
    smooth = np.asarray(small.resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR), np.float32)
    return np.float32(spread) * (bright + np.float32(COLOURED / 32) * (smooth - 128))

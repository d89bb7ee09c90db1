"""Small views, of another resolution than the model's: which sizes a model can take."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch

from vitlab.config import UserError
from vitlab.models import BorrowedConfig, from_config

SMALL = 96 / 224  # the side of a small view over that of a large one, in the code of DINO and of MSN


def small_size(model: Any, side: int) -> int:
    """The side of small views that is nearest to the authors' proportion."""
    return nearest_size(model, side, side * SMALL)


def size_problems(name: str, kind: str, size: int | None, model: Any, side: int) -> Iterator[str]:
    """Why `NAME.method.KIND_size` cannot be, and what can. `size` null: the nearest to the authors'."""
    why = refusal(model, side, size or small_size(model, side))
    if why is not None:
        near = nearest_size(model, side, size or side * SMALL)
        given = f"{name}.method.{kind}_size: given {size or 'null'}; {why}"
        yield f"{given}; give {name}.method.{kind}_size={near}, or {name}.method.{kind}_crops=0"


def nearest_size(model: Any, side: int, wanted: float) -> int:
    """The size up to `side` nearest to the one wanted that a model's grid allows; of two, the larger.

    A borrowed net takes that one, or its own alone.
    """
    order = sorted(range(1, side + 1), key=lambda size: (abs(size - wanted), -size))
    size = next((size for size in order if _off_the_grid(model, size) is None), side)
    return size if refusal(model, side, size) is None else side


def refusal(model: Any, side: int, other: int) -> str | None:
    """Why a model of this config, made for images of one side, cannot take others; None: it can."""
    if other > side:
        return f"the images have data.image_size={side}, and small views are no larger"
    if other == side or not isinstance(model, BorrowedConfig):
        return _off_the_grid(model, other)
    return _tried(model, side, other)


def _off_the_grid(model: Any, size: int) -> str | None:
    try:
        model.grid((size, size))
    except UserError as error:
        return str(error)
    return None


@lru_cache(maxsize=8)
def _tried(model: BorrowedConfig, side: int, other: int) -> str | None:
    """Of another library's net only the net itself can say: it is run without memory."""
    try:
        with torch.device("meta"):
            made = from_config(model, num_classes=1, image_size=side).eval()
            made(torch.empty(2, model.in_chans, other, other), {"pooled"})
    except UserError:
        return None  # it cannot be made at all, which is told elsewhere
    except Exception as error:  # each net fails in its own way
        line = " ".join(str(error).split())[:100]
        return f"image_size {other}: {model.arch} is made for {side} ({line})"
    return None

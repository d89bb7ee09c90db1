"""Intermediate maps of nets that are not ours: what their parts give, heard while they compute.

Letters: B samples, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def listening(net: nn.Module, parts: Iterable[str], heard: list[Tensor]) -> Iterator[None]:
    """Meanwhile `heard` takes what these parts of the net give, in the order of their calls; no vectors."""

    def listen(part: nn.Module, inputs: Any, out: Any) -> None:
        if isinstance(out, Tensor) and out.ndim > 2:
            heard.append(out)

    hooks = [net.get_submodule(name).register_forward_hook(listen) for name in parts]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def are_maps(heard: list[Tensor], images: Tensor) -> bool:
    """Whether all are B D height width of the image's shape: tokens are not, nor maps with D at the end."""
    return bool(heard) and all(_is_map(out, images) for out in heard)


def _is_map(out: Tensor, images: Tensor) -> bool:
    if out.ndim != 4:
        return False
    (height, width), (rows, columns) = out.shape[2:], images.shape[2:]
    return height <= rows and abs(height * columns - width * rows) <= max(rows, columns)


def stages(maps: list[Tensor]) -> list[Tensor]:
    """The last map of each resolution, from the image up."""
    return list({tuple(found.shape[2:]): found for found in maps}.values())

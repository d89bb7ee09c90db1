"""What any backbone gives, and what a method may ask of it.

Letters: B samples, N patches, P prefix tokens, D width, H heads, T = P + N tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

from torch import Tensor, nn

from vitlab.config import UserError, nearest


class Features(NamedTuple):  # a tuple, because ZeRO-3's hooks look for tensors in tuples
    """The parts of a forward pass that were asked for by `want`; the others are None."""

    logits: Tensor | None = None  # B classes
    heads: tuple[Tensor, Tensor] | None = None  # class head, distillation head: B classes each
    tokens: Tensor | None = None  # B N D, the patches after the final norm (B K D with `keep`)
    prefix: Tensor | None = None  # B P D, the class token and its like after the final norm
    pooled: Tensor | None = None  # B D, what the head reads
    pyramid: list[Tensor] | None = None  # maps B C height width, coarse last
    attentions: list[Tensor] | None = None  # B H T T a block


NAMES = Features._fields


def wanted(want: Collection[str]) -> frozenset[str]:
    """`want` as a set of names of `Features`."""
    names = frozenset([want] if isinstance(want, str) else want)
    for name in sorted(names - set(NAMES)):
        raise UserError(f"want: given '{name}'; allowed: {', '.join(NAMES)}{nearest(name, NAMES)}")
    return names


class Backbone(nn.Module):
    """A model that turns images into logits or `Features`; layers are numbered for layer-wise decay."""

    config: Any  # the family's own subclass of Config
    num_classes: int
    image_size: tuple[int, int]  # height, width

    @property
    def num_layers(self) -> int:
        """How many layer numbers there are: `layer_of` is in 0 … num_layers - 1."""
        raise NotImplementedError

    def layer_of(self, name: str) -> int:
        """The layer that a parameter belongs to: 0 at the image, the head has the last."""
        raise NotImplementedError

    def no_decay(self) -> set[str]:
        """Parameters that weight decay leaves alone although they have more than one dimension."""
        raise NotImplementedError


def grid_of(image_size: int | tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Image in pixels → patches down and across."""
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    for side in (height, width):
        if side <= 0 or side % patch_size:
            sizes = sorted(
                {max(1, side // patch_size) * patch_size, (max(0, side) // patch_size + 1) * patch_size}
            )
            near = " or ".join(str(s) for s in sizes)
            raise UserError(f"image_size {side} is not divisible by patch_size {patch_size}; nearest: {near}")
    return height // patch_size, width // patch_size

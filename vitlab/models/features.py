"""What any backbone gives, and what a method may ask of it.

Letters: B samples, N patches, P prefix tokens, D width, H heads, T = P + N tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from vitlab.config import Config, UserError, nearest
from vitlab.models.parts.norm import BatchNorm2d, repeating

Size = tuple[int, int]  # height, width


class BackboneConfig(Config):
    """What the configs of all families have: a preset's `name`, and sizes that win over the preset's."""

    presets: ClassVar[dict[str, dict[str, Any]]]
    batch_norm: ClassVar[bool] = False  # whether a sample's output in training depends on its batch

    name: str
    in_chans: int = Field(3, gt=0)
    num_classes: int | None = Field(None, ge=0)  # null: whoever builds the model says

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        """The preset's sizes, so that a resolved config holds every one of them."""
        return {**cls.presets.get(str(data.get("name")), {}), **data} if isinstance(data, dict) else data

    def grid(self, image_size: Size) -> Size:
        """Patches down and across in an image of this size: what `mask` counts, else the last map's.

        A size that cannot be is a `UserError`.
        """
        raise NotImplementedError


class Features(NamedTuple):  # a tuple, because ZeRO-3's hooks look for tensors in tuples
    """The parts of a forward pass that were asked for by `want`; the others are None."""

    logits: Tensor | None = None  # B classes
    heads: tuple[Tensor, Tensor] | None = None  # class head, distillation head: B classes each
    tokens: Tensor | None = None  # B N D, the patches after the final norm (B K D with `keep`)
    prefix: Tensor | None = None  # B P D, the class token and its like after the final norm
    pooled: Tensor | None = None  # B D, what the head reads
    pyramid: list[Tensor] | None = None  # maps B C height width, coarse last
    attentions: list[Tensor] | None = None  # B H T T a block
    layers: list[Tensor] | None = None  # maps B D height width by depth, a block or a stage each


NAMES = Features._fields


def wanted(want: Collection[str]) -> frozenset[str]:
    """`want` as a set of names of `Features`."""
    names = frozenset([want] if isinstance(want, str) else want)
    for name in sorted(names - set(NAMES)):
        raise UserError(f"want: given '{name}'; allowed: {', '.join(NAMES)}{nearest(name, NAMES)}")
    return names


class Backbone(nn.Module):
    """A model that turns images into logits or `Features`; layers are numbered for layer-wise decay.

    A family gives `compute`; everybody calls the model, `model(images, want, keep=…, mask=…, seeds=…)`.
    """

    gives: frozenset[str] = frozenset(NAMES) - {"heads"}  # what may be wanted
    keeps: bool = False  # whether `keep` works
    layered: bool = False  # `compute` gives `layers` itself; else they are `pyramid`
    heads: Sequence[str] = ("head",)  # the parts that turn features into logits, by their prefix

    config: Any  # the family's own subclass of BackboneConfig
    num_classes: int
    image_size: Size
    recompute: bool = False  # blocks forget their insides and compute them again for the gradient

    def __init__(self, config: BackboneConfig, num_classes: int, image_size: int | Size) -> None:
        """`num_classes` 0: no head, the logits are the pooled features."""
        super().__init__()
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        config.grid(size)  # refuses a size that cannot be
        self.config = config.model_copy(update={"num_classes": num_classes})
        self.num_classes, self.image_size = num_classes, size

    def forward(
        self,
        images: Tensor,
        want: Collection[str] = (),
        *,
        keep: Tensor | None = None,
        mask: Tensor | None = None,
        seeds: Tensor | None = None,
    ) -> Tensor | Features:
        """Images B C height width → logits, or the `Features` that are wanted by name.

        `keep` (B K, int64): only these patches go in. `mask` (B N, bool): these are replaced by the mask
        token. `seeds` (B, int64): each sample's randomness in training; without them drop path and dropout
        draw from torch's generator.
        """
        names = wanted(want)
        self.refuse(images, names, keep, mask)
        if self.layered or "layers" not in names:
            return self.compute(images, names, keep, mask, seeds)
        found: Any = self.compute(images, names - {"layers"} | {"pyramid"}, keep, mask, seeds)
        pyramid = found.pyramid if "pyramid" in names else None
        features: Features = found._replace(layers=found.pyramid, pyramid=pyramid)
        return features

    def compute(
        self,
        images: Tensor,
        want: frozenset[str],
        keep: Tensor | None,
        mask: Tensor | None,
        seeds: Tensor | None,
    ) -> Tensor | Features:
        """What `forward` promises, by a family's own architecture; nothing wanted means the logits."""
        raise NotImplementedError

    def refuse(
        self, images: Tensor, want: frozenset[str], keep: Tensor | None = None, mask: Tensor | None = None
    ) -> None:
        """One line for a call that this model cannot serve."""
        family = type(self).__name__
        if images.ndim != 4 or images.shape[1] != self.config.in_chans:
            given = "×".join(str(side) for side in images.shape)
            raise UserError(f"images: given {given}; expected B×{self.config.in_chans}×height×width")
        if not images.is_floating_point():
            raise UserError(f"images: given {images.dtype}; expected normalised floating-point numbers")
        for name in sorted(want - self.gives):
            raise UserError(
                f"want: given '{name}', which this {family} does not have; "
                f"allowed: {', '.join(sorted(self.gives))}"
            )
        if keep is not None and not self.keeps:
            raise UserError(f"keep: {family} needs every patch; leave keep out, or mask patches instead")
        if mask is not None and not getattr(self.config, "mask_token", False):
            raise UserError("mask: the model has no mask token; build it with mask_token: true")
        if mask is not None:
            rows, columns = self.config.grid((images.shape[2], images.shape[3]))
            _refuse_shape("mask", mask, (images.shape[0], rows * columns), torch.bool)
        if keep is not None:
            _refuse_shape("keep", keep, (images.shape[0], keep.shape[-1] if keep.ndim else 0), torch.int64)
        if keep is not None and (mask is not None or want & {"pyramid", "layers"}):
            raise UserError(
                "keep: given with a mask or wanted pyramid or layers, which need every patch; leave one out"
            )

    def layer_sizes(self) -> list[tuple[int, int, int]]:
        """(D, height, width) of each of `layers` for images of `image_size`, at no cost; or []."""
        if "layers" not in self.gives:
            return []
        named = [*self.named_parameters(), *self.named_buffers()]
        empty = {name: torch.empty_like(tensor, device="meta") for name, tensor in named}
        image = torch.empty(1, self.config.in_chans, *self.image_size, device="meta")
        trained = self.training
        with torch.no_grad():
            found: Any = functional_call(self.eval(), empty, (image, {"layers"}))
        self.train(trained)
        return [(m.shape[1], m.shape[2], m.shape[3]) for m in found.layers]

    def run(self, block: nn.Module, *inputs: Any) -> Any:
        """`block(*inputs)`; with `recompute` its insides are not kept for the gradient."""
        fills = any(isinstance(thing, list) for thing in inputs)  # a second pass would fill it again
        if fills or not (self.recompute and self.training):
            return block(*inputs)
        if not any(isinstance(part, BatchNorm2d) for part in block.modules()):
            return checkpoint(block, *inputs, use_reentrant=False)
        if torch.compiler.is_compiling():  # it cannot mark the second pass, and would move statistics twice
            return block(*inputs)
        return checkpoint(
            block, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), repeating(block))
        )

    def normalised(self, mean: Tensor, std: Tensor) -> None:
        """Told before training what images are normalised with, C 1 1 each, for a model of pixels."""

    def resized(self, name: str, value: Tensor) -> Tensor | None:
        """A table of another resolution, by its name in the state dict, for this model's; None: no table."""
        return None

    def adapted(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a model of this family that was pretrained in another shape, for this one's shape.

        A mask token has served its purpose where this model has none.
        """
        spare = not getattr(self.config, "mask_token", False)
        return {n: t for n, t in state.items() if not (spare and n.rpartition(".")[2] == "mask_token")}

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


def _refuse_shape(name: str, given: Tensor, shape: Size, dtype: torch.dtype) -> None:
    if tuple(given.shape) != shape or given.dtype != dtype:
        found, wanted = ("×".join(str(side) for side in sides) for sides in (given.shape, shape))
        raise UserError(f"{name}: given {found} of {given.dtype}; expected {wanted} of {dtype}")


def grid_of(image_size: Size, patch_size: int) -> Size:
    """Image in pixels → patches down and across."""
    height, width = image_size
    for side in (height, width):
        if side <= 0 or side % patch_size:
            sizes = {max(1, side // patch_size) * patch_size, (max(0, side) // patch_size + 1) * patch_size}
            near = " or ".join(str(s) for s in sorted(sizes))
            fits = ", ".join(str(p) for p in range(1, side + 1) if side % p == 0)
            raise UserError(
                f"image_size {side} is not divisible by patch_size {patch_size}; nearest: {near}"
                + (f"; patch sizes that divide it: {fits}" if fits else "")
            )
    return height // patch_size, width // patch_size

"""What attention maps say in numbers: rollout, how far heads look, how spread out, and a CNN beside them.

Papers: attention rollout: Abnar & Zuidema 2020 (arXiv 2005.00928); mean attention distance: Dosovitskiy et
al. 2020 (2010.11929, figure 7 and appendix D.7); receptive fields: the recurrence of Araujo et al. 2019
(Computing Receptive Fields of Convolutional Neural Networks, Distill).

Choices:
- distances are between the centres of patches, in pixels of the image that the model sees; prefix tokens
  have no place in it, so they are left out and what is left of each row is scaled to a sum of 1.
- every image and every query counts alike, those at the border too.
- `discard` of the rollout is not of the paper: it drops the weakest part of each row before the mixing.
- a convolution does not spread its weight evenly over its receptive field; `even_look` is what it would see
  if it did, cut off at the image's border, so that it stands on the same axis as a head's distance.

Letters: B samples, W windows of an image, H heads, P prefix tokens, N patches, T = P + N tokens,
h w the patches down and across.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitlab.config import UserError
from vitlab.models.features import Backbone, Features, Size

Sides = tuple[float, float]  # of a patch in pixels: height, width
Step = tuple[int, int]  # of a network without branches: kernel, stride


def rollout(attentions: Sequence[Tensor], *, discard: float = 0.0) -> Tensor:
    """B H T T a layer, the first layer first → B T T: what each token at the top has of each at the bottom.

    A layer mixes M = (mean over heads + I) / 2 with rows that sum to 1; the answer is M_L … M_2 M_1.
    `discard`: this part of each row of the mean, the weakest, is dropped first.
    """
    product: Tensor | None = None
    for attention in attentions:
        mean = _exact(attention).mean(1)
        dropped = int(discard * mean.shape[-1])
        if dropped:
            mean = mean.scatter(-1, mean.topk(dropped, largest=False).indices, 0.0)
        mixed = mean + torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device)
        mixed = mixed / mixed.sum(-1, keepdim=True)
        product = mixed if product is None else mixed @ product
    assert product is not None, "a rollout is over one layer or more"
    return product


def mean_distance(attention: Tensor, grid: Size, patch_size: float | Sides, prefix: int = 0) -> Tensor:
    """B H T T, or B W H T T of windows whose patches are `grid` → H: pixels between a query and what it sees.

    Σ_k a_qk |place_q - place_k|, the mean over queries and images. A row with nothing but prefix tokens is 0.
    """
    weights = _exact(attention)[..., prefix:, prefix:]
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
    apart = _apart(grid, patch_size).to(weights)
    out: Tensor = (weights * apart).sum(-1).mean(-1).flatten(0, -2).mean(0)
    return out


def entropy(attention: Tensor) -> Tensor:
    """B H T T or B W H T T → H: -Σ_k a_qk ln a_qk over all tokens, the mean over queries and images."""
    out: Tensor = torch.special.entr(_exact(attention)).sum(-1).mean(-1).flatten(0, -2).mean(0)
    return out


def _apart(grid: Size, patch_size: float | Sides) -> Tensor:
    """N N: pixels between the centres of patches, numbered row by row."""
    height, width = patch_size if isinstance(patch_size, tuple) else (patch_size, patch_size)
    y = torch.arange(grid[0], dtype=torch.float64) * height
    x = torch.arange(grid[1], dtype=torch.float64) * width
    places = torch.cartesian_prod(y, x)
    return torch.cdist(places, places)


def _exact(attention: Tensor) -> Tensor:
    """Half precision is not enough to add up in."""
    return attention if attention.dtype == torch.float64 else attention.float()


# ---------------------------------------------------------------- convolutional networks


def receptive_fields(steps: Iterable[Step]) -> list[int]:
    """Pixels across that a value after each layer depends on: r ← r + (kernel - 1)·j, then j ← j·stride."""
    field, jump, fields = 1, 1, []
    for kernel, stride in steps:
        field, jump = field + (kernel - 1) * jump, jump * stride
        fields.append(field)
    return fields


def resnet_fields(depths: Sequence[int] = (3, 4, 6, 3)) -> list[int]:
    """Receptive fields after the stages of a ResNet of bottlenecks; as it stands, ResNet-50.

    The longest path, through all 3×3 convolutions; they hold the strides, as in torchvision and timm (the
    first paper had them one layer earlier, which makes the fields larger).
    """
    steps: list[Step] = [(7, 2), (3, 2)]
    ends = []
    for stage, depth in enumerate(depths):
        for block in range(depth):
            steps.append((3, 2 if stage and not block else 1))
        ends.append(len(steps) - 1)
    fields = receptive_fields(steps)
    return [fields[end] for end in ends]


def even_look(field: float, image_size: Size) -> float:
    """The mean distance of a look that spreads evenly over a square of `field` pixels, inside the image.

    `math.inf`: over all of the image. Every pixel is a query and gives each of the n_q pixels within its
    square 1/n_q. With d the step from a query to a pixel this is separable: mean_q (1/n_q) Σ_d |d| = Σ_d
    |d| v(d_y) v(d_x) / pixels, where v(d) on one axis sums 1/n_q over the queries that d keeps inside.
    """
    (y, down), (x, across) = (_steps(side, field) for side in image_size)
    length = (y[:, None] ** 2 + x**2).sqrt()
    return float((length * down[:, None] * across).sum() / (image_size[0] * image_size[1]))


def _steps(side: int, field: float) -> tuple[Tensor, Tensor]:
    """On one axis: the steps d that lead from one pixel to another, and v(d)."""
    reach = int(min(side - 1, field / 2))
    places, steps = torch.arange(side), torch.arange(-reach, reach + 1)
    inside = (places + steps[:, None] >= 0) & (places + steps[:, None] < side)  # steps, queries
    return steps.double(), (inside.double() / inside.sum(0)).sum(1)


# ---------------------------------------------------------------- where the tokens of a layer lie


class Layer(NamedTuple):
    """How one layer's tokens lie on the image."""

    grid: Size  # patches down and across, of the image or of one window
    patch: Sides  # pixels
    prefix: int
    windows: bool


def place(shape: Sequence[int], grids: Iterable[Size], image_size: Size, prefix: int) -> Layer | None:
    """The layer that an attention of this shape belongs to; None: its tokens lie on none of the grids.

    B H T T: prefix tokens, then all patches of a grid. B W H T T: square windows that fill a grid.
    """
    tokens = shape[-1]
    side = math.isqrt(tokens)
    for grid in grids:
        patch, patches = (image_size[0] / grid[0], image_size[1] / grid[1]), grid[0] * grid[1]
        if shape[-2] != tokens:
            return None
        if len(shape) == 4 and tokens - prefix == patches:
            return Layer(grid, patch, prefix, False)
        fills = side * side == tokens and not (grid[0] % side or grid[1] % side)
        if len(shape) == 5 and fills and shape[1] * tokens == patches:
            return Layer((side, side), patch, 0, True)
    return None


def place_all(
    shapes: Sequence[Sequence[int]], grids: Sequence[Size], image_size: Size, prefix: int
) -> list[Layer]:
    """`place` of each layer; one line for a model whose tokens cannot be placed."""
    if not shapes:
        raise UserError("evaluate.attention: the model has no layer of attention; allowed for this model: 0")
    layers = [place(shape, grids, image_size, prefix) for shape in shapes]
    for number, (layer, shape) in enumerate(zip(layers, shapes, strict=True), 1):
        if layer is None:
            given = "×".join(str(side) for side in shape[1:])
            raise UserError(
                f"evaluate.attention: attention of layer {number} is {given} (heads, queries, keys), not "
                "from each patch of a grid to each, which pictures need; allowed for this model: 0"
            )
    return [layer for layer in layers if layer is not None]


def plain(layers: Sequence[Layer]) -> bool:
    """Whether all layers share one grid over the whole image, which a rollout needs."""
    return len(set(layers)) == 1 and not layers[0].windows


# ---------------------------------------------------------------- a model on some images


class Look(NamedTuple):
    """Where a model looked on some images."""

    layers: list[Layer]
    distances: list[Tensor]  # H a layer, in pixels
    entropies: list[Tensor]  # H a layer, in nats
    heads: Tensor | None  # B H h w: what the reader takes from each patch in the last layer
    rollout: Tensor | None  # B h w: what it takes from each patch at the image
    answers: Tensor  # B: the class with the highest logit
    reader: str  # what the model's head reads


Forward = Callable[[Tensor, Collection[str]], Any]  # images and what is wanted → Features
CHUNK = 4  # images whose maps are held at a time


@torch.no_grad()
def layers_of(forward: Forward, model: Backbone) -> list[Layer]:
    """Where the model's tokens lie, from one black image; refuses a model that gives nothing to draw."""
    if "attentions" not in model.gives:
        family = type(model).__name__
        raise UserError(f"evaluate.attention: {family} gives no attention maps; allowed for this model: 0")
    want = {"attentions", "prefix", "pyramid"} & model.gives
    black = torch.zeros(1, model.config.in_chans, *model.image_size, device=next(model.parameters()).device)
    found: Features = forward(black, want)
    grids = [model.config.grid(model.image_size), *((m.shape[2], m.shape[3]) for m in found.pyramid or ())]
    prefix = 0 if found.prefix is None else found.prefix.shape[1]
    return place_all([m.shape for m in found.attentions or ()], grids, model.image_size, prefix)


@torch.no_grad()
def look(forward: Forward, model: Backbone, images: Tensor) -> Look:
    """B C height width, as the model takes them; the model is in evaluation mode.

    The reader is the class token where the model's head reads it, else the mean over all patches as queries.
    """
    layers = layers_of(forward, model)
    token = bool(layers[-1].prefix) and getattr(model.config, "pool", "token") == "token"
    chunks = [images[i : i + CHUNK] for i in range(0, len(images), CHUNK)]
    parts, sizes = [_look(forward, c, layers, token) for c in chunks], torch.tensor([len(c) for c in chunks])
    heads, rolled = ([part[i] for part in parts if part[i] is not None] for i in (2, 3))
    return Look(
        layers,
        [_weighted(found, sizes) for found in zip(*(part[0] for part in parts), strict=True)],
        [_weighted(found, sizes) for found in zip(*(part[1] for part in parts), strict=True)],
        torch.cat(heads) if heads else None,
        torch.cat(rolled) if rolled else None,
        torch.cat([part[4] for part in parts]),
        "class token" if token else "mean of all patches",
    )


def _look(forward: Forward, images: Tensor, layers: list[Layer], token: bool) -> tuple[Any, ...]:
    """Distances, entropies, heads, rollout and answers of a few images, on the CPU."""
    found: Features = forward(images, {"attentions", "logits"})
    assert found.attentions is not None
    assert found.logits is not None
    both = list(zip(found.attentions, layers, strict=True))
    distances = [mean_distance(m, layer.grid, layer.patch, layer.prefix).cpu() for m, layer in both]
    last, maps = layers[-1], found.attentions
    heads = None if last.windows else _read(_exact(maps[-1]), last, token).cpu()
    rolled = _read(rollout(maps), last, token).cpu() if plain(layers) else None
    return distances, [entropy(m).cpu() for m in maps], heads, rolled, found.logits.argmax(1).cpu()


def _read(maps: Tensor, layer: Layer, token: bool) -> Tensor:
    """… T T → … h w: the reader's row without prefix tokens."""
    rows = maps[..., 0, layer.prefix :] if token else maps[..., layer.prefix :, layer.prefix :].mean(-2)
    return rows.reshape(*rows.shape[:-1], *layer.grid)


def _weighted(parts: Sequence[Tensor], sizes: Tensor) -> Tensor:
    """Means over parts → the mean over all."""
    return (torch.stack(list(parts)) * sizes[:, None]).sum(0) / sizes.sum()

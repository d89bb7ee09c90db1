"""Mixup and CutMix: images of a batch mixed two by two, and what share of the label each has.

Papers: Zhang et al. 2017, mixup (arXiv 1710.09412); Yun et al. 2019, CutMix (1905.04899). λ is drawn from
Beta(α, α): Mixup takes λ of the image and 1 - λ of its partner; CutMix pastes a box of the partner's with 1 -
λ of the area, and λ becomes what is left of the image once the box is cut to it. Each image has its own λ and
its own choice of the two, as timm's `Mixup(mode="elem")`.

The partner is the next image of the same stream in the same global batch, the last one's the first: streams
lie whole in a worker's part of a batch, so pairs do not depend on the number of workers. timm pairs the i-th
image with the i-th from the end, which would.

A partner without a label, or an empty slot, cannot be mixed in: such an image stays as it is.

Letters: B images, G images of a stream in a global batch, C channels, H W image.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from vitlab.batch import Batch, uniform
from vitlab.data.images.recipes import AugmentConfig

NUMBERS = 5  # random numbers an image has: mixed at all, CutMix or Mixup, λ, 2 for the box's centre


class Lots(NamedTuple):
    """What is drawn for each image of a batch."""

    partner: Tensor  # B, int64: its place in the batch
    share: Tensor  # B, float32: λ
    boxes: Tensor  # B 4: top, bottom, left, right of what CutMix pastes; empty for Mixup
    cut: Tensor  # B, bool: CutMix


def draw_lots(batch: Batch, config: AugmentConfig, group: int) -> Lots:
    """From the images' own numbers; `group`: images of a stream in a global batch, G."""
    places = torch.arange(len(batch.labels), device=batch.labels.device)
    partner = places.view(-1, group).roll(-1, dims=1).flatten()
    known = (batch.labels >= 0) & (batch.weight > 0)
    mixes, switch, u, *centre = uniform(batch.seeds, "mix", NUMBERS).unbind(1)
    cut = switch < (config.mix_switch if config.mixup and config.cutmix else float(config.cutmix > 0))
    share = torch.where(cut, _beta(u, config.cutmix), _beta(u, config.mixup))
    share = torch.where(known & known[partner] & (mixes < config.mix_prob), share, 1.0)
    height, width = batch.views[0].shape[-2:]
    boxes = _boxes(torch.where(cut, share, 1.0), torch.stack(centre, 1), (height, width))
    top, bottom, left, right = boxes.unbind(1)
    left_over = 1 - (bottom - top) * (right - left) / (height * width)
    return Lots(partner, torch.where(cut, left_over, share), boxes, cut)


def mixed(batch: Batch, lots: Lots) -> Batch:
    """A normalised batch on any device, mixed as the lots say that were drawn for it."""
    (images,) = batch.views
    partner, share, boxes, cut = (lot.to(images.device, non_blocking=True) for lot in lots)
    taken = torch.where(cut[:, None, None], _inside(boxes, images), (1 - share)[:, None, None])
    mixture = torch.lerp(images, images[partner], taken[:, None].to(images.dtype))
    return replace(batch, views=[mixture], others=batch.labels[partner], share=share)


def _beta(u: Tensor, alpha: float) -> Tensor:
    """Uniform numbers → numbers of Beta(α, α), by its inverse distribution; 1 where α is 0."""
    from scipy.special import betaincinv

    if not alpha:
        return torch.ones_like(u)
    return torch.from_numpy(betaincinv(alpha, alpha, u.double().cpu().numpy())).to(u)


def _boxes(share: Tensor, centre: Tensor, side: tuple[int, int]) -> Tensor:
    """B, B 2 → B 4: boxes of 1 - λ of the area about a pixel, cut to the image."""
    edges = []
    for length, u in zip(side, centre.unbind(1), strict=True):
        cut = (length * (1 - share).sqrt()).long()
        middle = (length * u).long()
        edges += [(middle - cut // 2).clamp(0, length), (middle + (cut + 1) // 2).clamp(0, length)]
    return torch.stack(edges, 1)


def _inside(boxes: Tensor, images: Tensor) -> Tensor:
    """B 4 → B H W: 1 in the box, else 0."""
    height, width = (torch.arange(n, device=boxes.device) for n in images.shape[-2:])
    top, bottom, left, right = boxes[:, :, None].unbind(1)
    rows = (top <= height) & (height < bottom)
    columns = (left <= width) & (width < right)
    return (rows[:, :, None] & columns[:, None]).float()

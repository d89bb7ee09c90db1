"""Masks in blocks: rectangles of patches one after the other until enough of an image is hidden.

Paper: Bao et al. 2021, BEiT (arXiv 2106.08254), algorithm 1, as the authors' code draws it: a block's area is
uniform between `least` and what is still to be hidden, its aspect log-uniform, its place uniform; it counts
if it is smaller than the image both ways and adds at least one patch and not too many; ten tries that fail
in a row are the end. So the number of hidden patches is at most `target`, and mostly that.

Departures: every sample's draws come from its own seed, and all samples of a batch are tried at once. For
that there are `TRIES` tries in all and no more; of the authors' masks (75 of 196 patches) 99.9% need no more
than 36.

Letters: B samples, N = h·w patches, S tries.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vitlab.batch import uniform

TRIES = 48
FAILS = 10


def block_mask(seeds: Tensor, grid: tuple[int, int], target: int, least: int, aspect: float) -> Tensor:
    """B, int64 → B N, bool, row by row. `aspect`: a block's least height over width; the largest is 1/it."""
    (height, width), samples = grid, len(seeds)
    places = [torch.arange(side, device=seeds.device) for side in grid]
    draws = uniform(seeds, "mask", 4 * TRIES).double().view(samples, TRIES, 4)
    low = math.log(aspect)
    shapes = (low + draws[..., 1] * (-2 * low)).exp()  # B S
    mask = torch.zeros(samples, height, width, dtype=torch.bool, device=seeds.device)
    count, failed = torch.zeros_like(seeds), torch.zeros_like(seeds)
    going = torch.ones_like(seeds, dtype=torch.bool)
    for i in range(TRIES):
        rest, shape = target - count, shapes[:, i]
        area = least + (rest - least) * draws[:, i, 0]
        down, across = (area * shape).sqrt().round(), (area / shape).sqrt().round()
        rows = _between(places[0], draws[:, i, 2], down, height)
        columns = _between(places[1], draws[:, i, 3], across, width)
        new = rows[:, :, None] & columns[:, None] & ~mask
        more = new.sum((1, 2))
        good = going & (down < height) & (across < width) & (more > 0) & (more <= rest)
        mask |= new & good[:, None, None]
        count = count + more * good
        failed = (failed + 1) * ~good
        going = going & (count < target) & (failed < FAILS)
        if seeds.device.type == "cpu" and not going.any():  # to ask an accelerator would be to wait for it
            break
    return mask.flatten(1)


def _between(places: Tensor, draw: Tensor, length: Tensor, side: int) -> Tensor:
    """B side: a stretch of `length` places (B) whose beginning is uniform."""
    begin = (draw * (side - length + 1)).floor()[:, None]
    return (places >= begin) & (places < begin + length[:, None])

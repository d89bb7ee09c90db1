"""Masks in blocks against the authors' algorithm, a sample at a time: with the same numbers, and at large."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from vitlab.batch import uniform
from vitlab.methods.masks import FAILS, TRIES, block_mask

ASPECT = 0.3
CASES = [((14, 14), 75, 16), ((8, 8), 25, 5), ((4, 4), 6, 1), ((6, 9), 21, 4)]


Draw = Callable[[], tuple[float, ...]]  # the four numbers of a try


def one(grid: tuple[int, int], target: int, least: int, draw: Draw) -> list[Tensor]:
    """The masks after every block."""
    height, width = grid
    mask, found = torch.zeros(grid, dtype=torch.bool), []
    while int(mask.sum()) < target:
        rest = target - int(mask.sum())
        for _ in range(FAILS):
            a, b, c, d = draw()
            area, shape = least + a * (rest - least), math.exp(math.log(ASPECT) * (1 - 2 * b))
            h, w = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
            if h >= height or w >= width:
                continue
            top, left = int(c * (height - h + 1)), int(d * (width - w + 1))
            after = mask.clone()
            after[top : top + h, left : left + w] = True
            if 0 < int(after.sum()) - int(mask.sum()) <= rest:
                mask = after
                found.append(mask)
                break
        else:
            break
    return found


def apart(ours: Tensor, theirs: Tensor) -> float:
    """Means of many masks, in standard deviations of one mask (which a single odd mask hardly gives)."""
    return float((ours.mean() - theirs.mean()).abs() / max(float(theirs.std()), 0.1))


def seeds(n: int) -> Tensor:
    return torch.arange(n) * 1_000_003 + 5


@pytest.mark.parametrize(("grid", "target", "least"), CASES)
def test_the_authors_algorithm_with_the_same_numbers(grid: tuple[int, int], target: int, least: int) -> None:
    masks = block_mask(seeds(300), grid, target, least, ASPECT)
    rows = uniform(seeds(300), "mask", 4 * TRIES).double().view(300, TRIES, 4).tolist()

    def numbers(row: list[list[float]]) -> Iterator[tuple[float, ...]]:
        yield from (tuple(four) for four in row)

    for mask, row in zip(masks, rows, strict=True):
        left = numbers(row)
        blocks = one(grid, target, least, lambda left=left: next(left))
        assert torch.equal(mask.view(grid), blocks[-1])


@pytest.mark.parametrize(("grid", "target", "least"), CASES)
def test_many_masks_are_those_of_the_authors(grid: tuple[int, int], target: int, least: int) -> None:
    """Counts, how often the count is reached, and where the patches lie."""
    n, generator = 4000, random.Random(1)
    ours = block_mask(seeds(n), grid, target, least, ASPECT).view(n, *grid)
    theirs = torch.stack(
        [one(grid, target, least, lambda: tuple(generator.random() for _ in range(4)))[-1] for _ in range(n)]
    )
    for found in (ours, theirs):
        assert int(found.sum((1, 2)).max()) == target
    counts = [found.sum((1, 2)).double() for found in (ours, theirs)]
    noise = 4 * (2 / n) ** 0.5
    assert apart(*counts) <= noise
    full = [float((count == target).double().mean()) for count in counts]
    assert abs(full[0] - full[1]) <= noise * 0.5
    share = [found.double().mean(0) for found in (ours, theirs)]
    assert float((share[0] - share[1]).abs().max()) <= 1.3 * noise * 0.5  # of up to 196 places
    for axis in (1, 2):  # how far the masks reach down and across
        extents = [found.any(axis).double().sum(1) for found in (ours, theirs)]
        assert apart(*extents) <= noise
    edges = [(found[:, 1:] ^ found[:, :-1]).double().sum((1, 2)) for found in (ours, theirs)]
    assert apart(*edges) <= noise  # blocks, not dust


def test_tries_are_enough() -> None:
    """What the limit cuts off: masks whose next block might still have come."""
    generator, needed = random.Random(2), []

    def draw() -> tuple[float, ...]:
        needed[-1] += 1
        return tuple(generator.random() for _ in range(4))

    for _ in range(2000):
        needed.append(0)
        one((14, 14), 75, 16, draw)
    assert sorted(needed)[-20] < 30
    assert max(needed) < TRIES


def test_a_mask_belongs_to_its_sample() -> None:
    together = block_mask(seeds(20), (14, 14), 75, 16, ASPECT)
    alone = torch.cat([block_mask(seed[None], (14, 14), 75, 16, ASPECT) for seed in seeds(20)])
    assert torch.equal(together, alone)
    assert len({tuple(mask.tolist()) for mask in together}) == 20


def test_no_wait_for_an_accelerator() -> None:
    """On a device without data nothing can be asked: no step looks at a value."""
    mask = block_mask(torch.empty(3, dtype=torch.int64, device="meta"), (14, 14), 75, 16, ASPECT)
    assert mask.shape == (3, 196)

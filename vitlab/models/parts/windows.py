"""Windows over a grid of tokens, kept as orders: which token stands at which rank.

Paper: Liu et al. 2021 (arXiv 2103.14030). Between two blocks tokens lie in the order of their windows, so a
block's norms, dense layers and residuals read them as they are, and a shift is one permutation instead of
four copies (roll, cut into windows, and both back). Every move is an index and its inverse: the gradient is
a gather as well.

Where a side is not a multiple of the window, zeros fill the windows inside the attention alone; they never
pass a norm or an MLP.

Letters: B samples, N tokens, W windows, T slots of a window, M = W·T, D width, H heads.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Size = tuple[int, int]
Padding = Literal["official", "timm"]


class Move(NamedTuple):
    """What stands at each new rank, and the way back; one past the last rank means zeros."""

    there: Tensor
    back: Tensor


class Order(NamedTuple):
    """How the tokens of one block lie."""

    relative: Tensor  # T T, the row of the bias table for each pair of slots
    regions: Tensor | None  # W T, a number for each part of the image that the shift brought together
    fill: Move | None  # N tokens → M slots, where some slots stay empty


class Stage(NamedTuple):
    """The tokens of one stage: how they come in, change between two blocks, and go out in rows."""

    grid: Size
    enter: Move  # from pixels' rows (first stage) or the stage before (4 for each token)
    orders: tuple[Order, Order]  # of even and of odd blocks
    turn: tuple[Move, Move] | None  # even → odd and back; None: no block is shifted
    leave: Move  # to rows


def move(x: Tensor, way: Move) -> Tensor:
    """B N D → the tokens at `way.there`."""
    if x.requires_grad:
        moved: Tensor = _Moved.apply(x, *way)
        return moved
    return _select(x, way.there)


def _select(x: Tensor, index: Tensor) -> Tensor:
    if len(index) > x.shape[1]:  # only then an index may ask for zeros
        x = F.pad(x, (0, 0, 0, 1))
    return x.index_select(1, index)


class _Moved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return _select(x, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _select(grad, ctx.saved_tensors[0]), None, None


# ---------------------------------------------------------------- plans


def shrunk(grid: Size, window: Size, padding: Padding) -> Size:
    """A window is not larger than its grid: not than the smaller side (official), or side by side (timm)."""
    height, width = grid if padding == "timm" else (min(grid), min(grid))
    return min(height, window[0]), min(width, window[1])


def shifts(grid: Size, window: Size, padding: Padding) -> Size:
    """Half a window, but none along a side that one window spans; then, officially, none at all."""
    spans = [side <= w for side, w in zip(grid, window, strict=True)]
    if padding == "official" and any(spans):
        return 0, 0
    down, across = (0 if one else w // 2 for one, w in zip(spans, window, strict=True))
    return down, across


def merged(grid: Size) -> Size:
    return (grid[0] + 1) // 2, (grid[1] + 1) // 2


def settings(windows: Sequence[Size], depths: Sequence[int], padding: Padding) -> str:
    """What `plan` must know of a model; `windows` are those of the stages' bias tables."""
    return json.dumps([windows, depths, padding])


def plan(grid: str, settings: str, device: str) -> list[Stage]:
    """The stages of a model for a first grid, as "56 56". Words alone: a compiler takes them as constants."""
    height, width = map(int, grid.split())
    windows, depths, padding = json.loads(settings)
    made = _plan if torch.compiler.is_compiling() else _kept
    return made((height, width), tuple(map(tuple, windows)), tuple(depths), padding, torch.device(device))


# All that torch.compiler.assume_constant_result does, without importing the compiler: 1.7 s of every start.
plan._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _plan(
    grid: Size, windows: tuple[Size, ...], depths: tuple[int, ...], padding: Padding, device: torch.device
) -> list[Stage]:
    stages: list[Stage] = []
    last: np.ndarray | None = None  # the row-wise place of each rank where the stage before ended
    with torch.inference_mode(False):
        for table, depth in zip(windows, depths, strict=True):
            above, grid = grid, grid if last is None else merged(grid)
            stage, last = _stage(grid, table, padding, (above, last), device, depth)
            stages.append(stage)
    return stages


_kept = lru_cache(maxsize=32)(_plan)


def _stage(
    grid: Size,
    table: Size,
    padding: Padding,
    above: tuple[Size, np.ndarray | None],
    device: torch.device,
    depth: int,
) -> tuple[Stage, np.ndarray]:
    window = shrunk(grid, table, padding)
    shift = shifts(grid, window, padding)
    even, odd = (_slots(grid, window, s, padding) for s in ((0, 0), shift))
    orders, places = [], []
    for slots, s in ((even, (0, 0)), (odd, shift)):
        filled = slots < grid[0] * grid[1]
        regions = _windows(_regions(slots_grid(grid, window), window, s), window) if any(s) else None
        fill = (
            None
            if filled.all()
            else (np.where(filled, filled.cumsum() - 1, filled.sum()), filled.nonzero()[0])
        )
        places.append(slots[filled])
        orders.append(
            Order(
                _tensor(_relative(window, table), device),
                None if regions is None else _tensor(regions, device),
                None if fill is None else Move(*(_tensor(a, device) for a in fill)),
            )
        )
    first, second = places
    turns = (_inverse(first)[second], _inverse(second)[first])
    turn = Move(*(_tensor(a, device) for a in turns))
    end = second if any(shift) and depth % 2 == 0 else first
    enter = (first, _inverse(first)) if above[1] is None else _merge(above[0], above[1], first)
    stage = Stage(
        grid,
        Move(*(_tensor(a, device) for a in enter)),
        (orders[0], orders[1]),
        (turn, Move(turn.back, turn.there)) if any(shift) else None,
        Move(_tensor(_inverse(end), device), _tensor(end, device)),
    )
    return stage, end


def slots_grid(grid: Size, window: Size) -> Size:
    """The grid with the padding that makes its sides multiples of the window's."""
    return -(-grid[0] // window[0]) * window[0], -(-grid[1] // window[1]) * window[1]


def _slots(grid: Size, window: Size, shift: tuple[int, ...], padding: Padding) -> np.ndarray:
    """M: the row-wise place of the token in each slot, N for an empty one."""
    n = grid[0] * grid[1]
    places = np.arange(n).reshape(grid)
    padded = [(0, full - side) for full, side in zip(slots_grid(grid, window), grid, strict=True)]
    back = (-shift[0], -shift[1])
    if padding == "timm":
        places = np.pad(np.roll(places, back, (0, 1)), padded, constant_values=n)
    else:
        places = np.roll(np.pad(places, padded, constant_values=n), back, (0, 1))
    return _windows(places, window).ravel()


def _windows(grid: np.ndarray, window: Size) -> np.ndarray:
    """Height width → W T."""
    h, w = window
    cut = grid.reshape(grid.shape[0] // h, h, grid.shape[1] // w, w)
    return cut.transpose(0, 2, 1, 3).reshape(-1, h * w)


def _regions(full: Size, window: Size, shift: tuple[int, ...]) -> np.ndarray:
    """Parts of the rolled grid whose tokens were neighbours before: three along a shifted side."""
    row, column = (
        (np.arange(f) >= f - w).astype(int) + (np.arange(f) >= f - s) if s else np.zeros(f, int)
        for f, w, s in zip(full, window, shift, strict=True)
    )
    found: np.ndarray = 3 * row[:, None] + column
    return found


def _relative(window: Size, table: Size) -> np.ndarray:
    """T T: (Δrow + h - 1)·(2w - 1) + Δcolumn + w - 1 for a table of h × w.

    A smaller window reads the middle of the table.
    """
    rows, columns = (a.ravel() for a in np.indices(window))
    down = rows[:, None] - rows + table[0] - 1
    found: np.ndarray = down * (2 * table[1] - 1) + columns[:, None] - columns + table[1] - 1
    return found


def _inverse(places: np.ndarray) -> np.ndarray:
    out = np.empty_like(places)
    out[places] = np.arange(len(places))
    return out


def _merge(above: Size, last: np.ndarray, first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Four tokens for each new one: down first, then across; odd sides get zeros."""
    n = len(last)
    ranks = np.pad(_inverse(last).reshape(above), [(0, s % 2) for s in above], constant_values=n)
    h, w = (s // 2 for s in ranks.shape)
    index = ranks.reshape(h, 2, w, 2).transpose(0, 2, 3, 1).reshape(-1, 4)[first].ravel()
    real = index < n
    inverse = np.empty(n, int)
    inverse[index[real]] = real.nonzero()[0]
    return index, inverse


def _tensor(numbers: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(numbers)).to(device)

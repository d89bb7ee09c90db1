"""Relative positions of a plain transformer: a number a head for how far two patches lie apart.

Paper: Bao et al. 2021, BEiT (arXiv 2106.08254), with the conventions of the authors' code: a table has
(2h-1)·(2w-1) rows for the distances, row by row, and three more for class token → patch, patch → class token
and the class token itself; it starts at zero.

A table of another grid is resampled, bicubic over its two distances, as in timm; the authors' code, which
does that for weights alone, lays the distances on a geometric progression first.

Letters: N = h·w patches, T = 1 + N tokens, H heads, R rows of the table.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EXTRA = 3  # rows of the class token
Size = tuple[int, int]  # height, width


class RelativeBias(nn.Module):
    """Table → what is added to the scores of every pair of tokens."""

    index: Tensor

    def __init__(self, grid: Size, num_heads: int) -> None:
        super().__init__()
        self.grid = grid
        self.table = nn.Parameter(torch.zeros(rows(grid), num_heads))
        self.register_buffer("index", pairs(grid), persistent=False)

    def forward(self, grid: Size) -> Tensor:
        """H T T for an image of so many patches."""
        if grid == self.grid:
            return F.embedding(self.index, self.table).permute(2, 0, 1)
        index = pairs(grid, self.index.device)
        return F.embedding(index, retabled(self.table, self.grid, grid)).permute(2, 0, 1)


def rows(grid: Size) -> int:
    return (2 * grid[0] - 1) * (2 * grid[1] - 1) + EXTRA


def pairs(grid: Size, device: torch.device | None = None) -> Tensor:
    """T T: the row of each pair, from a query (down) to a key (across); the class token comes first."""
    height, width = grid
    y = torch.arange(height, device=device)[:, None].expand(grid).flatten()
    x = torch.arange(width, device=device).expand(grid).flatten()
    down, across = y[:, None] - y + height - 1, x[:, None] - x + width - 1
    patches = down * (2 * width - 1) + across
    count = rows(grid)
    table = F.pad(patches, (1, 0, 1, 0), value=count - 2)  # from a patch to the class token
    table[0] = count - 3
    table[0, 0] = count - 1
    return table


def retabled(table: Tensor, old: Size, new: Size) -> Tensor:
    """R H of one grid for another."""
    (a, b), (c, d) = ((2 * side - 1 for side in grid) for grid in (old, new))
    image = table[:-EXTRA].T.reshape(1, -1, a, b)
    fine = F.interpolate(image.to(torch.promote_types(table.dtype, torch.float32)), (c, d), mode="bicubic")
    return torch.cat([fine[0].flatten(1).T.to(table.dtype), table[-EXTRA:]])

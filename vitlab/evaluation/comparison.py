"""The picture of a comparison: every seed of every variant, one panel a figure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vitlab.evaluation.pictures import BLUE, blank_figure, shortened

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def comparison_figure(points: Sequence[tuple[str, str, Sequence[float]]], title: str) -> Figure:
    """`points`: (row, figure, a value a seed). Rows lie below each other, the first on top."""
    rows = list(dict.fromkeys(row for row, _, _ in points))
    names = list(dict.fromkeys(name for _, name, _ in points))
    figure = blank_figure(1.6 + 2.6 * len(names), 1.2 + 0.42 * len(rows))
    for i, name in enumerate(names):
        axes = figure.add_subplot(1, len(names), i + 1)
        for row, _, values in (p for p in points if p[1] == name):
            at = len(rows) - 1 - rows.index(row)
            axes.scatter(values, [at] * len(values), s=22, color=BLUE, alpha=0.65, linewidths=0)
            mean = statistics.fmean(values)
            axes.plot([mean, mean], [at - 0.3, at + 0.3], color="#c0392b", linewidth=1.6)
        named = [shortened(row) for row in reversed(rows)] if i == 0 else [""] * len(rows)
        axes.set_yticks(range(len(rows)), named, fontsize=8)
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.tick_params(length=0, labelsize=8)
        axes.set_xlabel(name, fontsize=8)
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right", "left"]].set_visible(False)
    figure.suptitle(title, fontsize=10)
    return figure

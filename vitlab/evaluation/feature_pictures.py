"""Features to look at: an image beside its nearest neighbours, and all images on a map."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vitlab.evaluation.pictures import blank_figure, draw_image, shortened

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RIGHT, WRONG, UNKNOWN = "#2e8b57", "#c0392b", "#999999"
COLOURED = 20  # classes that a map can tell apart


class Row(NamedTuple):
    """A query and its neighbours, nearest first: images C H W in 0..1, and labels, -1 for none."""

    images: list[Tensor]  # 1 + K
    labels: list[int]  # 1 + K
    similarity: list[float]  # K


def neighbours_figure(rows: list[Row], labels: list[str], title: str) -> Figure:
    """One row a query; neighbours of its class are framed green, others red."""
    columns = max(len(row.labels) for row in rows)
    figure = blank_figure(1.05 * columns + 0.4, 1.3 * len(rows) + 0.5)
    widths = [1.0, 0.25, *[1.0] * (columns - 1)]  # a gap after the query
    grid = figure.add_gridspec(len(rows), columns + 1, width_ratios=widths)
    for r, row in enumerate(rows):
        for c, label in enumerate(row.labels):
            axes = figure.add_subplot(grid[r, c + (c > 0)])
            name = shortened(labels[label]) if label >= 0 else "no label"
            draw_image(axes, row.images[c])
            if c == 0:
                axes.set_title(name, fontsize=8, pad=3, fontweight="bold")
                axes.spines[:].set_color("#333333")
                continue
            known = label >= 0 and row.labels[0] >= 0
            color = (RIGHT if label == row.labels[0] else WRONG) if known else UNKNOWN
            axes.spines[:].set_color(color)
            axes.spines[:].set_linewidth(2.5)
            axes.set_title(f"{name} · {row.similarity[c - 1]:.2f}", fontsize=7, pad=3, color=color)
    figure.suptitle(title, fontsize=10)
    return figure


def principal(features: Tensor) -> tuple[Tensor, Tensor]:
    """L2-normalised N D features on their first two principal axes (N 2), and the variance's share of each.

    Signs are fixed by the largest number of an axis being positive, so that equal features look equal.
    """
    x = normalize(features.double(), dim=1)
    x = x - x.mean(0)
    values, vectors = torch.linalg.eigh(x.T @ x)
    axes = vectors[:, -2:].flip(1)
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    share = values.flip(0).clamp(min=0)[:2] / values.clamp(min=0).sum().clamp(min=1e-300)
    return x @ axes, share


def map_figure(features: Tensor, labels: Tensor, names: list[str], title: str) -> Figure:
    """Every image a dot, coloured by class; beyond 20 classes the most frequent ones, the others grey."""
    import matplotlib

    places, share = principal(features)
    figure = blank_figure(7.6, 6.0)
    axes = figure.add_subplot()
    counts = torch.bincount(labels[labels >= 0], minlength=len(names))
    frequent = counts.argsort(descending=True, stable=True)[:COLOURED].tolist()
    shown = sorted(label for label in frequent if counts[label])
    rest = places[~torch.isin(labels, torch.tensor(shown, dtype=labels.dtype))].numpy()
    colors = matplotlib.colormaps["tab10" if len(shown) <= 10 else "tab20"]
    axes.scatter(rest[:, 0], rest[:, 1], s=6, color="#dddddd", linewidths=0)
    for number, label in enumerate(shown):
        x, y = places[labels == label].T.numpy()
        name = shortened(names[label])
        axes.scatter(x, y, s=12, color=colors(number), alpha=0.75, linewidths=0, label=name)
    axes.set_xlabel(f"first principal axis ({share[0]:.0%} of the variance)")
    axes.set_ylabel(f"second ({share[1]:.0%})")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_color("#cccccc")
    if shown:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8, markerscale=1.6)
    axes.set_title(title, fontsize=10, pad=10)
    return figure

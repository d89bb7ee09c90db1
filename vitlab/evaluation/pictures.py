"""Figures for a person: confusion, reconstructions. Drawn without a display."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vitlab.evaluation.classify import Tally

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE = "#1f4e79"


def save_figure(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")


def confusion_table(tally: Tally, labels: list[str]) -> str:
    """CSV: a row for each true class, a column for each answer, the class's accuracy last."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["true \\ predicted", *labels, "images", "accuracy"])
    for label, row, share in zip(labels, tally.confusion.tolist(), tally.by_class(), strict=True):
        writer.writerow([label, *row, sum(row), "" if share is None else f"{share:.6f}"])
    return text.getvalue()


def confusion_figure(tally: Tally, labels: list[str], title: str) -> Figure:
    """Rows are true classes, shaded by the share of the row; the diagonal is what is right.

    Up to 30 classes the cells hold the numbers of images; beyond, every few classes are named. Small
    shares are made visible: the shade goes with the square root.
    """
    from matplotlib.colors import PowerNorm

    count, numbered = len(labels), len(labels) <= 30
    side = max(3.2, 1.5 + 0.3 * count) if numbered else min(12.0, 5 + 0.05 * count)
    figure = blank_figure(side + 1.4, side + 0.9)
    axes = figure.add_subplot()
    counts = tally.confusion
    share = (counts / counts.sum(1, keepdim=True).clamp(min=1)).numpy()
    drawn = axes.imshow(share, cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=1))
    bar = figure.colorbar(drawn, ax=axes, fraction=0.045, pad=0.03, ticks=[0, 0.01, 0.1, 0.25, 0.5, 1])
    bar.ax.set_yticklabels(["0", "1 %", "10 %", "25 %", "50 %", "100 %"], fontsize=8)
    bar.ax.minorticks_off()
    bar.outline.set_visible(False)
    for i, j in counts.nonzero().tolist() if numbered else ():
        color = "white" if share[i, j] > 0.3 else BLUE
        axes.text(j, i, str(int(counts[i, j])), ha="center", va="center", fontsize=8, color=color)
    named = range(0, count, 1 if numbered else max(1, round(count / 40)))
    names = [shortened(labels[i]) for i in named]
    turned = 90 if max(map(len, names)) * 0.08 > side / len(names) else 0  # an inch holds 12 letters
    axes.set_xticks(named, names, rotation=turned, fontsize=8 if numbered else 7)
    axes.set_yticks(named, names, fontsize=8 if numbered else 7)
    axes.tick_params(length=0 if numbered else 2)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true (shade: share of the row)")
    axes.set_title(title, fontsize=10, pad=10)
    return figure


def reconstruction_figure(original: Tensor, masked: Tensor | None, painted: Tensor, title: str) -> Figure:
    """Rows: the image, what the encoder saw, what the decoder painted; values in 0..1, B C H W.

    Without `masked` the encoder saw the image.
    """
    shown = (("image", original), ("visible", masked), ("painted", painted))
    rows = [(name, images) for name, images in shown if images is not None]
    count = len(original)
    figure = blank_figure(1.0 * count + 0.7, 0.5 + 1.0 * len(rows))
    grid = figure.add_gridspec(len(rows), count, wspace=0.06, hspace=0.06)
    for r, (name, images) in enumerate(rows):
        for c in range(count):
            axes = figure.add_subplot(grid[r, c])
            draw_image(axes, images[c])
            if name == "visible":
                hidden = (images[c] - original[c]).abs().amax(0) > 0
                _hatch(axes, hidden)
            if c == 0:
                axes.set_ylabel(name, fontsize=9)
    figure.suptitle(title, fontsize=10)
    return figure


def augmentation_figure(views: dict[str, Tensor], title: str) -> Figure:
    """Every image in all its views, what a method gets; values in 0..1.

    Many views stand side by side, an image a row. Few lie below each other, an image a column: else the
    picture of a single view would be a strip.
    """
    count = min(len(images) for images in views.values())
    flat = len(views) < count
    rows, columns = (len(views), count) if flat else (count, len(views))
    side = min(1.6, max(1.0, 12 / columns))  # inches
    figure = blank_figure(side * columns + 0.5, side * rows + (0.4 if flat else 0.7))
    grid = figure.add_gridspec(rows, columns, wspace=0.03, hspace=0.03)
    for v, (name, images) in enumerate(views.items()):
        said = f"{name}\n{images.shape[-1]} px"
        for i in range(count):
            axes = figure.add_subplot(grid[v, i] if flat else grid[i, v])
            draw_image(axes, images[i])
            if i == 0 and flat:
                axes.set_ylabel(said, fontsize=8)
            elif i == 0:
                axes.set_title(said, fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure


def draw_image(axes: Axes, image: Tensor) -> None:
    """C H W, values in 0..1."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_color("#cccccc")
    pixels = image.detach().float().cpu().clamp(0, 1).permute(1, 2, 0).squeeze(-1)
    smooth_if_shrunk = "antialiased"  # small images keep their pixels, photos do not become grainy
    axes.imshow(pixels.numpy(), cmap="gray", vmin=0, vmax=1, interpolation=smooth_if_shrunk)


def _hatch(axes: Axes, hidden: Tensor) -> None:
    """Tints what the encoder did not see: the fill alone looks like any grey pixel."""
    tint = torch.zeros(*hidden.shape, 4)
    tint[hidden] = torch.tensor([0.94, 0.55, 0.24, 1.0])
    axes.imshow(tint.numpy(), interpolation="nearest")


def shortened(label: str) -> str:
    return label if len(label) <= 18 else label[:17] + "…"


def blank_figure(width: float, height: float | None = None) -> Figure:
    """An empty figure that needs no display; square unless a height is given."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height or width), layout="constrained")
    FigureCanvasAgg(figure)
    return figure

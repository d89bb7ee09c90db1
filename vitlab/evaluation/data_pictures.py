"""Pictures of the data itself: a contact sheet, how many images a class has, how large they are.

Letters: C channels, H W image.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from vitlab.evaluation.pictures import BLUE, blank_figure, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TILE, GAP = 96, 6  # pixels of an image of the sheet, and between two
ROWS, COLUMNS = 12, 8
EDGE = 204
NAMED = 40  # classes that have a bar and a name of their own
TINTS = {"train": BLUE, "val": "#e08a3c", "held_out": "#9dbbd6"}


def contact_sheet(
    images: Sequence[Tensor],
    labels: Sequence[int],
    classes: Sequence[str],
    title: str,
    counts: Sequence[int] | None = None,
) -> Figure:
    """A row for each class with its first images: uint8 C H W of any size, 12 classes of 8 at most.

    `counts`: how many images each class has, told beside its name.
    """
    rows, columns = _extent(labels)
    figure = blank_figure(_width(columns), 0.8 * rows + 0.5)
    _draw_sheet(figure.add_subplot(), images, labels, classes, counts)
    figure.suptitle(title, fontsize=10)
    return figure


def data_figure(
    sheet: tuple[Sequence[Tensor], Sequence[int]],
    classes: Sequence[str],
    counts: Mapping[str, Sequence[int]],
    sizes: tuple[Sequence[int], Sequence[int]],
    title: str,
) -> Figure:
    """The contact sheet; below it the images of each class by split, and the widths and heights.

    `sheet`: images and their labels; `counts`: of each class, by split; `sizes`: widths and heights.
    """
    rows, columns = _extent(sheet[1])
    high = 0.8 * rows + 0.3
    figure = blank_figure(max(8.6, _width(columns)), high + 3.6)
    parts: Any = figure.subfigures(2, 1, height_ratios=[high, 3.3], hspace=0.04)
    above, below = parts
    total = np.sum([np.asarray(some) for some in counts.values()], axis=0).tolist()
    _draw_sheet(above.add_subplot(), *sheet, classes, total)
    left, right = below.subplots(1, 2, width_ratios=[1.9, 1])
    _draw_classes(left, classes, counts)
    _draw_sizes(right, *sizes)
    figure.suptitle(title, fontsize=11)
    return figure


def _extent(labels: Sequence[int]) -> tuple[int, int]:
    """Rows and columns that a sheet needs."""
    found = Counter(labels)
    return min(ROWS, max(1, len(found))), min(COLUMNS, max(found.values(), default=1))


def _width(columns: int) -> float:
    return 0.8 * columns + 1.9  # the names


# ---------------------------------------------------------------- the sheet


def _draw_sheet(
    axes: Axes,
    images: Sequence[Tensor],
    labels: Sequence[int],
    classes: Sequence[str],
    counts: Sequence[int] | None,
) -> None:
    """One picture of all tiles: an axes for each would take seconds."""
    rows, columns = _extent(labels)
    shown = sorted(set(labels))[:ROWS]
    step = TILE + GAP
    canvas = np.full((rows * step - GAP, columns * step - GAP, 3), 255, np.uint8)
    for r, label in enumerate(shown):
        tiles = [image for image, one in zip(images, labels, strict=True) if one == label][:columns]
        for c, image in enumerate(tiles):
            place = canvas[r * step : r * step + TILE, c * step : c * step + TILE]
            place[:] = EDGE  # or a light sky would melt into the paper
            place[1:-1, 1:-1] = tile(image)[1:-1, 1:-1]
    axes.imshow(canvas, interpolation="lanczos")
    names = [_name(label, classes, counts) for label in shown]
    axes.set_yticks([r * step + TILE / 2 for r in range(len(shown))], names, fontsize=9)
    axes.set_xticks([])
    axes.tick_params(length=0, pad=6)
    axes.spines[:].set_visible(False)


def _name(label: int, classes: Sequence[str], counts: Sequence[int] | None) -> str:
    name = shortened(classes[label]) if 0 <= label < len(classes) else "no label"
    return name if counts is None or name == "no label" else f"{name}\n{_images(counts[label])}"


def _images(count: int) -> str:
    return f"{count:,} image{'s' * (count != 1)}"


def tile(image: Tensor, side: int = TILE) -> np.ndarray:
    """uint8 C H W of any size → side side 3: its middle; pixels of a small image stay squares."""
    from vitlab.data import eval_transform

    height, width = image.shape[1:]
    times = side // min(height, width)
    if times > 1:
        image = image.repeat_interleave(times, 1).repeat_interleave(times, 2)
    image = eval_transform(side)([image], torch.zeros(1, dtype=torch.int64))[0]
    pixels: np.ndarray = image.expand(3, side, side).permute(1, 2, 0).numpy()
    return pixels


# ---------------------------------------------------------------- figures below it


def _draw_classes(axes: Axes, classes: Sequence[str], counts: Mapping[str, Sequence[int]]) -> None:
    """Bars of the splits upon one another, a name each; many classes are a curve, the largest first."""
    splits = {name: np.asarray(some) for name, some in counts.items() if np.any(some)}
    many = len(classes) > NAMED
    total = np.sum(list(splits.values()), axis=0)
    order = np.argsort(-total, kind="stable") if many else np.arange(len(classes))
    base = np.zeros(len(classes))
    for name, some in splits.items():
        color, top = TINTS.get(name, "#777777"), base + some[order]
        if many:  # as one area: thousands of bars take minutes
            axes.fill_between(
                np.arange(len(order)), base, top, step="mid", color=color, label=name, linewidth=0
            )
        else:
            axes.bar(order, some, 0.78, base, color=color, label=name)
        base = top
    if many:
        axes.set_xlabel("classes, the largest first", fontsize=8)
        axes.tick_params(axis="x", labelsize=8)
    else:
        names = [shortened(name) for name in classes]
        size = 8 if len(names) <= 20 else 6
        axes.set_xticks(range(len(names)), names, fontsize=size)
        if max(map(len, names), default=0) * len(names) > 60:  # letters that fit side by side
            for text in axes.get_xticklabels():
                text.set(rotation=45, ha="right", rotation_mode="anchor")
    axes.set_title("images of each class", fontsize=9)
    axes.tick_params(axis="y", labelsize=8)
    axes.locator_params(axis="y", integer=True)
    axes.legend(fontsize=7, frameon=False, ncols=len(splits), loc="upper right")
    axes.set_ylim(0, max(base.max(), 1) * 1.18)  # room for the legend
    _plain(axes)


def _draw_sizes(axes: Axes, widths: Sequence[int], heights: Sequence[int]) -> None:
    """A disc for each size, its area the share of the images."""
    found = Counter(zip(widths, heights, strict=True))
    x, y = np.array(list(found)).T
    share = np.array(list(found.values())) / max(1, len(widths))
    axes.scatter(x, y, 12 + 300 * share, color=BLUE, alpha=0.35 if len(found) > 1 else 1.0, linewidths=0)
    low, high = min(x.min(), y.min()), max(x.max(), y.max())
    if high > 8 * low:
        ends = (low / 1.3, high * 1.3)
        _logarithmic(axes, ends)
    else:
        margin = 0.12 * (high - low) or 0.5 * high
        ends = (max(0, low - margin), high + margin)
    axes.plot(ends, ends, color="#bbbbbb", linewidth=0.8, linestyle="--", zorder=0)
    axes.set_xlim(ends)
    axes.set_ylim(ends)
    axes.set_aspect("equal")
    axes.tick_params(labelsize=8)
    axes.set_xlabel("width in pixels", fontsize=8)
    axes.set_ylabel("height", fontsize=8)
    one = f"all are {x[0]} × {y[0]}" if len(found) == 1 else f"{len(found)} sizes"
    axes.set_title(one, fontsize=9)
    _plain(axes)


def _logarithmic(axes: Axes, ends: tuple[float, float]) -> None:
    """Both sides, named in pixels and not as powers of ten."""
    from matplotlib.ticker import FixedLocator, NullLocator

    steps = [digit * 10**power for power in range(6) for digit in (1, 2, 5)]
    named = [n for n in steps if ends[0] <= n <= ends[1]]
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(FixedLocator(named))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter("{x:g}")


def _plain(axes: Axes) -> None:
    axes.tick_params(length=2)
    axes.spines[["top", "right"]].set_visible(False)

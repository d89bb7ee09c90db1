"""Figures for a person: confusion, reconstructions. Drawn without a display."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from vitlab.evaluation.classify import Tally

if TYPE_CHECKING:
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
    """Rows are true classes, in per cent of the row; the diagonal is what is right."""
    figure = blank_figure(3 + 0.42 * min(len(labels), 40))
    axes = figure.add_subplot()
    counts = tally.confusion
    share = counts / counts.sum(1, keepdim=True).clamp(min=1)
    axes.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=1)
    if len(labels) <= 30:
        axes.set_xticks(range(len(labels)), labels, rotation=90 if max(map(len, labels)) > 3 else 0)
        axes.set_yticks(range(len(labels)), labels)
        for i, row in enumerate(counts.tolist()):
            for j, n in enumerate(row):
                if n:
                    axes.text(j, i, str(n), ha="center", va="center", fontsize=8, color="white" if share[i, j] > 0.5 else BLUE)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title(title, fontsize=10)
    return figure


def reconstruction_figure(original: Tensor, masked: Tensor, painted: Tensor, title: str) -> Figure:
    """Three rows: the image, what the encoder saw, what the decoder painted. Values in 0..1, B C H W."""
    count = len(original)
    figure = blank_figure(0.9 * count + 0.8, 3.2)
    for r, (name, images) in enumerate((("image", original), ("visible", masked), ("painted", painted))):
        for c in range(count):
            axes = figure.add_subplot(3, count, r * count + c + 1)
            axes.set_xticks([])
            axes.set_yticks([])
            pixels = images[c].clamp(0, 1).permute(1, 2, 0)
            axes.imshow(pixels.squeeze(-1).numpy() if pixels.shape[-1] == 1 else pixels.numpy(), cmap="gray", vmin=0, vmax=1)
            if c == 0:
                axes.set_ylabel(name, fontsize=9)
    figure.suptitle(title, fontsize=10)
    return figure


def blank_figure(width: float, height: float | None = None) -> Figure:
    """An empty figure that needs no display; square unless a height is given."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height or width))
    FigureCanvasAgg(figure)
    return figure

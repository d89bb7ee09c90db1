"""Pictures of attention: where each head looks, what a rollout says, how far heads look.

A map is drawn patch by patch, not smoothed: a patch is all that the model tells apart. Its colours go from
nothing to the strongest patch of that map (matplotlib's inferno, whose brightness alone tells the order), and
the weaker, the more of the image, in grey, shines through. So maps say where, not how much.

Letters: B images, C channels, H heads, h w patches down and across.
"""

from __future__ import annotations

import csv
import io
import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from vitlab.evaluation.attention import Look, Sides, even_look, mean_distance, resnet_fields
from vitlab.evaluation.pictures import BLUE, blank_figure
from vitlab.models.features import Size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

MOST = 8  # images of a picture
HEADS = 12  # heads of a picture
DIM = 0.6  # the grey image's brightness
ORANGE, GREY = "#b35900", "#666666"


def heads_figure(images: Tensor, maps: Tensor, captions: list[str], title: str) -> Figure:
    """A row for each image (B C height width in 0..1), a column for each head's map (B H h w)."""
    count, heads = min(len(images), MOST), min(maps.shape[1], HEADS)
    tall = images.shape[2] / images.shape[3]
    side = 1.25 if heads > 4 else 1.6
    figure = blank_figure(side * (heads + 1) + 0.9, side * tall * count + 0.45)
    grid = figure.add_gridspec(count, heads + 1, wspace=0.03, hspace=0.03)
    for row in range(count):
        axes = _panel(figure.add_subplot(grid[row, 0]), _colours(images[row]))
        axes.set_ylabel(captions[row], fontsize=9)
        axes.set_title("image" if row == 0 else "", fontsize=9)
        for head in range(heads):
            axes = _panel(figure.add_subplot(grid[row, head + 1]), overlay(images[row], maps[row, head]))
            axes.set_title(f"head {head + 1}" if row == 0 else "", fontsize=9)
    some = f" · {heads} of {maps.shape[1]} heads" if heads < maps.shape[1] else ""
    figure.suptitle(title + some, fontsize=10)
    _scale(figure)
    return figure


def rollout_figure(images: Tensor, maps: Tensor, captions: list[str], title: str) -> Figure:
    """Two rows: the image (B C height width in 0..1), and below it its rollout (B h w)."""
    count = min(len(images), MOST)
    tall = images.shape[2] / images.shape[3]
    figure = blank_figure(max(1.6 * count + 0.9, 4.2), 3.2 * tall + 0.65)
    grid = figure.add_gridspec(2, count, wspace=0.03, hspace=0.03)
    for i in range(count):
        axes = _panel(figure.add_subplot(grid[0, i]), _colours(images[i]))
        axes.set_title(captions[i], fontsize=9)
        axes.set_ylabel("" if i else "image", fontsize=9)
        axes = _panel(figure.add_subplot(grid[1, i]), overlay(images[i], maps[i]))
        axes.set_ylabel("" if i else "rollout", fontsize=9)
    figure.suptitle(title, fontsize=10)
    _scale(figure)
    return figure


def distance_figure(distances: list[Tensor], patch: Sides, image_size: Size, title: str) -> Figure:
    """One dot a head; lines for even looks: at the whole image, and at a CNN's receptive fields within it.

    The whole image is that of the first layer's patches (`patch`, in pixels), so that a head whose look is
    even lies on the line. A field that is all but the whole image has no line of its own.
    """
    figure = blank_figure(6.4, 4.0)
    axes = figure.add_subplot()
    for number, layer in enumerate(distances, 1):
        axes.scatter([number] * len(layer), layer.tolist(), s=30, color=BLUE, alpha=0.75, linewidths=0)
    grid = round(image_size[0] / patch[0]), round(image_size[1] / patch[1])
    even = torch.full((1, 1, *[math.prod(grid)] * 2), 1 / math.prod(grid))
    everything = float(mean_distance(even, grid, patch))
    fields = {
        f"ResNet-50, stage {stage}: {field} px": field for stage, field in enumerate(resnet_fields(), 1)
    }
    heights = {name: even_look(field, image_size) for name, field in fields.items()}
    heights = {name: height for name, height in heights.items() if height < 0.9 * everything}
    _line(axes, everything, "the whole image", "dotted")
    for name, height in heights.items():
        _line(axes, height, name, "dashed")
    highest = max(everything, *(float(layer.max()) for layer in distances))
    axes.set_ylim(0, 1.08 * highest)
    axes.set_xlim(0.5, len(distances) + 0.5)
    axes.set_xticks(range(1, len(distances) + 1))
    axes.set_xlabel("attention layer")
    axes.set_ylabel("mean attention distance (pixels)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    figure.suptitle(title, fontsize=10)
    among = ", or at a CNN's receptive field in it" if heights else ", which all stages of a ResNet-50 see"
    note = f"one dot a head; lines: an even look at the whole image{among}"
    axes.set_title(note, fontsize=8, color=GREY, loc="left")
    return figure


def attention_table(found: Look) -> str:
    """CSV: a row for each layer and head, counted from 1."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["layer", "head", "distance_px", "entropy_nats"])
    for number, (distances, entropies) in enumerate(zip(found.distances, found.entropies, strict=True), 1):
        for head, (distance, spread) in enumerate(
            zip(distances.tolist(), entropies.tolist(), strict=True), 1
        ):
            writer.writerow([number, head, f"{distance:.6g}", f"{spread:.6g}"])
    return text.getvalue()


def overlay(image: Tensor, heat: Tensor) -> Tensor:
    """C height width in 0..1 and h w ≥ 0 → height width 3: the map's colours over the grey image."""
    strength = heat.float() / heat.max().clamp(min=torch.finfo(torch.float32).tiny)
    strength = F.interpolate(strength[None, None], size=image.shape[1:], mode="nearest-exact")[0, 0]
    colours = torch.from_numpy(_palette()(strength.numpy())[..., :3]).float()
    grey = _colours(image).float().mean(-1, keepdim=True)
    cover = 0.9 * strength.sqrt()[..., None]
    return (1 - cover) * DIM * grey + cover * colours


def _palette() -> Colormap:
    """Inferno without its black end, which would look like a dark place of the image."""
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    return ListedColormap(colormaps["inferno"](np.linspace(0.2, 1, 256)))


def _colours(image: Tensor) -> Tensor:
    """C height width → height width 3."""
    pixels = image.detach().float().cpu().clamp(0, 1).permute(1, 2, 0)
    return pixels if pixels.shape[-1] == 3 else pixels.mean(-1, keepdim=True).expand(-1, -1, 3)


def _panel(axes: Axes, pixels: Tensor) -> Axes:
    axes.imshow(pixels.numpy(), interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    return axes


def _line(axes: Axes, height: float, name: str, style: str) -> None:
    axes.axhline(height, color=ORANGE, linestyle=style, linewidth=1)
    axes.annotate(
        name,
        (1, height),
        xycoords=("axes fraction", "data"),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        fontsize=8,
        color=ORANGE,
    )


def _scale(figure: Figure) -> None:
    """What the colours mean."""
    from matplotlib.cm import ScalarMappable

    drawn = ScalarMappable(cmap=_palette())
    drawn.set_clim(0, 1)
    bar = figure.colorbar(drawn, ax=figure.axes, fraction=0.02, pad=0.01, aspect=25, ticks=[0, 1])
    bar.ax.set_yticklabels(["none", "most"], fontsize=8)
    bar.outline.set_visible(False)

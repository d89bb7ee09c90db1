"""The figures can be drawn for few and many classes, grey and coloured, without a warning."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from vitlab.evaluation import Tally, confusion_figure, reconstruction_figure, save_figure
from vitlab.evaluation.pictures import augmentation_figure
from vitlab.evaluation.search import Trial, search_figure


def tally(classes: int) -> Tally:
    confusion = torch.eye(classes, dtype=torch.int64) * 9
    confusion[0, classes - 1] = 1
    confusion[classes // 2] = 0
    return Tally(confusion, 0, int(confusion.sum()), 1.0)


def saved(figure: Figure, tmp_path: Path) -> np.ndarray:
    save_figure(figure, tmp_path / "deep" / "f.png")
    with Image.open(tmp_path / "deep" / "f.png") as image:
        return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize(
    ("labels", "named"),
    [
        ([str(i) for i in range(10)], 10),
        (["no", "a class with a name that goes on and on"], 2),
        ([f"kind {i}" for i in range(30)], 30),
        ([f"class {i:03d}" for i in range(100)], 50),
        ([f"n{i:08d}" for i in range(1000)], 40),
    ],
)
def test_confusion(labels: list[str], named: int, tmp_path: Path) -> None:
    title = f"evaluate student · {len(labels)} held_out images · top-1 97.22%"
    figure = confusion_figure(tally(len(labels)), labels, title)
    axes = figure.axes[0]
    assert axes.get_title() == title
    assert len(axes.get_yticklabels()) == len(axes.get_xticklabels()) == named
    assert all(len(text.get_text()) <= 18 for text in axes.get_yticklabels())
    numbers = [(text.get_position(), text.get_text()) for text in axes.texts]
    if len(labels) <= 30:
        assert len(numbers) == len(labels), "the diagonal without one class, and one mistake"
        assert ((len(labels) - 1, 0), "1") in numbers
    else:
        assert numbers == []
    drawn = saved(figure, tmp_path)
    assert 400 < drawn.shape[0] < 1700
    assert 400 < drawn.shape[1] < 1900


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("count", [1, 8])
def test_reconstruction(channels: int, count: int, tmp_path: Path) -> None:
    images = torch.rand(count, channels, 8, 8) * 1.2 - 0.1  # a decoder may paint beyond black and white
    figure = reconstruction_figure(images, images * 0.5, images, "75% hidden")
    assert len(figure.axes) == 3 * count
    assert [axes.get_ylabel() for axes in figure.axes[::count]] == ["image", "visible", "painted"]
    first = np.asarray(figure.axes[0].images[0].get_array())
    assert first.shape == ((8, 8, 3) if channels == 3 else (8, 8))
    assert np.allclose(first, images[0].clamp(0, 1).permute(1, 2, 0).squeeze(-1).numpy())
    drawn = saved(figure, tmp_path)
    assert drawn.shape[1] > 100 * count


def test_reconstruction_of_whole_images_has_two_rows(tmp_path: Path) -> None:
    images = torch.rand(3, 1, 8, 8)
    figure = reconstruction_figure(images, None, images * 0.5, "from codes")
    assert [axes.get_ylabel() for axes in figure.axes[::3]] == ["image", "painted"]
    assert np.allclose(figure.axes[3].images[0].get_array(), images[0, 0].numpy() * 0.5)
    assert all(len(axes.images) == 1 for axes in figure.axes), "nothing is tinted"
    saved(figure, tmp_path)


@pytest.mark.parametrize("lowest", [False, True])
def test_search(lowest: bool, tmp_path: Path) -> None:
    trials = [
        Trial({"lr": 0.1, "pool": "mean"}, 0.5, 3.0, "a"),
        Trial({"lr": 0.01, "pool": "token"}, 0.9, 1.0, None),
        Trial({"lr": 0.001, "pool": "mean"}, 0.7, 3.0, "b"),
    ]
    figure = search_figure(trials, "val/loss", {"lr"}, lowest=lowest)
    axes = figure.axes[0]
    assert [a.get_xlabel() for a in figure.axes] == ["lr", "pool"]
    assert axes.get_xscale() == "log"
    red = [dots.get_offsets()[0].tolist() for dots in axes.collections if dots.get_edgecolor()[0][0] > 0.5]
    assert red == ([[0.1, 0.5]] if lowest else [[0.001, 0.7]])
    saved(figure, tmp_path)


@pytest.mark.parametrize("channels", [1, 3])
def test_views(channels: int, tmp_path: Path) -> None:
    views = {
        "global/0": torch.rand(4, channels, 28, 28),
        "local/0": torch.rand(4, channels, 12, 12) * 2 - 0.5,
    }
    figure = augmentation_figure(views, "two views of four images")
    assert [axes.get_ylabel() for axes in figure.axes if axes.get_ylabel()] == [
        "global/0\n28 px",
        "local/0\n12 px",
    ]
    height, width = saved(figure, tmp_path).shape[:2]
    assert width > height
    figure = augmentation_figure(
        {f"local/{i}": torch.rand(2, channels, 8, 8) for i in range(3)}, "three of two"
    )
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles == [f"local/{i}\n8 px" for i in range(3)]
    assert len(figure.axes) == 6

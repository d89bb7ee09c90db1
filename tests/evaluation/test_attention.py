"""Attention in numbers against naive loops, hand-made cases and real convolutions; its pictures and stage."""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vitlab.config import UserError, build
from vitlab.data import ShardsConfig, named, prepare
from vitlab.dist import World
from vitlab.evaluation import EvaluateConfig
from vitlab.evaluation.attention import (
    Layer,
    Look,
    entropy,
    even_look,
    layers_of,
    look,
    mean_distance,
    place,
    place_all,
    plain,
    receptive_fields,
    resnet_fields,
    rollout,
)
from vitlab.evaluation.attention_pictures import (
    attention_table,
    distance_figure,
    heads_figure,
    overlay,
    rollout_figure,
)
from vitlab.evaluation.pictures import save_figure
from vitlab.jobs.evaluating import EvaluateJob, run_evaluation
from vitlab.jobs.place import Place, preprocess
from vitlab.models import create_model, load_model, save_model
from vitlab.models.features import Features
from vitlab.tracking import Store, TrackingConfig


def maps(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(*shape, generator=generator, dtype=torch.float64)).softmax(-1)


# ---------------------------------------------------------------- rollout


@pytest.mark.parametrize("discard", [0.0, 0.4])
def test_rollout_is_the_product_over_layers(discard: float) -> None:
    layers = [maps(2, 3, 5, 5, seed=i) for i in range(4)]
    found = rollout(layers, discard=discard)
    for b in range(2):
        product = torch.eye(5, dtype=torch.float64)
        for layer in layers:
            mixed = torch.zeros(5, 5, dtype=torch.float64)
            for q in range(5):
                row = [sum(layer[b, h, q, k].item() for h in range(3)) / 3 for k in range(5)]
                weakest = sorted(range(5), key=lambda k: row[k])[: int(discard * 5)]
                row = [0.0 if k in weakest else value for k, value in enumerate(row)]
                row[q] += 1
                mixed[q] = torch.tensor(row, dtype=torch.float64) / sum(row)
            product = mixed @ product
        torch.testing.assert_close(found[b], product, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 5, dtype=torch.float64))


def test_rollout_by_hand() -> None:
    eye = torch.eye(4).expand(1, 2, 4, 4)
    assert torch.equal(rollout([eye, eye, eye]), torch.eye(4)[None])
    even = torch.full((1, 2, 4, 4), 0.25)
    # M = (I + J/4)/2, and J/4 · J/4 = J/4: M² = I/4 + 3/4 · J/4
    torch.testing.assert_close(rollout([even, even])[0], torch.eye(4) / 4 + 3 / 16)


def test_the_first_layer_is_the_one_at_the_image() -> None:
    """Token 0 reads 1 in the last layer, 1 has read 2 in the first: so 0 has a quarter of 2."""
    first, last = torch.eye(3).repeat(1, 1, 1, 1), torch.eye(3).repeat(1, 1, 1, 1)
    first[0, 0, 1] = torch.tensor([0.0, 0.0, 1.0])
    last[0, 0, 0] = torch.tensor([0.0, 1.0, 0.0])
    assert rollout([first, last])[0, 0].tolist() == [0.5, 0.25, 0.25]


# ---------------------------------------------------------------- distance and entropy


@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize(
    ("grid", "patch"), [((3, 3), (16.0, 16.0)), ((2, 4), (8.0, 4.0)), ((1, 5), (2.0, 2.0))]
)
def test_distance_as_naive_loops_count(
    grid: tuple[int, int], patch: tuple[float, float], prefix: int
) -> None:
    n = grid[0] * grid[1]
    attention = maps(2, 3, prefix + n, prefix + n)
    found = mean_distance(attention, grid, patch, prefix)
    for head in range(3):
        total = 0.0
        for b, q in itertools.product(range(2), range(n)):
            row = attention[b, head, prefix + q, prefix:]
            for k in range(n):
                down = (q // grid[1] - k // grid[1]) * patch[0]
                across = (q % grid[1] - k % grid[1]) * patch[1]
                total += (row[k] / row.sum()).item() * math.hypot(down, across)
        assert found[head].item() == pytest.approx(total / (2 * n), rel=1e-12)


def test_distance_by_hand() -> None:
    n = 16
    eye = torch.eye(n).expand(2, 3, n, n)
    assert mean_distance(eye, (4, 4), 16).tolist() == [0.0] * 3
    right = torch.eye(n)[[q + 1 if q % 4 < 3 else q - 1 for q in range(n)]].expand(1, 2, n, n)
    assert mean_distance(right, (4, 4), 16).tolist() == [16.0] * 2
    below = torch.eye(n)[[(q + 4) % n if q < 12 else q - 4 for q in range(n)]].expand(1, 2, n, n)
    assert mean_distance(below, (4, 4), (7.0, 3.0)).tolist() == [7.0] * 2
    # A 2×2 grid looked at evenly: (0 + 1 + 1 + √2) / 4 patches.
    even = torch.full((1, 1, 4, 4), 0.25, dtype=torch.float64)
    assert mean_distance(even, (2, 2), 8).item() == pytest.approx(8 * (2 + math.sqrt(2)) / 4)


def test_prefix_tokens_have_no_place() -> None:
    """Whatever the prefix gets, the rest is scaled to a sum of 1; nothing at all is 0."""
    inner = maps(1, 2, 9, 9)
    attention = torch.zeros(1, 2, 11, 11, dtype=torch.float64)
    attention[..., 2:, 2:] = 0.3 * inner
    attention[..., 2:, 0] = 0.7
    torch.testing.assert_close(mean_distance(attention, (3, 3), 16, 2), mean_distance(inner, (3, 3), 16))
    attention[..., 2:, 2:] = 0
    assert mean_distance(attention, (3, 3), 16, 2).tolist() == [0.0, 0.0]


def test_distance_inside_windows_is_the_mean_over_windows() -> None:
    attention = maps(2, 5, 3, 4, 4)
    each = torch.stack([mean_distance(attention[:, w], (2, 2), 4) for w in range(5)])
    torch.testing.assert_close(mean_distance(attention, (2, 2), 4), each.mean(0))


def test_half_precision_is_summed_in_single() -> None:
    attention = maps(2, 3, 50, 50).to(torch.bfloat16)
    for found in (mean_distance(attention, (7, 7), 16, 1), entropy(attention), rollout([attention])):
        assert found.dtype == torch.float32
    wanted = mean_distance(attention.double(), (7, 7), 16, 1)
    torch.testing.assert_close(mean_distance(attention, (7, 7), 16, 1).double(), wanted, rtol=1e-5, atol=0)


def test_entropy() -> None:
    assert entropy(torch.eye(6).expand(1, 2, 6, 6)).tolist() == [0.0, 0.0]
    assert entropy(torch.full((2, 1, 6, 6), 1 / 6)).item() == pytest.approx(math.log(6))
    attention = maps(2, 3, 5, 5)
    for head in range(3):
        rows = attention[:, head].flatten().tolist()
        assert entropy(attention)[head].item() == pytest.approx(-sum(a * math.log(a) for a in rows) / 10)


# ---------------------------------------------------------------- convolutional networks


@pytest.mark.parametrize("steps", [[(3, 1)] * 3, [(7, 2), (3, 2), (3, 1), (1, 1), (3, 2)], [(4, 4), (3, 1)]])
def test_a_field_is_where_the_gradient_reaches(steps: list[tuple[int, int]]) -> None:
    fields = receptive_fields(steps)
    image = torch.zeros(1, 1, 1, 3 * fields[-1], requires_grad=True)
    x = image
    for (kernel, stride), field in zip(steps, fields, strict=True):
        layer = nn.Conv2d(1, 1, (1, kernel), (1, stride), bias=False)
        nn.init.ones_(layer.weight)
        x = layer(x)
        (gradient,) = torch.autograd.grad(x[0, 0, 0, 0], image, retain_graph=True)
        assert int((gradient != 0).sum()) == field


def test_fields_of_residual_networks() -> None:
    assert resnet_fields() == [35, 91, 267, 427]  # 427: torchvision's ResNet-50
    assert resnet_fields((3, 4, 23, 3))[-1] == 971  # and its ResNet-101
    # With the stride in the first 1×1 of a stage, as the first paper had it, the field is 483, as Araujo et
    # al. give it for ResNet-50.
    early = [(7, 2), (3, 2)]
    for stage, depth in enumerate((3, 4, 6, 3)):
        early += [(1, 2), *[(3, 1)] * depth] if stage else [(3, 1)] * depth
    assert receptive_fields(early)[-1] == 483


@pytest.mark.parametrize("field", [1, 2, 3, 5.5, 8, 100, math.inf])
@pytest.mark.parametrize("size", [(6, 6), (4, 9)])
def test_an_even_look_as_naive_loops_count(size: tuple[int, int], field: float) -> None:
    pixels = list(itertools.product(range(size[0]), range(size[1])))
    total = 0.0
    for y, x in pixels:
        seen = [math.hypot(v - y, u - x) for v, u in pixels if max(abs(v - y), abs(u - x)) <= field / 2]
        total += sum(seen) / len(seen)
    assert even_look(field, size) == pytest.approx(total / len(pixels), rel=1e-12)


def test_an_even_look_over_everything_is_what_an_even_head_has() -> None:
    even = torch.full((1, 1, 36, 36), 1 / 36, dtype=torch.float64)
    assert even_look(math.inf, (6, 6)) == pytest.approx(mean_distance(even, (6, 6), 1).item(), rel=1e-12)
    # The mean distance between two points of a square of side 1 is 0.5214.
    assert even_look(math.inf, (224, 224)) / 224 == pytest.approx(0.5214, abs=1e-4)


# ---------------------------------------------------------------- where tokens lie


def test_layers_are_placed() -> None:
    size, grids = (224, 192), [(14, 12), (7, 6)]
    assert place((2, 3, 170, 170), grids, size, 2) == Layer((14, 12), (16.0, 16.0), 2, False)
    assert place((2, 3, 42, 42), grids, size, 0) == Layer((7, 6), (32.0, 32.0), 0, False)
    assert place((2, 3, 43, 43), grids, size, 0) is None
    assert place((2, 3, 168, 42), grids, size, 0) is None, "fewer keys than queries"
    assert place((2, 42, 3, 4, 4), grids, size, 0) == Layer((2, 2), (16.0, 16.0), 0, True)
    assert place((2, 7, 3, 24, 24), grids, size, 0) is None, "no square window"
    same = place_all([(1, 3, 169, 169)] * 2, grids, size, 1)
    assert plain(same)
    assert not plain(place_all([(1, 3, 168, 168), (1, 3, 42, 42)], grids, size, 0))
    assert not plain(place_all([(1, 42, 3, 4, 4)], grids, size, 0))
    with pytest.raises(UserError, match=r"evaluate\.attention: .* layer 2 is 3×168×42 .* allowed .*: 0"):
        place_all([(1, 3, 168, 168), (1, 3, 168, 42)], grids, size, 0)


# ---------------------------------------------------------------- a model on some images


TINY = {"patch_size": 4, "embed_dim": 8, "depth": 3, "num_heads": 2, "in_chans": 1}


class Staged(nn.Module):
    """Attention of two stages, as hierarchical models give it: in windows, or over each stage's grid."""

    gives = frozenset({"logits", "attentions", "pyramid"})
    image_size = (16, 16)

    def __init__(self, windows: bool, keys: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.shapes = [(4, 3, 4, 4), (1, 6, 4, 4)] if windows else [(3, 16, keys or 16), (6, 4, 4)]
        self.config = SimpleNamespace(in_chans=1, grid=lambda size: (4, 4))

    def forward(self, images: Tensor, want: Collection[str]) -> Features:
        b = len(images)
        pyramid = [images.new_zeros(b, 8, side, side) for side in (4, 2)]
        attentions = [torch.full((b, *shape), 1 / shape[-1]) for shape in self.shapes]
        found = {"logits": images.new_zeros(b, 3), "attentions": attentions, "pyramid": pyramid}
        return Features(**{name: found[name] for name in want})


@pytest.mark.parametrize(
    ("name", "more", "reader"),
    [
        ("vit_tiny", {}, "class token"),
        ("vit_tiny", {"pool": "mean"}, "mean of all patches"),
        ("deit_tiny", {}, "class token"),
    ],
)
def test_a_look_is_that_of_the_whole_batch(name: str, more: dict[str, str], reader: str) -> None:
    """More images than are held at a time, on a grid that is no square."""
    torch.manual_seed(0)
    model = create_model(name, num_classes=3, image_size=(8, 12), **TINY, **more).eval()
    images = 5 * torch.randn(7, 1, 8, 12)
    with torch.no_grad():
        features = model(images, {"attentions", "logits", "prefix"})
    p = features.prefix.shape[1]
    found = look(model, model, images)
    assert found.layers == [Layer((2, 3), (4.0, 4.0), p, False)] * 3
    for i, attention in enumerate(features.attentions):
        torch.testing.assert_close(found.distances[i], mean_distance(attention, (2, 3), 4, p))
        torch.testing.assert_close(found.entropies[i], entropy(attention))
    assert found.reader == reader
    assert torch.equal(found.answers, features.logits.argmax(1))
    rolled, last = rollout(features.attentions), features.attentions[-1]
    if reader == "class token":
        wanted = rolled[:, 0, p:], last[:, :, 0, p:]
    else:
        wanted = rolled[:, p:, p:].mean(1), last[:, :, p:, p:].mean(2)
    torch.testing.assert_close(found.rollout, wanted[0].view(7, 2, 3))
    torch.testing.assert_close(found.heads, wanted[1].view(7, 2, 2, 3))


def test_stages_have_distances_but_no_rollout() -> None:
    images = torch.zeros(2, 1, 16, 16)
    stages = Staged(windows=False)
    found = look(stages, stages, images)
    assert [layer.patch for layer in found.layers] == [(4.0, 4.0), (8.0, 8.0)]
    assert found.rollout is None
    assert found.heads is not None
    assert found.heads.shape == (2, 6, 2, 2)
    two = (2 + math.sqrt(2)) / 4  # an even look at 2×2
    assert found.distances[1].tolist() == pytest.approx([8 * two] * 6)
    windows = Staged(windows=True)
    found = look(windows, windows, images)
    assert found.rollout is found.heads is None
    assert found.distances[0].tolist() == pytest.approx([4 * two] * 3)
    assert found.distances[1].tolist() == pytest.approx([8 * two] * 6)


def test_models_without_maps_are_refused() -> None:
    fewer = Staged(windows=False, keys=4)
    with pytest.raises(UserError, match=r"attention of layer 1 is 3×16×4 .*allowed for this model: 0"):
        layers_of(fewer, fewer)
    with pytest.raises(UserError, match=r"has no layer of attention; allowed for this model: 0"):
        place_all([], [(4, 4)], (16, 16), 0)
    fewer.gives = frozenset({"logits"})
    with pytest.raises(
        UserError, match=r"evaluate\.attention: Staged gives no attention maps; allowed .*: 0"
    ):
        layers_of(fewer, fewer)


# ---------------------------------------------------------------- pictures


def test_an_overlay_is_brightest_where_the_map_is_strongest() -> None:
    heat = torch.tensor([[0.0, 0.1], [0.2, 0.4]])
    drawn = overlay(torch.full((1, 4, 6), 0.5), heat)
    assert drawn.shape == (4, 6, 3)
    assert 0 <= drawn.min() <= drawn.max() <= 1
    assert torch.equal(drawn[0, 0], drawn[1, 2]), "a patch has one colour on an even image"
    assert drawn[0, 0].tolist() == pytest.approx([0.3] * 3), "nothing: the image, dimmed"
    bright = [drawn[y, x].sum().item() for y, x in ((0, 3), (2, 0), (2, 3))]
    assert bright == sorted(bright)
    assert overlay(torch.zeros(3, 4, 4), torch.zeros(2, 2)).isfinite().all()


@pytest.mark.parametrize(("count", "heads", "channels"), [(1, 1, 1), (9, 2, 3), (1, 18, 3)])
def test_maps_are_drawn(count: int, heads: int, channels: int, tmp_path: Path) -> None:
    images, names = torch.rand(count, channels, 8, 8), [f"class {i}" for i in range(count)]
    figure = heads_figure(images, torch.rand(count, heads, 2, 2), names, "title")
    rows, columns = min(count, 8), min(heads, 12) + 1
    assert len(figure.axes) == rows * columns + 1
    assert [axes.get_ylabel() for axes in figure.axes[:-1:columns]] == names[:8]
    assert [axes.get_title() for axes in figure.axes[:2]] == ["image", "head 1"]
    assert figure.get_suptitle() == ("title" if heads <= 12 else "title · 12 of 18 heads")
    save_figure(figure, tmp_path / "heads.png")
    figure = rollout_figure(images, torch.rand(count, 2, 2), names, "title")
    assert len(figure.axes) == rows * 2 + 1
    save_figure(figure, tmp_path / "rollout.png")


@pytest.mark.parametrize(("side", "dashed"), [(8, 0), (32, 1), (96, 2), (224, 3)])
def test_distances_are_drawn(side: int, dashed: int, tmp_path: Path) -> None:
    heads = [torch.tensor([1.0, 2.0]), torch.tensor([3.0])]
    figure = distance_figure(heads, (side / 4, side / 4), (side, side), "title")
    axes = figure.axes[0]
    dots = [dots.get_offsets().tolist() for dots in axes.collections]
    assert dots == [[[1, 1], [1, 2]], [[2, 3]]]
    assert [line.get_linestyle() for line in axes.lines] == [":"] + ["--"] * dashed
    even = mean_distance(torch.full((1, 1, 16, 16), 1 / 16), (4, 4), side / 4).item()
    assert axes.lines[0].get_ydata()[0] == pytest.approx(even), "an even head lies on the dotted line"
    save_figure(figure, tmp_path / "distance.png")


def test_the_table_of_attention() -> None:
    found = Look([], [torch.tensor([1.5, 2])], [torch.tensor([0.0, 1])], None, None, torch.zeros(1), "")
    assert attention_table(found) == "layer,head,distance_px,entropy_nats\n1,1,1.5,0\n1,2,2,1\n"


# ---------------------------------------------------------------- the stage


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with shards of the digits and an untrained model that knows their classes."""
    home = tmp_path_factory.mktemp("home")
    shards = prepare(DATA, home / "shards")
    torch.manual_seed(0)
    model = create_model("vit_tiny", num_classes=10, image_size=8, **TINY)
    save_model(model, home / "model", preprocess=preprocess(DATA), labels=shards.classes)
    return home


DATA = build(ShardsConfig, {"source": "digits", "image_size": 8, "channels": 1})


def evaluated(home: Path, attention: int) -> tuple[str, dict[str, float], list[Any]]:
    """The MLflow run, what the job says it measured, and what it posted."""
    store = Store(TrackingConfig(), home)
    run_id = store.start("evaluate", {}, {})
    place = Place(home, store.config, run_id, named(prepare(DATA, home / "shards")), DATA, 0)
    job = EvaluateJob(EvaluateConfig(attention=attention), place, home / "model", "evaluate model")
    posts: list[Any] = []
    result = run_evaluation(job, World(device=torch.device("cpu")), lambda *post: posts.append(post))
    return run_id, result["metrics"], posts


def test_an_evaluation_draws_attention(home: Path) -> None:
    run_id, metrics, posts = evaluated(home, 3)
    store = Store(TrackingConfig(), home)
    pictures, report = store.download(run_id, "pictures"), store.download(run_id, "report")
    assert pictures is not None
    assert report is not None
    assert {p.name for p in pictures.iterdir()} == {"attention.png", "rollout.png", "attention_distance.png"}
    assert {p.name for p in report.iterdir()} == {
        "attention.csv",
        "confusion.csv",
        "confusion.png",
        "report.json",
    }
    rows = list(csv.DictReader((report / "attention.csv").read_text().splitlines()))
    assert [(row["layer"], row["head"]) for row in rows] == [
        (str(i), str(h)) for i in (1, 2, 3) for h in (1, 2)
    ]
    for layer in range(3):
        mean = sum(float(row["distance_px"]) for row in rows[2 * layer : 2 * layer + 2]) / 2
        name = f"eval/attention_distance/layer_0{layer + 1}"
        assert metrics[name] == pytest.approx(mean, rel=1e-4)
        assert store.get(run_id).metrics[name] == metrics[name]
    assert {kind for kind, _ in posts} == {"progress"}


def test_an_evaluation_draws_none_unless_asked(home: Path) -> None:
    run_id, metrics, _ = evaluated(home, 0)
    assert Store(TrackingConfig(), home).download(run_id, "pictures") is None
    assert not [name for name in metrics if "attention" in name]


def test_an_evaluation_refuses_before_it_works(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_model(home / "model")
    loaded.model.gives = frozenset({"logits"})
    monkeypatch.setattr("vitlab.jobs.evaluating.load_model", lambda folder: loaded)
    monkeypatch.setattr("vitlab.jobs.evaluating.classify", None)
    with pytest.raises(UserError, match=r"^evaluate\.attention: ViT gives no attention maps"):
        evaluated(home, 3)

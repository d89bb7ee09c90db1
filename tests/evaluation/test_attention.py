"""Figures of attention against naive loops, hand-made cases and real convolutions."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from vitlab.config import UserError
from vitlab.evaluation.attention import (
    Layer,
    entropy,
    even_look,
    mean_distance,
    place,
    place_all,
    plain,
    receptive_fields,
    resnet_fields,
    rollout,
)


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
    with pytest.raises(UserError, match=r"evaluate\.attention: .* layer 2 is 3×168×42, .* allowed .*: 0"):
        place_all([(1, 3, 168, 168), (1, 3, 168, 42)], grids, size, 0)

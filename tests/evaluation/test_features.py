"""Features come whole and in order from any number of ranks; collapse is what rank and spread see."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from test_classify import batches, on_ranks, sample
from torch import Tensor

from vitlab.batch import Batch
from vitlab.dist import World
from vitlab.evaluation.features import EPS, Found, collect, effective_rank, spread


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("count", [1, 16, 37])
def test_every_sample_once_and_in_order(ranks: int, count: int) -> None:
    features, labels = sample(5, count)
    labels[::3] = -1  # no label is no reason to be left out

    def work(world: World) -> Found:
        return collect(lambda batch: batch.views[0].flatten(1), batches(features, labels, 16, world), world)

    for found in on_ranks(ranks, work):
        assert torch.equal(found.features, features)
        assert torch.equal(found.labels, labels)
        known = found.labelled()
        assert torch.equal(known.features, features[labels >= 0])
        assert (known.labels >= 0).all()


def test_forwards_are_the_same_number_on_every_rank() -> None:
    """A batch that is all padding is forwarded too: under ZeRO-3 the others wait for it."""
    features, labels = sample(3, 17)

    def work(world: World) -> int:
        calls: list[int] = []

        def forward(batch: Batch) -> Tensor:
            calls.append(1)
            return batch.views[0].flatten(1)

        collect(forward, batches(features, labels, 16, world), world)
        return len(calls)

    assert on_ranks(4, work) == [2, 2, 2, 2]


def test_half_precision_is_widened_and_no_gradient_is_kept() -> None:
    layer = torch.nn.Linear(3, 2)
    features, labels = sample(3, 5)
    world = World(device=torch.device("cpu"))
    cut = batches(features, labels, 4, world)
    found = collect(lambda batch: layer(batch.views[0].flatten(1)).bfloat16(), cut, world)
    assert found.features.dtype == torch.float32
    assert not found.features.requires_grad


def shapes() -> Iterator[tuple[int, int]]:
    yield from ((200, 16), (16, 200), (30, 30))


@pytest.mark.parametrize(("n", "d"), list(shapes()))
def test_rank_is_the_papers(n: int, d: int) -> None:
    """Against the singular values themselves."""
    z = torch.randn(n, d, generator=torch.Generator().manual_seed(n)).double() * torch.linspace(0, 1, d)
    sigma = torch.linalg.svdvals(z)
    share = sigma / sigma.sum()
    wanted = math.exp(-sum((p + EPS) * math.log(p + EPS) for p in share.tolist()))
    assert effective_rank(z) == pytest.approx(wanted, rel=1e-4)
    assert 1 < effective_rank(z) < min(n, d)


def test_rank_and_spread_of_what_is_known() -> None:
    generator = torch.Generator().manual_seed(0)
    axes = torch.eye(8).repeat(5, 1)
    assert effective_rank(axes) == pytest.approx(8, rel=1e-5)
    line = torch.randn(50, 1, generator=generator) * torch.randn(1, 8, generator=generator)
    assert effective_rank(line) == pytest.approx(1, abs=1e-3)
    same = torch.ones(50, 8)
    assert effective_rank(same) == pytest.approx(1, abs=1e-3)
    assert spread(same) == pytest.approx(0, abs=1e-9)
    assert effective_rank(torch.zeros(4, 3)) == pytest.approx(1, abs=1e-3)
    everywhere = torch.randn(20000, 32, generator=generator)
    assert spread(everywhere) == pytest.approx(1, abs=0.01)
    assert spread(7 * everywhere) == pytest.approx(spread(everywhere), rel=1e-6)

"""The order is a pure function, fair to every sample, and the same on any number of workers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitlab.config import UserError
from vitlab.data.order import Order, chosen, divisors, exact


@st.composite
def orders(draw: st.DrawFn) -> Order:
    streams = draw(st.sampled_from([1, 2, 3, 4, 6, 8]))
    batch = streams * draw(st.integers(1, 4))
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=12))
    if sum(sizes) < batch:
        sizes.append(batch)
    return Order(tuple(sizes), streams, batch, draw(st.integers(0, 2**40)), draw(st.integers(1, 50)))


def epoch_of(order: Order, epoch: int) -> np.ndarray:
    return np.stack([order.batch_indices(epoch, step) for step in range(order.steps)])


@settings(deadline=None, max_examples=60)
@given(orders(), st.integers(0, 5))
def test_every_sample_at_most_once(order: Order, epoch: int) -> None:
    table = epoch_of(order, epoch)
    n = sum(order.sizes)
    assert table.dtype == np.int64
    assert table.shape == (n // order.batch, order.batch)
    assert len(np.unique(table)) == table.size > n - order.batch
    assert table.min() >= 0
    assert table.max() < n


@settings(deadline=None, max_examples=40)
@given(orders())
def test_workers_share_the_batch(order: Order) -> None:
    for workers in divisors(order.streams):
        shares = [order.share(rank, workers) for rank in range(workers)]
        assert {len(share) for share in shares} == {order.batch // workers}
        assert sorted(np.concatenate(shares)) == list(range(order.batch))
        per_stream = order.batch // order.streams
        assert all(set(s // per_stream % workers) == {rank} for rank, s in enumerate(shares))


@settings(deadline=None, max_examples=40)
@given(orders(), st.integers(0, 3))
def test_pure(order: Order, epoch: int) -> None:
    again = Order(order.sizes, order.streams, order.batch, order.seed, order.window)
    again.batch_indices(epoch + 1, 0)  # what was asked before does not matter
    assert np.array_equal(epoch_of(order, epoch), epoch_of(again, epoch))
    assert order == again


@settings(deadline=None, max_examples=40)
@given(orders(), st.integers(0, 3))
def test_displacement_is_bounded(order: Order, epoch: int) -> None:
    """Every stream holds the samples of its own contiguous part, each less than a window from its place."""
    sequence = order._sequence(epoch)[: order.steps * order.batch]
    streams = epoch_of(order, epoch).reshape(order.steps, order.streams, -1).swapaxes(0, 1)
    for before, after in zip(sequence.reshape(order.streams, -1), streams, strict=True):
        place = {sample: i for i, sample in enumerate(after.reshape(-1))}
        assert max(abs(place[sample] - i) for i, sample in enumerate(before)) < order.window


def test_mixing() -> None:
    """Displacement is near a quarter of the window (uniform over half of it either way); neighbours part."""
    order = Order((500,) * 40, 4, 32, 0, 1000)
    sequence = order._sequence(0)[: order.steps * 32].reshape(4, -1)
    table = epoch_of(order, 0)
    batch_of = np.full(20000, -1)
    batch_of[table] = np.arange(order.steps)[:, None]
    places = np.argsort(order._jitter(0, 0, sequence.shape[1]))
    moved = np.abs(places - np.arange(len(places))).mean()
    assert 220 < moved < 260
    neighbours = (batch_of[sequence[:, 1:]] == batch_of[sequence[:, :-1]]).mean()
    assert neighbours < 0.015
    shards_in_batch = [len(np.unique(row // 500)) for row in table]
    assert np.mean(shards_in_batch) > 8


def test_epochs_seeds_and_remainders_differ() -> None:
    order = Order((30, 30, 30, 9), 4, 16, 0, 10)
    tables = [epoch_of(order, epoch) for epoch in range(30)]
    assert len({table.tobytes() for table in tables}) == 30
    left_out = [frozenset(range(99)) - set(table.reshape(-1).tolist()) for table in tables]
    assert all(len(left) == 3 for left in left_out)
    assert len(set(left_out)) > 20
    assert not np.array_equal(tables[0], epoch_of(Order((30, 30, 30, 9), 4, 16, 1, 10), 0))


def test_only_two_epochs_are_kept_and_none_can_be_changed() -> None:
    order = Order((40,), 2, 4, 0, 10)
    first = order.batch_indices(0, 0).copy()
    for epoch in range(5):
        order.batch_indices(epoch, 0)
    assert sorted(order._epochs) == [3, 4]
    assert np.array_equal(order.batch_indices(0, 0), first)
    with pytest.raises(ValueError, match="read-only"):
        order.batch_indices(0, 0)[0] = 1


@given(st.integers(0, 200), st.integers(1, 40), st.integers(1, 7))
def test_exact_gives_every_sample_once(n: int, batch: int, workers: int) -> None:
    tables = [exact(n, batch, workers, rank) for rank in range(workers)]
    assert len({table.shape for table in tables}) == 1
    slots = np.concatenate([table.reshape(-1) for table in tables])
    assert sorted(slots[slots >= 0]) == list(range(n))
    assert (slots < 0).sum() < workers * -(-batch // workers)


@pytest.mark.parametrize(
    ("sizes", "streams", "batch", "seed", "window", "text"),
    [
        ((100,), 8, 12, 0, 10, "batch size: given 12, but the samples come in 8 streams"),
        ((10,), 4, 16, 0, 10, "only 10 samples; give 8 or less"),
        ((100,), 4, 16, -1, 10, "allowed: a seed from 0"),
        ((100,), 4, 16, 0, 0, "a window from 1"),
    ],
)
def test_refused(sizes: tuple[int, ...], streams: int, batch: int, seed: int, window: int, text: str) -> None:
    with pytest.raises(UserError, match=text) as caught:
        Order(sizes, streams, batch, seed, window)
    assert "\n" not in str(caught.value)


def test_workers_that_do_not_divide_the_streams() -> None:
    with pytest.raises(UserError, match=r"workers: given 3 .* 4 streams; allowed: 1, 2, 4"):
        Order((100,), 4, 16, 0, 10).share(0, 3)
    with pytest.raises(UserError, match="batch size: given 0"):
        exact(10, 0, 1, 0)


def test_chosen_are_always_the_same_and_nested() -> None:
    few, more = chosen(100, 10).tolist(), chosen(100, 30).tolist()
    assert few == sorted(few) == chosen(100, 10).tolist()
    assert len(set(few)) == 10
    assert set(few) < set(more)
    assert chosen(7, 10).tolist() == list(range(7))
    assert max(few) > 50, "from all over the split"

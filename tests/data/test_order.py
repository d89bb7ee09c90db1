"""The order is a pure function, fair to every sample, and the same on any number of workers."""

from __future__ import annotations

import hashlib
import time
import tracemalloc
from collections import OrderedDict
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitlab.config import UserError
from vitlab.data.reading import order as order_module
from vitlab.data.reading.order import Order, Streams, chosen, divisors, exact


@st.composite
def orders(draw: st.DrawFn) -> Order:
    """Shards of no sample, of one and of many; often fewer shards than streams."""
    streams = draw(st.sampled_from([1, 2, 3, 4, 6, 8]))
    batch = streams * draw(st.integers(1, 4))
    sizes = draw(st.lists(st.one_of(st.integers(0, 3), st.integers(4, 90)), min_size=1, max_size=12))
    if sum(sizes) < batch:
        sizes.append(batch)
    window = draw(st.sampled_from([1, 2, 7, 50, 10**9]))
    return Order(tuple(sizes), streams, batch, draw(st.integers(0, 2**40)), window)


def epoch_of(order: Streams, epoch: int) -> np.ndarray:
    return np.stack([order.batch_indices(epoch, step) for step in range(order.steps)])


def sequence_of(order: Order, epoch: int) -> np.ndarray:
    """The definition in plain words: shuffled shards laid end to end, begun at a random place."""
    ends = np.cumsum(order.sizes)
    shards = np.random.default_rng([order.seed, epoch, 1, 0]).permutation(len(order.sizes))
    runs = [np.arange(ends[i] - order.sizes[i], ends[i]) for i in shards]
    begin = int(np.random.default_rng([order.seed, epoch, 2, 0]).integers(ends[-1]))
    return np.roll(np.concatenate(runs), -begin)[: order.steps * order.batch].reshape(order.streams, -1)


def defined(order: Order, epoch: int) -> np.ndarray:
    """The whole epoch by definition: each stream sorted by place + window·noise, cut into steps."""
    rows = []
    for i, row in enumerate(sequence_of(order, epoch)):
        noise = np.random.default_rng([order.seed, epoch, 3, i]).random(len(row))
        rows.append(row[np.argsort(np.arange(len(row)) + order.window * noise, kind="stable")])
    streams = np.stack(rows).reshape(order.streams, order.steps, order.each)
    return streams.swapaxes(0, 1).reshape(order.steps, order.batch)


def test_the_order_is_for_ever() -> None:
    """Curves of earlier runs and runs that go on after an update depend on it."""
    order = Order((5, 0, 9, 1, 7), 2, 4, 11, 3)
    assert epoch_of(order, 0).tolist() == [
        [16, 15, 8, 7],
        [17, 18, 10, 9],
        [19, 20, 11, 12],
        [14, 21, 1, 0],
        [5, 6, 13, 2],
    ]
    assert order.batch_indices(10**6, 4).tolist() == [10, 11, 4, 16]
    large = Order((1000,) * 1281 + (167,), 8, 1024, 7, 1000)
    assert hashlib.sha256(large.batch_indices(3, 700).tobytes()).hexdigest()[:16] == "a65f9988c6b826f0"


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


@settings(deadline=None, max_examples=60)
@given(orders(), st.integers(0, 3), st.integers(1, 40), st.data())
def test_parts_are_what_the_definition_says(order: Order, epoch: int, held: int, data: st.DataObject) -> None:
    """Whatever is computed at once, in whatever order it is asked for, by a fresh object or a used one."""
    whole = defined(order, epoch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order_module, "HELD", held)
        used = Order(order.sizes, order.streams, order.batch, order.seed, order.window)
        for step in data.draw(st.permutations(range(order.steps))):
            assert np.array_equal(used.batch_indices(epoch, step), whole[step])
        late = order.steps - 1
        assert np.array_equal(order.batch_indices(epoch, late), whole[late])
        assert order == used


@settings(deadline=None, max_examples=40)
@given(orders(), st.integers(0, 2))
def test_workers_share_the_batch(order: Order, epoch: int) -> None:
    """For any number of workers: the same batch, the same number each, nobody without work, whole streams."""
    step = order.steps // 2
    batch = order.batch_indices(epoch, step)
    for workers in divisors(order.streams):
        shares = [order.share(rank, workers) for rank in range(workers)]
        assert {len(share) for share in shares} == {order.batch // workers}
        assert sorted(np.concatenate(shares)) == list(range(order.batch))
        for rank, share in enumerate(shares):
            assert set(share // order.each) == set(range(rank, order.streams, workers))
            assert np.array_equal(order.part(epoch, step, rank, workers), batch[share])


@settings(deadline=None, max_examples=40)
@given(orders(), st.integers(0, 3))
def test_displacement_is_bounded(order: Order, epoch: int) -> None:
    """Every stream holds the samples of its own contiguous part, each less than a window from its place."""
    streams = epoch_of(order, epoch).reshape(order.steps, order.streams, -1).swapaxes(0, 1)
    for before, after in zip(sequence_of(order, epoch), streams, strict=True):
        place = {sample: i for i, sample in enumerate(after.reshape(-1))}
        assert max(abs(place[sample] - i) for i, sample in enumerate(before)) < order.window


@pytest.mark.parametrize("sizes", [(24,), (0, 24, 0), (1,) * 24, (1, 22, 1), (23, 0, 0, 0, 0, 0, 0, 1)])
def test_fewer_shards_than_workers(sizes: tuple[int, ...]) -> None:
    """Streams are cut by samples, not by shards: all eight workers have work in every step."""
    order = Order(sizes, 8, 8, 0, 5)
    seen = [order.part(0, step, rank, 8) for step in range(order.steps) for rank in range(8)]
    assert [len(part) for part in seen] == [1] * 24
    assert sorted(np.concatenate(seen)) == list(range(24))


def test_a_shard_without_samples_changes_only_the_sequence() -> None:
    order = Order((0, 7, 0, 0, 9, 0), 2, 4, 0, 3)
    for epoch in range(20):
        assert sorted(epoch_of(order, epoch).reshape(-1)) == list(range(16))
    with pytest.raises(UserError, match="only 0 samples; give more images or fewer data"):
        Order((0, 0), 2, 4, 0, 3)


def test_epochs_seeds_and_remainders_differ() -> None:
    order = Order((30, 30, 30, 9), 4, 16, 0, 10)
    tables = [epoch_of(order, epoch) for epoch in range(30)]
    assert len({table.tobytes() for table in tables}) == 30
    left_out = [frozenset(range(99)) - set(table.reshape(-1).tolist()) for table in tables]
    assert all(len(left) == 3 for left in left_out)
    assert len(set(left_out)) > 20
    assert not np.array_equal(tables[0], epoch_of(Order((30, 30, 30, 9), 4, 16, 1, 10), 0))


def test_remainders_meet_all_samples_alike() -> None:
    """Over many epochs no sample is left out often: 7 of 39 each time, 500 times, 90 on average."""
    order = Order((10, 1, 28), 4, 16, 5, 8)
    times = np.zeros(39, dtype=np.int64)
    for epoch in range(500):
        times[epoch_of(order, epoch)] += 1
    left_out = 500 - times
    assert left_out.sum() == 500 * 7
    assert 45 < left_out.min() <= left_out.max() < 135  # five standard deviations


def test_what_is_handed_out_can_be_changed() -> None:
    order = Order((40,), 1, 4, 0, 10)
    first = order.batch_indices(0, 0)
    again = first.copy()
    first[:] = -1
    assert np.array_equal(order.batch_indices(0, 0), again)
    with pytest.raises(AssertionError, match="step 10 of 10"):
        order.batch_indices(0, 10)


# ---------------------------------------------------------------- mixing, reading and cost


class Mixed(NamedTuple):
    """What batches of 256 show, for data that lies on disk class after class, in shards of 1000."""

    classes: float  # different ones in a batch
    successive: float  # how often the next sample of a stream has the same class
    together: float  # how often neighbours on disk meet in a batch
    apart: float  # steps between neighbours on disk, as a fraction of the epoch
    shards: float  # different ones in a batch


def mixing(shards: int, classes: int, streams: int, window: int) -> Mixed:
    order = Order((1000,) * shards, streams, 256, 0, window)
    table = epoch_of(order, 0)
    by_stream = table.reshape(order.steps, streams, -1).swapaxes(0, 1).reshape(streams, -1)
    labels = by_stream * classes // order.count
    step_of = np.full(order.count, -1)
    step_of[table] = np.arange(order.steps)[:, None]
    both = (step_of[1:] >= 0) & (step_of[:-1] >= 0)
    distance = np.abs(np.diff(step_of))[both]
    looked_at = table[:: max(1, order.steps // 200)]
    return Mixed(
        float(np.mean([len(np.unique(row * classes // order.count)) for row in looked_at])),
        float((labels[:, 1:] == labels[:, :-1]).mean()),
        float((distance == 0).mean()),
        float(distance.mean()) / order.steps,
        float(np.mean([len(np.unique(row // 1000)) for row in looked_at])),
    )


@pytest.mark.parametrize(
    ("shards", "classes", "streams", "window", "classes_seen", "successive", "met", "apart"),
    [
        # a true shuffle of 100 classes: 92.4 of them in a batch, 0.010 successive, 0.0026, 0.333
        (100, 100, 8, 1000, (14, 17), 0.72, 0.034, 0.02),
        (100, 100, 8, 10_000, (58, 66), 0.18, 0.0062, 0.19),
        (100, 100, 64, 1000, (86, 95), 0.78, 0.0057, 0.16),
        # of 1000 classes: 225.9, 0.001, 0.0002, 0.333
        (1281, 1000, 8, 1000, (19, 23), 0.58, 0.032, 0.002),
        (1281, 1000, 64, 1000, (114, 124), 0.58, 0.0034, 0.015),
    ],
)
def test_mixing_of_sorted_data(
    shards: int,
    classes: int,
    streams: int,
    window: int,
    classes_seen: tuple[int, int],
    successive: float,
    met: float,
    apart: float,
) -> None:
    """A batch meets as many shards as the streams have open, so of sorted data as many classes, no more."""
    found = mixing(shards, classes, streams, window)
    assert classes_seen[0] < found.classes < classes_seen[1]
    assert found.successive < successive
    assert found.together < met
    assert found.apart > apart
    assert found.shards <= streams * (window / 1000 + 2)


def test_data_that_is_written_mixed_is_read_mixed() -> None:
    """As `vitlab shards` writes it: a shard has all classes, and a batch what a true shuffle would give."""
    order = Order((1000,) * 100, 8, 256, 0, 1000)
    labels = np.random.default_rng(5).permutation(order.count) % 100
    found = np.mean([len(np.unique(labels[row])) for row in epoch_of(order, 0)])
    assert abs(found - 100 * (1 - 0.99**256)) < 0.4  # 92.4


@pytest.mark.parametrize("workers", [1, 8])
def test_few_shards_are_read_at_a_time(workers: int) -> None:
    """With room for streams/workers · (window/size + 2) open tars none is opened much more than once."""
    order = Order((1000,) * 1281, 64, 1024, 0, 1000)
    room = 64 // workers * 3
    held: OrderedDict[int, None] = OrderedDict()
    opened, seen = 0, set()
    for step in range(300, 400):
        for shard in (order.part(0, step, 0, workers) // 1000).tolist():
            opened += shard not in held
            held[shard] = None
            held.move_to_end(shard)
            seen.add(shard)
            if len(held) > room:
                held.popitem(last=False)
    assert opened <= 1.05 * len(seen)


def test_a_step_in_the_middle_costs_little() -> None:
    """ImageNet-21k, 64 streams, one worker: nothing is made for a whole epoch of 14 million samples."""
    order = Order((1000,) * 14_197, 64, 1024, 0, 1000)
    tracemalloc.start()
    try:
        order.batch_indices(3, order.steps // 2)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8e6, "bytes; a table of the epoch has 114 million"
    begin = time.process_time()
    order.batch_indices(4, order.steps // 2)
    assert time.process_time() - begin < 1.0, "seconds; 0.06 where nothing else runs"


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

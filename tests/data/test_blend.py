"""Sets come in by weight, evenly in every batch; each set's samples by turns; all of it from integers."""

from __future__ import annotations

import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import one_line

from vitlab.batch import Bad
from vitlab.config import UserError, build, deciding
from vitlab.data.reading import order as order_module
from vitlab.data.reading.blend import Blend, BlendOrder, blend, order_for, sets_of, training_order
from vitlab.data.reading.order import Order, Streams, divisors
from vitlab.data.settings import ShardsConfig
from vitlab.data.shards.index import ShardInfo, Shards

SIZES = ((40,) * 60, (37, 0, 1, 90), (16,))  # 2400, 128 and 16 samples


@st.composite
def blends(draw: st.DrawFn) -> BlendOrder:
    """A first set of some size, others that may be as small as they can be."""
    streams = draw(st.sampled_from([1, 2, 3, 4, 8]))
    shards = st.lists(st.integers(0, 40), min_size=1, max_size=5)
    others = draw(st.lists(shards, min_size=1, max_size=4))
    sizes = ((*draw(shards), 30 * streams), *((*some, streams) for some in others))
    weights = tuple(draw(st.floats(0.5, 2)) for _ in sizes)
    batch = streams * draw(st.integers(1, 4))
    return BlendOrder(sizes, weights, streams, batch, draw(st.integers(0, 2**40)), draw(st.integers(1, 50)))


def epoch_of(order: Streams, epoch: int) -> np.ndarray:
    return np.stack([order.batch_indices(epoch, step) for step in range(order.steps)])


def sets_in(order: BlendOrder, table: np.ndarray) -> np.ndarray:
    return np.searchsorted(np.cumsum([sum(sizes) for sizes in order.sizes]), table, side="right")


def seen(order: BlendOrder, epochs: int) -> list[np.ndarray]:
    """Of each set, how often each of its samples came."""
    times = np.zeros(order.count, dtype=np.int64)
    for epoch in range(epochs):
        np.add.at(times, epoch_of(order, epoch).reshape(-1), 1)
    return np.split(times, np.cumsum([sum(sizes) for sizes in order.sizes])[:-1])


# ---------------------------------------------------------------- weights


@settings(deadline=None, max_examples=50)
@given(blends(), st.integers(0, 4))
def test_every_stream_gives_a_set_the_same_number_of_places(order: BlendOrder, epoch: int) -> None:
    table = epoch_of(order, epoch)
    assert table.shape == (order.count // order.batch, order.batch)
    streams = sets_in(order, table).reshape(order.steps, order.streams, -1).swapaxes(0, 1)
    places = order.steps * order.each
    for stream in streams.reshape(order.streams, -1):
        assert np.bincount(stream, minlength=len(order.sizes)).tolist() == list(order.quotas)
    wanted = [Fraction(w) / sum(map(Fraction, order.weights)) * places for w in order.weights]
    assert sum(order.quotas) == places
    assert all(abs(quota - w) < 1 for quota, w in zip(order.quotas, wanted, strict=True))


@settings(deadline=None, max_examples=50)
@given(blends(), st.integers(0, 4))
def test_weights_are_met_in_every_batch(order: BlendOrder, epoch: int) -> None:
    """Within three samples, whatever the number of sets; any stretch of a stream as well."""
    found = sets_in(order, epoch_of(order, epoch))
    places = order.steps * order.each
    for k, quota in enumerate(order.quotas):
        assert np.abs((found == k).sum(1) - order.batch * quota / places).max() < 3
        ours = (found == k).reshape(order.steps, order.streams, -1).swapaxes(0, 1)
        so_far = np.cumsum(ours.reshape(order.streams, -1), axis=1)
        even = np.arange(1, places + 1) * quota / places
        assert np.abs(so_far - even).max() < 3


@pytest.mark.parametrize("streams", [8, 64])
def test_measured_on_sets_of_very_unequal_sizes(streams: int) -> None:
    """1.28 million, 50 thousand and 300 samples at 0.7, 0.2 and 0.1: of 256, 179.2, 51.2 and 25.6."""
    sizes = ((1000,) * 1281, (1000,) * 50, (300,))
    order = BlendOrder(sizes, (0.7, 0.2, 0.1), streams, 256, 3, 1000)
    found = sets_in(order, np.stack([order.batch_indices(1, step) for step in range(2050, 2250)]))
    counts = np.stack([(found == k).sum(1) for k in range(3)])
    assert counts.min(1).tolist() in ([179, 50, 25], [179, 51, 25])
    assert counts.max(1).tolist() == [180, 52, 26]
    assert np.allclose(counts.mean(1), [179.2, 51.2, 25.6], atol=0.05)


@pytest.mark.parametrize("sets", [2, 3, 5, 12])
def test_many_sets_are_as_even_as_few(sets: int) -> None:
    rng = np.random.default_rng(sets)
    for _ in range(20):
        weights = rng.dirichlet(np.full(sets, rng.choice([1, 2, 50]))) + 0.01
        order = BlendOrder(((400,),) * sets, tuple(weights.tolist()), 8, 16, 0, 20)
        found = sets_in(order, epoch_of(order, 0))
        worst = [
            np.abs((found == k).sum(1) - 16 * quota / order.steps / order.each).max()
            for k, quota in enumerate(order.quotas)
        ]
        assert max(worst) < (1 if sets == 2 else 2 if sets == 3 else 2.5)


# ---------------------------------------------------------------- samples


def test_a_set_goes_on_where_it_stopped() -> None:
    """All sizes are whole for the streams: after any epoch every sample came equally often or once more."""
    order = BlendOrder(SIZES, (0.5, 0.3, 0.2), 8, 16, 3, 20)
    assert order.count == 2544
    for epochs in (1, 2, 3, 7):
        for times, sizes, quota in zip(seen(order, epochs), SIZES, order.quotas, strict=True):
            often = Fraction(epochs * quota * 8, sum(sizes))
            assert set(times) <= {int(often), int(often) + 1}
            assert times.sum() == epochs * quota * 8
    assert order.quotas == (159, 95, 64)


@settings(deadline=None, max_examples=30)
@given(blends(), st.integers(1, 4))
def test_samples_come_by_turns(order: BlendOrder, epochs: int) -> None:
    """But for the remainders, each smaller than the number of streams, that its own epochs leave out."""
    for times, own, quota in zip(seen(order, epochs), order.orders, order.quotas, strict=True):
        rounds, more = divmod(epochs * quota, own.steps)
        assert times.max() <= rounds + bool(more)
        left_out = (own.count % order.streams) * rounds
        assert np.maximum(rounds - times, 0).sum() <= left_out


def test_a_large_set_is_seen_whole_over_several_epochs() -> None:
    order = BlendOrder(SIZES, (1, 1, 1), 8, 16, 3, 20)
    large = [int((times > 0).sum()) for epochs in (1, 2, 3) for times in seen(order, epochs)[:1]]
    assert large == [848, 1696, 2400]


# ---------------------------------------------------------------- the contract of an order


@settings(deadline=None, max_examples=40)
@given(blends(), st.integers(0, 3), st.integers(1, 40), st.data())
def test_pure_and_the_same_for_any_workers(
    order: BlendOrder, epoch: int, held: int, data: st.DataObject
) -> None:
    """A late step of a fresh object, steps in any order, and the parts of any number of workers."""
    whole = epoch_of(order, epoch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order_module, "HELD", held)
        used = BlendOrder(order.sizes, order.weights, order.streams, order.batch, order.seed, order.window)
        for step in data.draw(st.lists(st.sampled_from(range(order.steps)), max_size=12)):
            assert np.array_equal(used.batch_indices(epoch, step), whole[step])
    assert order == used
    for workers in divisors(order.streams):
        fresh = BlendOrder(order.sizes, order.weights, order.streams, order.batch, order.seed, order.window)
        step = order.steps - 1
        for rank in range(workers):
            part = fresh.part(epoch, step, rank, workers)
            assert np.array_equal(part, whole[step][fresh.share(rank, workers)])


def test_epochs_and_seeds_differ() -> None:
    orders = [BlendOrder(SIZES, (1, 1, 1), 4, 8, seed, 20) for seed in (0, 1)]
    tables = [epoch_of(order, epoch).tobytes() for order in orders for epoch in range(5)]
    assert len(set(tables)) == 10
    first, second = BlendOrder(((64,), (64,)), (1, 1), 4, 8, 0, 20).orders
    assert not np.array_equal(epoch_of(first, 0), epoch_of(second, 0)), "sets of one shape are mixed alike"


def test_the_blend_is_for_ever() -> None:
    order = BlendOrder(((5, 3), (4,)), (1, 3), 2, 4, 7, 3)
    assert epoch_of(order, 0).tolist() == [[8, 5, 1, 10], [9, 11, 11, 0], [4, 8, 9, 10]]
    assert order.batch_indices(1000, 2).tolist() == [2, 11, 9, 6]


def test_a_step_in_the_middle_costs_little() -> None:
    order = BlendOrder(((1000,) * 14_197, (1000,) * 1281), (1, 1), 64, 1024, 0, 1000)
    begin = time.process_time()
    order.batch_indices(5, order.steps // 2)
    assert time.process_time() - begin < 2, "seconds; 0.2 where nothing else runs"


def test_sets_without_weights_are_one() -> None:
    """A plain order over all shards: every sample at most once an epoch."""
    order = order_for(SIZES, [None] * 3, 8, 16, 3, 20)
    assert order == Order(tuple(size for sizes in SIZES for size in sizes), 8, 16, 3, 20)
    assert len(np.unique(epoch_of(order, 0))) == 2544
    assert order_for(SIZES[:1], [2.0], 8, 16, 3, 20) == Order(SIZES[0], 8, 16, 3, 20)
    assert isinstance(order_for(SIZES, [1, 1, 2], 8, 16, 3, 20), BlendOrder)


@pytest.mark.parametrize(
    ("sizes", "weights", "batch", "text"),
    [
        (((90,), (7,)), [1, 1], 16, r"data.sets\[1\]: has 7 samples to train on, .* 8 streams; give it 8 or"),
        (((90,), ()), [1, 1], 16, r"data.sets\[1\]: has 0 samples to train on"),
        (((90,), (70,)), [1, 1e-6], 16, r"data.sets\[1\].weight: given 1e-06 of 1, less than one of the 20"),
        (((90,), (70,)), [1, None], 16, "data.sets: 1 of 2 sets have a weight; give it to all"),
        (((90,), (70,)), [1, 0.0], 16, "weight: given 0; allowed: numbers above 0"),
        (((90,), (70,)), [1, 1], 12, "batch size: given 12, but the samples come in 8 streams"),
        (((90,), (70,)), [1, 1], 168, "only 160 samples; give 160 or less"),
    ],
)
def test_orders_refused(
    sizes: list[tuple[int, ...]], weights: list[float | None], batch: int, text: str
) -> None:
    with pytest.raises(UserError, match=text) as caught:
        order_for(sizes, weights, 8, batch, 0, 10)
    one_line(caught.value)


# ---------------------------------------------------------------- shards


def made(name: str, classes: list[str], **splits: list[int]) -> Shards:
    """Shards that lie nowhere."""
    infos = {
        split: [ShardInfo(f"{split}-{i}.tar", n, 512, f"{name}{split}{i}") for i, n in enumerate(counts)]
        for split, counts in splits.items()
    }
    return Shards(Path(name), classes, infos, {"source": name}, [Bad("cut_tar", f"{name}.tar", "", "cut")])


CATS = made("cats", ["cat", "lynx"], train=[20, 30], val=[4], held_out=[])
DOGS = made("dogs", ["dog", "cat", "fox"], train=[40], held_out=[5])
MORE = made("more", ["cat", "lynx"], train=[8])


def test_classes_are_united_by_name() -> None:
    both = blend([CATS, DOGS, MORE], [None, None, None])
    assert both.classes == ["cat", "lynx", "dog", "fox"]
    assert [tar.labels for tar in both.tars("train")] == [None, None, (2, 0, 3), None]
    assert [tar.shards for tar in both.tars("train")] == [CATS, CATS, DOGS, MORE]
    assert [tar.info.count for tar in both.tars("train")] == [20, 30, 40, 8]
    assert {split: both.count(split) for split in both.splits} == {"train": 98, "val": 4, "held_out": 5}
    assert [tar.shards for tar in both.tars("held_out")] == [DOGS]
    named = ((part, one) for part in (CATS, DOGS, MORE) for one in part.bad)
    assert both.bad == [one._replace(shard=f"{part.where}/{one.shard}") for part, one in named]
    assert both.made == {"sets": [CATS.made, DOGS.made, MORE.made]}
    assert both.where == "cats + dogs + more"
    assert sets_of(both) == (CATS, DOGS, MORE)
    assert sets_of(CATS) == (CATS,)


def test_sets_that_share_no_class_are_told() -> None:
    birds, bare = made("birds", ["wren"], train=[7]), made("bare", [], train=[9])
    assert (
        blend([CATS, DOGS], [1, 1]).described
        == "90 train, 4 val, 5 held_out images of 4 classes in cats + dogs"
    )
    assert blend([CATS, bare], [1, 1]).described.endswith("images of 2 classes in cats + bare")
    told = "images of 3 classes in cats + birds; no two of the sets share a class"
    assert blend([CATS, birds], [1, 1]).described.endswith(told)


def test_samples_are_numbered_as_tars_are() -> None:
    """The order's numbers run through `tars`, set after set."""
    both = blend([CATS, DOGS], [1, 3])
    order = training_order(both, 2, 8, 0, 5)
    assert isinstance(order, BlendOrder)
    assert order.sizes == ((20, 30), (40,))
    assert [n for sizes in order.sizes for n in sizes] == [tar.info.count for tar in both.tars("train")]
    assert training_order(CATS, 2, 8, 0, 5) == Order((20, 30), 2, 8, 0, 5)
    assert training_order(blend([CATS, DOGS], [None, None]), 2, 8, 0, 5) == Order((20, 30, 40), 2, 8, 0, 5)


def test_the_digest_is_that_of_parts_and_weights() -> None:
    again = Shards(Path("elsewhere"), CATS.classes, CATS.splits)
    same = [blend([CATS, DOGS], [1.0, 2.0]), blend([again, DOGS], [1.0, 2.0])]
    others = [blend([CATS, DOGS], w) for w in ([None, None], [2.0, 1.0])] + [blend([DOGS, CATS], [1.0, 2.0])]
    assert same[0].digest == same[1].digest
    assert len({one.digest for one in [same[0], *others, CATS, DOGS]}) == 6
    assert blend([CATS], [2.0]) is CATS


def test_what_a_blend_cannot_tell() -> None:
    both = blend([CATS, DOGS], [None, None])
    assert isinstance(both, Blend)
    with pytest.raises(UserError, match=r"cats \+ dogs: no split 'test'; there are: train, val, held_out"):
        both.tars("test")
    with pytest.raises(UserError, match="no split 'train'"):
        training_order(blend([made("a", []), made("b", [])], [None, None]), 2, 8, 0, 5)
    with pytest.raises(AssertionError, match="several places"):
        _ = both.address
    for ask in (both.file, both.open, both.columns):
        with pytest.raises(AssertionError, match=r"train-0\.tar: several sets may have a file of this name"):
            ask(both.splits["train"][0])


# ---------------------------------------------------------------- settings


def section(**more: object) -> ShardsConfig:
    return build(ShardsConfig, {"image_size": 8} | more)


def test_each_set_is_an_ordinary_section() -> None:
    sets = [{"path": "/a", "weight": 2}, {"source": "hf:b", "limit": 9, "image_column": "x", "weight": 0.5}]
    config = section(sets=sets, val=0.3, channels=1, num_classes=7, mean=[0.1])
    assert config.parts() == [
        section(path="/a", val=0.3, channels=1, mean=[0.1]),
        section(source="hf:b", limit=9, image_column="x", val=0.3, channels=1, mean=[0.1]),
    ]
    assert config.weights == [2.0, 0.5]
    assert section(sets=[{"path": "/a"}, {"path": "/b"}]).weights == [None, None]
    plain = section(source="digits", num_classes=10)
    assert plain.parts() == [plain]
    assert plain.weights == [None]


def test_where_sets_lie_decides_nothing_but_their_weights_do() -> None:
    keys = [
        deciding(section(sets=[{"path": path, "weight": weight}, {"path": "/c", "weight": 1}]))
        for path, weight in (("/a", 1), ("/b", 1), ("/a", 2))
    ]
    assert keys[0] == keys[1] != keys[2]


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({}, r"give exactly one of source \(to write shards\) and path \(existing ones\); given neither"),
        ({"sets": []}, r"give exactly one of source \(to write shards\)"),
        ({"path": "/a", "sets": [{"path": "/b"}]}, "path: given beside sets; write it into one of the sets"),
        ({"limit": 3, "sets": [{"path": "/b"}]}, "limit: given beside sets"),
        ({"sets": [{"weight": 1}]}, r"sets\[0\]: give exactly one of source .* given neither"),
        ({"sets": [{"path": "/b", "source": "digits"}]}, r"sets\[0\]: give exactly .* given both"),
        ({"sets": [{"path": "/b", "limit": 2}]}, r"sets\[0\]: limit: given 2; it is for a source"),
        ({"sets": [{"path": "/b", "weight": 0}]}, r"sets\[0\].weight: given 0; must be greater than 0"),
        ({"sets": [{"path": "/b", "wieght": 1}]}, r"sets\[0\].wieght: unknown key .* did you mean 'weight'"),
        (
            {"sets": [{"path": "/b", "weight": 1}, {"path": "/c"}]},
            "sets: 1 of 2 have a weight; give it to all",
        ),
        ({"sets": {"path": "/b"}}, "sets: given .*; must be a list"),
    ],
)
def test_sections_refused(more: dict[str, object], text: str) -> None:
    with pytest.raises(UserError, match=text) as caught:
        section(**more)
    one_line(caught.value)

"""What a worker holds: the ledger counts what can be counted by hand, and shards are as small as promised."""

from __future__ import annotations

import weakref

import pytest
import torch

from vitlab.bench import MemoryOptions, bench_memory
from vitlab.bench.memory import Ledger, dino, measure, measured
from vitlab.config import UserError
from vitlab.dist import World
from vitlab.engine.loop import LoopConfig, make_strategy
from vitlab.engine.zero import Zero, _unpack

SMALL = MemoryOptions(workers=(2,), persist=(0,), batch=2, image_size=32, embed_dim=96, depth=2, rounds=1)


def test_plain_is_twenty_bytes_a_parameter() -> None:
    """Student 4, its gradient 4, AdamW's moments 8, teacher 4; and the lengths of the last layer's rows."""
    found = measure(None, None, SMALL, World())
    expected = {"weights": 4, "frozen": 4, "gradients": 4, "moments": 8, "state": 20}
    for kind, size in expected.items():
        assert found[kind] == pytest.approx(size * found["parameters"], rel=5e-3)
    assert found["peak"] > found["state"]


def test_the_ledger_follows_a_storage_to_its_end() -> None:
    strategy = make_strategy(dino(SMALL), LoopConfig(epochs=1, batch_size=2), None, World())
    with Ledger(strategy) as ledger:
        before = sum(size for size, _ in ledger.live.values())
        kept = torch.ones(1000)
        torch.ones(5000).sum()  # lives for a moment
        now = sum(size for size, _ in ledger.live.values())
        assert now - before >= kept.nbytes
        assert now - before < 20_000
        assert ledger.most["peak"] >= before + 20_000


def test_what_a_graph_keeps_goes_with_it() -> None:
    """A figure that no gradient is taken of: a softmax keeps its output, which must not keep itself."""
    strategy = object.__new__(Zero)
    strategy.running = [torch.nn.Identity()]
    x = torch.randn(3, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(strategy._pack, _unpack):
        found = (2 * x).softmax(0)
    (gradient,) = torch.autograd.grad(found[0], x, retain_graph=True)
    assert torch.equal(gradient, torch.autograd.grad((2 * x).softmax(0)[0], x)[0])
    gone = weakref.ref(found)
    del found
    assert gone() is None


def test_two_workers_hold_half_of_all_state() -> None:
    """Of 20 bytes a parameter, and a share of a step group's gradient; nothing is whole beside its shard."""
    plain, sharded = measure(None, None, SMALL, World()), measured(2, 0, SMALL)
    assert "copies" not in sharded  # only what was once above zero is there
    assert sharded["state"] / plain["state"] <= 0.64
    for kind in ("weights", "frozen", "moments"):
        assert sharded[kind] == pytest.approx(plain[kind] / 2, rel=0.02)


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(UserError, match=r"bench memory: workers: given \(0,\); allowed: 1 or more"):
        bench_memory(MemoryOptions(workers=(0,)))

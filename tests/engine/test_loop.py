"""The loop in this process: what a step without weight, a loss that is no number, and a window do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from world import Notes, Toy, batches

from vitlab.dist import World
from vitlab.engine.loop import LoopConfig, Plan, make_strategy, train
from vitlab.engine.optim import OptimConfig, lr_at

CONFIG: dict[str, Any] = {"epochs": 1, "batch_size": 20, "log_every": 1, "optim": {"lr": 1e-2}}


def trained(weights: dict[int, float], **changes: Any) -> tuple[Toy, Notes]:
    """Six steps; `weights` multiplies the weight of every sample of a step."""
    torch.manual_seed(0)
    method, notes, world = Toy(), Notes(), World()
    config = LoopConfig.model_validate(CONFIG | changes)
    strategy = make_strategy(method, config, None, world)

    def weighed(start: int) -> Any:
        for step, micro in enumerate(batches(config, world, start, None), start):
            yield [replace(batch, weight=batch.weight * weights.get(step, 1.0)) for batch in micro]

    train(method, strategy, Plan(config, 6, weighed, notes), world)
    return method, notes


def test_a_global_batch_without_weight_teaches_nothing() -> None:
    method, notes = trained({2: 0.0})
    assert all(torch.isfinite(p).all() for p in method.parameters())
    points = dict(notes.points)
    assert "train/loss" not in points[3]  # there is no mean over nothing
    assert points[4]["train/loss"] > 0


def test_the_weight_of_samples_is_relative() -> None:
    (a, _), (b, _) = trained({}), trained(dict.fromkeys(range(6), 2.0))
    assert all(torch.allclose(x, y, atol=1e-6) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_trouble_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step without weight has no figures to tell it by."""
    monkeypatch.setattr(Toy, "diagnose", lambda _, values: "far" if values["train/far"] > 0 else None)
    _, notes = trained({0: 0.0, 1: 0.0})
    assert notes.notes == ["step 3: far"]


def test_a_loss_that_is_no_number_ends_it() -> None:
    with pytest.raises(ValueError, match=r"optim.lr: the loss is nan at step 3"):
        trained({2: float("nan")})


def test_points_are_means_over_their_steps() -> None:
    (_, each), (_, three) = trained({}), trained({}, log_every=3)
    single = dict(each.points)
    for step, values in three.points:
        mean = sum(single[s]["train/loss"] for s in range(step - 2, step + 1)) / 3
        assert values["train/loss"] == pytest.approx(mean, rel=1e-6)


def test_the_rate_is_that_of_the_mae_code() -> None:
    config = OptimConfig(lr=1.0, min_lr=0.1, warmup_epochs=2)
    assert [lr_at(config, e, 10) for e in (0, 1, 2)] == [0.0, 0.5, 1.0]
    assert lr_at(config, 6, 10) == pytest.approx(0.55)
    assert lr_at(config, 10, 10) == pytest.approx(0.1)

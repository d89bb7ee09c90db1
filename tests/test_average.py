"""`finetune.ema` through a whole stage: published and validated is the average, not what was trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import vitlab
from vitlab.cache import Artifact
from vitlab.engine.strategy import Plain
from vitlab.methods.base import Average
from vitlab.tracking import Store

Finetuned = Callable[..., tuple[Artifact, Store]]


def trained(finetuned: Finetuned, ema: float) -> tuple[dict[str, list[float]], Any]:
    """The curves and the model of a fine-tuning."""
    few = ("finetune.epochs=2", "finetune.checkpoint_every=0")
    found, store = finetuned(*few, f"finetune.ema={ema}")
    names = ("train/loss", "val/loss")
    curves = {name: [p.value for p in store.client.get_metric_history(found.run_id, name)] for name in names}
    return curves, vitlab.load(found.uri).model


@pytest.mark.usefixtures("home")
def test_the_average_is_published_and_validated(
    finetuned: Finetuned, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Average] = []
    plain = Plain.average

    def spied(self: Plain, average: Average) -> None:
        plain(self, average)
        seen.append(average)

    monkeypatch.setattr(Plain, "average", spied)
    without, _ = trained(finetuned, 0.0)
    assert not seen
    with_it, model = trained(finetuned, 0.99)
    average, weights = seen[-1].target.state_dict(), seen[-1].source.state_dict()
    assert seen[-1].momentum == 0.99
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, average[name])
    assert not all(torch.equal(average[name], weights[name]) for name in average)
    assert {name: len(points) for name, points in without.items()} == {"train/loss": 13, "val/loss": 2}
    assert with_it["train/loss"] == without["train/loss"]  # the training does not know of it
    assert all(a != b for a, b in zip(with_it["val/loss"], without["val/loss"], strict=True))

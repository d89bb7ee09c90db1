"""`finetune.ema` through a whole stage: published and validated is the average, not what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import vitlab
from vitlab.engine.strategy import Plain
from vitlab.face import Face
from vitlab.methods.base import Average
from vitlab.tracking import Store, TrackingConfig

TINY = Path(__file__).parent / "integration" / "tiny.yaml"
FEW = ["cluster.workers=0", "cluster.zero=null", "finetune.epochs=2", "finetune.checkpoint_every=0"]


def finetuned(home: Path, ema: float) -> tuple[dict[str, list[float]], Any]:
    """The curves and the model of a fine-tuning in this process."""
    threads = torch.get_num_threads()
    exp = vitlab.read(TINY, [*FEW, f"finetune.ema={ema}"])
    with vitlab.Run(exp, "notebook", face=Face(quiet=True)) as run:
        run.finetune(exp.need("finetune"), data=run.shards(exp.data))
    torch.set_num_threads(threads)
    store = Store(TrackingConfig(), home)
    (found,) = store.find({"vitlab.stage": "finetune"})
    names = ("train/loss", "val/loss")
    curves = {name: [p.value for p in store.client.get_metric_history(found.run_id, name)] for name in names}
    return curves, vitlab.load(f"runs:/{found.run_id}/model").model


def test_the_average_is_published_and_validated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Average] = []
    plain = Plain.average

    def spied(self: Plain, average: Average) -> None:
        plain(self, average)
        seen.append(average)

    monkeypatch.setattr(Plain, "average", spied)
    monkeypatch.setenv("VITLAB_HOME", str(tmp_path / "without"))
    without, _ = finetuned(tmp_path / "without", 0.0)
    assert not seen
    monkeypatch.setenv("VITLAB_HOME", str(tmp_path / "with"))
    with_it, model = finetuned(tmp_path / "with", 0.99)
    average, trained = seen[-1].target.state_dict(), seen[-1].source.state_dict()
    assert seen[-1].momentum == 0.99
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, average[name])
    assert not all(torch.equal(average[name], trained[name]) for name in average)
    assert with_it["train/loss"] == without["train/loss"]  # the training does not know of it
    assert all(a != b for a, b in zip(with_it["val/loss"], without["val/loss"], strict=True))

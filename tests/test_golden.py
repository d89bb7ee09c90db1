"""A chain as in a notebook, and the golden curve of every stage.

A change that moves a curve changes what a content key stands for: raise the stage's REVISION in
vitlab/stages.py, then write the new curves with `python tests/test_golden.py`.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

import vitlab
from vitlab.face import Face
from vitlab.stages import REVISION
from vitlab.tracking import Store, TrackingConfig

GOLDEN = Path(__file__).parent / "golden" / "curves.json"
TINY = Path(__file__).parent / "integration" / "tiny.yaml"
STAGES = ("pretrain", "finetune", "distill")


def chain() -> dict[str, Any]:
    """The tiny chain in this process; the curves that it leaves in the store."""
    threads = torch.get_num_threads()
    exp = vitlab.read(TINY, ["cluster.workers=0", "cluster.zero=null"])
    with vitlab.Run(exp, "notebook", face=Face(quiet=True)) as run:
        shards = run.shards(exp.data)
        encoder = run.pretrain(exp.need("pretrain"), data=shards)
        model = run.finetune(exp.need("finetune"), data=shards, init=encoder)
        run.distill(exp.need("distill"), data=shards, teacher=model)
    torch.set_num_threads(threads)
    curves: dict[str, Any] = {}
    for stage in STAGES:
        (found,) = run.store.find({"vitlab.stage": stage})
        history = run.store.client.get_metric_history(found.run_id, "train/loss")
        curves[stage] = {"revision": REVISION[stage], "loss": [[p.step, p.value] for p in history]}
    return curves


@pytest.fixture(scope="module")
def ran(shared_home: Path) -> dict[str, Any]:
    return chain()


@pytest.mark.parametrize("stage", STAGES)
def test_the_curve_is_the_golden_one(ran: dict[str, Any], stage: str) -> None:
    ours, golden = ran[stage], json.loads(GOLDEN.read_text())[stage]
    assert ours["revision"] == golden["revision"], "REVISION was raised: write the new curves, see above"
    assert [step for step, _ in ours["loss"]] == [step for step, _ in golden["loss"]]
    # Another kind of processor rounds otherwise; a change of the mathematics moves a curve far more.
    apart = max(abs(a - b) for (_, a), (_, b) in zip(ours["loss"], golden["loss"], strict=True))
    assert apart < 2e-4, f"the curve of {stage} moved by {apart}: raise its REVISION if that is meant"


@pytest.mark.usefixtures("ran")
def test_a_model_is_loaded_by_its_address(shared_home: Path) -> None:
    (found,) = Store(TrackingConfig(), shared_home).find({"vitlab.stage": "distill"})
    loaded = vitlab.load(f"runs:/{found.run_id}/model")
    assert not loaded.model.training
    assert loaded.labels == [str(n) for n in range(10)]
    assert loaded.model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    with pytest.raises(ValueError, match="no such artifact"):
        vitlab.load(f"runs:/{found.run_id}/nothing")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        GOLDEN.parent.mkdir(exist_ok=True)
        os.environ["VITLAB_HOME"] = scratch
        GOLDEN.write_text(json.dumps(chain()).replace("}, ", "},\n") + "\n")

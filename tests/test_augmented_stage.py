"""Augmentation in a whole stage: its curve does not depend on micro-batches, its views can be looked at."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vitlab
from vitlab.face import Face
from vitlab.tracking import Store, TrackingConfig

TINY = Path(__file__).parent / "integration" / "tiny.yaml"
MIXED = ["cluster.workers=0", "cluster.zero=null", "finetune.epochs=1", "finetune.log_every=1"]


def finetuned(home: Path, *overrides: str) -> tuple[list[float], dict[str, float], np.ndarray]:
    """The losses of its steps, its last figures, and the picture of its views."""
    exp = vitlab.read(TINY, [*MIXED, *overrides])
    with vitlab.Run(exp, "notebook", face=Face(quiet=True)) as run:
        run.finetune(exp.need("finetune"), data=run.shards(exp.data))
    store = Store(TrackingConfig(), home)
    (found,) = store.find({"vitlab.stage": "finetune"})
    losses = [point.value for point in store.client.get_metric_history(found.run_id, "train/loss")]
    folder = store.download(found.run_id, "pictures")
    assert folder is not None
    with Image.open(folder / "augmentation.png") as image:
        return losses, store.client.get_run(found.run_id).data.metrics, np.asarray(image.convert("RGB"))


def test_mixing_does_not_see_micro_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    curves, pictures, validated = {}, {}, {}
    for name, more in (("mixed", []), ("cut", ["finetune.accumulate=2"]), ("plain", ["finetune.augment={}"])):
        monkeypatch.setenv("VITLAB_HOME", str(tmp_path / name))
        mixing = ["finetune.augment={name: deit, crop_scale: [0.8, 1.0], erase: 0.0}", *more]
        curves[name], figures, pictures[name] = finetuned(tmp_path / name, *mixing)
        validated[name] = figures["val/loss"]
    np.testing.assert_allclose(curves["cut"], curves["mixed"], rtol=0, atol=1e-5)
    assert validated["cut"] == pytest.approx(validated["mixed"], abs=1e-5)
    assert np.abs(np.subtract(curves["plain"], curves["mixed"])).max() > 0.01
    assert np.array_equal(pictures["cut"], pictures["mixed"])
    assert pictures["mixed"].shape == pictures["plain"].shape
    assert not np.array_equal(pictures["mixed"], pictures["plain"])

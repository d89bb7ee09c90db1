"""Augmentation in a whole stage: its curve does not depend on micro-batches, its views can be looked at."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitlab.cache import Artifact
from vitlab.tracking import Store

MIXED = ("finetune.epochs=1", "finetune.log_every=1")
DEIT = "finetune.augment={name: deit, crop_scale: [0.8, 1.0], erase: 0.0}"
Finetuned = Callable[..., tuple[Artifact, Store]]


def measured(finetuned: Finetuned, *overrides: str) -> tuple[list[float], dict[str, float], np.ndarray]:
    """The losses of its steps, its last figures, and the picture of its views."""
    found, store = finetuned(*MIXED, *overrides)
    losses = [point.value for point in store.client.get_metric_history(found.run_id, "train/loss")]
    folder = store.download(found.run_id, "pictures")
    assert folder is not None
    with Image.open(folder / "augmentation.png") as image:
        return losses, store.get(found.run_id).metrics, np.asarray(image.convert("RGB"))


def test_mixing_does_not_see_micro_batches(
    finetuned: Finetuned, home: Path, new_home: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    curves, pictures, validated = {}, {}, {}
    for name, more in (
        ("mixed", [DEIT]),
        ("plain", ["finetune.augment={}"]),
        ("cut", [DEIT, "finetune.accumulate=2"]),
    ):
        if name == "cut":  # decides no result, so at home it would be a hit
            monkeypatch.setenv("VITLAB_HOME", str(new_home()))
        curves[name], figures, pictures[name] = measured(finetuned, *more)
        validated[name] = figures["val/loss"]
    assert len(curves["mixed"]) == 19
    np.testing.assert_allclose(curves["cut"], curves["mixed"], rtol=0, atol=1e-5)
    assert validated["cut"] == pytest.approx(validated["mixed"], abs=1e-5)
    assert np.abs(np.subtract(curves["plain"], curves["mixed"])).max() > 0.01
    assert np.array_equal(pictures["cut"], pictures["mixed"])
    assert pictures["mixed"].shape == pictures["plain"].shape
    assert not np.array_equal(pictures["mixed"], pictures["plain"])

"""A `Run` in this process on images of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import vitlab
from vitlab.config import build
from vitlab.experiment import Experiment
from vitlab.face import Face

NAMES = ("colt's foot", "snow,drop (white)")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Bright images and dark ones, in folders with names that people really give."""
    numbers = np.random.default_rng(0)
    for label, name in enumerate(NAMES):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(48):
            pixels = numbers.integers(label * 128, label * 128 + 128, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path / "images"


def experiment(images: Path, **finetune: Any) -> Experiment:
    model = {"name": "vit_tiny", "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
    stage = {"model": model, "method": {"name": "supervised"}, "epochs": 12, "batch_size": 16}
    tree = {
        "name": "own images",
        "data": {"source": f"folder:{images}", "image_size": 8, "streams": 4, "shard_samples": 20},
        "cluster": {"workers": 0},
        "finetune": stage | {"optim": {"lr": 3e-3}} | finetune,
    }
    return build(Experiment, tree)


def test_any_class_name_from_folder_to_report(images: Path, home: Path) -> None:
    exp = experiment(images)
    with vitlab.Run(exp, face=Face(quiet=True)) as run:
        shards = run.shards(exp.data)
        model = run.finetune(exp.need("finetune"), data=shards)
        report = run.evaluate(exp.evaluate, data=shards, model=model, label="evaluate, once (more)")
        assert run.done["evaluate, once (more)"].metrics["eval/top1"] > 0.9
    assert all(name.split(",")[0] in (report.folder / "confusion.csv").read_text() for name in NAMES)
    assert vitlab.load(model.uri).labels == sorted(NAMES)


def test_a_stage_that_fails_leaves_the_next_alone(images: Path, home: Path) -> None:
    exp, wild = experiment(images), experiment(images, optim={"lr": 1e30})
    with vitlab.Run(exp, face=Face(quiet=True)) as run:
        shards = run.shards(exp.data)
        with pytest.raises(ValueError, match="the loss is"):
            run.finetune(wild.need("finetune"), data=shards)
        run.finetune(exp.need("finetune"), data=shards)
    statuses = [found.status for found in run.store.find({"vitlab.stage": "finetune"})]
    assert sorted(statuses) == ["FAILED", "FINISHED"]

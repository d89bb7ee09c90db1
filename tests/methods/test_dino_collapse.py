"""A teacher that says the same of everything: seen in the figures, told in a line, and only then."""

from __future__ import annotations

import math

import pytest
import torch
from steps import batch, one_step, strategy_of

from vitlab.config import build
from vitlab.methods import Moment, create_method
from vitlab.methods.dino import DINO, DINOConfig
from vitlab.models import create_model

STEPS, EPOCH = 50, 5
SMALL = {"patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2}
HEAD = {"out_dim": 40, "hidden_dim": 24, "bottleneck_dim": 12, "local_crops": 1, "freeze_last_layer": 0.0}


def trained(pool: str, **more: object) -> tuple[dict[str, float], list[str]]:
    """The figures of the last step, and what was said on the way."""
    torch.manual_seed(0)
    model = create_model("vit_tiny", num_classes=0, image_size=16, pool=pool, **SMALL)
    of = create_method(build(DINOConfig, {**HEAD, **more}), model)
    assert isinstance(of, DINO)
    plain, said, values = strategy_of(of, EPOCH), [], dict[str, float]()
    for step in range(STEPS):
        one = batch(of, 16, first=16 * (step % 4), like=0.9)
        means = one_step(of, plain, [one], Moment(step, STEPS, EPOCH), lr=3e-3).metrics
        values = {f"train/{name}": float(value) for name, value in means.items()}
        said.append(of.diagnose(values))
    return values, [line for line in said if line]


def test_a_healthy_training_is_left_alone() -> None:
    values, said = trained("mean", momentum=0.98)
    assert values["train/spread"] > 0.5
    assert not said


def test_without_centering_one_dimension_wins() -> None:
    values, said = trained("token", momentum=0.9, centering=False)
    assert values["train/spread"] < 1e-3
    assert values["train/teacher_entropy"] < 0.1
    assert said
    assert "the same of every image" in said[0]
    assert "give centering=true" in said[0]


def test_without_sharpening_all_dimensions_are_alike() -> None:
    values, said = trained("mean", momentum=0.9, teacher_temp=1.0)
    assert values["train/spread"] < 1e-3
    assert values["train/teacher_entropy"] == pytest.approx(math.log(40), abs=0.01)
    assert values["train/kl"] < 0.05
    assert said
    assert "evenly over its 40 dimensions; give a lower teacher_temp" in said[0]


def test_nothing_is_said_at_the_start() -> None:
    model = create_model("vit_tiny", num_classes=0, image_size=16, **SMALL)
    of = create_method(build(DINOConfig, HEAD), model)
    alike = {"train/spread": 0.0, "train/teacher_entropy": 3.0}
    of.before_step(Moment(19, 100, 10))
    assert of.diagnose(alike) is None
    of.before_step(Moment(20, 100, 10))
    assert of.diagnose(alike) is not None

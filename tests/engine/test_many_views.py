"""Objectives with many views, a momentum teacher and batch statistics, on two workers and after a cut.

What is compared is the whole state: student, teacher, centre, and all else that an objective keeps.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from world import TEACHING, apart, launch

CONFIG: dict[str, Any] = {
    "epochs": 4,
    "batch_size": 20,
    "log_every": 1,
    "optim": {"lr": 3e-3, "clip": 1.0, "warmup_epochs": 1.0, "weight_decay": 0.04, "weight_decay_end": 0.4},
}
STEPS, SAVED = 20, 15  # steps of a whole run, and those of its last checkpoint
STAGES = {"zero 1": (1, None), "zero 2": (2, None), "zero 3": (3, None), "zero 3, all sharded": (3, 0)}
ALL = "zero 3, all sharded"
# With BatchNorm in the head what stands right below it has no gradient but rounding, which AdamW makes steps
# of: those biases, and the means that follow them, go their own ways and change no output.
NORMED = "msn, normed"
SPEED = {"train/images_per_s"}
GENTLE = CONFIG["optim"] | {"lr": 1e-3, "eps": 1e-6}
ADRIFT = (".norm.bias", "head.fc1.bias", "head.fc2.bias", "head.bn1.running_mean", "head.bn2.running_mean")


def spec(method: str, zero: int | None, persist: int | None = None, **more: Any) -> dict[str, Any]:
    steps = STEPS // CONFIG["epochs"]
    config = CONFIG | {"optim": GENTLE} if method == NORMED else CONFIG
    return {"method": method, "config": config, "zero": zero, "persist": persist, "steps": steps, **more}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every run of every objective, in one launch of two workers: starting DeepSpeed takes seconds."""
    folder = tmp_path_factory.mktemp("views")
    two: dict[str, Any] = {}
    one: dict[str, Any] = {}
    for method in TEACHING:
        for name, stage in stages_of(method).items():
            two |= twice(folder, method, name, *stage)
        one |= twice(folder, method, "plain", None)
        one[f"{method}: on one worker"] = spec(method, None, checkpoints=str(folder / f"{method}: {ALL}"))
    return launch(2, two, folder) | launch(1, one, folder)


def stages_of(method: str) -> dict[str, tuple[int, int | None]]:
    return {ALL: STAGES[ALL]} if method == NORMED else STAGES


def twice(folder: Path, method: str, name: str, *stage: int | None) -> dict[str, Any]:
    """Whole, and the end of it once more from its last checkpoint."""
    once = spec(method, *stage, checkpoints=str(folder / f"{method}: {name}"))
    return {f"{method}: {name}": once, f"{method}: {name} resumed": once}


@pytest.fixture(params=TEACHING)
def runs(request: pytest.FixtureRequest, found: dict[str, Any]) -> dict[str, Any]:
    """The runs of one objective."""
    method = request.param
    own = {
        name.removeprefix(f"{method}: "): run for name, run in found.items() if name.startswith(f"{method}: ")
    }
    return own | {"method": method, "stages": list(stages_of(method))}


def near(runs: dict[str, Any], name: str) -> None:
    """A run is the plain one. MSN's own temperature makes its loss steep: it tells more of small steps."""
    plain, other, normed = runs["plain"], runs[name], runs["method"] == NORMED
    figures = {"train/loss", "train/mean_entropy"} if normed else plain["points"][-1][1].keys() - SPEED
    curve, state = apart(other, plain, figures, ADRIFT if normed else ())
    print(runs["method"], name, f"state {state:.1e}, figures {curve:.1e}")
    assert state < 1e-4
    assert curve < (1e-3 if normed else 1e-4)


def test_every_stage_on_two_workers_is_plain_pytorch(runs: dict[str, Any]) -> None:
    for name in runs["stages"]:
        near(runs, name)


def test_resumed_to_the_bit(runs: dict[str, Any]) -> None:
    for name in ("plain", *runs["stages"]):
        resumed = runs[f"{name} resumed"]
        assert min(dict(resumed["points"])) == SAVED + 1
        assert apart(resumed, runs[name], resumed["points"][-1][1].keys() - SPEED) == (0, 0)


def test_resumed_on_another_number_of_workers(runs: dict[str, Any]) -> None:
    assert min(dict(runs["on one worker"]["points"])) == SAVED + 1
    near(runs, "on one worker")


def test_everything_moved(runs: dict[str, Any]) -> None:
    """Equal because nothing happened would prove nothing."""
    state, early = runs["plain"]["state"], runs["plain"]["history"][0]
    still = {name for name in state if torch.equal(state[name], early[name])}
    assert not {name for name in still if not name.endswith("weight_g")}  # lengths that are fixed
    teacher = {name: value for name, value in state.items() if name.startswith("teacher.")}
    lags = [float((value - state[f"model.{name[8:]}"]).abs().max()) for name, value in teacher.items()]
    assert max(lags) > (1e-4 if runs["method"] == NORMED else 1e-3)

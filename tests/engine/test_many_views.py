"""Objectives with many views, a momentum teacher and batch statistics, on two workers and after a cut.

What is compared is the whole state: student, teacher, centre, and all else that an objective keeps.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from world import TEACHING, launch

CONFIG: dict[str, Any] = {
    "epochs": 4,
    "batch_size": 20,
    "log_every": 1,
    "optim": {"lr": 3e-3, "clip": 1.0, "warmup_epochs": 1.0, "weight_decay": 0.04, "weight_decay_end": 0.4},
}
STEPS, CUT, SAVED = 20, 13, 10  # steps of a whole run, where some are cut off, and their checkpoint
STAGES = {"zero 1": (1, None), "zero 2": (2, None), "zero 3": (3, None), "zero 3, all sharded": (3, 0)}


def spec(method: str, zero: int | None, persist: int | None = None, **more: Any) -> dict[str, Any]:
    steps = STEPS // CONFIG["epochs"]
    return {"method": method, "config": CONFIG, "zero": zero, "persist": persist, "steps": steps, **more}


@pytest.fixture(scope="module", params=TEACHING)
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All runs of one objective: two launches, because starting DeepSpeed costs seconds."""
    method, folder = request.param, tmp_path_factory.mktemp(request.param)

    def thrice(name: str, *stage: int | None) -> dict[str, Any]:
        """Undisturbed, cut off, and taken up again from the checkpoint."""
        there = str(folder / name)
        return {
            name: spec(method, *stage),
            f"{name} cut": spec(method, *stage, checkpoints=there, stop=CUT),
            f"{name} resumed": spec(method, *stage, checkpoints=there),
        }

    other = str(folder / "for one worker")
    two = {key: value for name, stage in STAGES.items() for key, value in thrice(name, *stage).items()}
    two["cut for one worker"] = spec(method, 3, 0, checkpoints=other, stop=CUT)
    one = {**thrice("plain", None), "on one worker": spec(method, None, checkpoints=other)}
    return launch(2, two, folder) | launch(1, one, folder)


def apart(a: Any, b: Any) -> float:
    assert a["state"].keys() == b["state"].keys()
    return max(float((a["state"][name] - b["state"][name]).abs().max()) for name in a["state"])


def curves_apart(a: Any, b: Any) -> float:
    """Over all figures of the steps that both have."""
    ours, theirs = dict(a["points"]), dict(b["points"])
    shared = ours.keys() & theirs.keys()
    assert len(shared) >= STEPS - CUT
    names = theirs[STEPS].keys() - {"train/images_per_s"}
    return max(abs(ours[step][name] - theirs[step][name]) for step in shared for name in names)


def test_every_stage_on_two_workers_is_plain_pytorch(runs: dict[str, Any]) -> None:
    for name in STAGES:
        figures = apart(runs["plain"], runs[name]), curves_apart(runs["plain"], runs[name])
        print(name, figures)  # noqa: T201  (pytest shows it with -s)
        assert max(figures) < 1e-4


def test_resumed_to_the_bit(runs: dict[str, Any]) -> None:
    for name in ("plain", *STAGES):
        resumed = runs[f"{name} resumed"]
        assert min(dict(resumed["points"])) == SAVED + 1
        assert apart(runs[name], resumed) == 0
        assert curves_apart(runs[name], resumed) == 0


def test_resumed_on_another_number_of_workers(runs: dict[str, Any]) -> None:
    resumed = runs["on one worker"]
    assert min(dict(resumed["points"])) == SAVED + 1
    assert apart(runs["plain"], resumed) < 1e-4


def test_everything_moved(runs: dict[str, Any]) -> None:
    """Equal because nothing happened would prove nothing."""
    state, early = runs["plain"]["state"], runs["plain cut"]["state"]
    still = {name for name in state if torch.equal(state[name], early[name])}
    assert not {name for name in still if not name.endswith("weight_g")}  # lengths that are fixed
    teacher = {name: value for name, value in state.items() if name.startswith("teacher.")}
    lags = [float((value - state[f"model.{name[8:]}"]).abs().max()) for name, value in teacher.items()]
    assert max(lags) > 1e-3

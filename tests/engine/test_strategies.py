"""One loop, five ways to hold the state: the same curve, the same weights, and checkpoints that cross."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from world import launch

CONFIG: dict[str, Any] = {
    "epochs": 3,
    "batch_size": 20,
    "log_every": 1,
    "optim": {"lr": 1e-2, "clip": 0.5, "warmup_epochs": 1, "layer_decay": 0.7},
}
STEPS, CUT, SAVED = 24, 13, 8  # steps of a whole run, where some are cut off, and their checkpoint


def spec(zero: int | None, method: str = "toy", **more: Any) -> dict[str, Any]:
    config = CONFIG | more.pop("config", {})
    return {"method": method, "config": config, "zero": zero, "steps": STEPS // CONFIG["epochs"], **more}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All runs of this file: three launches, because starting DeepSpeed costs seconds."""
    folder = tmp_path_factory.mktemp("strategies")

    def from_copy(source: str, name: str) -> str:
        shutil.copytree(folder / source, folder / name)
        return str(folder / name)

    def cut(name: str) -> dict[str, Any]:
        return {"checkpoints": str(folder / name), "stop": CUT}

    two = {f"zero {z}": spec(z) for z in range(4)}
    two |= {f"zero {z}, accumulate 2": spec(z, config={"accumulate": 2}) for z in range(4)}
    two |= {f"digits, zero {z}": spec(z, "digits") for z in range(4)}
    two |= {"wide, zero 0": spec(0, "wide")}
    two |= {f"bf16, zero {z}": spec(z, "wide", config={"precision": "bf16"}) for z in (0, 1, 3)}
    two |= {f"cut at zero {z}": spec(z, **cut(f"cut{z}")) for z in range(4)}
    found = launch(2, two, folder)

    one = {
        "plain": spec(None),
        "digits, plain": spec(None, "digits"),
        "cut plain": spec(None, **cut("cut-plain")),
    }
    one |= {
        f"zero {z} on 2 → plain": spec(None, checkpoints=from_copy(f"cut{z}", f"{z}-plain")) for z in range(4)
    }
    found |= launch(1, one, folder)

    again = {
        f"zero {z} on 2 → same": spec(z, checkpoints=from_copy(f"cut{z}", f"{z}-same")) for z in range(4)
    }
    again |= {
        f"zero {a} on 2 → zero {b}": spec(b, checkpoints=from_copy(f"cut{a}", f"{a}-{b}"))
        for a, b in ((1, 3), (3, 1), (2, 3), (0, 2), (3, 0))
    }
    again |= {
        f"plain → zero {z} on 2": spec(z, checkpoints=from_copy("cut-plain", f"plain-{z}")) for z in range(4)
    }
    found |= launch(2, again, folder)

    alone = {
        f"zero 3 on 2 → zero {z} on 1": spec(z, checkpoints=from_copy("cut3", f"3-alone-{z}")) for z in (1, 3)
    }
    return found | launch(1, alone, folder)


def weights_apart(a: Any, b: Any) -> float:
    assert a["state"].keys() == b["state"].keys()
    return max(float((a["state"][name] - b["state"][name]).abs().max()) for name in a["state"])


def curves_apart(a: Any, b: Any) -> float:
    ours, theirs = dict(a["points"]), dict(b["points"])
    shared = ours.keys() & theirs.keys()
    assert len(shared) >= STEPS - CUT
    return max(abs(ours[step]["train/loss"] - theirs[step]["train/loss"]) for step in shared)


def test_every_stage_has_the_curve_of_plain_pytorch(runs: dict[str, Any]) -> None:
    for z in range(4):
        assert len(dict(runs[f"digits, zero {z}"]["points"])) == STEPS
        assert curves_apart(runs["digits, plain"], runs[f"digits, zero {z}"]) < 1e-5
        assert weights_apart(runs["digits, plain"], runs[f"digits, zero {z}"]) < 1e-4  # Adam, tiny gradients
    first, last = runs["digits, plain"]["points"][0][1], runs["digits, plain"]["points"][-1][1]
    assert last["train/loss"] < first["train/loss"]


def test_half_precision_keeps_its_master_and_its_curve_at_every_stage(runs: dict[str, Any]) -> None:
    for z in (0, 1, 3):
        half = runs[f"bf16, zero {z}"]
        assert curves_apart(runs["bf16, zero 0"], half) < 5e-3
        matrix = half["state"]["inner.model.blocks.0.mlp.fc1.weight"]
        assert matrix.dtype == torch.float32
        assert not torch.equal(matrix, matrix.bfloat16().float())  # not rounded on its way out
    assert 1e-6 < curves_apart(runs["wide, zero 0"], runs["bf16, zero 0"]) < 0.05


def test_averages_are_held_at_every_stage(runs: dict[str, Any]) -> None:
    start = torch.nn.Linear(7, 33)
    assert runs["plain"]["state"]["teacher.0.weight"].shape == start.weight.shape
    for z in range(4):
        assert weights_apart(runs["plain"], runs[f"zero {z}"]) < 1e-6
        assert curves_apart(runs["plain"], runs[f"zero {z}"]) < 1e-6
    moved = runs["plain"]["state"]["teacher.0.weight"] - runs["plain"]["state"]["net.0.weight"]
    assert float(moved.abs().max()) > 1e-3  # the teacher lags: an average that is a copy would prove nothing


def test_accumulation_changes_nothing(runs: dict[str, Any]) -> None:
    for z in range(4):
        accumulated = runs[f"zero {z}, accumulate 2"]
        state = {name: t for name, t in accumulated["state"].items() if name != "seen"}  # counts forwards
        other = {name: t for name, t in runs["plain"]["state"].items() if name != "seen"}
        assert weights_apart({"state": other}, {"state": state}) < 1e-6


def test_resumed_on_the_same_workers_to_the_bit(runs: dict[str, Any]) -> None:
    for z in range(4):
        resumed = runs[f"zero {z} on 2 → same"]
        assert min(dict(resumed["points"])) == SAVED + 1
        assert weights_apart(runs[f"zero {z}"], resumed) == 0
        assert curves_apart(runs[f"zero {z}"], resumed) == 0


@pytest.mark.parametrize(
    "name",
    [
        *(f"zero {z} on 2 → plain" for z in range(4)),
        *(f"plain → zero {z} on 2" for z in range(4)),
        *(f"zero {a} on 2 → zero {b}" for a, b in ((1, 3), (3, 1), (2, 3), (0, 2), (3, 0))),
        *(f"zero 3 on 2 → zero {z} on 1" for z in (1, 3)),
    ],
)
def test_resumed_elsewhere(runs: dict[str, Any], name: str) -> None:
    assert weights_apart(runs["plain"], runs[name]) < 1e-6
    assert curves_apart(runs["plain"], runs[name]) < 1e-6
    assert int(runs[name]["state"]["seen"]) == STEPS


def test_a_cut_run_left_only_whole_checkpoints(
    runs: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = next(p for p in Path(tmp_path_factory.getbasetemp()).glob("strategies*"))
    for z in range(4):
        assert [p.name for p in (folder / f"cut{z}").iterdir()] == [f"step-{SAVED:08d}"]

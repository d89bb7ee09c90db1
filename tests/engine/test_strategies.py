"""One loop, five ways to hold the state: the same curve, the same weights, and checkpoints that cross."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from world import FIGURES, apart, launch

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
    """All runs of this file; those on two workers are one launch, as starting DeepSpeed costs seconds."""
    folder = tmp_path_factory.mktemp("strategies")

    def cut(name: str) -> dict[str, Any]:
        return {"checkpoints": str(folder / name), "stop": CUT}

    def goes_on(source: str, name: str) -> dict[str, Any]:
        return {"copy_of": str(folder / source), "checkpoints": str(folder / name)}

    plain = {"plain": spec(None), "digits, plain": spec(None, "digits")}
    found = launch(1, plain | {"cut plain": spec(None, **cut("cut-plain"))}, folder)

    two = {f"zero {z}": spec(z) for z in range(4)}
    two |= {f"zero {z}, accumulate 2": spec(z, config={"accumulate": 2}) for z in range(4)}
    two |= {f"digits, zero {z}": spec(z, "digits") for z in range(4)}
    two |= {"wide, zero 0": spec(0, "wide")}
    two |= {f"bf16, zero {z}": spec(z, "wide", config={"precision": "bf16"}) for z in (0, 1, 3)}
    two |= {f"cut at zero {z}": spec(z, **cut(f"cut{z}")) for z in range(4)}
    two |= {f"zero {z} on 2 → same": spec(z, **goes_on(f"cut{z}", f"{z}-same")) for z in range(4)}
    two |= {
        f"zero {a} on 2 → zero {b}": spec(b, **goes_on(f"cut{a}", f"{a}-{b}"))
        for a, b in ((1, 3), (3, 1), (2, 3), (0, 2), (3, 0))
    }
    two |= {f"plain → zero {z} on 2": spec(z, **goes_on("cut-plain", f"plain-{z}")) for z in range(4)}
    found |= launch(2, two, folder)

    one = {f"zero {z} on 2 → plain": spec(None, **goes_on(f"cut{z}", f"{z}-plain")) for z in range(4)}
    found |= launch(1, one, folder)
    alone = {f"zero 3 on 2 → zero {z} on 1": spec(z, **goes_on("cut3", f"3-alone-{z}")) for z in (1, 3)}
    return found | launch(1, alone, folder)


def test_every_stage_has_the_curve_of_plain_pytorch(runs: dict[str, Any]) -> None:
    for z in range(4):
        assert len(dict(runs[f"digits, zero {z}"]["points"])) == STEPS
        curve, weights = apart(runs[f"digits, zero {z}"], runs["digits, plain"], FIGURES)
        assert curve < 1e-5
        assert weights < 1e-4  # Adam, tiny gradients
    first, last = runs["digits, plain"]["points"][0][1], runs["digits, plain"]["points"][-1][1]
    assert last["train/loss"] < first["train/loss"]


def test_half_precision_keeps_its_master_and_its_curve_at_every_stage(runs: dict[str, Any]) -> None:
    for z in (0, 1, 3):
        half = runs[f"bf16, zero {z}"]
        assert apart(half, runs["bf16, zero 0"])[0] < 5e-3
        matrix = half["state"]["inner.model.blocks.0.mlp.fc1.weight"]
        assert matrix.dtype == torch.float32
        assert not torch.equal(matrix, matrix.bfloat16().float())  # not rounded on its way out
    assert 1e-6 < apart(runs["bf16, zero 0"], runs["wide, zero 0"])[0] < 0.05


def test_averages_are_held_at_every_stage(runs: dict[str, Any]) -> None:
    start = torch.nn.Linear(7, 33)
    assert runs["plain"]["state"]["teacher.0.weight"].shape == start.weight.shape
    for z in range(4):
        assert max(apart(runs[f"zero {z}"], runs["plain"], FIGURES)) < 1e-6
    moved = runs["plain"]["state"]["teacher.0.weight"] - runs["plain"]["state"]["net.0.weight"]
    assert float(moved.abs().max()) > 1e-3  # the teacher lags: an average that is a copy would prove nothing


def test_accumulation_changes_nothing(runs: dict[str, Any]) -> None:
    for z in range(4):
        accumulated = runs[f"zero {z}, accumulate 2"]
        assert max(apart(accumulated, runs["plain"], FIGURES, without=("seen",))) < 1e-6  # counts forwards


def test_resumed_on_the_same_workers_to_the_bit(runs: dict[str, Any]) -> None:
    for z in range(4):
        resumed = runs[f"zero {z} on 2 → same"]
        assert min(dict(resumed["points"])) == SAVED + 1
        assert apart(resumed, runs[f"zero {z}"], FIGURES) == (0, 0)


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
    assert len(runs[name]["points"]) == STEPS - SAVED
    assert max(apart(runs[name], runs["plain"], FIGURES)) < 1e-6
    assert int(runs[name]["state"]["seen"]) == STEPS


def test_a_cut_run_left_only_whole_checkpoints(
    runs: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = next(p for p in Path(tmp_path_factory.getbasetemp()).glob("strategies*"))
    for z in range(4):
        assert [p.name for p in (folder / f"cut{z}").iterdir()] == [f"step-{SAVED:08d}"]

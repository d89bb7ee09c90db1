"""Benchmarks: turns, rows, and the real command on models of real width and tiny images."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from vitlab.bench import CASES, StepOptions, bench_step, step
from vitlab.bench.peers import Classifier
from vitlab.bench.report import Row, alternate, write_json
from vitlab.config import UserError


def test_sides_take_turns() -> None:
    order: list[str] = []
    times = iter([9.0, 9.0, 1.0, 2.0, 4.0, 1.0, 3.0, 8.0])

    def side(name: str) -> float:
        order.append(name)
        return next(times)

    ours, theirs = alternate(lambda: side("ours"), lambda: side("theirs"), 3)
    assert order == ["ours", "theirs", "theirs", "ours", "ours", "theirs", "theirs", "ours"]
    assert (ours, theirs) == (4.0, 1.0)  # medians of 2 4 8 and 1 1 3; the first round is not counted


def test_the_file(tmp_path: Path) -> None:
    row = Row("vit", "timm 1", 1.0, 2.0, "s", 0.5, 3, {"images/s": 8.0})
    write_json(tmp_path / "deep" / "x.json", "step", [row], torch.device("cpu"))
    tree = json.loads((tmp_path / "deep" / "x.json").read_text())
    assert tree["bench"] == "step"
    assert tree["machine"]["threads"] == torch.get_num_threads()
    assert tree["rows"][0] | {"more": None} == {
        "case": "vit",
        "peer": "timm 1",
        "ours": 1.0,
        "theirs": 2.0,
        "unit": "s",
        "ratio": 0.5,
        "rounds": 3,
        "more": None,
    }


def test_two_different_things_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def pair(size: int) -> tuple[str, nn.Module, nn.Module]:
        def side() -> nn.Module:
            return Classifier(nn.Sequential(nn.Flatten(), nn.Linear(3 * size * size, 1000)))

        return "x", side(), side()

    monkeypatch.setitem(CASES, "vit_small", pair)
    with pytest.raises(
        RuntimeError, match=r"vit_small: on the same weights the loss is .* here and .* in the"
    ):
        bench_step(["vit_small"], StepOptions(batch=2, image_size=8, threads=torch.get_num_threads()))
    with pytest.raises(UserError, match=r"given 'vit_smal'; allowed: .*; did you mean 'vit_small'\?"):
        bench_step(["vit_smal"], StepOptions())
    with pytest.raises(UserError, match=r"bench step: batch: given 0; allowed: 1 or more"):
        bench_step(["vit_small"], StepOptions(batch=0))
    assert step.CASES is CASES


@pytest.mark.parametrize("case", CASES)
def test_every_pair_says_the_same_and_is_timed(case: str) -> None:
    """224 pixels only where the peer knows no other size; batch statistics need more than one number."""
    size = 224 if case == "coatnet_0" else 64
    options = StepOptions(batch=2, image_size=size, rounds=1, threads=torch.get_num_threads())
    (row,) = bench_step([case], options)
    assert row.case == case
    assert 0 < row.ours < 60
    assert row.ratio == row.ours / row.theirs


def test_the_command(tmp_path: Path) -> None:
    words = ["bench", "step", "vit_small", "--batch", "1", "--image-size", "32", "--rounds", "1"]
    command = [sys.executable, "-m", "vitlab.cli", *words, "--json", str(tmp_path / "x.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert "vit_small: 1 rounds" in done.stdout
    assert "median ratio" in done.stdout
    assert json.loads((tmp_path / "x.json").read_text())["rows"][0]["case"] == "vit_small"

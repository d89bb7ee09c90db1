"""Benchmarks: turns, rows, and the real command on models of real width and tiny images."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

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
    write_json(tmp_path / "deep" / "x.json", "step", [row], torch.device("cpu"), threads=3)
    tree = json.loads((tmp_path / "deep" / "x.json").read_text())
    assert tree["bench"] == "step"
    assert tree["machine"]["threads"] == 3
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


@pytest.mark.parametrize("case", [name for name in CASES if "/" not in name or name == "dino/lightly"])
def test_models_and_an_objective_that_follows_are_timed(case: str) -> None:
    """224 pixels only where the peer knows no other size; batch statistics need more than one number.

    Of objectives only the steps differ from those of models: all their pairs are compared below.
    """
    size = 224 if case == "coatnet_0" else 64
    options = StepOptions(batch=2, image_size=size, rounds=1, threads=torch.get_num_threads())
    (row,) = bench_step([case], options)
    assert row.case == case
    assert 0 < row.ours < 60
    assert 0 < row.theirs < 60


@pytest.mark.parametrize("case", [name for name in CASES if "/" in name])
def test_objectives_do_the_same_work(case: str) -> None:
    """Losses, the gradient's length, how far teachers and centres have moved."""
    torch.manual_seed(0)
    _, *sides = CASES[case](64)
    images, labels = torch.randn(4, 3, 64, 64), torch.arange(4)
    found: list[dict[str, float]] = []
    for side in sides:
        side.train()
        optimizer = torch.optim.AdamW([p for p in side.parameters() if p.requires_grad], lr=1e-3, eps=1e-2)
        before, figures = followers(side), {}
        for turn in range(2):
            loss = side(images, labels)
            loss.backward()
            learned = [p.grad.norm() for p in side.parameters() if p.grad is not None]
            figures[f"loss {turn}"] = float(loss.detach())
            figures[f"gradient {turn}"] = float(torch.stack(learned).norm())
            optimizer.step()
            optimizer.zero_grad()
            getattr(side, "follow", lambda: None)()
        figures |= {name: float((now - before[name]).norm()) for name, now in followers(side).items()}
        found.append(figures)
    assert found[0] == pytest.approx(found[1], rel=2e-3)
    assert found[0]["loss 0"] == pytest.approx(found[1]["loss 0"], rel=step.CLOSE)
    moving = {
        "dino/lightly": ["center", "teacher", "teacher_head"],
        "msn/lightly": ["teacher", "teacher_head"],
    }
    assert sorted(name for name, far in found[0].items() if far and " " not in name) == moving.get(case, [])


def followers(side: nn.Module) -> dict[str, Tensor]:
    """What no gradient reaches, in one row of numbers each."""
    owner: Any = getattr(side, "method", side)
    parts = {name: getattr(owner, name) for name in ("teacher", "teacher_head") if hasattr(owner, name)}
    found = {
        name: torch.cat([p.detach().flatten() for p in part.parameters()]) for name, part in parts.items()
    }
    center = getattr(getattr(owner, "criterion", owner), "center", None)
    return found if center is None else found | {"center": center.clone()}


def test_the_command(tmp_path: Path) -> None:
    words = ["bench", "step", "vit_small", "--batch", "1", "--image-size", "32", "--rounds", "1"]
    command = [sys.executable, "-m", "vitlab.cli", *words, "--json", str(tmp_path / "x.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert "vit_small: 1 rounds" in done.stdout
    assert "median ratio" in done.stdout
    assert json.loads((tmp_path / "x.json").read_text())["rows"][0]["case"] == "vit_small"

"""Ray Tune over real trials, and a real Ray job."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from conftest import BIN, ROOT, TINY, Ended, Lab

PLAIN = ("cluster.workers=0", "cluster.zero=null")


def test_a_search(lab: Lab) -> None:
    ended = lab.run("tune_finetune", TINY, *PLAIN)
    assert ended.outcomes() == {"pretrain": "ran", "search": "ran", "evaluate": "ran"}
    (search,) = lab.runs("search")
    trials = lab.store().find({"mlflow.parentRunId": search.run_id})
    assert len(trials) == 3
    assert {run.status for run in trials} <= {"FINISHED", "KILLED"}
    folder = lab.store().download(search.run_id, "search")
    assert folder is not None
    report = json.loads((folder / "search.json").read_text())
    finished = {run.run_id: run.metrics["val/top1"] for run in trials if run.status == "FINISHED"}
    assert report["best"] == max(finished, key=lambda run_id: finished[run_id])
    assert set(report["choice"]) == {"optim.lr", "optim.layer_decay", "model.drop_path"}
    assert (folder / "search.png").read_bytes()[:4] == b"\x89PNG"
    (evaluated,) = lab.runs("evaluate")
    assert evaluated.tags["vitlab.inputs"] == f"model=runs:/{report['best']}/model"
    again = lab.run("tune_finetune", TINY, *PLAIN)
    assert set(again.outcomes().values()) == {"hit"}


def test_a_job_is_submitted(head: dict[str, str]) -> None:
    home = Path(head["VITLAB_TEST_HEAD_HOME"])
    first = submit(head)
    assert "succeeded" in first.text
    assert first.outcomes()["finetune"] == "ran"
    lab = Lab(home, {})
    assert len(lab.runs("finetune")) == 1
    assert lab.runs("finetune")[0].tags["vitlab.git_sha"] != "unknown"
    model = lab.store().download(lab.runs("finetune")[0].run_id, "model")
    assert model is not None
    assert model.is_relative_to(home)
    second = submit(head)
    assert set(second.outcomes().values()) == {"hit"}
    sessions = sorted(Path("/tmp/ray").glob(f"session_*_{head['VITLAB_TEST_HEAD_PID']}"))  # named by date
    copies = [p for p in sessions[-1].glob("runtime_resources/*/_ray_pkg_*") if p.is_dir()]
    assert copies
    for copy in copies:
        assert not {".venv", "runs", ".git"} & {p.name for p in copy.iterdir()}


def submit(head: dict[str, str]) -> Ended:
    command = [
        BIN / "ray",
        "job",
        "submit",
        "--working-dir",
        ".",
        "--",
        "python",
        "pipelines/mae_then_finetune.py",
        TINY,
    ]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **head}, capture_output=True, text=True, timeout=300
    )
    text = done.stdout + done.stderr
    assert done.returncode == 0, text[-6000:]
    return Ended(done.returncode, text)


def test_a_space_that_cannot_be(lab: Lab) -> None:
    ended = lab.run("tune_finetune", TINY, "tune.space={optim.lrr: [1]}", code=2)
    assert "tune.space: finetune.optim.lrr: unknown key" in ended.text
    assert len(ended.text.strip().splitlines()) == 1

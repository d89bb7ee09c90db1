"""The whole chain for real: what it leaves behind, and what it does not do twice."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from conftest import Ended, Lab, copy_of

STAGES = ["pretrain", "finetune", "distill", "evaluate model", "evaluate student"]
PLAIN = ("cluster.workers=0", "cluster.zero=null")


def test_the_chain_runs_on_a_cluster(reference: tuple[Lab, Ended]) -> None:
    lab, ended = reference
    assert ended.outcomes() == dict.fromkeys(STAGES, "ran")
    assert "compare  http://127.0.0.1:5000/#/compare-runs?runs=" in ended.text
    noise = [
        line for line in ended.text.splitlines() if "WARNING" in line or "(pid=" in line or "[rank" in line
    ]
    assert noise == []
    for stage in ("pretrain", "finetune", "distill"):
        (run,) = lab.runs(stage)
        assert run.tags["vitlab.key"]
        assert run.tags["vitlab.data_digest"]
        assert run.name.startswith(stage)
        assert "train/loss" in run.metrics
        assert "train/images_per_s" in run.metrics
    finetune, pretrain = lab.runs("finetune")[0], lab.runs("pretrain")[0]
    assert finetune.tags["vitlab.inputs"] == f"init=runs:/{pretrain.run_id}/model"
    assert [step for step, _ in lab.curve(finetune, "train/loss")] == list(range(3, 115, 3))
    assert not list(lab.home.glob("checkpoints/*/step-*"))


def test_artifacts_hold_what_a_person_looks_for(reference: tuple[Lab, Ended]) -> None:
    lab, _ = reference
    pretrain = lab.store().download(lab.runs("pretrain")[0].run_id, "pictures")
    assert pretrain is not None
    assert (pretrain / "reconstructions.png").read_bytes()[:4] == b"\x89PNG"
    for run in lab.runs("evaluate"):
        report = lab.store().download(run.run_id, "report")
        assert report is not None
        assert (report / "confusion.png").read_bytes()[:4] == b"\x89PNG"
        rows = list(csv.reader((report / "confusion.csv").read_text().splitlines()))
        counts = [[int(n) for n in row[1:11]] for row in rows[1:]]
        found = json.loads((report / "report.json").read_text())["metrics"]
        assert sum(map(sum, counts)) == found["eval/images"] == 353
        assert sum(counts[i][i] for i in range(10)) / 353 == found["eval/top1"] == run.metrics["eval/top1"]
        assert found["eval/top1"] <= found["eval/top5"] <= 1
    model = lab.store().download(lab.runs("distill")[0].run_id, "model")
    assert model is not None
    assert {p.name for p in model.iterdir()} == {
        "config.json",
        "model.safetensors",
        "preprocess.json",
        "labels.json",
    }


def test_a_second_run_is_all_hits_and_starts_nothing(reference: tuple[Lab, Ended]) -> None:
    lab, _ = reference
    before = set((lab.home / "logs").iterdir())
    again = lab.chain()
    assert again.outcomes() == dict.fromkeys(STAGES, "hit")
    assert set((lab.home / "logs").iterdir()) == before
    # What does not decide a result is not in the key: other workers, another stage of ZeRO, another log.
    assert set(
        lab.chain("cluster.workers=4", "cluster.zero=3", "finetune.log_every=1").outcomes().values()
    ) == {"hit"}


def test_only_what_changed_runs_again(reference: tuple[Lab, Ended], make_lab: Callable[..., Lab]) -> None:
    lab = copy_of(reference[0], make_lab)
    changed = lab.chain("finetune.optim.lr=2e-3", *PLAIN)
    assert changed.outcomes() == {"pretrain": "hit"} | dict.fromkeys(STAGES[1:], "ran")
    evaluated = lab.chain("evaluate.split=val", *PLAIN)
    assert evaluated.outcomes() == dict.fromkeys(STAGES[:3], "hit") | dict.fromkeys(STAGES[3:], "ran")


def test_an_artifact_that_is_gone_or_changed_is_no_hit(
    reference: tuple[Lab, Ended], make_lab: Callable[..., Lab]
) -> None:
    lab = copy_of(reference[0], make_lab)
    model = lab.store().download(lab.runs("finetune")[0].run_id, "model")
    assert model is not None
    (model / "labels.json").write_text("[]")
    again = lab.chain()
    # Made anew on the same workers it is the same to the bit, so all that follows is a hit.
    assert again.outcomes() == {**dict.fromkeys(STAGES, "hit"), "finetune": "ran"}
    first, second = lab.store().find(
        {"vitlab.stage": "finetune", "vitlab.key": lab.runs("finetune")[0].tags["vitlab.key"]}
    )
    assert first.run_id != second.run_id
    shutil.rmtree(lab.store().download(lab.runs("pretrain")[0].run_id, "model") or Path())
    assert lab.chain(*PLAIN).outcomes()["pretrain"] == "ran"

"""Kill -9 at any place: nothing is lost, nothing is double, the result is the same."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
from conftest import ROOT, TINY, Ended, Lab, copy_of, wait_for

PLAIN = ("cluster.workers=0", "cluster.zero=null")


@pytest.fixture(scope="module")
def stopped(make_lab: Callable[..., Lab]) -> Lab:
    """Its driver was killed in the middle of fine-tuning; every test goes on with a copy of its home."""
    lab = make_lab()
    process = lab.start("mae_then_finetune", TINY)
    lab.wait_for_step(30, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (run,) = lab.runs("finetune", "RUNNING")
    assert run.metrics["train/loss"] > 0
    wait_until_gone(lab)
    return lab


def test_the_driver_is_killed(
    stopped: Lab, make_lab: Callable[..., Lab], reference: tuple[Lab, Ended]
) -> None:
    lab = copy_of(stopped, make_lab)
    again = lab.chain()
    assert again.outcomes()["pretrain"] == "hit"
    assert again.outcomes()["finetune"] == "resumed"
    same_as(lab, reference[0])


def test_stopped_on_two_workers_and_gone_on_with_on_one(
    stopped: Lab, make_lab: Callable[..., Lab], reference: tuple[Lab, Ended]
) -> None:
    lab = copy_of(stopped, make_lab)
    again = lab.chain("cluster.workers=1", "cluster.zero=null")
    assert again.outcomes()["finetune"] == "resumed"
    ours, theirs = (x.curve(x.runs("finetune")[0], "train/loss") for x in (lab, reference[0]))
    assert [step for step, _ in ours] == [step for step, _ in theirs]
    # The same global batches: another grouping of the sums, nothing else.
    assert max(abs(a - b) for (_, a), (_, b) in zip(ours, theirs, strict=True)) < 1e-5


def test_a_worker_is_killed(lab: Lab, reference: tuple[Lab, Ended]) -> None:
    process = lab.start("mae_then_finetune", TINY, "cluster.loaders=1")  # its loader must go with it
    kill_worker(lab, process, 30)
    same_as(lab, reference[0])


def test_two_at_once_train_once(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(bare=True)  # they race for the store's tables, too
    both = [lab.start("mae_then_finetune", TINY, *PLAIN) for _ in range(2)]
    texts = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], texts
    for stage in ("pretrain", "finetune", "distill"):
        assert len(lab.runs(stage)) == 1
    first, second = (Ended(0, text).outcomes() for text in texts)
    assert {first["finetune"], second["finetune"]} == {"ran", "hit"}
    assert any("waits for process" in text for text in texts)


def kill_worker(lab: Lab, process: subprocess.Popen[str], step: int) -> str:
    """From that step on there is one worker less; what the driver, which goes on to the end, says."""
    lab.wait_for_step(step, process)
    (log,) = lab.home.glob("logs/*/worker-1.log")
    pid = re.search(r"pid (\d+)", log.read_text())
    assert pid
    os.kill(int(pid[1]), signal.SIGKILL)
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    assert "a worker was lost" in text
    return text


def wait_until_gone(lab: Lab) -> None:
    """The killed driver's workers end with it; the test of a fast restart is the fence's own."""
    pids = [
        found[1]
        for log in lab.home.glob("logs/*/worker-*.log")
        if (found := re.search(r"pid (\d+)", log.read_text()))
    ]
    assert pids
    end = time.monotonic() + 60
    while any(subprocess.run(["kill", "-0", pid], capture_output=True).returncode == 0 for pid in pids):
        assert time.monotonic() < end, f"workers {pids} outlive their driver"
        time.sleep(0.2)


def same_as(lab: Lab, other: Lab) -> None:
    """The same weights to the bit, in one run, whose curve has every point once."""
    assert lab.digests() == other.digests() != {}
    assert len(lab.store().find({"vitlab.stage": "finetune"})) == 1
    for name in ("train/loss", "train/lr", "val/loss", "val/top1"):
        ours, theirs = (x.curve(x.runs("finetune")[0], name) for x in (lab, other))
        assert ours == theirs != []


FAIL_THEN_GO_ON = """
import sys
from pathlib import Path
import vitlab

def main():
    tiny = Path("tests/integration/tiny.yaml")
    good, wild = vitlab.read(tiny), vitlab.read(tiny, ["finetune.optim.lr=1e30", "finetune.optim.clip=0"])
    with vitlab.Run(good, "notebook") as run:
        shards = run.shards(good.data)
        try:
            run.finetune(wild.need("finetune"), data=shards)
        except ValueError as error:
            print("REFUSED", error)
        run.finetune(good.need("finetune"), data=shards)

if __name__ == "__main__":
    main()
"""


def test_a_stage_that_fails_on_its_workers_leaves_the_next_alone(lab: Lab) -> None:
    command = [sys.executable, "-c", FAIL_THEN_GO_ON]
    done = subprocess.run(command, cwd=ROOT, env=lab.env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "REFUSED optim.lr: the loss is" in done.stdout
    assert len(lab.runs("finetune")) == len(lab.runs("finetune", "FAILED")) == 1


def test_more_than_the_cluster_has_is_refused(lab: Lab) -> None:
    ended = lab.chain("cluster.cpus_per_worker=8", code=2)
    assert "vitlab: cluster.workers: given 2 of 8 CPUs each; the cluster has 4" in ended.text


DINO = """
from pathlib import Path
import vitlab

METHOD = "{name: dino, local_crops: 1, out_dim: 64, hidden_dim: 48, bottleneck_dim: 16, momentum: 0.9}"
SIZES = "{name: vit_tiny, patch_size: 4, in_chans: 1, embed_dim: 64, depth: 1, num_heads: 2}"  # some shards
SETTINGS = ["cluster.zero=3", f"pretrain.method={METHOD}", f"pretrain.model={SIZES}", "pretrain.epochs=2"]
LOOP = ["pretrain.augment.name=dino", "pretrain.batch_size=64", "pretrain.checkpoint_every=10"]
LOOP += ["pretrain.optim.weight_decay_end=0.4"]

def main():
    exp = vitlab.read(Path("tests/integration/tiny.yaml"), SETTINGS + LOOP)
    with vitlab.Run(exp, "notebook") as run:
        shards = run.shards(exp.data)
        whole = run.pretrain(exp.need("pretrain"), data=shards)
        whole.folder.rename(run.home / "whole")  # gone, so the next one trains again
        run.pretrain(exp.need("pretrain"), data=shards)

if __name__ == "__main__":
    main()
"""


def test_a_worker_is_killed_that_holds_half_of_a_teacher(lab: Lab) -> None:
    """Teacher, centre and schedules go on from the shards of the checkpoint: the same weights to the bit."""
    command = [sys.executable, "-c", DINO]
    process = subprocess.Popen(
        command, cwd=ROOT, env=lab.env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    wait_for((lab.home / "whole").exists, process, "an undisturbed pretraining")
    text = kill_worker(lab, process, 10)
    again = re.search(r"goes on from step (\d+)/", text)
    assert again, text
    assert int(again[1]) >= 10
    killed, whole = lab.runs("pretrain")
    assert killed.tags["vitlab.artifact_digest"] == whole.tags["vitlab.artifact_digest"]
    for name in ("train/loss", "train/teacher_entropy", "train/spread"):  # the last two are of the centre
        assert lab.curve(killed, name) == lab.curve(whole, name) != []

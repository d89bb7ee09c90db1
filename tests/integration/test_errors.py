"""What a person can get wrong: one clear line, exit code 2, nothing started."""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest
from conftest import Ended, Lab

PLAIN = ("cluster.workers=0", "cluster.zero=null")


def refused(lab: Lab, *arguments: str) -> str:
    ended: Ended = lab.chain(*arguments, code=2)
    lines = [line for line in ended.text.splitlines() if line.startswith("vitlab:")]
    assert len(lines) == 1, ended.text
    assert "Traceback" not in ended.text
    assert not (lab.home / "logs").exists()  # no worker was started
    return lines[0]


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("finetune.optim.lrr=1", ["finetune.optim.lrr", "unknown key", "did you mean 'lr'?"]),
        ("finetune.optim.lr=-1", ["finetune.optim.lr", "-1", "greater than 0"]),
        ("finetune.batch_size=50", ["finetune.batch_size", "50", "data.streams=4"]),
        ("cluster.workers=3", ["cluster.workers", "3", "1, 2, 4"]),
        ("finetune.model.patch_size=3", ["finetune.model.patch_size", "3", "1, 2, 4, 8"]),
        ("data={path: /no/such/shards, image_size: 8, channels: 1, streams: 4}", ["/no/such/shards"]),
        ("data.num_classes=7", ["data.num_classes", "7", "10 classes"]),
        ("finetune.method.name=supervized", ["finetune.method.name", "supervized", "supervised"]),
        ("finetune.epochs=many", ["finetune.epochs", "many", "whole number"]),
    ],
)
def test_one_line(make_lab: Callable[..., Lab], argument: str, words: list[str]) -> None:
    line = refused(make_lab(), argument)
    for word in words:
        assert word in line


def test_a_tracking_server_that_is_not_there(lab: Lab) -> None:
    with socket.socket() as taken:  # bound and never listening: nobody answers
        taken.bind(("127.0.0.1", 0))
        line = refused(lab, f"tracking.uri=http://127.0.0.1:{taken.getsockname()[1]}")
    assert "does not answer" in line


def test_a_class_count_that_does_not_fit_the_model(lab: Lab) -> None:
    line = refused(lab, "finetune.model.num_classes=7", *PLAIN)
    assert "finetune.model.num_classes" in line
    assert "10 classes" in line

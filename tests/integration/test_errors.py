"""What a person can get wrong: one clear line, exit code 2, nothing started.

The sentences themselves are tests/test_experiment.py's; here is what only a process can show.
"""

from __future__ import annotations

import socket

import pytest
from conftest import Lab


def refused(lab: Lab, *arguments: str) -> str:
    ended = lab.chain(*arguments, code=2)
    lines = [line for line in ended.text.splitlines() if line.startswith("vitlab:")]
    assert len(lines) == 1, ended.text
    assert "Traceback" not in ended.text
    assert not (lab.home / "logs").exists()  # no worker was started
    return lines[0]


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        # by the experiment alone, before there is a store; then by its images
        ("finetune.optim.lrr=1", ["finetune.optim.lrr", "unknown key", "did you mean 'lr'?"]),
        ("data={path: /no/such/shards, image_size: 8, channels: 1, streams: 4}", ["/no/such/shards"]),
    ],
)
def test_one_line(lab: Lab, argument: str, words: list[str]) -> None:
    line = refused(lab, argument)
    for word in words:
        assert word in line


def test_a_tracking_server_that_is_not_there(lab: Lab) -> None:
    with socket.socket() as taken:  # bound and never listening: nobody answers
        taken.bind(("127.0.0.1", 0))
        line = refused(lab, f"tracking.uri=http://127.0.0.1:{taken.getsockname()[1]}")
    assert "does not answer" in line

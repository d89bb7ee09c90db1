"""Real pipelines in real processes. One Ray head serves the whole session."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from vitlab.tracking import Found, Store, TrackingConfig

ROOT = Path(__file__).resolve().parents[2]
TINY = "tests/integration/tiny.yaml"
BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Ended:
    """A program that has ended."""

    code: int
    text: str

    def outcomes(self) -> dict[str, str]:
        """`{"pretrain": "hit", …}` from the lines that stages end with."""
        lines = re.findall(r"^[•↻✓] (\S+(?: \S+)?) +(hit|resumed|ran) ", self.text, re.M)
        return dict(lines)


@dataclass
class Lab:
    """A home, and the programs that work in it."""

    home: Path
    env: dict[str, str]

    def start(self, pipeline: str, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, f"pipelines/{pipeline}.py", *arguments]
        return subprocess.Popen(
            command, cwd=ROOT, env=self.env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def run(self, pipeline: str, *arguments: str, code: int = 0) -> Ended:
        process = self.start(pipeline, *arguments)
        text, _ = process.communicate(timeout=400)
        assert process.returncode == code, text[-6000:]
        return Ended(process.returncode, text)

    def chain(self, *arguments: str, code: int = 0) -> Ended:
        return self.run("mae_then_finetune", TINY, *arguments, code=code)

    def store(self) -> Store:
        return Store(TrackingConfig(), self.home)

    def runs(self, stage: str, status: str = "FINISHED") -> list[Found]:
        return [run for run in self.store().find({"vitlab.stage": stage}) if run.status == status]

    def digests(self) -> dict[str, str]:
        """Of every stage's artifact."""
        stages = ("pretrain", "finetune", "distill")
        return {stage: run.tags["vitlab.artifact_digest"] for stage in stages for run in self.runs(stage)}

    def curve(self, run: Found, name: str) -> list[tuple[int, float]]:
        """Every point that the store holds, in the order of steps; a double point is there twice."""
        history = self.store().client.get_metric_history(run.run_id, name)
        return sorted((point.step, point.value) for point in history)

    def wait_for_step(self, step: int, process: subprocess.Popen[str]) -> None:
        """Until training has a checkpoint at or after a step."""

        def there() -> bool:
            saved = (int(p.name[5:]) for p in self.home.glob("checkpoints/*/step-????????"))
            return any(found >= step for found in saved)

        wait_for(there, process, f"a checkpoint at step {step}")


def wait_for(there: Callable[[], bool], process: subprocess.Popen[str], what: str) -> None:
    """Until what a program is making is there."""
    end = time.monotonic() + 200
    while not there():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, f"not there within 200 s: {what}"
        time.sleep(0.05)


@pytest.fixture(scope="session")
def make_lab(
    new_home: Callable[[], Path], tmp_path_factory: pytest.TempPathFactory, head: dict[str, str]
) -> Callable[..., Lab]:
    def make(bare: bool = False) -> Lab:
        """`bare`: the programs make the store's tables themselves, which takes seconds."""
        home = tmp_path_factory.mktemp("home") if bare else new_home()
        env = {**os.environ, "VITLAB_HOME": str(home), "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
        return Lab(home, env | head)

    return make


@pytest.fixture
def lab(make_lab: Callable[..., Lab]) -> Lab:
    return make_lab()


@pytest.fixture(scope="session")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """`ray start --head` with token authentication; yields the environment that reaches it."""
    folder = tmp_path_factory.mktemp("head")
    (folder / "token").write_text(os.urandom(32).hex())
    port, dashboard = _free_port(), _free_port()
    auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
    env = {**os.environ, **auth, "RAY_USAGE_STATS_ENABLED": "0", "PATH": f"{BIN}:{os.environ['PATH']}"}
    env |= {"VITLAB_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    command = [BIN / "ray", "start", "--head", "--block", "--num-cpus=4", f"--port={port}"]
    with (folder / "head.log").open("w") as log:
        process = subprocess.Popen(
            [*command, f"--dashboard-port={dashboard}"],
            env=env,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        _until_open(dashboard, folder / "head.log")
        jobs = {
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
            "VITLAB_TEST_HEAD_HOME": env["VITLAB_HOME"],
            "VITLAB_TEST_HEAD_PID": str(process.pid),  # the name of its session ends with it
        }
        yield {**auth, **jobs, "RAY_ADDRESS": f"127.0.0.1:{port}"}
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # a tidy end takes half a minute and leaves nothing else
        process.wait(timeout=60)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _until_open(port: int, log: Path) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.2)
        else:
            return
    pytest.fail(f"the Ray head did not start: {log.read_text()[-2000:]}")


@pytest.fixture(scope="session")
def reference(make_lab: Callable[..., Lab]) -> tuple[Lab, Ended]:
    """The undisturbed chain on two workers, in a home with nothing in it."""
    lab = make_lab(bare=True)
    return lab, lab.chain()


def copy_of(lab: Lab, make_lab: Callable[..., Lab]) -> Lab:
    """The same runs in a home of their own; the store's absolute artifact locations are moved too."""
    new = make_lab(bare=True)
    shutil.copytree(lab.home, new.home, dirs_exist_ok=True)
    with closing(sqlite3.connect(new.home / "mlflow.db")) as store, store:
        for table, column in (("experiments", "artifact_location"), ("runs", "artifact_uri")):
            store.execute(
                f"UPDATE {table} SET {column} = replace({column}, ?, ?)", (str(lab.home), str(new.home))
            )
    return new

"""One folder for all runs, and locks that die with their holder."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vitlab import home as place
from vitlab.config import UserError
from vitlab.home import git_sha, home, locked, repository

HOLD = """
import sys, time
from pathlib import Path
from vitlab.home import locked
with locked(Path(sys.argv[1])) as mine:
    print(mine, flush=True)
    time.sleep(60)
"""


def test_home_is_what_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITLAB_HOME", str(tmp_path))
    assert home() == tmp_path


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("runs", "absolute path"),
        ("./x", "absolute path"),
        ("~/x", "absolute path"),
        ("/a#b", "without %, ? and #"),
    ],
)
def test_home_must_be_a_plain_absolute_path(given: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITLAB_HOME", given)
    with pytest.raises(UserError, match=f"VITLAB_HOME: given '{given}'; it must be .*{re.escape(says)}"):
        home()


@pytest.mark.parametrize("given", [None, ""])
def test_without_it_home_is_in_the_checkout(
    given: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VITLAB_HOME", raising=False)
    if given is not None:
        monkeypatch.setenv("VITLAB_HOME", given)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(place, "repository", lambda: tmp_path / "checkout")
    assert home() == tmp_path / "checkout" / "runs"


def test_without_it_and_without_a_checkout_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VITLAB_HOME", raising=False)
    monkeypatch.setattr(place, "repository", lambda: None)
    with pytest.raises(UserError, match="VITLAB_HOME: not set; name the absolute folder"):
        home()


def test_the_checkout_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = repository()
    assert found is None or (found / "vitlab" / "home.py").is_file()


def test_git_sha(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VITLAB_GIT_SHA", raising=False)
    monkeypatch.setattr(place, "repository", lambda: tmp_path)
    assert git_sha() == "unknown"

    def git(*words: str) -> str:
        call = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *words]
        return subprocess.run(call, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-q", "-m", "x")
    assert git_sha() == git("rev-parse", "HEAD")
    (tmp_path / "a").write_text("2")
    assert git_sha() == git("rev-parse", "HEAD") + "-dirty"
    monkeypatch.setattr(place.shutil, "which", lambda name: None)
    assert git_sha() == "unknown"
    monkeypatch.setenv("VITLAB_GIT_SHA", "abc")
    assert git_sha() == "abc"


def test_a_lock_has_one_holder_and_dies_with_it(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "x.lock"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "True\n"
        with locked(path, wait=False) as mine:
            assert not mine
        os.kill(other.pid, signal.SIGKILL)
        other.wait()
    begin = time.monotonic()
    with locked(path) as mine:
        assert mine
        with locked(path, wait=False) as again:
            assert not again
    assert time.monotonic() - begin < 10  # not the 60 s that the dead one would have held it
    with locked(path, wait=False) as mine:
        assert mine


def test_a_failure_frees_the_lock(tmp_path: Path) -> None:
    with pytest.raises(BlockingIOError, match="of the block itself"), locked(tmp_path / "l"):
        raise BlockingIOError("of the block itself")
    with locked(tmp_path / "l", wait=False) as mine:
        assert mine

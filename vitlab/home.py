"""Where a user's runs live: one absolute folder, the same from a shell and from inside a Ray job.

`VITLAB_HOME` if it is set, else `runs/` of the repository that vitlab is installed from. A Ray job runs
in a temporary copy of the working directory, so neither the current directory nor `__file__` will do:
the editable installation remembers where the repository is.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlparse

from vitlab.config import UserError


def repository() -> Path | None:
    """The checkout that vitlab is installed from, if it is an editable installation."""
    # A build folder in the working directory describes the same package, without saying where it is from.
    notes = (d.read_text("direct_url.json") for d in importlib.metadata.distributions(name="vitlab"))
    source = json.loads(next((note for note in notes if note), "{}"))
    if not source.get("dir_info", {}).get("editable"):
        return None
    path = Path(unquote(urlparse(source["url"]).path))
    return path if path.is_dir() else None


def home() -> Path:
    given = os.environ.get("VITLAB_HOME")
    if given:
        if not Path(given).is_absolute():
            raise UserError(f"VITLAB_HOME: given {given!r}; it must be an absolute path, as in /data/vitlab")
        if set(given) & set("%?#"):  # MLflow reads the path as an address and takes these for its signs
            raise UserError(f"VITLAB_HOME: given {given!r}; it must be a path without %, ? and #")
        return Path(given)
    root = repository()
    if root is None:
        raise UserError(
            "VITLAB_HOME: not set; name the absolute folder for runs: export VITLAB_HOME=/data/vitlab"
        )
    return root / "runs"


def git_sha() -> str:
    """The commit of the code as the person who started the run has it; `-dirty` if it was changed."""
    if "VITLAB_GIT_SHA" in os.environ:
        return os.environ["VITLAB_GIT_SHA"]
    root = repository()
    if root is None or not (root / ".git").exists() or shutil.which("git") is None:
        return "unknown"
    git = ["git", "-C", str(root)]
    sha = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)  # noqa: S603
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=False)  # noqa: S603
    if sha.returncode:
        return "unknown"
    return sha.stdout.strip() + ("-dirty" if changed.stdout.strip() else "")


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Holds the kernel's lock on a file; yields False if `wait` is off and somebody else has it.

    The kernel frees the lock with its holder, however that one dies, so a lock is never stale.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True

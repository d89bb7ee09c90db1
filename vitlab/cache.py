"""What has already been done: the content key of a stage, its lease, and what to make of earlier runs.

The key is the sha256 of the stage's name and revision, the part of its config that decides the result,
and the digests of its inputs. A finished run with the key whose artifact is really there is a hit; an
unfinished one is gone on with; else the stage runs. One process at a time may work on a key: it holds a
lock that the kernel frees when it dies, however it dies.
"""

from __future__ import annotations

import json
import math
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vitlab.config import Config, deciding, digest
from vitlab.home import locked
from vitlab.tracking import Store, folder_digest

LOOK_EVERY = 0.5  # seconds between two looks at a lease that another process holds
TELL_EVERY = 30.0  # seconds between two words about who holds it


@dataclass(frozen=True)
class Artifact:
    """What one stage hands to the next: a folder of a run, and the digest of its content."""

    run_id: str
    path: str  # inside the run's artifacts
    digest: str
    folder: Path  # a local copy

    @property
    def uri(self) -> str:
        return f"runs:/{self.run_id}/{self.path}"


@dataclass(frozen=True)
class Claim:
    """The right to work on a key, and what earlier work there is."""

    key: str
    artifact: Artifact | None  # of a hit
    metrics: dict[str, float]  # of a hit
    unfinished: str | None  # the run to go on with


def content_key(stage: str, revision: int, config: Config, inputs: Mapping[str, str]) -> str:
    return digest({"stage": stage, "revision": revision, "config": deciding(config), "inputs": dict(inputs)})


@contextmanager
def claim(store: Store, key: str, waiting: Callable[[str], None]) -> Iterator[Claim]:
    """Waits until this process may work on the key, then says what is there. Held to the end of the block."""
    lease = store.home / "leases" / f"{key}.lock"
    with _lease(lease, waiting):
        yield _look(store, key)


@contextmanager
def _lease(path: Path, waiting: Callable[[str], None]) -> Iterator[None]:
    told = -math.inf
    while True:
        with locked(path, wait=False) as mine:
            if mine:
                holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.time()}
                path.write_text(json.dumps(holder))
                yield
                return
        if time.monotonic() - told > TELL_EVERY:
            told = time.monotonic()
            waiting(_holder(path))
        time.sleep(LOOK_EVERY)


def _holder(path: Path) -> str:
    try:
        found = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):  # its holder is just writing it
        return "another process"
    return f"process {found['pid']} on {found['host']}, at work for {time.time() - found['since']:.0f} s"


def _look(store: Store, key: str) -> Claim:
    """A finished run whose artifact was deleted or changed counts for nothing: it is never gone on with.

    An unfinished run may be older than such a one; going on with it is right all the same, since equal
    keys give equal results. It must have begun in this home folder: only there are its checkpoints, and
    only there does the lease say that nobody is at work on it now.
    """
    runs = store.find({"vitlab.key": key})
    for run in runs:
        if run.status == "FINISHED":
            artifact = present(store, run.run_id, run.tags)
            if artifact:
                return Claim(key, artifact, run.metrics, None)
    ours = (r for r in runs if r.status != "FINISHED" and r.tags.get("vitlab.home") == store.home_id)
    unfinished = next((run.run_id for run in ours), None)
    return Claim(key, None, {}, unfinished)


def present(store: Store, run_id: str, tags: Mapping[str, str]) -> Artifact | None:
    """A run's artifact, if all of it is there and none of it has changed."""
    path, expected = tags.get("vitlab.artifact"), tags.get("vitlab.artifact_digest")
    folder = store.download(run_id, path) if path else None
    if not path or folder is None or folder_digest(folder) != expected:
        return None
    return Artifact(run_id, path, expected, folder)


def publish(store: Store, run_id: str, folder: Path, path: str) -> Artifact:
    """Logs a finished stage's folder; its digest is written last, so half an upload is no artifact.

    What an earlier, killed attempt left there goes first, or it would stay mixed with this one.
    """
    store.clear(run_id, path)
    store.upload(run_id, folder, path)
    found = folder_digest(folder)
    there = store.download(run_id, path)
    if there is None or folder_digest(there) != found:
        raise RuntimeError(f"{path} of run {run_id} was uploaded to {store.uri}, but came back different")
    store.tag(run_id, {"vitlab.artifact": path, "vitlab.artifact_digest": found})
    return Artifact(run_id, path, found, there)


class Fence:
    """Keeps a process that lost its stage (its driver was killed, a new one started) from writing on."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "owner"

    def take(self) -> str:
        token = uuid.uuid4().hex
        self.file.parent.mkdir(parents=True, exist_ok=True)
        part = self.file.with_suffix(".part")
        part.write_text(token)
        part.replace(self.file)
        return token

    def holds(self, token: str) -> bool:
        return self.file.is_file() and self.file.read_text() == token


Outcome = Literal["hit", "resumed", "ran"]

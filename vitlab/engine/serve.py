"""The workers' side of a session: the desk that hands out jobs, and a worker's life.

The desk is an actor beside the driver. It holds the job in work and passes events and results on.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vitlab.config import UserError
from vitlab.dist import World, backend, world_of_group

Post = Callable[[str, Any], None]
Work = Callable[[Any, World, Post], dict[str, Any]]

# What a collective says when the other side has died; anything else is this worker's own fault.
PEER_LOST = (
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "timed out waiting",
    "pair closure",  # gloo
    "communicator was aborted",  # NCCL
    "remote process exited",
)


class Desk:
    """Between the driver and the workers. Jobs are numbered, so that late words are known as such."""

    def __init__(self) -> None:
        self.number, self.closed = 0, False
        self.job: Any = None
        self.finished = True
        self.events: list[tuple[str, Any]] = []
        self.attempts = 0

    async def post(self, job: Any) -> int:
        self.number, self.job, self.finished = self.number + 1, job, False
        return self.number

    async def next(self, rank: int, after: int) -> tuple[int, Any]:
        """The job in work, unless this worker has done it; None when there will be no more."""
        if rank == 0 and after == 0:
            self.attempts += 1
            if self.attempts > 1:
                self.events.append(("restarted", self.attempts))
        while not self.closed and (self.finished or self.number <= after):
            await asyncio.sleep(0.05)
        return self.number, None if self.closed else self.job

    async def event(self, kind: str, payload: Any) -> None:
        self.events.append((kind, payload))

    async def finish(self, number: int, result: dict[str, Any]) -> None:
        self.finished = self.finished or number == self.number
        self.events.append((f"done {number}", result))

    async def fail(self, number: int, payload: dict[str, Any]) -> None:
        self.closed = True
        self.events.append((f"failed {number}", payload))

    async def poll(self) -> list[tuple[str, Any]]:
        events, self.events = self.events, []
        return events

    async def close(self) -> None:
        self.closed = True

    async def is_closed(self) -> bool:
        return self.closed


def serve(config: dict[str, Any]) -> None:
    """A worker's life: fetch a job, do it with the others, fetch the next."""
    import ray
    import torch

    desk, work = config["desk"], config["work"]
    torch.set_num_threads(config["threads"])
    world = world_of_group()
    assert world.size == 1 or torch.distributed.get_backend() == backend(world.device)
    log = _redirect(Path(config["logs"]) / f"worker-{world.rank}.log")
    sys.stdout.write(f"worker {world.rank} of {world.size} on {socket.gethostname()}, pid {os.getpid()}\n")
    sys.stdout.flush()
    number, busy = 0, threading.Event()
    threading.Thread(target=_end_with, args=(desk, busy), name="vitlab-end", daemon=True).start()
    while True:
        busy.clear()
        number, job = ray.get(desk.next.remote(world.rank, number))
        if job is None:
            return
        busy.set()
        try:
            result = work(job, world, lambda kind, payload: desk.event.remote(kind, payload))
            world.barrier()
        except Exception as error:
            traceback.print_exc()
            if not _peer_lost(error):
                failure = {"user": isinstance(error, UserError), "text": first_line(error)}
                ray.get(desk.fail.remote(number, failure | {"where": socket.gethostname(), "log": str(log)}))
            raise
        if world.first:
            ray.get(desk.finish.remote(number, result))


def _end_with(desk: Any, busy: threading.Event) -> None:
    """Ends this worker in the middle of a job that nobody waits for any more; its peers may hang."""
    import ray

    closed = False
    while not (closed and busy.is_set()):
        time.sleep(1)
        try:
            closed = ray.get(desk.is_closed.remote())
        except ray.exceptions.RayError:
            closed = True
    os._exit(1)


def _peer_lost(error: Exception) -> bool:
    from torch.distributed import DistError

    if isinstance(error, DistError):
        return True
    return isinstance(error, RuntimeError | OSError) and any(text in str(error).lower() for text in PEER_LOST)


def _redirect(path: Path) -> Path:
    """Everything that frameworks print on this worker goes to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.close(file)
    return path


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__

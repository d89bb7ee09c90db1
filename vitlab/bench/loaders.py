"""Loader processes: how the rate grows with them, and what they all hold in memory.

Each side runs in a process of its own, the one that would train, which starts the loaders. The two sides'
processes have the same modules loaded and run one after the other; who is first changes from row to row.

What is held is that of the whole tree of processes: memory that several share is counted once (PSS, the
kernel's proportional set size), and so are the pages of libraries and files, as those of the process that has
most of them. Those the kernel would divide by all processes of the machine that use the same library.
"""

from __future__ import annotations

import os
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from vitlab.bench.report import Row

PROC = Path("/proc")
MB = 1e6


class Sizes(Protocol):
    @property
    def batch(self) -> int: ...
    @property
    def steps(self) -> int: ...
    @property
    def loaders(self) -> tuple[int, ...]: ...


Start = Callable[[int], Iterator[Any]]  # number of loaders → batches without an end; must travel by pickle


class Found(NamedTuple):
    seconds: float  # of an image, the median of the rounds
    held: float  # bytes of all processes; 0 where the system does not tell
    loaders: float  # of them, those of the loaders and what else they need


def grown(
    starts: Sequence[Start], peer: str, sizes: Sizes, rounds: int, say: Callable[[str], None]
) -> Iterator[Row]:
    """For each number of loaders, ours and theirs: the cost of an image, and what is held."""
    rows: list[Row] = []
    for turn, loaders in enumerate(sizes.loaders):
        found: dict[Start, Found] = {}
        name = f"{loaders} loader{'s' * (loaders != 1)}"
        for start in starts if turn % 2 == 0 else reversed(starts):
            say(f"{name}: {'vitlab' if start is starts[0] else peer}")
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                found[start] = pool.submit(
                    _measure, start, loaders, sizes.steps, sizes.batch, rounds
                ).result()
        ours, theirs = (found[start] for start in starts)
        more = {"images/s": 1 / ours.seconds, "theirs images/s": 1 / theirs.seconds}
        a, b = 1e3 * ours.seconds, 1e3 * theirs.seconds
        yield Row(f"image, {name}", peer, a, b, "ms", a / b, rounds, more)
        if ours.held and theirs.held:
            more = {"of loaders": ours.loaders / MB, "theirs of loaders": theirs.loaders / MB}
            a, b = ours.held / MB, theirs.held / MB
            rows.append(Row(f"memory, {name}", peer, a, b, "MB", a / b, 1, more))
    yield from rows


def _measure(start: Start, loaders: int, steps: int, batch: int, rounds: int) -> Found:
    """In a process of its own."""
    torch.set_num_threads(1)
    batches = start(loaders)
    each = -(-steps // max(1, loaders)) * max(1, loaders)  # every loader makes as many
    for _ in range(each):
        next(batches)
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        for _ in range(each):
            next(batches)
        times.append((time.perf_counter() - begin) / (each * batch))
    everyone, me = held(os.getpid())
    return Found(statistics.median(times), everyone, everyone - me)


def held(process: int) -> tuple[float, float]:
    """Bytes of a process and its children, and of it alone; zeros where the system does not tell."""
    try:
        found = [_parts(one) for one in tree(process)]
    except FileNotFoundError:
        return 0.0, 0.0
    files = max(mapped for _, mapped in found)
    return sum(own for own, _ in found) + files, sum(found[0])


def _parts(process: int) -> tuple[float, float]:
    """Bytes of its own memory, and of the files that it has mapped."""
    rollup = (PROC / str(process) / "smaps_rollup").read_text("utf8")
    own = sum(int(size) for size in re.findall(r"^Pss_(?:Anon|Shmem): +(\d+) kB", rollup, re.MULTILINE))
    status = (PROC / str(process) / "status").read_text("utf8")
    mapped = re.findall(r"^RssFile:\s+(\d+) kB", status, re.MULTILINE)
    return own * 1024.0, int(mapped[0]) * 1024.0 if mapped else 0.0


def tree(process: int) -> list[int]:
    """It and all that descend from it."""
    children: dict[int, list[int]] = {}
    for stat in PROC.glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text("utf8").rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just ended
        children.setdefault(parent, []).append(int(stat.parent.name))
    found = [process]
    for one in found:  # grows on the way
        found += children.get(one, [])
    return found

"""Sides that take turns, each in a process of its own.

In one process one side would work in the memory that another left behind, and its libraries would share
their state: no user has that.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from typing import Any, NamedTuple, Self

import torch

Start = Callable[[], Iterator[Any]]  # batches without an end; must travel by pickle


class Turns(NamedTuple):
    """How often each side has its turn, and what it makes then."""

    rounds: int
    steps: int
    batch: int


class Turn:
    """A side in a process of its own; a batch stays there."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self.pool = pool

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> None:
        self.pool.submit(_step, 1).result()


_batches: list[Iterator[Any]] = []  # of the side that this process is


@contextmanager
def apart(starts: Mapping[str, Start], warm: int) -> Iterator[dict[str, Iterator[Any]]]:
    """Each side in a process of its own, when it has made some batches."""
    with ExitStack() as stack:
        pools = {
            name: stack.enter_context(
                ProcessPoolExecutor(1, get_context("spawn"), initializer=_become, initargs=(start,))
            )
            for name, start in starts.items()
        }
        for done in [pool.submit(_step, warm) for pool in pools.values()]:
            done.result()
        yield {name: Turn(pool) for name, pool in pools.items()}


def _become(start: Start) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", ResourceWarning)
    _batches.append(start())


def _step(count: int) -> None:
    for _ in range(count):
        next(_batches[0])


def in_turns(
    sides: Mapping[str, Iterator[Any]], turns: Turns, say: Callable[[str], None] = lambda text: None
) -> dict[str, float]:
    """Seconds of an image, medians; who goes first goes last in the next round."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(turns.rounds):
        say(f"one core: round {i + 1} of {turns.rounds}")
        for name in list(sides)[:: -1 if i % 2 else 1]:
            begin = time.perf_counter()
            for _ in range(turns.steps):
                next(sides[name])
            found[name].append((time.perf_counter() - begin) / (turns.steps * turns.batch))
    return {name: statistics.median(seconds) for name, seconds in found.items()}

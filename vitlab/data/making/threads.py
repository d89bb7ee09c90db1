"""Work by threads that keeps its order and holds little. Pillow, hashes and files let threads run at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

AHEAD = 4  # items that are under way, for every thread

T = TypeVar("T")
R = TypeVar("R")


def in_order(work: Callable[[T], R], items: Iterable[T], workers: int) -> Generator[R]:
    """`map` by threads that run no more than a few items ahead; the order of the results is kept."""
    items, waiting = iter(items), deque[Future[R]]()
    with ThreadPoolExecutor(workers, "images") as pool:
        try:
            for item in islice(items, AHEAD * workers):
                waiting.append(pool.submit(work, item))
            while waiting:
                result = waiting.popleft().result()
                waiting.extend(pool.submit(work, item) for item in islice(items, 1))
                yield result
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

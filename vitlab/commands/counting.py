"""A line that counts on stderr, once something takes longer than a moment."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SHOW_AFTER = 2.0  # seconds


@contextmanager
def counting(text: str, total: int, unit: str = "images") -> Iterator[Callable[[int], None]]:
    """Gives what is to be called with every so many more that are done, from any thread."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    rate = TextColumn("{task.fields[rate]:,.0f} " + unit + "/s")
    columns = (TextColumn(text), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn())
    progress = Progress(*columns, console=Console(stderr=True))
    task = progress.add_task("", total=total, rate=0.0)
    begin, lock, done, shown = time.monotonic(), threading.Lock(), 0, 0.0

    def step(more: int) -> None:
        nonlocal done, shown
        with lock:
            done += more
            now = time.monotonic()
            if now - begin < SHOW_AFTER or (now - shown < 0.2 and done < total):
                return
            if not shown:
                progress.start()
            shown = now
            progress.update(task, completed=done, rate=done / (now - begin))

    try:
        yield step
    finally:
        if shown:
            progress.stop()

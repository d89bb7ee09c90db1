"""A line on stderr with count, rate and time left, for what takes longer than a moment."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress

SHOW_AFTER = 2.0  # seconds until the line appears

T = TypeVar("T")


class Meter:
    """Counts what is done; the line appears once it takes a while, and ends with the `with` block."""

    def __init__(self, text: str, unit: str, total: int | None = None, begin: int = 0) -> None:
        self.text, self.unit, self.total = text, unit, total
        self.begin, self.done, self.bytes = begin, begin, 0
        self.since = time.monotonic()
        self.line: Progress | None = None

    def __enter__(self) -> Meter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        if self.line is not None:
            self._update()
            self.line.stop()

    def add(self, size: int = 0) -> None:
        """One more, of so many bytes."""
        self.done += 1
        self.bytes += size
        if self.line is not None:
            self._update()
        elif time.monotonic() - self.since > SHOW_AFTER:
            self.line = self._line()
            self._update()

    def _line(self) -> Progress:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        speed = TextColumn("{task.fields[speed]}")
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), speed)
        line = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))
        line.add_task(self.text, total=self.total, completed=self.begin, speed="")
        line.start()
        return line

    def _update(self) -> None:
        assert self.line is not None
        rate = (self.done - self.begin) / max(time.monotonic() - self.since, 1e-9)
        speed = f"{rate:,.0f} {self.unit}/s" + (f" · {self.bytes / 1e6:,.0f} MB" if self.bytes else "")
        self.line.update(self.line.task_ids[0], completed=self.done, speed=speed)


def shown(items: Iterable[T], text: str, unit: str, total: int | None = None) -> Iterator[T]:
    """The items as they come, counted on a line."""
    with Meter(text, unit, total) as meter:
        for item in items:
            yield item
            meter.add()

"""A line on stderr with count, rate and time left, for what takes longer than a moment."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

SHOW_AFTER = 2.0  # seconds until the line appears
PRINT_EVERY = 10.0  # seconds between two lines where one cannot move

T = TypeVar("T")


class Meter:
    """Counts what is done; the line appears once it takes a while, and ends with the `with` block.

    Where a line cannot move, a new one is printed now and then.
    """

    def __init__(self, text: str, unit: str, total: int | None = None, begin: int = 0) -> None:
        self.text, self.unit, self.total = text, unit, total
        self.begin, self.done, self.bytes = begin, begin, 0
        self.since, self.printed = time.monotonic(), -PRINT_EVERY
        self.console: Console | None = None
        self.line: Progress | None = None

    def __enter__(self) -> Meter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        if self.line is not None:
            self._move(self.line)
            self.line.stop()
        elif self.console is not None:
            self.console.print(self._sentence())

    def add(self, size: int = 0) -> None:
        """One more, of so many bytes."""
        self.done += 1
        self.bytes += size
        now = time.monotonic()
        if self.console is None and now - self.since > SHOW_AFTER:
            self._appear()
        if self.line is not None:
            self._move(self.line)
        elif self.console is not None and now - self.printed >= PRINT_EVERY:
            self.printed = now
            self.console.print(self._sentence())

    def _appear(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.console = Console(stderr=True, soft_wrap=True, highlight=False)
        if self.console.is_terminal:
            speed = TextColumn("{task.fields[speed]}")
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), speed)
            self.line = Progress(*columns, TimeRemainingColumn(), console=self.console)
            self.line.add_task(self.text, total=self.total, completed=self.begin, speed="")
            self.line.start()

    def _move(self, line: Progress) -> None:
        line.update(line.task_ids[0], completed=self.done, speed=self._speed())

    def _rate(self) -> float:
        return (self.done - self.begin) / max(time.monotonic() - self.since, 1e-9)

    def _speed(self) -> str:
        return f"{self._rate():,.0f} {self.unit}/s" + (f" · {self.bytes / 1e6:,.0f} MB" if self.bytes else "")

    def _sentence(self) -> str:
        from vitlab.face import duration

        text = f"  {self.text}: {self.done}"
        if self.total is None:
            return f"{text} {self.unit} · {self._speed()}"
        left = (self.total - self.done) / max(self._rate(), 1e-9)
        ahead = f" · {duration(left)} left" if 0 < left < float("inf") and self.done > self.begin else ""
        return f"{text}/{self.total} · {self._speed()}{ahead}"


def shown(items: Iterable[T], text: str, unit: str, total: int | None = None) -> Iterator[T]:
    """The items as they come, counted on a line."""
    with Meter(text, unit, total) as meter:
        for item in items:
            yield item
            meter.add()

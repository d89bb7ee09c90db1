"""What a person sees while it runs: one live line a stage, and a table of stages at the end.

On a terminal the line moves; elsewhere (a log, a Ray job) a new line is printed every few seconds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

EVERY = 5.0  # seconds between two lines where the line cannot move


@dataclass(frozen=True)
class Row:
    """One stage in the final table."""

    stage: str
    outcome: str  # hit, resumed, ran
    seconds: float
    figure: str
    run_id: str


class Line:
    """The live line of one stage."""

    def __init__(self, face: Face, stage: str, task: TaskID | None) -> None:
        self.face, self.stage, self.task = face, stage, task
        self.printed, self.text = time.monotonic(), ""
        self.shown: dict[str, float] = {}
        self.step = 0
        self.from_step, self.since = 0, time.monotonic()

    def say(self, text: str) -> None:
        """What is being done when no step can be counted."""
        self._show(text, None)
        self.printed = time.monotonic() - EVERY  # the next figure is news

    def note(self, text: str) -> None:
        """Something that stays on the screen."""
        self.face.print(f"  {self.stage}: {text}")

    def progress(self, step: int, total: int, values: dict[str, float]) -> None:
        if step < self.step or not self.step:
            self.from_step, self.since = step, time.monotonic()
        self.step = step
        self.shown |= values
        self._show(self._sentence(total), step / total)

    def _sentence(self, total: int) -> str:
        parts = [f"step {self.step}/{total}"]
        for key, text in (("train/loss", "loss {:.4f}"), ("val/top1", "val top-1 {:.1%}")):
            if key in self.shown:
                parts.append(text.format(self.shown[key]))
        if "train/images_per_s" in self.shown:
            parts.append(f"{self.shown['train/images_per_s']:,.0f} images/s")
        done = self.step - self.from_step
        if done:
            left = (time.monotonic() - self.since) / done * (total - self.step)
            parts.append(f"{duration(left)} left")
        return " · ".join(parts)

    def _show(self, text: str, fraction: float | None) -> None:
        self.text = text
        if self.task is not None:
            assert self.face.bar is not None
            self.face.bar.update(self.task, text=text, completed=100 * (fraction or 0))
        elif time.monotonic() - self.printed >= EVERY or fraction is None:
            self.printed = time.monotonic()
            self.face.print(f"  {self.stage}: {text}")


class Face:
    def __init__(self, console: Console | None = None, quiet: bool = False) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True, quiet=quiet)
        self.bar: Progress | None = None
        self.rows: list[Row] = []

    def print(self, text: str = "") -> None:
        self.console.print(Text(text))

    @contextmanager
    def stage(self, name: str) -> Iterator[Line]:
        if not self.console.is_terminal:
            yield Line(self, name, None)
            return
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(20), TextColumn("{task.fields[text]}"))
        with Progress(*columns, console=self.console, transient=True) as self.bar:
            task = self.bar.add_task(f"{name:<9}", total=100, text="")
            yield Line(self, name, task)
        self.bar = None

    def done(self, row: Row) -> None:
        self.rows.append(row)
        mark = {"hit": "•", "resumed": "↻", "ran": "✓"}.get(row.outcome, " ")
        self.print(f"{mark} {row.stage:<9} {row.outcome:<8} {duration(row.seconds):>7}  {row.figure}")

    def table(self, title: str) -> None:
        table = Table(title=title, title_justify="left", pad_edge=False)
        for name in ("stage", "outcome", "seconds", "result", "run"):
            table.add_column(name, justify="right" if name == "seconds" else "left", no_wrap=name != "result")
        for row in self.rows:
            table.add_row(row.stage, row.outcome, f"{row.seconds:.1f}", row.figure, row.run_id[:8])
        self.console.print()
        self.console.print(table)

    def problem(self, text: str) -> None:
        """The one line that ends a run that cannot go on."""
        self.console.print(Text(f"vitlab: {text}", style="bold red"))


def duration(seconds: float) -> str:
    """`42 s`, `3:07 min`, `1:02 h`."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 9.95 else f"{seconds:.1f} s"
    minutes = math.floor(seconds / 60)
    return f"{minutes}:{seconds % 60:02.0f} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d} h"

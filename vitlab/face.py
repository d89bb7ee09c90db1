"""What a person sees while it runs: one live line a stage, and a table of stages at the end.

On a terminal the line moves; elsewhere (a log, a Ray job) a new line is printed every few seconds.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

EVERY = 5.0  # seconds between two lines where the line cannot move
NAME = 16  # columns for a stage's name
SENTENCE = {
    "train/loss": "loss {:.4f}",
    "val/top1": "val top-1 {:.1%}",
    "probe/knn_top1": "kNN top-1 {:.1%}",
    "train/images_per_s": "{:,.0f} images/s",
}


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

    def __init__(self, face: Face, stage: str, bar: Progress | None) -> None:
        self.face, self.stage, self.bar = face, stage, bar
        self.task = bar.add_task(stage, total=1.0, text="") if bar else TaskID(0)
        self.printed, self.text = time.monotonic(), ""
        self.shown: dict[str, float] = {}
        self.step = 0
        self.from_step, self.since = 0, time.monotonic()

    def say(self, text: str) -> None:
        """What is being done when no step can be counted."""
        if text == self.text:
            return
        self.text = text
        if self.bar is not None:
            self.bar.update(self.task, text=_cut(text, self._room()), refresh=True)
        else:
            self.face.print(f"  {self.stage}: {text}")
            self.printed = time.monotonic() - EVERY  # the next figure is news

    def note(self, text: str) -> None:
        """Something that stays on the screen."""
        self.face.print(f"  {self.stage}: {text}")

    def progress(self, step: int, total: int, values: dict[str, float]) -> None:
        if step < self.step or not self.step:  # the first, or again from a checkpoint
            self.from_step, self.since = step, time.monotonic()
        self.step = step
        self.shown |= values
        if self.bar is not None:
            self.text = self._sentence(total, self._room())
            self.bar.update(self.task, text=self.text, completed=step / max(total, 1))
        elif time.monotonic() - self.printed >= EVERY:
            self.printed = time.monotonic()
            self.text = self._sentence(total, None)
            self.face.print(f"  {self.stage}: {self.text}")

    def _sentence(self, total: int, room: int | None) -> str:
        """All there is to say, or as much as there is room for."""
        parts = {"step": f"step {self.step}/{total}"}
        for key, text in SENTENCE.items():
            if key in self.shown:
                parts[key] = text.format(self.shown[key])
        done = self.step - self.from_step
        if done and self.step < total:
            left = (time.monotonic() - self.since) / done * (total - self.step)
            parts["left"] = f"{duration(left)} left"
        for name in (
            "train/images_per_s",
            "train/loss",
            "probe/knn_top1",
            "val/top1",
            "left",
        ):  # what is missed least goes first
            if room is None or len(" · ".join(parts.values())) <= room:
                break
            parts.pop(name, None)
        return " · ".join(parts.values())

    def _room(self) -> int:
        """Columns of the terminal that spinner, name and bar leave."""
        return self.face.console.width - len(self.stage) - self.face.bar_width() - 4


class Face:
    def __init__(self, console: Console | None = None, quiet: bool = False) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True, quiet=quiet)
        self.rows: list[Row] = []

    def print(self, text: str = "") -> None:
        self.console.print(Text(text))

    def bar_width(self) -> int:
        return 20 if self.console.width >= 100 else 6

    @contextmanager
    def stage(self, name: str) -> Iterator[Line]:
        if not self.console.is_terminal:
            yield Line(self, name, None)
            return
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(self.bar_width()),
            TextColumn("{task.fields[text]}", markup=False),
        )
        with Progress(*columns, console=self.console, transient=True) as bar:
            yield Line(self, name, bar)

    @contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """Says what takes a while: beside a spinner on a terminal, in a line elsewhere."""
        if self.console.is_terminal:
            with self.console.status(Text(text)):
                yield
        else:
            self.print(f"  {text}")
            yield

    def done(self, row: Row) -> None:
        self.rows.append(row)
        mark = {"hit": "•", "resumed": "↻", "ran": "✓"}.get(row.outcome, " ")
        self.print(f"{mark} {row.stage:<{NAME}} {row.outcome:<8} {duration(row.seconds):>8}  {row.figure}")

    def table(self, title: str) -> None:
        table = Table(title=title, title_justify="left", title_style="bold", pad_edge=False, box=SIMPLE_HEAD)
        for name in ("stage", "outcome", "seconds", "result", "run"):
            table.add_column(name, justify="right" if name == "seconds" else "left", no_wrap=name != "result")
        for row in self.rows:
            table.add_row(row.stage, row.outcome, f"{row.seconds:.1f}", row.figure, row.run_id[:8])
        self.console.print()
        self.console.print(table)

    def listing(self, columns: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> None:
        """Rows below each other as they come; the first `left` columns are words, the others numbers."""
        table = Table(pad_edge=False, box=SIMPLE_HEAD)
        for i, name in enumerate(columns):
            table.add_column(name, justify="left" if i < left else "right", no_wrap=True)
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        self.console.print(table)

    def problem(self, text: str) -> None:
        """The one line that ends a run that cannot go on."""
        self.console.print(Text(f"vitlab: {text}", style="bold red"))


def _cut(text: str, room: int) -> str:
    return text if len(text) <= room else text[: max(room - 1, 0)] + "…"


def duration(seconds: float) -> str:
    """`4.2 s`, `42 s`, `3:07 min`, `1:02 h`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes}:{rest:02d} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d} h"

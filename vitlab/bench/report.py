"""What every benchmark has: taking turns, a row of figures, a table for people and JSON for programs."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

Seconds = Callable[[], float]  # does the work once and says how long it took


@dataclass(frozen=True)
class Row:
    """`ours` and `theirs` are medians of `rounds` rounds, in `unit`; `more` are further figures."""

    case: str
    peer: str
    ours: float
    theirs: float
    unit: str
    ratio: float
    rounds: int
    more: dict[str, float] = field(default_factory=dict)


def alternate(ours: Seconds, theirs: Seconds, rounds: int) -> tuple[float, float]:
    """Medians of both sides, which take turns at going first; a round before them warms up."""
    ours(), theirs()
    found: dict[Seconds, list[float]] = {ours: [], theirs: []}
    for i in range(rounds):
        for side in (ours, theirs) if i % 2 else (theirs, ours):
            found[side].append(side())
    return statistics.median(found[ours]), statistics.median(found[theirs])


def machine(device: torch.device, threads: int) -> dict[str, Any]:
    """What the figures depend on."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads,
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
    }


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text("utf8").splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def write_json(path: Path, bench: str, rows: Sequence[Row], device: torch.device, threads: int) -> None:
    tree = {"bench": bench, "machine": machine(device, threads), "rows": [asdict(row) for row in rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree, indent=2) + "\n", "utf8")


def print_rows(title: str, rows: Sequence[Row], console: Console | None = None) -> None:
    """A line a case; further figures stand below it, as no screen is as wide as all of them."""
    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left", title_style="bold")
    words = (word for row in rows for word in row.case.split())
    table.add_column("case", min_width=max(map(len, words), default=0))  # cut between words alone
    table.add_column("peer")
    unit = rows[0].unit if rows else ""
    for name in (f"ours ({unit})", f"theirs ({unit})", "ratio", "rounds"):
        table.add_column(name, justify="right")
    for row in rows:
        figures = (f"{row.ours:.4g}", f"{row.theirs:.4g}", f"{row.ratio:.3f}", str(row.rounds))
        table.add_row(row.case, row.peer, *figures)
    out = console or Console()
    out.print(table)
    for row in rows:
        if row.more:
            out.print(f"{row.case}: " + ", ".join(f"{name} {value:,.3g}" for name, value in row.more.items()))
    if rows:
        ratios = [row.ratio for row in rows]
        out.print(
            f"median ratio {statistics.median(ratios):.3f}, largest {max(ratios):.3f} (below 1 is better)"
        )

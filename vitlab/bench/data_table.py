"""What `vitlab bench data` shows: one table, and in words what of it was wanted."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from vitlab.bench.data import DataOptions
from vitlab.bench.photos import HEIGHT, WIDTH
from vitlab.bench.report import Row


def print_data(rows: Sequence[Row], options: DataOptions, console: Console | None = None) -> None:
    """A line a comparison; `met` and `missed` in its last column, and below it all rates."""
    table = Table(
        title="bench data",
        box=SIMPLE_HEAD,
        title_justify="left",
        title_style="bold",
        pad_edge=False,
        collapse_padding=True,
    )
    for name in ("of", "peer", "ours", "theirs", "ratio", "at most"):
        table.add_column(name, justify="left" if name in ("of", "peer") else "right", no_wrap=True)
    for row in rows:
        figures = (_figure(row.ours, row.unit), _figure(row.theirs, row.unit), f"{row.ratio:.3f}")
        table.add_row(row.case, _name(row), *figures, _verdict(row))
    out = console or Console(highlight=False)
    out.print(table)
    for line in sentences(rows, options):
        out.print(line, markup=False)


def _figure(value: float, unit: str) -> str:
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


def _name(row: Row) -> str:
    """The peer without its version, which is told below."""
    name, _, rest = row.peer.partition(" ")
    return name if rest[:1].isdigit() else row.peer


def wanted(row: Row) -> tuple[float, float, str] | None:
    """The figure that has a target, the target, and its unit; none for most."""
    if "target ratio" in row.more:
        return row.ratio, row.more["target ratio"], ""
    if "target s" in row.more:
        return row.ours, row.more["target s"], " s"
    return None


def _verdict(row: Row) -> str:
    aim = wanted(row)
    if aim is None:
        return ""
    figure, target, unit = aim
    return f"{target:.2f}{unit} " + ("[green]met[/]" if figure <= target else "[red]missed[/]")


def sentences(rows: Sequence[Row], options: DataOptions) -> list[str]:
    cores = [row for row in rows if "theirs MB/s" in row.more]
    more = cores[0].more
    rates = [f"vitlab {more['images/s']:,.0f} ({more['MB/s']:.1f} MB/s)"]
    rates += [_rate(row) for row in cores]
    grown = [row for row in rows if row.case.startswith("image,") and row not in cores]
    lines = [
        f"{options.images} photographs of {WIDTH}×{HEIGHT}, {more['file kB']:.0f} kB each, to batches of "
        f"{options.batch} of {options.image_size} pixels; medians of {_times(cores[0].rounds)}",
        f"images/s, one core (1 thread, no loaders): {', '.join(rates)}",
    ]
    for key, name in (("images/s", "vitlab"), ("theirs images/s", "torchvision")):
        found = [f"{row.case.removeprefix('image, ')} {row.more[key]:,.0f}" for row in grown]
        lines += [f"images/s, {name}: {', '.join(found)}"] if found else []
    aims = [aim for row in rows if (aim := wanted(row)) is not None]
    met = sum(figure <= target for figure, target, _ in aims)
    lines.append(f"peers: {', '.join(row.peer for row in cores)}")
    return [*lines, f"{met} of {len(aims)} targets met"]


def _times(rounds: int) -> str:
    return f"{rounds} round{'s' * (rounds != 1)}"


def _rate(row: Row) -> str:
    alone = ", which only decodes," if row.case.startswith("decoding") else ""
    return f"{_name(row)}{alone} {row.more['theirs images/s']:,.0f} ({row.more['theirs MB/s']:.1f} MB/s)"

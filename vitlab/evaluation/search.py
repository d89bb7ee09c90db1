"""The picture of a search: what each setting did to the figure that was searched for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from vitlab.evaluation.pictures import blank_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Trial(NamedTuple):
    """One sampled setting and how far it came."""

    choice: dict[str, Any]
    figure: float
    epochs: float
    run_id: str | None  # None: stopped early


def search_figure(trials: list[Trial], metric: str, logs: set[str], lowest: bool = False) -> Figure:
    """One panel a setting, one dot a trial; hollow dots were stopped early.

    `logs` are the settings on a log axis; `lowest`: the best is the lowest.
    """
    from matplotlib.ticker import NullFormatter

    names = sorted({name for trial in trials for name in trial.choice})
    figure = blank_figure(3.2 * len(names), 3.0)
    whole = [trial for trial in trials if trial.run_id]
    best = (min if lowest else max)(whole, key=lambda trial: trial.figure, default=None)
    for i, name in enumerate(names):
        axes = figure.add_subplot(1, len(names), i + 1)
        for trial in sorted(trials, key=lambda trial: trial is best):  # the best on top
            color = "#c0392b" if trial is best else "#1f4e79"
            face = color if trial.run_id else "none"
            value = trial.choice[name]
            value = value if isinstance(value, int | float) else str(value)
            axes.scatter(value, trial.figure, s=36, edgecolors=color, facecolors=face)
        if name in logs:
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(name)
        axes.grid(alpha=0.3)
        if i == 0:
            axes.set_ylabel(metric)
    figure.suptitle(f"{len(trials)} trials · red is the best · hollow was stopped early", fontsize=10)
    return figure

"""The same chain for several variants under several seeds, and a table of what came out.

    for exp in each(run):        # in a pipeline: every variant under every seed, itself an experiment
        model = run.finetune(exp.need("finetune"), data=shards)
        run.evaluate(exp.evaluate, data=shards, model=model)

Without a `compare` section that is the experiment itself, once. Every stage stands under its own content
key, so a comparison that was cut off goes on, and a new seed or variant costs only itself.
"""

from __future__ import annotations

import csv
import io
import math
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from vitlab.config import UserError, build, resolved
from vitlab.evaluation.comparison import comparison_figure
from vitlab.evaluation.pictures import save_figure
from vitlab.experiment import Experiment, check_shards
from vitlab.sections import changed
from vitlab.stages import Run

PLAIN = "as it is"  # the name of the only variant where none are given
SECTIONS = ("adopt", "tokenizer", "pretrain", "finetune", "distill", "evaluate")  # that variants may change
LEFT_OUT = ("images", "images_per_s")  # figures that say nothing about a model


class Trial(NamedTuple):
    variant: str
    seed: int
    experiment: Experiment


class Figures(NamedTuple):
    """One figure of one evaluation over the seeds."""

    row: str
    figure: str
    values: list[float]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float:
        """Standard deviation of a sample; one seed has none."""
        return statistics.stdev(self.values) if len(self.values) > 1 else math.nan

    def __str__(self) -> str:
        """Shares in percent, anything else as it is."""
        unit = 100 if percent(self.figure) else 1
        mean = f"{unit * self.mean:.2f}"
        return f"{mean} ± {unit * self.spread:.2f}" if len(self.values) > 1 else mean


def percent(figure: str) -> bool:
    """Whether a figure is a share of images."""
    return "top" in figure or figure.startswith("lowshot_")


def trials(experiment: Experiment) -> list[Trial]:
    """Every variant under every seed; a variant that cannot be is an error now, not after hours."""
    plan = experiment.compare
    if plan is None:
        return [Trial("", experiment.seed, experiment)]
    tree, found = resolved(experiment) | {"compare": None}, []
    for variant, changes in (plan.variants or {PLAIN: {}}).items():
        for key in changes:
            if key.partition(".")[0] not in SECTIONS:
                raise UserError(
                    f"compare.variants: {variant}: {key}: all variants share it; "
                    f"allowed: keys below {', '.join(SECTIONS)}"
                )
        for seed in plan.seeds:
            try:
                whole = build(Experiment, changed(tree, changes | {"seed": seed}))
            except UserError as error:
                raise UserError(f"compare.variants: {variant}: {error}") from None
            found.append(Trial(variant, seed, whole))
    return found


def each(run: Run) -> Iterator[Experiment]:
    """The experiments to run, one after the other; the table comes after the last one."""
    experiment = run.experiment
    if experiment.compare is None:
        yield experiment
        return
    plan, values = trials(experiment), dict[tuple[str, str], list[float]]()
    for trial in plan:
        if run.images is not None:
            check_shards(trial.experiment, run.images, evaluates=True)
    for number, trial in enumerate(plan, 1):
        run.face.print(f"{number}/{len(plan)} · {trial.variant} · seed {trial.seed}")
        with run.under(trial.experiment, f"{trial.variant} · seed {trial.seed}") as done:
            yield trial.experiment
        for label, metrics in done.items():
            row = trial.variant if label == "evaluate" else f"{trial.variant} · {label}"
            row = row.removeprefix(f"{PLAIN} · ").removeprefix("evaluate ")
            for name, value in metrics.items():
                if name.startswith("eval/") and name.count("/") == 1:
                    values.setdefault((row, name.removeprefix("eval/")), []).append(value)
    _publish(run, [Figures(*key, found) for key, found in values.items() if key[1] not in LEFT_OUT])


def _publish(run: Run, figures: list[Figures]) -> None:
    """The table on the screen, and with its picture in the pipeline's MLflow run."""
    if not figures:
        raise UserError("compare: this pipeline evaluates nothing, so there is nothing to compare")
    names = list(dict.fromkeys(f.figure for f in figures))
    rows = list(dict.fromkeys(f.row for f in figures))
    cells = {(f.row, f.figure): f for f in figures}
    seeds = max(len(f.values) for f in figures)
    run.face.print(f"\nmean ± standard deviation over {seeds} seeds; top-1 and the like in percent")
    table = [[row, *(str(cells.get((row, name), "")) for name in names)] for row in rows]
    run.face.listing(["variant", *names], table)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["variant", "figure", "mean", "standard deviation", "values by seed"])
    for f in figures:
        writer.writerow([f.row, f.figure, f"{f.mean:.6f}", f"{f.spread:.6f}", " ".join(map(str, f.values))])
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "comparison.csv").write_text(text.getvalue(), "utf8")
        units = {name: 100 if percent(name) else 1 for name in names}
        points = [
            (
                f.row,
                f"{f.figure}, %" if percent(f.figure) else f.figure,
                [units[f.figure] * v for v in f.values],
            )
            for f in figures
        ]
        title = f"{run.experiment.name} · held-out figures, a dot a seed, a line the mean"
        save_figure(comparison_figure(points, title), folder / "comparison.png")
        run.store.upload(run.run_id, folder, "comparison")
    run.store.metrics(run.run_id, {f"{_plain(f.row)}/{f.figure}_mean": f.mean for f in figures})


def _plain(row: str) -> str:
    """A name that MLflow takes: of `·` and its like it has none."""
    return "".join(c if c.isalnum() or c in "_-. " else "-" for c in row)

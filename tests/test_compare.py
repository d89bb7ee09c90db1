"""A chain over variants and seeds: each is its own experiment, and the table holds what they measured."""

from __future__ import annotations

import csv
import statistics
from pathlib import Path

import pytest
from rich.console import Console

import vitlab
from vitlab.compare import Figures, each, trials
from vitlab.config import UserError, build, resolved
from vitlab.evaluation.comparison import comparison_figure
from vitlab.experiment import Experiment
from vitlab.face import Face

TINY = Path(__file__).parent / "integration" / "tiny.yaml"
LOCAL = ["cluster.workers=0", "cluster.zero=null", "tune=null", "pretrain=null", "distill=null"]
VARIANTS = "{slow: {finetune.optim.lr: 1.0e-6}, fast: {finetune.optim.lr: 2.0e-3}}"


def read(*more: str) -> Experiment:
    return vitlab.read(TINY, [*LOCAL, *more])


def test_every_variant_under_every_seed() -> None:
    found = trials(read(f"compare={{seeds: [3, 5], variants: {VARIANTS}}}"))
    assert [(t.variant, t.seed) for t in found] == [("slow", 3), ("slow", 5), ("fast", 3), ("fast", 5)]
    for trial in found:
        assert trial.experiment.seed == trial.seed
        assert trial.experiment.need("finetune").optim.lr == {"slow": 1e-6, "fast": 2e-3}[trial.variant]
    plain = trials(read("compare={seeds: [7]}"))
    assert [resolved(t.experiment) for t in plain] == [resolved(read("seed=7"))]


@pytest.mark.parametrize(
    ("compare", "line"),
    [
        ("{seeds: [1, 1]}", r"seeds: given \[1, 1\]; allowed: different numbers from 0"),
        ("{variants: {a: {finetune.optim.lrr: 1}}}", "compare.variants: a: finetune.optim.lrr: unknown key"),
        ("{variants: {a: {data.image_size: 4}}}", "a: data.image_size: all variants share it"),
        ("{variants: {a: {seed: 4}}}", "a: seed: all variants share it"),
    ],
)
def test_what_cannot_be_compared(compare: str, line: str) -> None:
    with pytest.raises(UserError, match=line):
        trials(read(f"compare={compare}"))


@pytest.mark.usefixtures("home")
def test_the_table() -> None:
    exp = read(f"compare={{seeds: [0, 1], variants: {VARIANTS}}}", "finetune.epochs=2")
    console = Console(record=True, width=120, quiet=True)
    with vitlab.Run(exp, "train_then_evaluate", face=Face(console)) as run:
        shards = run.shards(exp.data)
        for trial in each(run):
            model = run.finetune(trial.need("finetune"), data=shards)
            run.evaluate(trial.evaluate, data=shards, model=model)
        uploaded = run.store.download(run.run_id, "comparison")
    assert uploaded is not None
    with (uploaded / "comparison.csv").open() as file:
        rows = {(r["variant"], r["figure"]): r for r in csv.DictReader(file)}
    assert set(rows) == {(v, f) for v in ("slow", "fast") for f in ("top1", "top5")}
    for row in rows.values():
        values = [float(v) for v in row["values by seed"].split()]
        assert len(values) == 2
        assert float(row["mean"]) == pytest.approx(statistics.fmean(values), abs=1e-6)
        assert float(row["standard deviation"]) == pytest.approx(statistics.stdev(values), abs=1e-6)
    assert float(rows["fast", "top1"]["mean"]) > float(rows["slow", "top1"]["mean"])
    assert (uploaded / "comparison.png").stat().st_size > 1000
    labels = [row.stage for row in run.face.rows]
    assert labels[:2] == ["slow · seed 0 · finetune", "slow · seed 0 · evaluate"]
    assert len(labels) == 8


@pytest.mark.usefixtures("home")
def test_a_chain_that_evaluates_nothing() -> None:
    with (
        pytest.raises(UserError, match="evaluates nothing"),
        vitlab.Run(read("compare={}"), "notebook", face=Face(quiet=True)) as run,
    ):
        assert len(list(each(run))) == 1


def test_words_for_a_mean() -> None:
    assert str(Figures("a", "top1", [0.5, 0.7])) == "60.00 ± 14.14"
    assert str(Figures("a", "top1", [0.5])) == "50.00"
    assert str(Figures("a", "rank", [2.0, 4.0])) == "3.00 ± 1.41"


def test_the_picture() -> None:
    figure = comparison_figure([("a", "top1", [0.5, 0.7]), ("b", "top1", [0.9]), ("b", "knn", [1.0])], "t")
    assert [axes.get_xlabel() for axes in figure.axes] == ["top1", "knn"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["b", "a"]


def test_without_a_comparison_it_is_the_experiment() -> None:
    exp = build(Experiment, resolved(read()))
    assert [t.experiment for t in trials(exp)] == [exp]

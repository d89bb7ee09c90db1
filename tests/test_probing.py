"""Probes of a whole stage, and an encoder that is judged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import vitlab
from vitlab import Run
from vitlab.cache import Artifact
from vitlab.config import UserError, build
from vitlab.evaluation import EvaluateConfig, ProbeConfig
from vitlab.evaluation.feature_pictures import map_figure, principal
from vitlab.evaluation.features import Found
from vitlab.evaluation.probe import collapse, probe_figures
from vitlab.face import Face
from vitlab.jobs.naming import figured

TINY = Path(__file__).parent / "integration" / "tiny.yaml"
ALONE = ("cluster.workers=0", "cluster.zero=null", "pretrain.epochs=3")
NAMES = {"probe/knn_top1", "probe/linear_top1", "probe/rank", "probe/std"}


# ---------------------------------------------------------------- figures


def clouds(n: int, seed: int) -> Found:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (n,), generator=generator)
    return Found(
        torch.eye(3, 8)[labels] + 0.2 * torch.randn(n, 8, generator=generator), labels, torch.arange(n)
    )


def test_figures_need_labels_on_both_sides() -> None:
    bank, queries, config = clouds(90, 0), clouds(30, 1), ProbeConfig()
    nameless = queries._replace(labels=torch.full((30,), -1))
    found = dict(probe_figures(bank, queries, 3, config))
    assert found.keys() == NAMES
    assert min(found["probe/knn_top1"], found["probe/linear_top1"]) > 0.9
    for asked in (None, nameless):
        assert dict(probe_figures(bank, asked, 3, config)).keys() == {"probe/rank", "probe/std"}
    less = dict(probe_figures(bank, queries, 3, ProbeConfig(knn=0, linear=False)))
    assert less.keys() == {"probe/rank", "probe/std"}


def test_collapse_is_told_in_one_line() -> None:
    same = Found(torch.ones(20, 8), torch.zeros(20, dtype=torch.int64), torch.arange(20))
    line = collapse(dict(probe_figures(same, None, 3, ProbeConfig())), 8)
    assert line is not None
    assert line.startswith("the features have collapsed (effective rank 1.00 of 8)")
    assert "\n" not in line
    assert collapse(dict(probe_figures(clouds(90, 0), None, 3, ProbeConfig())), 8) is None


def test_which_figure_stands_for_a_stage() -> None:
    metrics = {"train/loss": 1.0, "val/loss": 2.0, "probe/linear_top1": 0.9, "probe/knn_top1": 0.8}
    assert figured(metrics, "held_out") == "validation kNN top-1 80.00%"
    assert figured(metrics | {"val/top1": 0.7}, "held_out") == "validation top-1 70.00%"
    assert figured({"eval/linear_top1": 0.9, "eval/knn_top1": 0.8}, "val") == "val kNN top-1 80.00%"
    few = {"eval/lowshot_10_top1": 0.7, "eval/lowshot_2_top1": 0.6, "eval/lowshot_2_std": 0.1}
    assert figured(few, "held_out") == "held-out 2-shot top-1 60.00%"


# ---------------------------------------------------------------- the stages


def trained(*more: str) -> tuple[Artifact, dict[str, float], dict[str, list[int]]]:
    """(model, last figures, the steps of each figure) of a pretraining."""
    exp = vitlab.read(TINY, [*ALONE, *more])
    with Run(exp, face=Face(quiet=True)) as run:
        artifact = run.pretrain(exp.need("pretrain"), data=run.shards(exp.data))
        metrics = run.done["pretrain"].metrics
        history = run.store.client.get_metric_history
        return artifact, metrics, {n: [p.step for p in history(artifact.run_id, n)] for n in metrics}


@pytest.fixture(scope="module")
def probed(shared_home: Path) -> tuple[Artifact, dict[str, float], dict[str, list[int]]]:
    return trained("pretrain.probe.every=2")


def test_figures_come_at_their_epochs_and_at_the_end(probed: Any) -> None:
    _, metrics, steps = probed
    for name in NAMES:
        assert steps[name] == [18, 27], "9 steps an epoch: after the second and the last"
    assert steps["val/loss"] == [9, 18, 27]
    assert 0.3 < metrics["probe/linear_top1"] <= 1
    assert 1 <= metrics["probe/rank"] <= 32


def test_probes_are_no_part_of_the_key(probed: Any) -> None:
    artifact, _, _ = trained("pretrain.probe={every: 1, bank: 100, knn: 3, linear: false}")
    assert artifact.run_id == probed[0].run_id


def evaluated(model: Artifact, *more: str) -> tuple[dict[str, float], Path, Path]:
    """(figures, report, pictures) of an evaluation."""
    exp = vitlab.read(TINY, [*ALONE, *more])
    with Run(exp, face=Face(quiet=True)) as run:
        report = run.evaluate(exp.evaluate, data=run.shards(exp.data), model=model)
        pictures = run.store.download(report.run_id, "pictures")
        assert pictures is not None
        return run.done["evaluate"].metrics, report.folder, pictures


def test_an_encoder_is_judged_by_neighbours_and_regression_where_nothing_is_said(probed: Any) -> None:
    metrics, report, pictures = evaluated(probed[0])
    assert metrics.keys() >= {"eval/knn_top1", "eval/linear_top1", "eval/rank", "eval/std"}
    assert "eval/top1" not in metrics
    assert json.loads((report / "report.json").read_text())["metrics"] == metrics
    assert metrics["eval/linear_top1"] > 0.4
    for name in ("neighbours.png", "features.png"):
        assert (pictures / name).read_bytes()[:4] == b"\x89PNG"


def test_few_labels(probed: Any) -> None:
    metrics, _, _ = evaluated(probed[0], "evaluate={shots: [1, 10], split: val, bank: 500}")
    assert "eval/knn_top1" not in metrics
    assert metrics["eval/lowshot_10_top1"] > metrics["eval/lowshot_1_top1"]
    assert metrics["eval/lowshot_1_std"] > 0


def test_a_classifier_answers_itself_and_is_judged_if_asked(shared_home: Path) -> None:
    exp = vitlab.read(TINY, [*ALONE, "finetune.epochs=1", "tune=null", "evaluate.knn=5"])
    with Run(exp, face=Face(quiet=True)) as run:
        shards = run.shards(exp.data)
        model = run.finetune(exp.need("finetune"), data=shards)
        assert not any(name.startswith("probe/") for name in run.done["finetune"].metrics)
        run.evaluate(exp.evaluate, data=shards, model=model)
        metrics = run.done["evaluate"].metrics
        assert {"eval/top1", "eval/knn_top1"} <= metrics.keys()
        assert "eval/linear_top1" not in metrics


def test_what_cannot_be_judged_is_refused(probed: Any) -> None:
    with pytest.raises(UserError, match="split: given 'train', which knn, linear and shots learn from"):
        build(EvaluateConfig, {"split": "train", "knn": 5})
    with pytest.raises(UserError, match=r"shots: given \[1, 1\]; allowed: different numbers"):
        build(EvaluateConfig, {"shots": [1, 1]})
    with pytest.raises(UserError, match=r"shots.*given 0"):
        build(EvaluateConfig, {"shots": [0]})
    with pytest.raises(UserError, match=r"evaluate\.split: given 'train'; this model has no head"):
        evaluated(probed[0], "evaluate.split=train")


# ---------------------------------------------------------------- pictures


def test_the_map_is_the_principal_axes() -> None:
    from sklearn.decomposition import PCA

    features = clouds(60, 0).features
    places, share = principal(features)
    theirs = PCA(2).fit(torch.nn.functional.normalize(features.double(), dim=1))
    assert share.numpy() == pytest.approx(theirs.explained_variance_ratio_)
    wanted = theirs.transform(torch.nn.functional.normalize(features.double(), dim=1))
    assert abs(places.numpy()) == pytest.approx(abs(wanted), abs=1e-8)


def test_a_map_of_many_classes_colours_the_most_frequent() -> None:
    labels = torch.cat([torch.arange(30), torch.arange(25).repeat(2), torch.tensor([-1])])
    features = torch.randn(len(labels), 6, generator=torch.Generator().manual_seed(0))
    figure = map_figure(features, labels, [f"class {n}" for n in range(30)], "many")
    (axes,) = figure.axes
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == [f"class {n}" for n in range(20)]

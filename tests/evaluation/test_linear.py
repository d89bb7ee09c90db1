"""The fits are scikit-learn's minima; the draws are seeded; nothing draws from a global generator."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from test_knn import clouds

from vitlab.evaluation import linear
from vitlab.evaluation.features import Found


@pytest.mark.parametrize("strength", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("bias", [True, False])
def test_as_scikit_learn_fits(strength: float, bias: bool) -> None:
    data = clouds(300)
    x, y = data.features.double(), data.labels
    layer = linear.fit(x, y, 5, strength, bias=bias)
    theirs = LogisticRegression(C=1 / (strength * len(x)), fit_intercept=bias, tol=1e-12, max_iter=20000)
    theirs.fit(x.numpy(), y.numpy())
    assert np.abs(theirs.coef_ - layer.weight.numpy()).max() < 1e-4 * max(1, np.abs(theirs.coef_).max())
    assert np.abs(theirs.predict_proba(x) - layer(x).softmax(1).numpy()).max() < 1e-5
    assert bias or not layer.bias.any()


def test_the_gradient_is_that_of_the_objective() -> None:
    """At the minimum autograd, which the fit does not use, finds none."""
    data = clouds(200)
    x, y = data.features.double(), data.labels
    layer = linear.fit(x, y, 5, 0.01)
    weight, bias = layer.weight.requires_grad_(), layer.bias.requires_grad_()
    loss = torch.nn.functional.cross_entropy(x @ weight.T + bias, y) + 0.005 * weight.square().sum()
    for gradient in torch.autograd.grad(loss, [weight, bias]):
        assert gradient.abs().max() < 1e-6


def test_the_probe_is_scikit_learns_on_standardised_features() -> None:
    bank, queries = clouds(400), clouds(150, seed=1)
    scale = torch.logspace(-3, 3, 12)
    bank, queries = (Found(f.features * scale + 5, f.labels, f.places) for f in (bank, queries))
    scaler = StandardScaler().fit(bank.features.double())
    x = torch.from_numpy(scaler.transform(bank.features.double()))
    strength = linear.choose(x, bank.labels, 5)
    assert strength in linear.STRENGTHS[1:-1]
    theirs = LogisticRegression(C=1 / (strength * len(x)), tol=1e-10, max_iter=20000).fit(x, bank.labels)
    score = theirs.score(scaler.transform(queries.features.double()), queries.labels)
    assert linear.linear_top1(bank, queries, 5) == pytest.approx(score, abs=1 / 150)
    assert score > 0.5


def test_constant_features_and_tiny_banks_are_no_trouble() -> None:
    bank, queries = clouds(400), clouds(150, seed=1)

    def dead(found: Found) -> Found:
        return Found(
            torch.cat([found.features, torch.ones(len(found.labels), 2)], 1), found.labels, found.places
        )

    assert linear.linear_top1(dead(bank), dead(queries), 5) == linear.linear_top1(bank, queries, 5)
    assert 0 <= linear.linear_top1(clouds(3), queries, 5) <= 1


def test_low_shot_as_scikit_learn_with_the_codes_preparation() -> None:
    bank, queries = clouds(300), clouds(200, seed=1)
    found = linear.lowshot_top1(bank, queries, 5, 2)
    assert len(found) == 3

    def rows(x: torch.Tensor) -> np.ndarray:
        centred = x.double().numpy() - x.double().numpy().mean(1, keepdims=True)
        prepared: np.ndarray = centred / np.linalg.norm(centred, axis=1, keepdims=True)
        return prepared

    for draw, top1 in enumerate(found):
        few = linear._draw(bank.labels, 2, draw)
        assert bank.labels[few].bincount().tolist() == [2] * 5
        theirs = LogisticRegression(C=1 / 0.00025, fit_intercept=False, tol=1e-10, max_iter=20000)
        theirs.fit(rows(bank.features[few]), bank.labels[few])
        assert top1 == pytest.approx(theirs.score(rows(queries.features), queries.labels), abs=1 / 200)


def test_draws_are_seeded_and_nested() -> None:
    labels = clouds(100).labels
    one, two = (set(linear._draw(labels, shots, 0).tolist()) for shots in (1, 2))
    assert one < two
    assert one == set(linear._draw(labels, 1, 0).tolist())
    assert one != set(linear._draw(labels, 1, 1).tolist())
    rare = torch.tensor([0, 0, 0, 0, 1])
    assert rare[linear._draw(rare, 3, 0)].tolist().count(1) == 1


def test_more_labels_help_and_nothing_draws_from_torchs_generator() -> None:
    bank, queries = clouds(1000), clouds(500, seed=1)
    before = torch.get_rng_state()
    few, many = (float(np.mean(linear.lowshot_top1(bank, queries, 5, shots))) for shots in (1, 20))
    assert many > few + 0.05
    assert linear.linear_top1(bank, queries, 5) == linear.linear_top1(bank, queries, 5)
    assert torch.equal(before, torch.get_rng_state())

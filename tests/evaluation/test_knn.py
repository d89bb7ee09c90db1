"""The neighbours and votes are scikit-learn's with the same weights, and those of the protocol's formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch.nn.functional import normalize

from vitlab.evaluation import knn
from vitlab.evaluation.features import Found


def clouds(count: int, classes: int = 5, width: int = 12, seed: int = 0) -> Found:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(9))
    labels = torch.randint(classes, (count,), generator=generator)
    return Found(
        0.5 * centres[labels] + torch.randn(count, width, generator=generator), labels, torch.arange(count)
    )


def votes(distance: np.ndarray) -> np.ndarray:
    """Cosine distance is 1 - similarity."""
    weight: np.ndarray = np.exp((1 - distance) / knn.TEMPERATURE)
    return weight


@pytest.mark.parametrize("k", [1, 5, 20])
def test_as_scikit_learn_answers(k: int) -> None:
    bank, queries = clouds(300), clouds(101, seed=1)
    theirs = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=votes)
    theirs.fit(bank.features.numpy(), bank.labels.numpy())
    found = knn.nearest(bank.features, queries.features, k)
    shares = knn.vote(found, bank.labels, 5)
    distance, index = theirs.kneighbors(queries.features.numpy())
    assert np.allclose(1 - distance, found.similarity, atol=1e-5)
    assert (index == found.places.numpy()).all()
    wanted = theirs.predict_proba(queries.features.numpy())
    assert np.allclose(shares / shares.sum(1, keepdim=True), wanted, atol=1e-5)
    score = theirs.score(queries.features.numpy(), queries.labels.numpy())
    assert knn.knn_top1(bank, queries, k, 5) == pytest.approx(score)


def test_votes_are_the_formulas_in_float64() -> None:
    bank, queries = clouds(40), clouds(7, seed=1)
    a, b = bank.features.double(), queries.features.double()
    found = knn.vote(knn.nearest(a, b, 10), bank.labels, 5)
    similarity = normalize(b, dim=1) @ normalize(a, dim=1).T
    for q in range(7):
        wanted = torch.zeros(5, dtype=torch.float64)
        for n in similarity[q].argsort(descending=True)[:10].tolist():
            wanted[bank.labels[n]] += torch.exp(similarity[q, n] / 0.07)
        assert torch.allclose(found[q], wanted, rtol=1e-10)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, queries = clouds(50), clouds(33, seed=1)
    whole = knn.nearest(bank.features, queries.features, 5)
    monkeypatch.setattr(knn, "CHUNK", 500)
    parts = knn.nearest(bank.features, queries.features, 5)
    assert torch.equal(whole.places, parts.places)
    assert torch.allclose(whole.similarity, parts.similarity)


def test_a_bank_smaller_than_k_votes_as_a_whole() -> None:
    bank, queries = clouds(4), clouds(6, seed=1)
    assert knn.nearest(bank.features, queries.features, 20).places.shape == (6, 4)
    assert 0 <= knn.knn_top1(bank, queries, 20, 5) <= 1

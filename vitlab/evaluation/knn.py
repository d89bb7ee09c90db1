"""Classification by nearest neighbours: how good features are before anything is trained on them.

Protocol: Wu et al. 2018 (arXiv 1805.01978) as in the code of DINO (Caron et al. 2021, arXiv 2104.14294): the
k images of the bank of highest cosine similarity vote for their class with weight exp(similarity / 0.07).

**Departures**: queries go in chunks of a bounded size instead of a hundred chunks; a bank of fewer than k
images votes as a whole.

Letters: Q queries, N images of the bank, D width, K neighbours, C classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vitlab.evaluation.features import Found

TEMPERATURE = 0.07
CHUNK = 2**24  # similarities held at a time: 64 MiB


class Neighbours(NamedTuple):
    """The most similar images of the bank, most similar first."""

    similarity: Tensor  # Q K
    places: Tensor  # Q K, int64: where they stand in the bank


@torch.no_grad()
def nearest(bank: Tensor, queries: Tensor, k: int) -> Neighbours:
    """By cosine similarity of N D and Q D features."""
    bank, queries = normalize(bank, dim=1), normalize(queries, dim=1)
    rows = max(1, CHUNK // len(bank))
    found = [(part @ bank.T).topk(min(k, len(bank))) for part in torch.split(queries, rows)]
    return Neighbours(torch.cat([f.values for f in found]), torch.cat([f.indices for f in found]))


@torch.no_grad()
def vote(neighbours: Neighbours, labels: Tensor, classes: int) -> Tensor:
    """Q C: the sum of the votes for each class; `labels` are those of the bank."""
    weight = (neighbours.similarity / TEMPERATURE).exp()
    votes = weight.new_zeros(len(weight), classes)
    return votes.scatter_add_(1, labels[neighbours.places], weight)


def knn_top1(bank: Found, queries: Found, k: int, classes: int) -> float:
    """The share of queries whose class gets most votes. All have labels."""
    votes = vote(nearest(bank.features, queries.features, k), bank.labels, classes)
    return float((votes.argmax(1) == queries.labels).double().mean())

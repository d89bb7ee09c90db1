"""Classification by logistic regression on frozen features: with all labels, and with few of them.

`linear_top1`, the linear probe: features standardised by the bank's mean and deviation, multinomial logistic
regression with a bias, the mean cross-entropy plus λ/2·‖W‖², minimised over the whole bank at once by L-BFGS:
no learning rate, no order, no randomness but which fifth of the bank λ is chosen on. λ goes down from 1 by
factors of 10 for as long as the cross-entropy of that fifth falls; each fit starts where the last one ended.
This is scikit-learn's LogisticRegression with C = 1/(λ·N). Papers train the layer by SGD on augmented images
instead, for tens of epochs; their figures are a little higher.

`lowshot_top1`, few labels: Assran et al. 2022, MSN (arXiv 2204.07141), by their code: k images a class, three
draws, each sample's features centred over their own D numbers and L2-normalised, no bias, λ = 0.00025 / N.
**Departures**: L-BFGS instead of cyanure's solver for the same convex objective; the draws are seeded, since
the published lists are of ImageNet's files; a class with fewer than k images gives all that it has.

Letters: N samples, D width, C classes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from vitlab.evaluation.features import Found

STRENGTHS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)  # λ, in the order in which they are tried
FOLDS = 5  # a fifth of the bank chooses λ
ITERATIONS = 300  # of L-BFGS; far fewer are needed where λ is not tiny
LOWSHOT_STRENGTH = 0.00025
DRAWS = 3


class Linear(NamedTuple):
    """One linear layer."""

    weight: Tensor  # C D
    bias: Tensor  # C

    def __call__(self, x: Tensor) -> Tensor:
        """N D → N C."""
        return x @ self.weight.T + self.bias


def linear_top1(bank: Found, queries: Found, classes: int) -> float:
    """The linear probe's share of right answers. All samples have labels."""
    features = bank.features.double()
    mean, std = features.mean(0), features.std(0, correction=0)
    std = torch.where(std > 0, std, 1.0)  # a dead feature stays zero
    x = (features - mean) / std
    layer = fit(x, bank.labels, classes, choose(x, bank.labels, classes))
    return _top1(layer, (queries.features.double() - mean) / std, queries.labels)


def choose(x: Tensor, labels: Tensor, classes: int) -> float:
    """λ by the cross-entropy of a fifth of the samples that the other four fifths have not seen."""
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(x))).to(x.device)
    apart = order[: len(x) // FOLDS]
    rest = order[len(x) // FOLDS :]
    best, lowest, start = STRENGTHS[0], float("inf"), None
    for strength in STRENGTHS if len(apart) else ():
        start = fit(x[rest], labels[rest], classes, strength, start=start)
        loss = float(torch.nn.functional.cross_entropy(start(x[apart]), labels[apart]))
        if loss >= lowest:
            break
        best, lowest = strength, loss
    return best


def lowshot_top1(bank: Found, queries: Found, classes: int, shots: int, draws: int = DRAWS) -> list[float]:
    """Right answers after learning from `shots` images a class, for each draw of them."""
    inputs = _rows(queries.features)
    results = []
    for draw in range(draws):
        few = _draw(bank.labels, shots, draw)
        x, labels = _rows(bank.features[few]), bank.labels[few]
        layer = fit(x, labels, classes, LOWSHOT_STRENGTH / len(x), bias=False)
        results.append(_top1(layer, inputs, queries.labels))
    return results


def _draw(labels: Tensor, shots: int, draw: int) -> Tensor:
    """Places of `shots` samples of every class; more shots of the same draw hold those of fewer."""
    order = np.random.default_rng([0, draw]).permutation(len(labels))
    mixed = labels.cpu().numpy()[order]
    places = [order[mixed == label][:shots] for label in np.unique(mixed)]
    return torch.from_numpy(np.sort(np.concatenate(places))).to(labels.device)


def _rows(features: Tensor) -> Tensor:
    """Each sample centred over its own numbers, then of length 1."""
    x = features.double()
    return normalize(x - x.mean(1, keepdim=True), dim=1)


def _top1(layer: Linear, x: Tensor, labels: Tensor) -> float:
    return float((layer(x).argmax(1) == labels).double().mean())


@torch.no_grad()
def fit(
    x: Tensor,
    labels: Tensor,
    classes: int,
    strength: float,
    *,
    bias: bool = True,
    start: Linear | None = None,
) -> Linear:
    """The minimum of the mean cross-entropy plus strength/2·‖W‖²; the bias is not penalised."""
    weight = x.new_zeros(classes, x.shape[1]) if start is None else start.weight.clone()
    offset = x.new_zeros(classes) if start is None else start.bias.clone()
    layer, target = Linear(weight, offset), one_hot(labels, classes).to(x.dtype)
    solver = torch.optim.LBFGS(
        [weight, offset] if bias else [weight],
        max_iter=ITERATIONS,
        tolerance_grad=1e-8,
        tolerance_change=1e-12,
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    @torch.no_grad()
    def closure() -> Tensor:
        """Value and gradient in closed form: probes run where autograd is off."""
        scores = layer(x).log_softmax(1)
        error = (scores.exp() - target) / len(x)
        weight.grad = error.T @ x + strength * weight
        offset.grad = error.sum(0)
        return -(scores * target).sum() / len(x) + strength / 2 * weight.square().sum()

    solver.step(closure)  # type: ignore[no-untyped-call]
    return layer

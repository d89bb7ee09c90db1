"""Frozen features of a split: one pass over it, every sample once, whole on every rank.

Two diagnostics of collapse come with it. RankMe (Garrido et al. 2022, arXiv 2210.02885): the effective rank
exp(-Σ pₖ log pₖ) of the features' singular values σₖ, with pₖ = σₖ / Σσ + ε; features are not centred, as in
the paper. Spread (as in SimSiam, arXiv 2011.10566): the standard deviation of L2-normalised features, here
times √D, so that it is about 1 for features in all directions of any width and 0 where all are equal.

**Departures**: singular values come from the eigenvalues of ZᵀZ or ZZᵀ in float64, whichever is smaller.

Letters: B samples of a batch, N of the split, D width, K singular values, min(N, D).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vitlab.batch import Batch
from vitlab.dist import World

EPS = 1e-7  # the paper's, for float32


class Found(NamedTuple):
    """What a pass over a split has seen, in the order of its samples; on the CPU."""

    features: Tensor  # N D, float32
    labels: Tensor  # N, int64; -1 where a sample has none
    places: Tensor  # N, int64, on the CPU: which of the samples asked for it is; bad ones are left out

    def labelled(self) -> Found:
        """Only the samples that have a label."""
        known = self.labels >= 0
        return Found(self.features[known], self.labels[known], self.places[known.cpu()])

    def to(self, device: torch.device) -> Found:
        return Found(self.features.to(device), self.labels.to(device), self.places)


@torch.no_grad()
def collect(forward: Callable[[Batch], Tensor], batches: Iterable[Batch], world: World) -> Found:
    """Features by `forward` (batch → B D) of batches that are in step on all ranks, as from `eval_batches`.

    There the first rank has the first part of a global batch, so parts laid side by side by rank are in
    the order of the split; slots of weight 0 hold nothing and are dropped.
    """
    features: list[Tensor] = []
    labels: list[Tensor] = []
    there: list[Tensor] = []
    for batch in batches:
        real = (batch.weight > 0).cpu()  # a batch may be all padding here; the others wait for its forward
        mine = forward(batch).float().cpu()[real], batch.labels.cpu()[real], real
        for theirs, classes, slots in world.gather(mine):
            features.append(theirs)
            labels.append(classes)
            there.append(slots)
    return Found(torch.cat(features), torch.cat(labels), torch.cat(there).nonzero().flatten())


@torch.no_grad()
def effective_rank(features: Tensor) -> float:
    """RankMe of N D features: between 1 (all on one line) and min(N, D)."""
    z = features.double()
    gram = z.T @ z if len(z) > z.shape[1] else z @ z.T
    sigma = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    share = sigma / sigma.sum().clamp(min=torch.finfo(sigma.dtype).tiny) + EPS
    return float(torch.exp(-(share * share.log()).sum()))


@torch.no_grad()
def spread(features: Tensor) -> float:
    """Mean over dimensions of the standard deviation of L2-normalised features, times √D."""
    unit = normalize(features.double(), dim=1)
    return float(unit.std(0, correction=0).mean() * features.shape[1] ** 0.5)

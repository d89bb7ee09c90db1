"""Looks at a model that learns without labels: what its features are worth while it still trains."""

from __future__ import annotations

from collections.abc import Iterator

from vitlab.config import Config, free
from vitlab.evaluation.features import Found, effective_rank, spread
from vitlab.evaluation.knn import knn_top1
from vitlab.evaluation.linear import linear_top1

COLLAPSED = 1.5  # an effective rank below is that of features which all but lie on one line


class ProbeConfig(Config):
    """Nothing here changes what is trained."""

    every: int = free(5, gt=0, description="epochs between two looks; the last step is always looked at")
    bank: int = free(2000, ge=0, description="most training images that are learned from; 0: no probes")
    queries: int = free(2000, gt=0, description="most validation images that are asked about")
    knn: int = free(20, ge=0, description="neighbours that vote; 0: none")
    linear: bool = free(True, description="logistic regression")


def probe_figures(
    bank: Found, queries: Found | None, classes: int, config: ProbeConfig
) -> Iterator[tuple[str, float]]:
    """`probe/…`; without labels on both sides only what the features themselves tell."""
    yield "probe/rank", effective_rank(bank.features)
    yield "probe/std", spread(bank.features)
    known, asked = bank.labelled(), queries.labelled() if queries is not None else None
    if asked is None or not len(asked.labels) or not len(known.labels):
        return
    if config.knn:
        yield "probe/knn_top1", knn_top1(known, asked, config.knn, classes)
    if config.linear:
        yield "probe/linear_top1", linear_top1(known, asked, classes)


def collapse(figures: dict[str, float], width: int) -> str | None:
    """One line for a person if the features no longer tell images apart."""
    rank = figures.get("probe/rank", COLLAPSED)
    if rank >= COLLAPSED:
        return None
    return (
        f"the features have collapsed (effective rank {rank:.2f} of {width}): all images look alike to the "
        "model; begin again with a smaller optim.lr, a longer optim.warmup_epochs or optim.clip=1.0"
    )

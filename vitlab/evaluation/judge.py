"""What frozen features are worth: the figures that an evaluation was asked for."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import mean, stdev
from typing import NamedTuple

from vitlab.config import UserError
from vitlab.evaluation.features import Found, effective_rank, spread
from vitlab.evaluation.knn import knn_top1
from vitlab.evaluation.linear import linear_top1, lowshot_top1

NEIGHBOURS = 20  # what DINO's authors found best on ImageNet


class Ways(NamedTuple):
    """How features are judged."""

    knn: int = 0  # neighbours
    linear: bool = False
    shots: tuple[int, ...] = ()  # images a class

    @property
    def any(self) -> bool:
        return bool(self.knn or self.linear or self.shots)


USUAL = Ways(NEIGHBOURS, True)  # for an encoder when nothing is said


def judged(bank: Found, queries: Found, classes: int, ways: Ways) -> Iterator[tuple[str, float]]:
    """`eval/…`; learned from the bank, asked of the queries, where these have labels."""
    known, asked = bank.labelled(), queries.labelled()
    for key, found in (("evaluate.bank: the train split", known), ("evaluate.split: it", asked)):
        if not len(found.labels):
            raise UserError(f"{key} has no image with a label; knn, linear and shots need some")
    if ways.knn:
        yield "eval/knn_top1", knn_top1(known, asked, ways.knn, classes)
    if ways.linear:
        yield "eval/linear_top1", linear_top1(known, asked, classes)
    for shots in ways.shots:
        draws = lowshot_top1(known, asked, classes, shots)
        yield f"eval/lowshot_{shots}_top1", mean(draws)
        yield f"eval/lowshot_{shots}_std", stdev(draws)
    yield "eval/rank", effective_rank(queries.features)
    yield "eval/std", spread(queries.features)

"""A method's own loss and metrics on images it is not trained on. The same for every method."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from vitlab.batch import Batch
from vitlab.dist import World
from vitlab.methods.base import Losses


def validate(
    forward: Callable[[Batch], Losses],
    weigh: Callable[[Batch], Tensor],
    batches: Iterable[Batch],
    world: World,
) -> Iterator[tuple[str, float]]:
    """Yields `val/NAME`, the mean over all samples of the split, whoever holds them.

    A batch may be all padding on this rank; it is forwarded all the same, because under ZeRO-3 the
    others wait for it.
    """
    sums: dict[str, Tensor] = {}
    weight = torch.zeros((), dtype=torch.float64, device=world.device)
    for batch in batches:
        losses = forward(batch)
        weight += weigh(batch).double()
        for name, value in {"loss": losses.loss, **losses.metrics}.items():
            sums[name] = sums.get(name, 0.0) + value.double()
    names = sorted(sums)
    totals = world.sum(torch.stack([weight, *(sums[name] for name in names)])).tolist()
    for name, total in zip(names, totals[1:], strict=True) if totals[0] else ():  # nothing labelled: no mean
        yield f"val/{name}", total / totals[0]

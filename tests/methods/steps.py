"""Views of images that have something to learn, and the loop's step without its loop."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from vitlab.batch import Batch, derived, uniform
from vitlab.engine.optim import OptimConfig, set_rates, set_starts
from vitlab.engine.strategy import Plain
from vitlab.methods import Method, Moment

LR, DECAY = 1e-3, 0.1
ADAM = {torch.float32: 1e-4, torch.float64: 1e-8}  # ε, far above a gradient that is rounding alone


def batch(
    of: Method, n: int = 5, first: int = 0, dtype: torch.dtype = torch.float32, like: float = 0.5
) -> Batch:
    """An image is four bright or dark fields a channel: `like` of a view, the rest is the view's noise."""
    seeds, chans = torch.arange(n) + first, of.model.config.in_chans
    fields = uniform(seeds, "fields", chans * 4).view(n, chans, 2, 2).round()
    views = []
    for name, size, _ in of.views():
        noise = uniform(derived(seeds, name), "noise", chans * size * size).view(n, chans, size, size)
        view = like * F.interpolate(fields, size) + (1 - like) * noise
        views.append(view.to(dtype) * 4 - 2)
    keys = [str(int(seed)) for seed in seeds]
    return Batch(views, torch.full((n,), -1), torch.ones(n, dtype=dtype), seeds, keys)


def unlabelled(*views: Tensor) -> Batch:
    """Views that are here already; every sample has a seed of its own."""
    n, dtype = len(views[0]), views[0].dtype
    seeds, keys = torch.arange(n) * 77_777 + 3, [str(i) for i in range(n)]
    return Batch(list(views), torch.full((n,), -1), torch.ones(n, dtype=dtype), seeds, keys)


def part(of: Batch, rows: slice | list[int]) -> Batch:
    keys = [of.keys[i] for i in torch.arange(len(of.keys))[rows].tolist()]
    views = [view[rows] for view in of.views]
    given = {"labels": of.labels[rows], "weight": of.weight[rows], "seeds": of.seeds[rows], "keys": keys}
    return replace(of, views=views, **given)


def strategy_of(of: Method, epoch_steps: int, dtype: torch.dtype = torch.float32) -> Plain:
    plain = Plain(of, OptimConfig(lr=LR, weight_decay=DECAY, eps=ADAM[dtype]), bf16=False)
    set_starts(plain.optimizer, epoch_steps)
    plain.train(True)
    return plain


def one_step(of: Method, plain: Plain, micro: list[Batch], now: Moment, lr: float = LR) -> Tensor:
    """What the loop does: gives the mean loss of a global batch."""
    of.before_step(now)
    set_rates(plain.optimizer, now.step, lr, DECAY)
    weight, total = torch.stack([of.weigh(part) for part in micro]).sum(), torch.zeros(())
    for part in micro:
        losses = plain.forward(part)
        plain.backward(losses, weight)
        total = total + losses.loss.detach() / weight
    plain.step()
    for average in of.all_averages():
        plain.average(average)
    of.after_step()
    return total

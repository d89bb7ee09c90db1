"""Views of images that have something to learn, and the loop's step without its loop."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from vitlab.batch import Batch, derived, uniform
from vitlab.config import build
from vitlab.engine.optim import OptimConfig, set_rates, set_starts
from vitlab.engine.strategy import Plain
from vitlab.methods import Losses, Method, Moment

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


def part(of: Batch, rows: slice | Tensor) -> Batch:
    """Some of the samples, with all that is their own; `mean` and `std` are the batch's."""
    keys = [of.keys[i] for i in torch.arange(len(of.keys))[rows].tolist()]
    tensors = {name: getattr(of, name) for name in ("labels", "weight", "seeds", "others", "share")}
    own = {name: value[rows] for name, value in tensors.items() if value is not None}
    return replace(of, views=[view[rows] for view in of.views], keys=keys, **own)


def strategy_of(of: Method, epoch_steps: int, dtype: torch.dtype = torch.float32, **optim: float) -> Plain:
    config = build(OptimConfig, {"lr": LR, "weight_decay": DECAY, "eps": ADAM[dtype], **optim})
    plain = Plain(of, config, bf16=False)
    set_starts(plain.optimizer, epoch_steps)
    plain.train(True)
    return plain


def one_step(of: Method, plain: Plain, micro: list[Batch], now: Moment, lr: float = LR) -> Losses:
    """What the loop does: gives the means over a global batch."""
    means = first_half(of, plain, micro, now, lr)
    second_half(of, plain)
    return means


def first_half(of: Method, plain: Plain, micro: list[Batch], now: Moment, lr: float = LR) -> Losses:
    """A step as far as its gradients, which are still there."""
    of.before_step(now)
    set_rates(plain.optimizer, now.step, lr, DECAY)
    weight, found = torch.stack([of.weigh(one) for one in micro]).sum(), []
    for one in micro:
        losses = plain.forward(one)
        plain.backward(losses, weight)
        found.append({"": losses.loss.detach(), **losses.metrics})
    means = {name: torch.stack([sums[name] for sums in found]).sum() / weight for name in found[0]}
    return Losses(means.pop(""), means)


def second_half(of: Method, plain: Plain) -> None:
    """From the gradients on."""
    plain.step()
    for average in of.all_averages():
        plain.average(average)
    of.after_step()


def halved(of: Method, batch: Batch) -> None:
    """Products in half precision: the loss is not, it is near what it was, and gradients reach everything."""
    with torch.autocast("cpu", torch.bfloat16):
        losses = of(batch)
    assert losses.loss.dtype == torch.float32
    torch.testing.assert_close(losses.loss, of(batch).loss, rtol=0.02, atol=0)
    losses.loss.backward()
    for name, value in of.named_parameters():
        if value.requires_grad:
            assert value.grad is not None, name
            assert value.grad.dtype == torch.float32, name
            assert bool(value.grad.isfinite().all()), name

"""The one training loop: any method, any strategy, any number of workers, or one plain process.

A step takes the micro-batches of one global batch, divides the summed loss by the weight of that global
batch, and steps once. Everything that happens at a step is a function of the step's number, so a resumed
run repeats what an undisturbed one does.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import torch
from pydantic import Field
from torch import Tensor

from vitlab.batch import Batch
from vitlab.config import Config, UserError, free
from vitlab.dist import World, half
from vitlab.engine import checkpoint
from vitlab.engine.compiling import announced, prepare
from vitlab.engine.optim import OptimConfig, decay_at, lr_at, set_rates, set_starts
from vitlab.engine.strategy import Plain, Strategy
from vitlab.methods.base import Losses, Method, Moment


class LoopConfig(Config):
    """What every training stage has."""

    optim: OptimConfig = OptimConfig()
    epochs: int = Field(gt=0)
    batch_size: int = Field(gt=0, description="images of a global batch, over all workers")
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    ema: float = Field(0.0, ge=0, lt=1, description="momentum of the average that is exported; 0: none")
    accumulate: int = free(1, gt=0, description="micro-batches that a worker's part is cut into")
    recompute: bool = free(False, description="blocks compute their insides again for the gradient")
    compile: bool = free(False, description="the model's forward and backward as compiled code")
    validate_every: int = Field(1, gt=0, description="epochs between two passes over the validation split")
    log_every: int = free(10, gt=0, description="steps that one point of a training curve averages over")
    checkpoint_every: int = free(0, ge=0, description="steps between two checkpoints; 0: every epoch")
    keep: int = free(2, gt=0, description="checkpoints kept while the stage runs")


class Recorder(Protocol):
    """Where the loop's figures go. Called on rank 0 only."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Takes the values of one step; must not block."""

    def flush(self) -> None:
        """Returns when all that was logged is stored."""

    def progress(self, step: int, total: int, values: dict[str, float]) -> None:
        """Takes what a person may see now."""

    def say(self, text: str) -> None:
        """Takes what is being done while no step can be counted."""

    def note(self, text: str) -> None:
        """Takes a line that a person must not miss."""


class Probe(NamedTuple):
    """A look at the model every so many epochs and after the last step; it must not change the training."""

    every: int
    look: Callable[[Strategy, int], Iterable[tuple[str, float]]]


@dataclass
class Plan:
    """What the loop needs besides the method: where it reads, writes and looks."""

    config: LoopConfig
    steps_per_epoch: int
    batches: Callable[[int], Iterator[list[Batch]]]  # from a step on: the micro-batches of each step
    recorder: Recorder
    checkpoints: Path | None = None
    probes: list[Probe] = field(default_factory=list)
    may_commit: Callable[[], bool] = lambda: True  # false once another process owns this stage

    @property
    def steps(self) -> int:
        return self.config.epochs * self.steps_per_epoch

    def due(self, done: int) -> list[Probe]:
        """The probes whose turn it is after so many steps."""
        spans = ((probe, self.steps_per_epoch * probe.every) for probe in self.probes)
        return [probe for probe, span in spans if done % span == 0 or done == self.steps]


def make_strategy(
    method: Method, config: LoopConfig, zero: int | None, world: World, persist: int | None = None
) -> Strategy:
    """Plain PyTorch for one process without `zero`, else DeepSpeed.

    `persist`: numbers of the largest parameter that is never given away at stage 3; none: `zero.STAYS`.
    """
    if config.recompute or config.compile:
        prepare(method.model, recompute=config.recompute, compile=config.compile)
    bf16 = half(world.device, config.precision)
    if zero is None and world.size == 1:
        return Plain(method, config.optim, bf16)
    from vitlab.engine.zero import Zero

    micro = config.batch_size // world.size // config.accumulate
    how = {"micro": micro, "accumulate": config.accumulate, "bf16": bf16, "compiles": config.compile}
    return Zero(method, config.optim, zero or 0, world, persist=persist, **how)


def train(method: Method, strategy: Strategy, plan: Plan, world: World) -> dict[str, float]:
    """Runs to the last step, from the newest checkpoint if there is one; returns the last figures."""
    start, window = 0, Window(world)
    found = checkpoint.latest(plan.checkpoints) if plan.checkpoints else None
    found = world.from_first(found)
    set_starts(strategy.optimizer, plan.steps_per_epoch)
    if found:
        meta = checkpoint.load(found, strategy)
        start, window.carried = meta["step"], meta["window"]
        if world.first:
            plan.recorder.say(f"goes on from step {start}/{plan.steps}")
    last: dict[str, float] = {}
    trouble: str | None = None
    batches = plan.batches(start)
    clock = Clock(plan.config.batch_size)
    strategy.train(True)
    for step in range(start, plan.steps):
        now = Moment(step, plan.steps, plan.steps_per_epoch)
        method.before_step(now)
        lr = lr_at(plan.config.optim, now.epoch, plan.config.epochs)
        set_rates(strategy.optimizer, step, lr, decay_at(plan.config.optim, now.progress))
        micro, compiles = next(batches), plan.config.compile and step == start
        with announced(plan.recorder.say) if compiles else nullcontext():
            norm = _one_step(method, strategy, micro, window, world)
        if compiles:
            clock.skip()
        for average in method.all_averages():
            strategy.average(average)
        method.after_step()
        done = step + 1
        values = _after_step(done, plan, window, {"lr": lr, "grad_norm": norm}, clock)
        if not trouble and "train/loss" in values and (trouble := method.diagnose(values)) and world.first:
            plan.recorder.note(f"step {done}: {trouble}")
        last |= _report(done, values, plan, world)
        if probes := plan.due(done):
            last |= _probe(strategy, done, probes, plan, world)
            clock.skip()
        if done < plan.steps and _due(done, plan):
            _commit(done, strategy, plan, window, world)
            clock.skip()
    if world.first:
        plan.recorder.flush()
    world.barrier()
    return last


def _one_step(
    method: Method, strategy: Strategy, micro: list[Batch], window: Window, world: World
) -> Tensor | float | None:
    weight = world.sum(torch.stack([method.weigh(batch) for batch in micro]).sum())
    for batch in micro:
        losses = strategy.forward(batch)
        strategy.backward(losses, weight)
        window.add(losses)
    window.weigh(weight)
    return strategy.step()


def _after_step(
    done: int, plan: Plan, window: Window, extra: dict[str, Tensor | float | None], clock: Clock
) -> dict[str, float]:
    clock.tick()
    if done % plan.config.log_every and done != plan.steps:
        return {}
    values = window.close()
    if not math.isfinite(values.get("loss", 0.0)):
        raise UserError(
            f"optim.lr: the loss is {values['loss']} at step {done}; go on with a smaller optim.lr, "
            "a longer optim.warmup_epochs or optim.clip=1.0"
        )
    values |= {name: float(value) for name, value in extra.items() if value is not None}
    return {f"train/{name}": value for name, value in values.items()} | {"train/images_per_s": clock.rate()}


def _report(done: int, values: dict[str, float], plan: Plan, world: World) -> dict[str, float]:
    if world.first and values:
        plan.recorder.log(done, values)
    if world.first:
        plan.recorder.progress(done, plan.steps, values)
    return values


def _probe(strategy: Strategy, done: int, probes: list[Probe], plan: Plan, world: World) -> dict[str, float]:
    strategy.train(False)
    with torch.no_grad():
        values = {name: value for probe in probes for name, value in probe.look(strategy, done)}
    strategy.train(True)
    return _report(done, values, plan, world)


def _due(done: int, plan: Plan) -> bool:
    return plan.checkpoints is not None and done % (plan.config.checkpoint_every or plan.steps_per_epoch) == 0


def _commit(done: int, strategy: Strategy, plan: Plan, window: Window, world: World) -> None:
    """Figures first, then the checkpoint: what a checkpoint skips on resume is already stored."""
    assert plan.checkpoints is not None
    if not world.from_first(plan.may_commit() if world.first else None):
        raise RuntimeError(f"another process has taken over this stage; {plan.checkpoints} is left to it")
    meta = {"window": window.carry()}
    if world.first:
        plan.recorder.flush()
    checkpoint.save(plan.checkpoints, done, strategy, meta, world)
    if world.first:
        checkpoint.prune(plan.checkpoints, plan.config.keep)


class Window:
    """Means over the steps between two points of the curve, over all workers, carried over a resume."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.sums: dict[str, Tensor] = {}
        self.weight: Tensor | float = 0.0
        self.carried: dict[str, float] = {}

    def add(self, losses: Losses) -> None:
        for name, value in {"loss": losses.loss, **losses.metrics}.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach().double()

    def weigh(self, weight: Tensor) -> None:
        self.weight = self.weight + weight.double()

    def carry(self) -> dict[str, float]:
        """Reduces what was added so far to plain numbers that a checkpoint can hold."""
        if self.sums:
            names = sorted(self.sums)
            totals = self.world.sum(torch.stack([self.sums[name] for name in names])).tolist()
            new = dict(zip(names, totals, strict=True)) | {"": float(self.weight)}
            self.carried = {name: self.carried.get(name, 0.0) + value for name, value in new.items()}
            self.sums, self.weight = {}, 0.0
        return self.carried

    def close(self) -> dict[str, float]:
        totals = self.carry()
        self.carried = {}
        weight = totals.get("", 0.0)
        return {name: value / weight for name, value in totals.items() if name and weight}


class Clock:
    """Images a second while training, without the time that probes and checkpoints take."""

    def __init__(self, images: int) -> None:
        self.images, self.steps, self.seconds, self.since = images, 0, 0.0, time.perf_counter()

    def tick(self) -> None:
        now = time.perf_counter()
        self.steps, self.seconds, self.since = self.steps + 1, self.seconds + now - self.since, now

    def skip(self) -> None:
        self.since = time.perf_counter()

    def rate(self) -> float:
        rate = self.steps * self.images / max(self.seconds, 1e-9)
        self.steps, self.seconds = 0, 0.0
        return rate

"""`vitlab bench memory`: what a worker holds in a step of DINO, student and teacher, against plain PyTorch.

The same method is trained by plain PyTorch in one process and by ZeRO-3 in several, in fp32. After some
steps one is followed by a `Ledger`: a dispatch mode that sees every operation, so every storage from its
first tensor to its last, and sums the live ones by owner at each allocation. Owners are asked, not guessed:
a strategy tells which tensors are weights, moments, gradients, frozen parameters. The rest is divided by who
made it: DeepSpeed's own code (gathered parameters, buckets, scratch of collectives), or a forward or backward
pass. What a kernel takes and gives back within one operation is not seen.

A figure is the largest of its sums over the step; `peak` is that of the sum of all, `state` that of what
stays between steps (see `STATE`).
"""

from __future__ import annotations

import gc
import itertools
import os
import statistics
import sys
import tempfile
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vitlab.batch import Batch, uniform
from vitlab.bench.report import Row
from vitlab.config import UserError
from vitlab.dist import World, world_of_group
from vitlab.engine.loop import LoopConfig, make_strategy
from vitlab.engine.optim import set_rates, set_starts
from vitlab.engine.strategy import Strategy
from vitlab.engine.zero import STAYS
from vitlab.methods import DINO, DINOConfig
from vitlab.methods.base import Method, Moment
from vitlab.models import ViTConfig, from_config

STATE = ("weights", "frozen", "moments", "gradients", "copies")
WARM = 4  # steps before one is timed: ZeRO-3 learns the order of modules in two and prefetches after them
MB = 2**20


@dataclass(frozen=True)
class MemoryOptions:
    workers: tuple[int, ...] = (1, 2, 4)
    persist: tuple[int, ...] = (0, STAYS, 100_000)
    batch: int = 16
    image_size: int = 64
    embed_dim: int = 384
    depth: int = 6
    rounds: int = 5
    threads: int = 1


def dino(options: MemoryOptions) -> DINO:
    """A ViT of 11 M parameters, of which most are in matrices, and a small head."""
    sizes = {"patch_size": 8, "embed_dim": options.embed_dim, "depth": options.depth, "num_heads": 6}
    config = ViTConfig.model_validate({"name": "vit_small", **sizes})
    model = from_config(config, num_classes=0, image_size=options.image_size)
    return DINO(DINOConfig(local_crops=2, out_dim=2048, hidden_dim=512), model, options.image_size)


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Every storage that lives, and the largest sums by owner."""

    def __init__(self, strategy: Strategy) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.strategy = strategy
        self.live: dict[int, tuple[int, str]] = {}  # address → bytes, made by
        self.most: Counter[str] = Counter()
        for thing in gc.get_objects():
            if issubclass(type(thing), Tensor):
                self._add(thing, "passes")
        self._sample()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        before = len(self.live)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf, None)
        if len(self.live) > before:
            self._sample()
        return out

    def _add(self, tensor: Tensor, maker: str | None) -> None:
        storage = tensor.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        if size and key not in self.live:
            self.live[key] = (size, maker or _maker())
            weakref.finalize(storage, self.live.pop, key, None)

    def _sample(self) -> None:
        owners: dict[int, str] = {}
        for kind, tensor in self.strategy.tensors():
            owners.setdefault(tensor.untyped_storage().data_ptr(), kind)
        sums: Counter[str] = Counter()
        for key, (size, maker) in self.live.items():
            sums[owners.get(key, maker)] += size
        sums |= {"peak": sums.total(), "state": sum(sums[kind] for kind in STATE)}
        self.most |= sums


def _maker() -> str:
    """Who makes a storage: the nearest caller that is DeepSpeed, or else a pass through the model."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != "_engine_run_backward":
        file = frame.f_code.co_filename
        if "/deepspeed/" in file:
            return "passing"
        if "/vitlab/" in file and file != __file__:
            return "passes"
        frame = frame.f_back
    return "passes"


def measure(zero: int | None, persist: int | None, options: MemoryOptions, world: World) -> dict[str, float]:
    """Seconds of a step, and the largest sums of one step in bytes, of the worker that holds most."""
    torch.manual_seed(0)
    method = dino(options)
    settings = {"epochs": 1, "batch_size": options.batch, "precision": "fp32", "optim": {"lr": 1e-4}}
    strategy = make_strategy(method, LoopConfig.model_validate(settings), zero, world, persist)
    set_starts(strategy.optimizer, 1)
    strategy.train(True)
    batch = _batch(method, options, world)
    seconds = [_step(method, strategy, batch, number, world) for number in range(WARM + options.rounds)]
    gc.collect()
    ledger = Ledger(strategy)
    with ledger:
        _step(method, strategy, batch, WARM + options.rounds, world)
    found = {"seconds": statistics.median(seconds[WARM:]), **ledger.most}
    strategy.close()
    trained = sum(getattr(p, "ds_numel", p.numel()) for p in method.parameters() if p.requires_grad)
    every = world.gather(found)
    return {"parameters": trained, **max(every, key=lambda one: one["state"])}


def _step(method: Method, strategy: Strategy, batch: Batch, number: int, world: World) -> float:
    """What the loop does in a step; its seconds."""
    begin = time.perf_counter()
    method.before_step(Moment(number, 1000, 100))
    set_rates(strategy.optimizer, number, 1e-4, 0.05)
    losses = strategy.forward(batch)
    strategy.backward(losses, world.sum(method.weigh(batch)))
    del losses
    strategy.step()
    for average in method.all_averages():
        strategy.average(average)
    method.after_step()
    return time.perf_counter() - begin


def _batch(method: Method, options: MemoryOptions, world: World) -> Batch:
    ids = torch.arange(options.batch)[world.rank :: world.size]
    views = [
        uniform(ids, view.name, 3 * view.size**2).view(-1, 3, view.size, view.size) for view in method.views()
    ]
    return Batch(views, torch.zeros_like(ids), torch.ones(len(ids)), ids, ["x"] * len(ids))


# ------------------------------------------------------------ processes


def _one(
    rank: int, workers: int, store: str, persist: int | None, options: MemoryOptions
) -> dict[str, float]:
    """One of the processes: ZeRO-3 with this threshold; plain PyTorch without one."""
    torch.set_num_threads(options.threads)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(workers), LOCAL_RANK=str(rank), CUDA_VISIBLE_DEVICES="")
    if persist is None:
        return measure(None, None, options, World())
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=workers, timeout=timedelta(minutes=5)
    )
    try:
        return measure(3, persist, options, world_of_group())
    finally:
        torch.distributed.destroy_process_group()


def measured(workers: int, persist: int | None, options: MemoryOptions) -> dict[str, float]:
    """`measure` in processes of their own, where nothing of an earlier one is left."""
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool,
    ):
        store = str(Path(folder) / "store")
        tasks = [pool.submit(_one, rank, workers, store, persist, options) for rank in range(workers)]
        found: list[dict[str, float]] = [task.result() for task in tasks]
    return found[0]


def bench_memory(options: MemoryOptions, say: Callable[[str], None] = lambda text: None) -> list[Row]:
    for key in ("batch", "image_size", "rounds", "threads", "workers"):
        given = getattr(options, key)
        if min(given if isinstance(given, tuple) else (given,)) < 1:
            raise UserError(f"bench memory: {key}: given {given}; allowed: 1 or more")
    return list(_rows(options, say))


def _rows(options: MemoryOptions, say: Callable[[str], None]) -> Iterator[Row]:
    say("plain PyTorch in one process")
    plain = measured(1, None, options)
    parts = {kind: plain.get(kind, 0.0) / MB for kind in (*STATE, "passes", "peak")}
    say("of it, MiB: " + ", ".join(f"{kind} {size:.4g}" for kind, size in parts.items()))
    for workers, persist in itertools.product(options.workers, options.persist):
        case = f"zero 3 on {workers}, persist {persist}"
        say(case)
        found = measured(workers, persist, options)
        more = {"bytes/parameter": found["state"] / found["parameters"]}
        more |= {kind: found.get(kind, 0.0) / MB for kind in (*STATE, "passing", "passes", "peak")}
        more |= {"plain peak": plain["peak"] / MB, "s": found["seconds"], "plain s": plain["seconds"]}
        ours, theirs = found["state"] / MB, plain["state"] / MB
        peer = f"torch {torch.__version__}"
        yield Row(case, peer, ours, theirs, "MiB", ours / theirs, options.rounds, more)

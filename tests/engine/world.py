"""Several real processes with a gloo group, for tests that need workers but not Ray."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from vitlab.batch import Batch, View, derived, uniform
from vitlab.dist import World, world_of_group
from vitlab.engine.loop import LoopConfig, Plan, make_strategy, train
from vitlab.methods import MethodConfig, Supervised, SupervisedConfig, create_method
from vitlab.methods.base import Average, Losses, Method, frozen
from vitlab.models import ViTConfig, from_config
from vitlab.models.parts.norm import BatchNorm2d


class Toy(Method):
    """A small net with everything that strategies must handle: a frozen average, a buffer, odd sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(7, 33), torch.nn.GELU(), torch.nn.Linear(33, 5))
        self.teacher = torch.nn.Sequential(torch.nn.Linear(7, 33), torch.nn.GELU(), torch.nn.Linear(33, 5))
        self.teacher.load_state_dict(self.net.state_dict())
        self.teacher.requires_grad_(False)
        self.register_buffer("seen", torch.zeros(1))

    def views(self) -> list[View]:
        return [View("main", 7)]

    def layer_of(self, name: str) -> int:
        return 0 if name.startswith("net.0") else 1

    def no_decay(self) -> set[str]:
        return set()

    def losses(self, batch: Batch) -> Losses:
        x = batch.views[0]
        self.seen += self.training
        loss = ((self.net(x) - x[:, :5]) ** 2).mean(1) + ((self.net(x) - self.teacher(x)) ** 2).mean(1)
        return Losses((loss * batch.weight).sum(), {"far": loss.detach().sum()})

    def averages(self) -> list[Average]:
        return [Average(self.teacher, self.net, 0.9)]

    def starts(self) -> dict[str, float]:
        return {"net.2.bias": 0.4}


class Notes:
    def __init__(self) -> None:
        self.points: list[tuple[int, dict[str, float]]] = []
        self.notes: list[str] = []

    def log(self, step: int, values: dict[str, float]) -> None:
        self.points.append((step, values))

    def flush(self) -> None: ...

    def progress(self, step: int, total: int, values: dict[str, float]) -> None: ...

    def say(self, text: str) -> None: ...

    def note(self, text: str) -> None:
        self.notes.append(text)


def batches(config: LoopConfig, world: World, start: int, stop: int | None) -> Any:
    """Global batches that are the same on any number of workers."""
    for step in range(start, stop or 1000):
        ids = torch.arange(config.batch_size) + step * config.batch_size
        x = uniform(ids, "x", 7)
        weight = (torch.arange(config.batch_size) % 5 > 0).float()
        mine = torch.arange(world.rank, config.batch_size, world.size)
        parts = mine.chunk(config.accumulate)
        yield [
            Batch([x[p]], torch.zeros(len(p), dtype=torch.int64), weight[p], ids[p], [str(int(i)) for i in p])
            for p in parts
        ]


class Digits(Method):
    """A real objective: a small ViT on images made of the batch's numbers."""

    width = 32

    def __init__(self) -> None:
        super().__init__()
        sizes = {"patch_size": 2, "in_chans": 1, "embed_dim": self.width, "depth": 2, "num_heads": 2}
        config = ViTConfig.model_validate({"name": "vit_tiny", "drop_path": 0.2, **sizes})
        self.inner = Supervised(
            SupervisedConfig(label_smoothing=0.1), from_config(config, num_classes=7, image_size=4), 4
        )
        self.model = self.inner.model

    def layer_of(self, name: str) -> int:
        return self.inner.layer_of(name.removeprefix("inner."))

    def no_decay(self) -> set[str]:
        return {f"inner.{name}" for name in self.inner.no_decay()}

    def losses(self, batch: Batch) -> Losses:
        images = uniform(batch.seeds, "image", 16).view(-1, 1, 4, 4)
        labels = (images.mean((1, 2, 3)) * 7).long()
        return self.inner(replace(batch, views=[images], labels=labels))


class Wide(Digits):
    """Matrices above ZeRO-3's persistence threshold, so that they really are sharded."""

    width = 128


class Follower(Toy):
    """All that a self-distillation asks of the engine: a teacher, batch statistics, a part that begins late.

    `keep_average` adds the average that is exported.
    """

    late = "net.4."

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(7, 32),
            torch.nn.Unflatten(1, (2, 4, 4)),
            BatchNorm2d(2),
            torch.nn.Flatten(),
            torch.nn.Linear(32, 5),
        )
        self.teacher = frozen(self.net)

    def starts(self) -> dict[str, float]:
        return {self.late: 0.7}

    def export(self) -> Any:
        return self.net


def teaching(config: dict[str, Any]) -> Method:
    """An objective with several views of a sample, each made of the sample's numbers and of its own noise."""
    model = ViTConfig.model_validate({"name": "vit_tiny", "drop_path": 0.2, **VIEWED})
    method = create_method(
        TypeAdapter(MethodConfig).validate_python(config), from_config(model, num_classes=0, image_size=8)
    )
    plain = method.losses

    def losses(batch: Batch) -> Losses:
        fields = uniform(batch.seeds, "fields", 4).view(-1, 1, 2, 2)
        views = []
        for name, size, _ in method.views():
            noise = uniform(derived(batch.seeds, name), "noise", size * size).view(-1, 1, size, size)
            views.append(torch.nn.functional.interpolate(fields, size) + noise / 2)
        return plain(replace(batch, views=views))

    vars(method)["losses"] = losses
    return method


VIEWED = {"patch_size": 2, "in_chans": 1, "embed_dim": 32, "depth": 2, "num_heads": 2}
TEACHING: dict[str, dict[str, Any]] = {
    "dino": {"local_crops": 2, "out_dim": 48, "hidden_dim": 40, "bottleneck_dim": 24, "momentum": 0.9},
    # A low temperature makes rounding grow, and what stands below BatchNorm is led by rounding alone.
    "msn": {
        "focal_crops": 2,
        "prototypes": 24,
        "hidden_dim": 40,
        "output_dim": 24,
        "momentum": 0.9,
        "temperature": 1.0,
        "head_batch_norm": False,
    },
    "msn, normed": {
        "name": "msn",
        "focal_crops": 2,
        "prototypes": 24,
        "hidden_dim": 40,
        "output_dim": 24,
        "momentum": 0.9,
    },
}
METHODS: dict[str, Callable[[], Method]] = {
    "toy": Toy,
    "digits": Digits,
    "wide": Wide,
    "follower": Follower,
    **{name: partial(teaching, {"name": name, **sizes}) for name, sizes in TEACHING.items()},
}


def run(spec: dict[str, Any], world: World) -> dict[str, Any] | None:
    """One training. `copy_of`: the checkpoints of an earlier run, from which it goes on in its own folder."""
    if spec.get("copy_of") and world.first:
        shutil.copytree(spec["copy_of"], spec["checkpoints"])
    world.barrier()
    torch.manual_seed(0)
    method = METHODS[spec["method"]]()
    config = LoopConfig.model_validate(spec["config"])
    if config.ema:
        method.keep_average(config.ema)
    strategy = make_strategy(method, config, spec["zero"], world, spec.get("persist"))
    notes, history = Notes(), [strategy.state(method)]
    if spec.get("recorded"):
        vars(method)["after_step"] = lambda: history.append(strategy.state(method))
    plan = Plan(config, spec["steps"], lambda s: batches(config, world, s, spec.get("stop")), notes)
    if spec.get("checkpoints"):
        plan.checkpoints = Path(spec["checkpoints"])
    try:
        train(method, strategy, plan, world)
    except StopIteration:  # the data ends where this run is meant to be cut off
        assert spec.get("stop")
    state = strategy.state(method)
    strategy.close()
    return {"points": notes.points, "state": state, "history": history} if world.first else None


def launch(workers: int, specs: dict[str, dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Runs every spec, one after the other, on that many processes; returns what rank 0 has, by name."""
    if workers == 1 and all(spec["zero"] is None for spec in specs.values()):
        return {name: run(spec, World()) for name, spec in specs.items()}  # starting a process takes seconds
    return spawn(__file__, workers, specs, folder)


def divided(
    program: str, work: Callable[[Any, World], Any], jobs: dict[str, Any], folder: Path
) -> dict[str, Any]:
    """Jobs without `zero` in this process, the others by `spawn` on two."""
    plain = {name: work(dict(job), World()) for name, job in jobs.items() if job["zero"] is None}
    return plain | spawn(program, 2, {name: job for name, job in jobs.items() if name not in plain}, folder)


def spawn(program: str, workers: int, jobs: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Runs a file that ends in `serve` as so many processes; what rank 0 has, by the jobs' names."""
    out = folder / f"{uuid.uuid4().hex}.pt"
    command = [sys.executable, "-W", "ignore", program, str(out), json.dumps(jobs)]
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(workers)}
    settings["PYTHONPATH"] = os.pathsep.join(sys.path)
    children = [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=settings | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(workers)
    ]
    outputs = [child.communicate(timeout=900)[0] for child in children]
    for child, output in zip(children, outputs, strict=True):
        assert child.returncode == 0, output[-4000:]
    found: dict[str, Any] = torch.load(out, weights_only=True, mmap=True)  # some keep it for a whole session
    return found


def serve(work: Callable[[Any, World], Any]) -> None:
    """One of the processes of `spawn`: every job in turn; a group only where it is needed."""
    out, jobs = Path(sys.argv[1]), json.loads(sys.argv[2])
    world, workers = World(), int(os.environ["WORLD_SIZE"])
    if workers > 1 or any(job.get("zero") is not None for job in jobs.values()):
        store = f"file://{out.with_suffix('.store')}"
        torch.distributed.init_process_group(
            "gloo", init_method=store, rank=int(os.environ["RANK"]), world_size=workers
        )
        world = world_of_group()
    results = {name: work(job, world) for name, job in jobs.items()}
    if world.first:
        torch.save(results, out)
    world.barrier()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def fitted(
    method: Method, config: dict[str, Any], steps: int, parts: Callable[..., Any], world: World, **way: Any
) -> dict[str, Any]:
    """One epoch of a method in a way: `zero`, `kept` (a folder of checkpoints), and keys of the loop."""
    stage, kept = way.pop("zero"), way.pop("kept", None)
    loop = LoopConfig.model_validate(
        {"epochs": 1, "log_every": 1, "checkpoint_every": steps // 2} | config | way
    )
    strategy, notes = make_strategy(method, loop, stage, world), Notes()
    plan = Plan(loop, steps, lambda start: parts(loop, world, start, steps), notes)
    plan.checkpoints = Path(kept) if kept else None
    train(method, strategy, plan, world)
    state = strategy.state(method)
    strategy.close()
    return {"points": notes.points, "state": state}


# A gradient scaled by a constant shows in its norm alone: AdamW's steps are the same.
FIGURES = ("train/loss", "train/grad_norm")


def apart(
    a: Any, b: Any, names: Iterable[str] = ("train/loss",), without: tuple[str, ...] = ()
) -> tuple[float, float]:
    """Largest differences of two runs: of figures, over the last steps that both have, and of the state.

    Figures above one count by their ratio: norms of gradients are of any size.
    """
    ours, theirs = dict(a["points"]), dict(b["points"])
    shared = ours.keys() & theirs.keys()
    assert shared in (ours.keys(), theirs.keys())
    pairs = ((ours[step][name], theirs[step][name]) for name in names for step in shared)
    ratios = [abs(one - other) / max(1.0, abs(other)) for one, other in pairs]
    figures = float(torch.tensor(ratios, dtype=torch.float64).max())  # NaN if one is: it is below nothing
    return figures, states_apart(a["state"], b["state"], without)


def states_apart(a: dict[str, Tensor], b: dict[str, Tensor], without: tuple[str, ...] = ()) -> float:
    """Largest difference of two states, leaving out names with such an end."""
    assert a.keys() == b.keys()
    names = [name for name in a if not name.endswith(without)]
    return float(torch.stack([(a[name].double() - b[name].double()).abs().max() for name in names]).max())


if __name__ == "__main__":
    serve(run)

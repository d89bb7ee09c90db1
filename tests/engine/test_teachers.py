"""Averages, late parameters and schedules: the same numbers on plain PyTorch and at every ZeRO stage.

One method has them all, `Follower`; every step of every way to hold it is recorded and compared with what
is computed by hand here in float64, or with torch's own AdamW.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
from world import Follower, batches, launch, states_apart

from vitlab.dist import World
from vitlab.engine.loop import LoopConfig
from vitlab.engine.optim import OptimConfig, decay_at, lr_at

CONFIG: dict[str, Any] = {
    "epochs": 2,
    "batch_size": 20,
    "log_every": 1,
    "checkpoint_every": 4,
    "ema": 0.8,
    "optim": {"lr": 1e-2, "warmup_epochs": 0.5, "weight_decay": 0.1, "weight_decay_end": 0.6},
}
EPOCH = 8
STEPS = CONFIG["epochs"] * EPOCH
FIRST = math.ceil(0.7 * EPOCH)  # the step at which the late part begins
CUTS = {"before": 5, "after": 11}  # saved at 4 and 8
WAYS: dict[str, dict[str, Any]] = {
    **{f"zero {z}": {"zero": z} for z in range(3)},
    **{f"zero 3, persist {n}": {"zero": 3, "persist": n} for n in (0, 60, 100_000)},  # 60: some stay
}
CROSSED = ("zero 2", "zero 3, persist 0", "zero 3, persist 100000")


def spec(**more: Any) -> dict[str, Any]:
    return {"method": "follower", "config": CONFIG, "steps": EPOCH, "recorded": True, **more}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("teachers")
    plain = {"plain": {"zero": None}}

    def cut(ways: dict[str, Any]) -> dict[str, Any]:
        return {
            f"{way}, cut {when}": spec(**how, stop=stop, checkpoints=str(folder / f"{way} {when}"))
            for way, how in ways.items()
            for when, stop in CUTS.items()
        }

    def again(ways: dict[str, Any], source: str = "") -> dict[str, Any]:
        found = {}
        for way, how in ways.items():
            for when in CUTS:
                left = folder / f"{source or way} {when}"
                here = {"copy_of": str(left), "checkpoints": f"{left}, {way}"}
                found[f"{source}{way}, resumed {when}"] = spec(**how, **here)
        return found

    found = launch(1, {"plain": spec(zero=None)} | cut(plain), folder)
    whole = {way: spec(**how) for way, how in WAYS.items()}
    crossed = {way: WAYS[way] for way in CROSSED}
    elsewhere = again(crossed, "plain") | again(crossed, "zero 3, persist 60")
    found |= launch(2, whole | cut(WAYS) | again(WAYS) | elsewhere, folder)
    return found | launch(1, again(plain) | again(plain, "zero 3, persist 0"), folder)


@pytest.mark.parametrize("way", ["plain", *WAYS])
def test_averages_are_those_of_hand(runs: dict[str, Any], way: str) -> None:
    """The teacher: weights alone. What is exported: weights and running statistics; counters are copied."""
    history = runs[way]["history"]
    assert len(history) == STEPS + 1
    for target, momentum, buffers in (("teacher", 0.9, False), ("smooth", 0.8, True)):
        names = [name for name in history[0] if name.startswith("net.")]
        names = [name for name in names if buffers or name.endswith(("weight", "bias"))]
        old = {name: history[0][name].double() for name in names}
        for state in history[1:]:
            for name in names:
                new = state[name].double()
                moves = state[name].is_floating_point()
                old[name] = momentum * old[name] + (1 - momentum) * new if moves else new
                kept = state[name.replace("net", target)].double()
                assert float((kept - old[name]).abs().max()) < 1e-6
        lag = history[-1]["net.0.weight"] - history[-1][f"{target}.0.weight"]
        assert float(lag.abs().max()) > 1e-3  # a copy would prove nothing
    assert int(history[-1]["smooth.2.num_batches_tracked"]) == 2 * STEPS  # a loss calls the net twice


@pytest.mark.parametrize("way", WAYS)
def test_every_way_is_plain(runs: dict[str, Any], way: str) -> None:
    """Also of what stays whole beside its shard at stage 3: the curve is made of the copies."""
    for ours, theirs in zip(runs[way]["history"], runs["plain"]["history"], strict=True):
        assert states_apart(ours, theirs) < 1e-6
    for (_, ours), (_, theirs) in zip(runs[way]["points"], runs["plain"]["points"], strict=True):
        assert abs(ours["train/loss"] - theirs["train/loss"]) < 1e-6


@pytest.mark.parametrize("when", CUTS)
@pytest.mark.parametrize("way", ["plain", *WAYS])
def test_resumed_to_the_bit(runs: dict[str, Any], way: str, when: str) -> None:
    resumed = runs[f"{way}, resumed {when}"]
    left = STEPS - CUTS[when] // 4 * 4
    assert len(resumed["points"]) == left
    for ours, theirs in zip(resumed["history"][1:], runs[way]["history"][-left:], strict=True):
        assert states_apart(ours, theirs) == 0


@pytest.mark.parametrize("when", CUTS)
@pytest.mark.parametrize(
    "way",
    [
        "zero 3, persist 0plain",
        *(source + way for source in ("plain", "zero 3, persist 60") for way in CROSSED),
    ],
)
def test_resumed_elsewhere(runs: dict[str, Any], way: str, when: str) -> None:
    assert states_apart(runs[f"{way}, resumed {when}"]["state"], runs["plain"]["state"]) < 1e-6


@pytest.mark.parametrize("way", ["plain", *WAYS])
def test_late_parameters_are_torchs_of_an_optimizer_that_begins_there(runs: dict[str, Any], way: str) -> None:
    history, reference = runs[way]["history"], by_torch()
    late = [{name: state[name] for name in state if name.startswith(Follower.late)} for state in history]
    for step in range(FIRST + 1):
        assert states_apart(late[step], late[0]) == 0
    assert states_apart(late[FIRST + 1], late[0]) > 1e-4
    for state, theirs in zip(history[1:], reference, strict=True):
        ours = {name: state[name] for name in theirs}
        assert states_apart(ours, theirs) < 1e-6


@cache
def by_torch() -> list[dict[str, torch.Tensor]]:
    """A loop by hand: until the late part begins, its gradients are None."""
    torch.manual_seed(0)
    method = Follower().train()
    optim = OptimConfig.model_validate(CONFIG["optim"])
    named = dict(method.net.named_parameters(prefix="net"))
    parts = [{"params": [p], "decayed": p.ndim > 1} for p in named.values()]
    optimizer = torch.optim.AdamW(parts, lr=0.0, betas=optim.betas, eps=optim.eps)
    history = []
    for step, (batch,) in enumerate(batches(LoopConfig.model_validate(CONFIG), World(), 0, STEPS)):
        decay = 0.6 + (0.1 - 0.6) * (1 + math.cos(math.pi * step / STEPS)) / 2
        for group in optimizer.param_groups:
            group["lr"] = lr_at(optim, step / EPOCH, CONFIG["epochs"])
            group["weight_decay"] = decay if group["decayed"] else 0.0
        (method(batch).loss / batch.weight.sum()).backward()
        for name, parameter in named.items():
            if step < FIRST and name.startswith(Follower.late):
                parameter.grad = None
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for old, new in zip(method.teacher.parameters(), named.values(), strict=True):
                old.mul_(0.9).add_(new, alpha=0.1)
        history.append({name: p.detach().clone() for name, p in named.items()})
    return history


def test_decay_goes_by_half_a_cosine() -> None:
    config = OptimConfig(weight_decay=0.04, weight_decay_end=0.4)
    assert [decay_at(config, p) for p in (0.0, 1.0)] == pytest.approx([0.04, 0.4])
    assert decay_at(config, 0.25) == pytest.approx(0.04 + 0.36 * (1 - math.cos(math.pi / 4)) / 2)
    assert decay_at(OptimConfig(weight_decay=0.04), 0.7) == 0.04

"""Batch normalisation over several workers is that of one process with the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from world import serve, spawn

from vitlab.dist import World
from vitlab.models.features import Backbone
from vitlab.models.parts.norm import BatchNorm1d, BatchNorm2d

STEPS = 3
SIZES = {2: [5, 3], 3: [4, 1, 3]}  # workers → samples of each: never the same number
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "mean of all steps": {"momentum": None},
    "bare": {"affine": False},
    "no statistics": {"track_running_stats": False},
}


class Net(nn.Module):
    """Two norms around a convolution, so that one's gradient passes through the other."""

    def __init__(self, norm: type[nn.BatchNorm2d], dtype: torch.dtype, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = norm(3, **settings)
        self.conv = nn.Conv2d(3, 4, 3)
        self.second = norm(4, **settings)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.conv(self.first(x))))


class Flat(nn.Module):
    """The same around a dense layer, on one place of the images."""

    def __init__(self, norm: type[nn.Module], dtype: torch.dtype, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = norm(3, **settings)
        self.dense = nn.Linear(3, 4)
        self.second = norm(4, **settings)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.dense(self.first(x[:, :, 0, 0]))))


def images(step: int, dtype: torch.dtype) -> Tensor:
    """Far from zero against their spread: a sum of squares would lose its digits."""
    generator = torch.Generator().manual_seed(step)
    return (torch.randn(8, 3, 6, 5, generator=generator, dtype=torch.float64) * 0.5 + 100).to(dtype)


NETS = {"": (Net, nn.BatchNorm2d, BatchNorm2d), "flat, ": (Flat, nn.BatchNorm1d, BatchNorm1d)}


def history(net: nn.Module, dtype: torch.dtype, part: slice, half: bool = False) -> dict[str, Any]:
    """Several steps on a part of each batch: outputs, gradients of it, summed gradients, and the buffers."""
    found: dict[str, Any] = {"output": [], "input": [], "weights": []}
    for step in range(STEPS):
        x = images(step, dtype)[part].requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            out = net(x)
        aim = images(step + 10, torch.float64).flatten()[: out[0].numel()].view(out[0].shape) - 100
        (out * aim.to(out.dtype) + out**2).mean(1).sum().backward()
        found["output"].append(out.detach())
        found["input"].append(x.grad)
        found["weights"].append([p.grad.clone() for p in net.parameters()])
        with torch.no_grad():
            for p in net.parameters():
                if torch.distributed.is_initialized():
                    torch.distributed.all_reduce(p.grad)
                p -= 0.01 * p.grad
                p.grad = None
    return found | {"buffers": dict(net.named_buffers())}


@pytest.fixture(scope="module", params=sorted(SIZES))
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of so many processes found, for every setting and both dtypes."""
    folder = tmp_path_factory.mktemp("norm")
    ranks: list[dict[str, Any]] = spawn(__file__, request.param, {"all": {}}, folder)["all"]
    return ranks


def apart(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-3))


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_workers_are_one_process_with_the_whole_batch(
    found: list[dict[str, Any]], setting: str, kind: str
) -> None:
    net, theirs, _ = NETS[kind]
    alone = history(net(theirs, torch.float64, **SETTINGS[setting]), torch.float64, slice(None))
    each = [rank[f"{kind}{setting}, float64"] for rank in found]
    for step in range(STEPS):
        for name in ("output", "input"):
            assert apart(torch.cat([r[name][step] for r in each]), alone[name][step]) < 1e-10
        for i, theirs in enumerate(alone["weights"][step]):
            assert apart(sum(r["weights"][step][i] for r in each), theirs) < 1e-10
    for name, theirs in alone["buffers"].items():
        for rank in each:
            assert apart(rank["buffers"][name].double(), theirs.double()) < 1e-10
            assert torch.equal(rank["buffers"][name], each[0]["buffers"][name])


def test_half_precision_keeps_its_statistics_wide(found: list[dict[str, Any]]) -> None:
    alone = history(Net(nn.BatchNorm2d, torch.float32), torch.float32, slice(None), half=True)
    for rank in found:
        half = rank["bf16"]
        assert half["output"][0].dtype == torch.bfloat16
        assert all(torch.isfinite(g).all() for step in half["weights"] for g in step)
        for name, theirs in alone["buffers"].items():
            assert half["buffers"][name].dtype == theirs.dtype
            assert apart(half["buffers"][name].double(), theirs.double()) < 5e-3  # one rounds another way


def test_a_repeated_forward_leaves_the_statistics(found: list[dict[str, Any]]) -> None:
    for rank in found:
        once, twice = rank["plain, float64"], rank["repeated"]
        assert all(torch.equal(once["buffers"][n], twice["buffers"][n]) for n in once["buffers"])
        assert all(torch.equal(a, b) for a, b in zip(once["input"], twice["input"], strict=True))


def test_alone_it_is_torchs_own() -> None:
    ours = history(Net(BatchNorm2d, torch.float32), torch.float32, slice(None))
    theirs = history(Net(nn.BatchNorm2d, torch.float32), torch.float32, slice(None))
    again = history(Repeated(torch.float32), torch.float32, slice(None))
    for name in ("output", "input"):
        for a, b, c in zip(ours[name], theirs[name], again[name], strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a, c)
    for name, value in theirs["buffers"].items():
        assert torch.equal(value, ours["buffers"][name])
        assert torch.equal(value, again["buffers"][f"net.{name}"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_alone_the_flat_one_is_torchs_own(dtype: torch.dtype) -> None:
    nets = [Flat(norm, dtype) for norm in (BatchNorm1d, nn.BatchNorm1d)]
    ours, theirs = (history(net, dtype, slice(None)) for net in nets)
    for name in ("output", "input"):
        assert all(apart(a, b) < 1e-6 for a, b in zip(ours[name], theirs[name], strict=True))
    assert nets[0].state_dict().keys() == nets[1].state_dict().keys()
    nets[0].load_state_dict(nets[1].state_dict())
    same = [net.eval()(images(5, dtype)).detach() for net in nets]
    assert apart(same[0], same[1]) < 1e-6


def test_a_plain_checkpoint_would_move_them_twice() -> None:
    """Why `Backbone.run` marks the second pass."""
    net = Net(BatchNorm2d, torch.float32)
    checkpoint(net, images(0, torch.float32), use_reentrant=False, early_stop=False).sum().backward()
    assert int(net.first.num_batches_tracked) == 2


class Repeated(nn.Module):
    """The same net as a block that forgets its insides, by the very method that backbones use."""

    recompute = True
    run = Backbone.run

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.net = Net(BatchNorm2d, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.net, x)


def share(_: dict[str, Any], world: World) -> list[dict[str, Any]]:
    """Every rank's findings on its own part of the batch."""
    begin = sum(SIZES[world.size][: world.rank])
    part = slice(begin, begin + SIZES[world.size][world.rank])
    out = {
        f"{kind}{name}, float64": history(net(ours, torch.float64, **settings), torch.float64, part)
        for name, settings in SETTINGS.items()
        for kind, (net, _, ours) in NETS.items()
    }
    out["bf16"] = history(Net(BatchNorm2d, torch.float32), torch.float32, part, half=True)
    out["repeated"] = history(Repeated(torch.float64), torch.float64, part)
    buffers = out["repeated"]["buffers"]
    out["repeated"]["buffers"] = {name.removeprefix("net."): value for name, value in buffers.items()}
    return world.gather(out)


if __name__ == "__main__":
    serve(share)

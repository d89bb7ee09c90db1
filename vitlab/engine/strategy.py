"""How parameters and optimizer states lie in memory, behind one face that the loop and checkpoints use.

`Plain` is one process with ordinary PyTorch; `vitlab.engine.zero.Zero` is DeepSpeed. Both describe what
they hold as `Piece`s of named tensors, so a checkpoint written by one is read by the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from vitlab.batch import Batch
from vitlab.engine.optim import OptimConfig, adamw
from vitlab.methods.base import TINY, Average, Losses, Method

MOMENTS = ("exp_avg", "exp_avg_sq")
Kind = Literal["weights", "moments", "gradients", "frozen", "copies", "passing"]


class Piece(NamedTuple):
    """A stretch of a flattened named tensor: `data` is elements start … start+len of `kind` of `name`.

    Kinds: `weight` (the fp32 master), `exp_avg`, `exp_avg_sq`, `buffer`. `data` is a view: writing to it
    changes the training state.
    """

    name: str
    kind: str
    start: int
    data: Tensor


class Strategy(Protocol):
    optimizer: Any  # has `param_groups`

    def forward(self, batch: Batch, ask: str = "losses") -> Any:
        """Calls the method; the only way in, because ZeRO-3 gathers parameters inside it."""

    def train(self, mode: bool) -> None: ...

    def backward(self, losses: Losses, weight: Tensor) -> None:
        """Adds the gradient of `losses.loss` / `weight`, where `weight` is that of the global batch."""

    def step(self) -> Tensor | float | None:
        """Clips, steps, clears; the gradient's norm before clipping if it is known."""

    def average(self, average: Average) -> None:
        """Moves an average one step on, in fp32, on the shards that are here."""

    def own(self) -> Iterator[Piece]:
        """What this rank saves; together the ranks' pieces are the whole state, each part once."""

    def copies(self) -> Iterator[Piece]:
        """What this rank must fill when a checkpoint is loaded: its part, and every copy of weights."""

    def set_steps(self, steps: int) -> None:
        """Prepares optimizer states as after `steps` steps, to be filled through `copies`."""

    def state(self, module: nn.Module) -> dict[str, Tensor] | None:
        """The whole state dict of a part of the method, on the CPU of rank 0; None elsewhere."""

    def tensors(self) -> Iterator[tuple[Kind, Tensor]]:
        """What this rank holds at this moment, for measurements.

        `frozen`: parameters that no gradient reaches; `copies`: whole parameters that stay beside their
        shards; `passing`: what lives only while it is sent, gathered parameters and gradients among it.
        """

    def close(self) -> None: ...


def kept(method: Method) -> dict[str, nn.Parameter]:
    """The parameters that belong to the training state: trained ones, and averages of them.

    Other frozen parameters (a distillation teacher) come from the stage's inputs and are not saved.
    """
    averaged = {id(p) for average in method.all_averages() for p in average.target.parameters()}
    return {n: p for n, p in method.named_parameters() if p.requires_grad or id(p) in averaged}


def buffers(method: Method) -> Iterator[Piece]:
    """Persistent buffers; equal on all ranks by contract."""
    saved = method.state_dict().keys()
    for name, buffer in method.named_buffers():
        if name in saved:
            yield Piece(name, "buffer", 0, buffer.data.view(-1))


@torch.no_grad()
def move(average: Average) -> None:
    """Moves an average whose tensors are whole one step on, all of its tensors in one call."""
    old: list[Tensor] = list(average.target.parameters())
    new: list[Tensor] = list(average.source.parameters())
    assert len(old) == len(new)
    torch._foreach_lerp_(old, new, 1 - average.momentum)
    average_buffers(average)


@torch.no_grad()
def average_buffers(average: Average) -> None:
    """Buffers are whole on every rank; counters and tables are taken as they are."""
    for old, new in zip(average.target.buffers(), average.source.buffers(), strict=True):
        if average.buffers and old.is_floating_point():
            old.lerp_(new, 1 - average.momentum)
        elif average.buffers:
            old.copy_(new)


class Plain:
    """One process, ordinary PyTorch."""

    def __init__(self, method: Method, optim: OptimConfig, bf16: bool) -> None:
        self.method, self.clip, self.bf16 = method, optim.clip, bf16
        self.optimizer = adamw(method, optim)
        self.device = next(method.parameters()).device

    def forward(self, batch: Batch, ask: str = "losses") -> Any:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return self.method(batch, ask)

    def train(self, mode: bool) -> None:
        self.method.train(mode)

    def backward(self, losses: Losses, weight: Tensor) -> None:
        torch.autograd.backward(losses.loss / weight.clamp(min=TINY))

    def step(self) -> Tensor | float | None:
        parameters = [p for p in self.method.parameters() if p.requires_grad]
        norm = nn.utils.clip_grad_norm_(parameters, self.clip or float("inf"))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def average(self, average: Average) -> None:
        move(average)

    def own(self) -> Iterator[Piece]:
        for name, parameter in kept(self.method).items():
            yield Piece(name, "weight", 0, parameter.data.view(-1))
            state = self.optimizer.state.get(parameter, {})
            for kind in MOMENTS:
                if kind in state:
                    yield Piece(name, kind, 0, state[kind].view(-1))
        yield from buffers(self.method)

    copies = own

    def set_steps(self, steps: int) -> None:
        for group in self.optimizer.param_groups:
            fill_states(self.optimizer, group["params"], steps - group["first"])

    def state(self, module: nn.Module) -> dict[str, Tensor] | None:
        return {name: tensor.detach().cpu().clone() for name, tensor in module.state_dict().items()}

    def tensors(self) -> Iterator[tuple[Kind, Tensor]]:
        for parameter in self.method.parameters():
            yield "weights" if parameter.requires_grad else "frozen", parameter.data
            if parameter.grad is not None:
                yield "gradients", parameter.grad
        yield from moments(self.optimizer)

    def close(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)


def moments(optimizer: torch.optim.Optimizer) -> Iterator[tuple[Kind, Tensor]]:
    yield from (("moments", state[kind]) for state in optimizer.state.values() for kind in MOMENTS)


def fill_states(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor], steps: int) -> None:
    """Gives AdamW the state that it has for `parameters` after `steps` steps, moments still zero."""
    for parameter in parameters if steps > 0 else ():
        optimizer.state[parameter] = {
            "step": torch.tensor(float(steps), device=parameter.device),
            **{kind: torch.zeros_like(parameter, dtype=torch.float32) for kind in MOMENTS},
        }

"""What is done to the trained model before it is trained: less memory, or compiled code.

`recompute`: its blocks forget their insides and compute them again for the gradient (Chen et al. 2016, arXiv
1604.06174), see `Backbone.run`. `compile`: torch.compile (Ansel et al. 2024) of its forward and backward
pass. Validation, pictures and evaluation run the very same weights as plain PyTorch: their last batch is
smaller, and each further shape would be compiled anew.

Only the model that is trained is touched: a teacher or an average beside it is not.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from vitlab.config import UserError
from vitlab.models import Backbone

BACKEND = "inductor"  # what torch.compile makes code with
PATIENCE = 2.0  # seconds until a person is told why nothing moves


def prepare(model: Backbone, *, recompute: bool, compile: bool) -> None:  # noqa: A002  (the setting's name)
    if recompute:
        model.recompute = True
    if compile:
        _compile(model)


def _compile(model: Backbone) -> None:
    """The model's forward is compiled code while it trains, and what it was elsewhere; names stay."""
    compiler = os.environ.get("CXX", "g++")
    if BACKEND == "inductor" and shutil.which(compiler) is None:
        raise UserError(
            f"compile: given true; this machine has no C++ compiler {compiler!r}, which torch.compile "
            "needs; install one, or give compile=false"
        )
    os.environ["TORCHDYNAMO_DISABLE"] = "0"  # a session's workers start with 1, see engine/launch.py
    plain = model.forward
    fast: Any = torch.compile(plain, dynamic=False, backend=BACKEND)

    def forward(*inputs: Any, **options: Any) -> Any:
        trains = model.training and torch.is_grad_enabled()
        return (fast if trains else plain)(*inputs, **options)

    vars(model)["forward"] = forward  # stands before the class's own


def leave_hooks(method: nn.Module) -> None:
    """ZeRO-3's hooks stay plain Python, which nobody could compile: code is then made module by module."""
    for module in method.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for number, hook in hooks.items():
                hooks[number] = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]


@contextmanager
def announced(say: Callable[[str], None]) -> Iterator[None]:
    """Says that it compiles if the first step takes long."""
    timer = threading.Timer(PATIENCE, say, ["compiling …"])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()

"""`vitlab bench step`: forward, backward and optimizer step of a model or an objective, against its peer.

Both sides hold the same weights, see the same images, have the fused AdamW and the same precision. Their
losses are compared before anything is timed, so the model alone is what differs. Objectives (`NAME/PEER`)
move their teachers and centres in the timed step, too (`follow`). The peer is always eager; with `compile`
ours is compiled.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vitlab.bench.objectives import beit_transformers, distill_timm, mae_lightly, simmim_lightly
from vitlab.bench.peers import CLASSES, Pair, cvt_pair, mae_pair, timm_pair
from vitlab.bench.report import Row, alternate
from vitlab.bench.siamese import dino_lightly, msn_lightly
from vitlab.config import UserError, nearest
from vitlab.dist import device, half

CLOSE = 1e-4  # how far apart the two losses may be, relatively, in fp32
PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}  # bf16 operations/s

CASES: dict[str, Callable[[int], Pair]] = {
    "vit_small": partial(timm_pair, "vit_small", "vit_small_patch16_224"),
    "deit_small": partial(timm_pair, "deit_small", "deit_small_distilled_patch16_224"),
    "swin_tiny": partial(timm_pair, "swin_tiny", "swin_tiny_patch4_window7_224"),
    "coatnet_0": partial(timm_pair, "coatnet_0", "coatnet_0_224"),
    "cvt_13": cvt_pair,
    "mae": mae_pair,
    "mae/lightly": mae_lightly,
    "simmim/lightly": simmim_lightly,
    "beit/transformers": beit_transformers,
    "dino/lightly": dino_lightly,
    "msn/lightly": msn_lightly,
    "distill/timm": partial(distill_timm, "hard"),
    "distill_soft/timm": partial(distill_timm, "soft"),
}


@dataclass(frozen=True)
class StepOptions:
    batch: int = 8
    image_size: int = 224
    rounds: int = 9
    threads: int = 2
    compile: bool = False
    precision: Literal["fp32", "bf16", "auto"] = "fp32"


def bench_step(
    names: Sequence[str], options: StepOptions, say: Callable[[str], None] = lambda text: None
) -> list[Row]:
    """One row a case; `say` hears what is being done."""
    for name in names:
        if name not in CASES:
            raise UserError(f"bench step: given '{name}'; allowed: {', '.join(CASES)}{nearest(name, CASES)}")
    for key in ("batch", "rounds", "threads", "image_size"):
        if getattr(options, key) < 1:
            raise UserError(f"bench step: {key}: given {getattr(options, key)}; allowed: 1 or more")
    torch.set_num_threads(options.threads)
    return [_row(name, options, say) for name in names or CASES]


def _row(name: str, options: StepOptions, say: Callable[[str], None]) -> Row:
    say(f"{name}: building both sides")
    where, size = device(0), options.image_size
    torch.manual_seed(0)
    peer, ours, theirs = CASES[name](size)
    images = torch.randn(options.batch, 3, size, size).to(where)
    labels = torch.randint(0, CLASSES, (options.batch,)).to(where)
    for side in (ours, theirs):
        side.to(where).train()
    _same(name, ours, theirs, images[:2], labels[:2])
    work = _operations(ours, images, labels) if where.type == "cuda" else 0
    if options.compile:
        say(f"{name}: compiling, up to some minutes")
        ours.compile()
    bf16 = half(where, options.precision)
    turns = [_stepper(side, images, labels, bf16) for side in (ours, theirs)]
    say(f"{name}: {options.rounds} rounds")
    mine, other = alternate(turns[0], turns[1], options.rounds)
    more = {"images/s": options.batch / mine}
    peak = next((p for gpu, p in PEAK.items() if work and gpu in torch.cuda.get_device_name(where)), None)
    if peak is not None:
        more["MFU %"] = 100 * work / mine / peak
    case = f"{name}, compiled" if options.compile else name
    return Row(case, peer, mine, other, "s", mine / other, options.rounds, more)


def _same(name: str, ours: nn.Module, theirs: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Else two different things would be timed."""
    with torch.no_grad():
        a, b = (float(side(images, labels)) for side in (ours, theirs))
    if abs(a - b) > CLOSE * abs(b):
        raise RuntimeError(f"{name}: on the same weights the loss is {a} here and {b} in the peer")


def _stepper(side: nn.Module, images: Tensor, labels: Tensor, bf16: bool) -> Callable[[], float]:
    parameters = [p for p in side.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    follow = getattr(side, "follow", None)

    def step() -> float:
        _wait(images.device)
        begin = time.perf_counter()
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            loss = side(images, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if follow is not None:
            follow()
        _wait(images.device)
        return time.perf_counter() - begin

    return step


def _operations(side: nn.Module, images: Tensor, labels: Tensor) -> int:
    """Multiplications and additions of forward and backward."""
    with FlopCounterMode(display=False) as counter:
        side(images, labels).backward()
    side.zero_grad(set_to_none=True)
    return int(counter.get_total_flops())


def _wait(where: torch.device) -> None:
    if where.type == "cuda":
        torch.cuda.synchronize(where)

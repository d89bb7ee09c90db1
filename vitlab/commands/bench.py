"""`vitlab bench`: ours and a peer's side by side."""

from __future__ import annotations

import argparse
import os
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitlab.commands.figures import writable
from vitlab.environment import set_for_torch

if TYPE_CHECKING:
    from vitlab.bench import DataOptions


def add(commands: Any) -> None:
    bench = commands.add_parser(
        "bench", help="measure against a peer", epilog="example: vitlab bench step --help"
    )
    kinds = bench.add_subparsers(dest="what", required=True, metavar="what")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")

    step = kinds.add_parser(
        "step",
        parents=[common],
        help="seconds of forward, backward and optimizer of a model or an objective",
        epilog="example: vitlab bench step vit_small dino/lightly --json step.json",
    )
    step.add_argument(
        "cases",
        nargs="*",
        help="models: vit_small, deit_small, swin_tiny, coatnet_0, cvt_13; objectives: mae, mae/lightly, "
        "simmim/lightly, beit/transformers, dino/lightly, msn/lightly, distill/timm, distill_soft/timm; "
        "default: all",
    )
    step.add_argument("--batch", type=int, help="images of a step (8)")
    step.add_argument("--image-size", type=int, help="pixels a side (224)")
    step.add_argument("--rounds", type=int, help="measured rounds; medians are shown (9)")
    step.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (all cores)")
    step.add_argument("--compile", action="store_true", help="our side by torch.compile, the peer eager")
    step.add_argument(
        "--precision", choices=["fp32", "bf16", "auto"], default="fp32", help="auto: bf16 on GPUs (fp32)"
    )

    memory = kinds.add_parser(
        "memory",
        parents=[common],
        help="bytes of a worker under ZeRO-3 with a teacher, against plain PyTorch, in fp32",
        epilog="example: vitlab bench memory --workers 2 --persist 0",
    )
    memory.add_argument("--batch", type=int, help="images of a step, over all workers (16)")
    memory.add_argument("--image-size", type=int, help="pixels a side (64)")
    memory.add_argument("--rounds", type=int, help="measured rounds, of the seconds (5)")
    memory.add_argument("--threads", type=int, help="CPU threads of a worker (1)")
    memory.add_argument("--workers", type=int, nargs="+", help="numbers of workers (1 2 4)")
    memory.add_argument(
        "--persist", type=int, nargs="+", help="largest parameters that are never sharded (0 10000 100000)"
    )

    data = kinds.add_parser(
        "data",
        parents=[common],
        help="image files to batches: images/s of one core, of loader processes, memory, the first batch",
        epilog="example: vitlab bench data --images 256 --loaders 0 2 4 --json data.json",
    )
    data.add_argument("--images", type=int, help="photographs to make and read (512)")
    data.add_argument("--batch", type=int, help="images of a batch (64)")
    data.add_argument("--image-size", type=int, help="pixels a side of a crop (224)")
    data.add_argument("--rounds", type=int, help="measured rounds; medians are shown (5; half with loaders)")
    data.add_argument("--loaders", type=int, nargs="+", help="numbers of loader processes (0 1 2)")
    bench.set_defaults(action=act)


def act(given: argparse.Namespace) -> None:
    set_for_torch()
    import torch

    from vitlab.bench import (
        DataOptions,
        MemoryOptions,
        StepOptions,
        bench_memory,
        bench_step,
        print_rows,
        write_json,
    )
    from vitlab.dist import device
    from vitlab.face import Face

    if given.json is not None:
        writable(given.json)

    def say(text: str) -> None:
        Face().print(f"  {text}")

    def options(kind: Any) -> Any:
        values = {field.name: getattr(given, field.name, None) for field in fields(kind)}
        fit = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items() if v is not None}
        return kind(**fit)

    if given.what == "data":
        _data(options(DataOptions), given.json)
        return
    if given.what == "memory":
        how = options(MemoryOptions)
        rows = bench_memory(how, say)
    else:
        how = options(StepOptions)
        rows = bench_step(given.cases, how, say)
    precision = getattr(how, "precision", "fp32")
    title = f"bench {given.what} · {precision} · batch {how.batch} · {how.threads} threads"
    print_rows(title, rows)
    if given.json is not None:
        place = torch.device("cpu") if given.what == "memory" else device(0)
        write_json(given.json, given.what, rows, place, how.threads)


def _data(how: DataOptions, file: Path | None) -> None:
    import torch
    from rich.console import Console

    from vitlab.bench import bench_data, print_data, write_json
    from vitlab.face import Face

    with Face(Console(stderr=True, highlight=False, soft_wrap=True)).stage("bench data") as line:
        rows = bench_data(how, line.say)
    print_data(rows, how)
    if file is not None:
        write_json(file, "data", rows, torch.device("cpu"), 1)

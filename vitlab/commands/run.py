"""`vitlab run`: a pipeline, as `python pipelines/NAME.py` would start it."""

from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path
from typing import Any

# Of a checkout, or of the copy of one that a Ray job runs in.
PIPELINES = Path(__file__).resolve().parents[2] / "pipelines"


def add(commands: Any) -> None:
    run = commands.add_parser(
        "run", help="run a pipeline", epilog="example: vitlab run mae_then_finetune finetune.epochs=5"
    )
    run.add_argument("pipeline", help=f"one of: {', '.join(sorted(p.stem for p in PIPELINES.glob('*.py')))}")
    run.add_argument("arguments", nargs=argparse.REMAINDER, help="[experiment.yaml] [key=value …]")
    run.set_defaults(action=act)


def act(given: argparse.Namespace) -> None:
    from vitlab.config import UserError, nearest

    names = sorted(p.stem for p in PIPELINES.glob("*.py"))
    if given.pipeline not in names:
        raise UserError(
            f"{given.pipeline}: no such pipeline; allowed: {', '.join(names)}{nearest(given.pipeline, names)}"
        )
    file = PIPELINES / f"{given.pipeline}.py"
    sys.argv = [str(file), *given.arguments]
    runpy.run_path(str(file), run_name="__main__")

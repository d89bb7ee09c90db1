"""The command `vitlab`, and what starts a pipeline: arguments in, exit code out.

Exit codes: 0 done; 1 failed while running; 2 the experiment asks for what cannot be, with few exceptions
(a loss that is not a number) before anything starts; 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vitlab.commands import WORDS
from vitlab.environment import set_for_torch

if TYPE_CHECKING:
    from vitlab.experiment import Experiment

HERE = Path(__file__).resolve().parents[1]  # a checkout, or the copy of one that a Ray job runs in


def pipeline(
    main: Callable[[Experiment], None],
    default: str,
    needs: Sequence[str] = (),
    argv: Sequence[str] | None = None,
    *,
    compares: bool = False,
) -> None:
    """Runs a pipeline as a program: `python pipelines/NAME.py [experiment.yaml] [key=value …]`.

    `compares`: its chain loops over `each(run)`, so an experiment may have a `compare` section.
    """
    set_for_torch()
    name = Path(sys.argv[0]).name
    section = next((need for need in needs if need in ("finetune", "pretrain")), "pretrain")
    parser = argparse.ArgumentParser(
        prog=f"python pipelines/{name}",
        description=(main.__doc__ or "").strip() or None,
        epilog=f"example: python pipelines/{name} {default} {section}.optim.lr=5e-4 cluster.workers=4",
    )
    parser.add_argument("experiment", nargs="?", default=default, help=f"a YAML file (default {default})")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help=f"changes to the file, as {section}.epochs=5"
    )
    given = parser.parse_intermixed_args(argv)
    words = [given.experiment, *given.overrides]  # the file may stand anywhere among the changes
    file = next((word for word in words if "=" not in word), default)
    changes = [word for word in words if word != file]
    sys.exit(guarded(lambda: _start(main, file, changes, needs, compares)))


def _start(
    main: Callable[[Experiment], None],
    file: str,
    overrides: Sequence[str],
    needs: Sequence[str],
    compares: bool,
) -> None:
    from vitlab.compare import trials
    from vitlab.config import UserError
    from vitlab.experiment import read

    path = Path(file)
    experiment = read(path if path.exists() else HERE / file, overrides)
    if experiment.compare is not None and not compares:
        raise UserError(
            "compare: this pipeline runs its chain once; loop over each(run) in it, or leave it out"
        )
    for trial in trials(experiment):
        try:
            trial.experiment.require(*needs)
        except UserError as error:
            raise UserError(
                f"compare.variants: {trial.variant}: {error}" if trial.variant else str(error)
            ) from None
    main(experiment)


def guarded(action: Callable[[], None]) -> int:
    """Runs an action; a problem that a person can mend is one line, anything else keeps its traceback."""
    from vitlab.config import UserError
    from vitlab.engine.launch import JobFailed
    from vitlab.face import Face

    face = Face()
    try:
        action()
    except UserError as error:
        face.problem(str(error))
        return 2
    except KeyboardInterrupt:
        face.problem("interrupted; the same command goes on from the last checkpoint")
        sys.stdout.flush()
        os._exit(130)  # Ray's own way out would wait for workers in the middle of a step
    except JobFailed as error:
        face.problem(str(error))
        return 1
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(prog="vitlab", description="Experiments with vision transformers.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for word in WORDS:
        word.add(commands)
    given = parser.parse_args()
    sys.exit(guarded(lambda: given.action(given)))


if __name__ == "__main__":
    main()

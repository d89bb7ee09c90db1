"""One pair of workers for the jobs of several test files: starting DeepSpeed takes seconds.

Such a file has `jobs(folder)`, by name, each with `zero` and what its own `run(job, world)` wants; its
fixture `runs` takes what they found from the session's `together`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from world import divided, serve

from vitlab.dist import World
from vitlab.engine import compiling, zero


def results(files: Iterable[str], folder: Path) -> dict[str, dict[str, Any]]:
    """By file and job: what every job of these test files has found."""
    jobs: dict[str, Any] = {}
    for file in files:
        own = folder / file
        own.mkdir()
        listed = importlib.import_module(file).jobs(own)
        jobs |= {f"{file}/{name}": job | {"file": file} for name, job in listed.items()}
    found: dict[str, dict[str, Any]] = {jobs[name]["file"]: {} for name in jobs}
    for name, result in divided(__file__, work, jobs, folder).items():
        file, own_name = name.split("/", 1)
        found[file][own_name] = result
    return found


def work(job: dict[str, Any], world: World) -> Any:
    job = dict(job)
    return importlib.import_module(job.pop("file")).run(job, world)


if __name__ == "__main__":
    zero.STAYS = 100  # so that matrices of these small models are really given away
    compiling.BACKEND = "aot_eager"  # traced and differentiated as ever; making C++ of it takes minutes
    serve(work)

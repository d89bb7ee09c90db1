"""vitlab: a distributed experiment pipeline for vision transformers.

`Run` chains stages, `each` repeats a chain for variants and seeds, `read` loads an experiment, `load` opens
a trained model, `create_model` makes a fresh one. Everything is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitlab.cli import pipeline
    from vitlab.compare import each
    from vitlab.experiment import Experiment, read
    from vitlab.jobs.fetching import load
    from vitlab.models import create_model
    from vitlab.stages import Run

_PLACES = {
    "Experiment": "vitlab.experiment",
    "Run": "vitlab.stages",
    "create_model": "vitlab.models",
    "each": "vitlab.compare",
    "load": "vitlab.jobs.fetching",
    "pipeline": "vitlab.cli",
    "read": "vitlab.experiment",
}
__all__ = ["Experiment", "Run", "create_model", "each", "load", "pipeline", "read"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"vitlab has no {name!r}; it has {', '.join(sorted(_PLACES))}")
    return getattr(importlib.import_module(_PLACES[name]), name)

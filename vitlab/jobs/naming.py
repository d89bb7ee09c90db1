"""What a stage's run is called, how it ended, and which of its figures stands for it."""

from __future__ import annotations

import re

from vitlab.config import Config
from vitlab.sections import AdoptConfig, TrainConfig


def title(label: str, config: Config) -> str:
    """A name that a person tells runs apart by."""
    if isinstance(config, AdoptConfig):
        return f"{label} · {getattr(config.model, 'arch', config.model.name)}"
    if not isinstance(config, TrainConfig):
        return label
    model, optim = config.model, config.optim
    parts = [label, f"lr {optim.lr:.2g}"]  # what differs first: MLflow's lists cut long names
    parts += [f"layer decay {optim.layer_decay:g}"] if optim.layer_decay < 1 else []
    parts += [model.name, config.method.name]
    return " · ".join(parts)


def figured(metrics: dict[str, float], split: str) -> str:
    """`split`: what was evaluated."""
    found = (re.fullmatch(r"eval/lowshot_(\d+)_top1", name) for name in metrics)
    shots = sorted(int(match[1]) for match in found if match)
    for name, text in (
        ("eval/top1", "held-out top-1 {:.2%}"),
        ("eval/knn_top1", "held-out kNN top-1 {:.2%}"),
        ("eval/linear_top1", "held-out linear top-1 {:.2%}"),
        *((f"eval/lowshot_{n}_top1", f"held-out {n}-shot top-1 {{:.2%}}") for n in shots),
        ("val/top1", "validation top-1 {:.2%}"),
        ("probe/knn_top1", "validation kNN top-1 {:.2%}"),
        ("probe/linear_top1", "validation linear top-1 {:.2%}"),
        ("val/loss", "validation loss {:.4f}"),
        ("train/loss", "training loss {:.4f}"),
    ):
        if name in metrics:
            return text.format(metrics[name]).replace("held-out", split.replace("_", "-"))
    return ""


def ended(error: type[BaseException] | None) -> str:
    """MLflow's word for how a run ended."""
    if error is None:
        return "FINISHED"  # and Tune stops a trial by SystemExit
    return "KILLED" if issubclass(error, KeyboardInterrupt | SystemExit) else "FAILED"

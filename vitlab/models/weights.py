"""Weights in and out of a model: strict loading, and the folder a model is kept in.

The folder holds config.json, model.safetensors, preprocess.json and labels.json; nothing in it is code.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vitlab.config import UserError, build, nearest, resolved
from vitlab.models.families import MODELS, from_config
from vitlab.models.features import Backbone

FILES = ("config.json", "model.safetensors", "preprocess.json", "labels.json")
SHOWN = 5  # names of one kind in a message


@dataclass(frozen=True)
class Report:
    """What became of every tensor, by name."""

    loaded: tuple[str, ...]
    fresh: tuple[str, ...]  # of the model, left as initialised
    ignored: tuple[str, ...]  # of the state, used nowhere


@dataclass(frozen=True)
class Loaded:
    """A model folder."""

    model: Backbone
    preprocess: dict[str, Any]
    labels: list[str]


def load_state(
    model: torch.nn.Module, state: Mapping[str, Tensor], *, replace: Collection[str] = ()
) -> Report:
    """Every tensor, by name and shape, or none: one line names those that do not fit.

    Tensors under a prefix in `replace` (`head` covers `head.weight`, not `head_dist.weight`) are left out:
    the model's keep their fresh initialisation whether or not the state holds some that would fit.
    """
    own = model.state_dict()
    fresh = tuple(name for name in own if _under(name, replace))
    ignored = tuple(name for name in state if _under(name, replace))
    missing = [name for name in own if name not in state and name not in fresh]
    extra = [name for name in state if name not in own and name not in ignored]
    common = [name for name in own if name in state and name not in fresh]
    reshaped = [name for name in common if own[name].shape != state[name].shape]
    shapes = [f"{name}: given {_size(state[name])}, model {_size(own[name])}" for name in reshaped]
    wrong = {"missing": missing, "not in the model": extra, "of other shape": shapes}
    if any(wrong.values()):
        found = "; ".join(f"{len(names)} {kind} ({_some(names)})" for kind, names in wrong.items() if names)
        raise UserError(
            f"the weights do not fit the model: {found}; a prefix in `replace` starts tensors fresh"
        )
    model.load_state_dict({name: state[name] for name in common}, strict=False)
    return Report(tuple(common), fresh, ignored)


def save_model(
    model: Backbone,
    folder: Path,
    *,
    preprocess: dict[str, Any],
    labels: list[str],
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the folder. `state` stands for the model's own tensors where they were gathered elsewhere."""
    own = model.state_dict()
    tensors = own if state is None else state
    missing, extra = [n for n in own if n not in tensors], [n for n in tensors if n not in own]
    if missing or extra:
        raise UserError(
            f"state: not the model's tensors: {_kinds({'missing': missing, 'not in the model': extra})}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        **resolved(model.config),
        "image_size": list(model.image_size),
        "num_classes": model.num_classes,
    }
    for name, data in zip(("config", "preprocess", "labels"), (config, preprocess, labels), strict=True):
        text = json.dumps(data, indent=2, ensure_ascii=False)
        (folder / f"{name}.json").write_text(text + "\n", "utf8")
    # clone: safetensors refuses tensors that share memory
    save_file({n: t.detach().cpu().clone().contiguous() for n, t in tensors.items()}, folder / FILES[1])


def load_model(folder: Path) -> Loaded:
    """Read what `save_model` wrote."""
    for name in FILES:
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: no such file; a model folder holds {', '.join(FILES)}")
    config = _json(folder / "config.json", dict)
    preprocess, labels = _json(folder / "preprocess.json", dict), _json(folder / "labels.json", list)
    try:
        model = _rebuild(config)
        load_state(model, load_file(folder / FILES[1]))
    except (UserError, SafetensorError) as error:
        raise UserError(f"{folder}: damaged or not of this version: {_line(error)}") from None
    return Loaded(model, preprocess, labels)


def _rebuild(tree: dict[str, Any]) -> Backbone:
    size = tree.pop("image_size", None)
    if not (isinstance(size, list) and len(size) == 2 and all(isinstance(side, int) for side in size)):
        raise UserError(f"image_size: given {json.dumps(size)}; expected [height, width]")
    name = tree.get("name")
    if name not in MODELS:
        raise UserError(f"name: given {name!r}; allowed: {', '.join(MODELS)}{nearest(str(name), MODELS)}")
    config = build(MODELS[name], tree)
    if config.num_classes is None:
        raise UserError("num_classes: missing")
    return from_config(config, num_classes=config.num_classes, image_size=(size[0], size[1]))


def _json(path: Path, kind: type) -> Any:
    try:
        data = json.loads(path.read_text("utf8"))
    except ValueError as error:  # broken JSON or broken UTF-8
        raise UserError(f"{path}: damaged: {_line(error)}") from None
    if not isinstance(data, kind):
        raise UserError(f"{path}: damaged: expected a {kind.__name__}, given a {type(data).__name__}")
    return data


def _under(name: str, prefixes: Iterable[str]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def _kinds(wrong: Mapping[str, list[str]]) -> str:
    return "; ".join(f"{len(names)} {kind} ({_some(names)})" for kind, names in wrong.items() if names)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _size(tensor: Tensor) -> str:
    return "×".join(str(side) for side in tensor.shape) or "scalar"


def _line(error: Exception) -> str:
    return str(error).splitlines()[0]

"""Weights in and out of a model: strict loading, and the folder a model is kept in.

The folder holds config.json, model.safetensors, preprocess.json and labels.json; nothing in it is code.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vitlab.config import UserError, build, nearest, resolved
from vitlab.models.families import MODELS, from_config
from vitlab.models.features import Backbone

FILES = ("config.json", "model.safetensors", "preprocess.json", "labels.json")
SHOWN = 5  # names of one kind in a message


class Resized(NamedTuple):
    """A table that was brought to the model's resolution."""

    name: str
    given: str  # shapes, as 1×197×768
    model: str


@dataclass(frozen=True)
class Report:
    """What became of every tensor, by name."""

    loaded: tuple[str, ...]
    fresh: tuple[str, ...]  # of the model, left as initialised
    ignored: tuple[str, ...]  # of the state, used nowhere
    resized: tuple[Resized, ...] = ()
    layout: str = "vitlab"  # whose names the weights have
    part: str = ""  # which part of a checkpoint was read, as `teacher`
    beside: tuple[str, ...] = ()  # parts of it that hold tensors and were not read

    def __str__(self) -> str:
        of = f", {self.part} of the checkpoint" if self.part else ""
        lines = [f"{len(self.loaded)} tensors loaded (layout: {self.layout}{of})"]
        lines += [f"not read: {some(self.beside)}"] if self.beside else []
        lines += [f"resized: {name} {given} → {model}" for name, given, model in self.resized]
        lines += [f"started fresh: {some(self.fresh)}"] if self.fresh else []
        lines += [f"left out: {some(self.ignored)}"] if self.ignored else []
        return "; ".join(lines)


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
    shapes = [f"{name}: given {size(state[name])}, model {size(own[name])}" for name in reshaped]
    kinds = [name for name in common if own[name].is_floating_point() != state[name].is_floating_point()]
    types = [f"{name}: given {state[name].dtype}, model {own[name].dtype}" for name in kinds]
    wrong = {"missing": missing, "not in the model": extra, "of other shape": shapes, "of other type": types}
    if any(wrong.values()):
        heads = _under_all((*missing, *extra, *reshaped, *kinds), getattr(model, "heads", ()))
        way = f"replace={heads} starts the head fresh" if heads else "`replace=` starts a prefix fresh"
        raise UserError(f"the weights do not fit the model: {_kinds(wrong)}; {way}")
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
        raise UserError(f"{folder}: damaged or not of this version: {one_line(error)}") from None
    return Loaded(model, preprocess, labels)


def _rebuild(tree: dict[str, Any]) -> Backbone:
    size = tree.pop("image_size", None)
    if not (isinstance(size, list) and len(size) == 2 and all(isinstance(side, int) for side in size)):
        raise UserError(f"image_size: given {json.dumps(size)}; expected [height, width]")
    name = tree.get("name")
    if not isinstance(name, str) or name not in MODELS:
        raise UserError(f"name: given {name!r}; allowed: {', '.join(MODELS)}{nearest(str(name), MODELS)}")
    config = build(MODELS[name], tree)
    if config.num_classes is None:
        raise UserError("num_classes: missing")
    return from_config(config, num_classes=config.num_classes, image_size=(size[0], size[1]))


def _json(path: Path, kind: type) -> Any:
    try:
        data = json.loads(path.read_text("utf8"))
    except ValueError as error:  # broken JSON or broken UTF-8
        raise UserError(f"{path}: damaged: {one_line(error)}") from None
    if not isinstance(data, kind):
        raise UserError(f"{path}: damaged: expected a {kind.__name__}, given a {type(data).__name__}")
    return data


def _under(name: str, prefixes: Iterable[str]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def _under_all(names: Collection[str], prefixes: Collection[str]) -> tuple[str, ...]:
    """The prefixes that are needed to cover all the names; none if they cannot."""
    used = tuple(p for p in prefixes if any(_under(name, [p]) for name in names))
    return used if all(_under(name, used) for name in names) else ()


def _kinds(wrong: Mapping[str, list[str]]) -> str:
    return "; ".join(f"{len(names)} {kind} ({some(names)})" for kind, names in wrong.items() if names)


def some(names: Sequence[str]) -> str:
    """A handful of names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def size(tensor: Tensor) -> str:
    """Its shape, as 3×16."""
    return "×".join(str(side) for side in tensor.shape) or "scalar"


def one_line(error: Exception) -> str:
    """The first line of what it says."""
    return (str(error).splitlines() or [type(error).__name__])[0]

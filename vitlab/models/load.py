"""Weights of anybody into a model: read, unwrapped, recognised by their names, converted, all of them used.

A checkpoint may hold the weights in an envelope, `{"model": …, "optimizer": …}`; of several parts the one
that its authors evaluate is read, the teacher before the student, unless the caller names another. A pickle
is read as tensors and plain data alone (`argparse.Namespace` among them: MAE's and DINO's have one), so no
file can run code here.

Nothing is passed over in silence: every tensor of the weights and of the model is loaded, named by the
caller, known to the layout as another's, or in the error's line; after an error the model is as it was.
"""

from __future__ import annotations

import argparse
import json
import re
import warnings
from collections.abc import Collection, Mapping
from dataclasses import replace as changed
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from vitlab.config import UserError, nearest
from vitlab.models.features import Backbone
from vitlab.models.layouts import LAYOUTS, Layout
from vitlab.models.weights import FILES, Report, Resized, load_state, one_line, size, some

PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".tar")
ENVELOPES = (  # the first that there is: what authors evaluate comes before what they train
    "teacher",
    "target_encoder",
    "model",
    "state_dict",
    "model_state_dict",
    "student",
    "encoder",
    "module",
)
WRAPPERS = ("module.", "_orig_mod.", "model.", "backbone.", "encoder.")
State = dict[str, Tensor]


def load_weights(
    model: Backbone,
    source: str | Path | Mapping[str, Any],
    *,
    replace: Collection[str] = (),
    part: str | None = None,
) -> Report:
    """A file, a model folder, a folder of Hugging Face, or tensors by name → the model, all or nothing.

    `replace`: prefixes (`head`) that start fresh, and of the weights are left out. `part`: which part of a
    checkpoint with several, as `student`; without it the report says which one was taken.
    """
    replace = [replace] if isinstance(replace, str) else replace
    where = "weights" if isinstance(source, Mapping) else str(source)
    raw = source if isinstance(source, Mapping) else _read(Path(source).expanduser(), model)
    try:
        given, label, beside = _unwrap(raw, part)
        state = _unprefixed(_tensors(given), model)
        layout = _recognised(state, model)
        left = set(layout.leaves(state, model))
        converted = layout.convert({n: v for n, v in state.items() if n not in left}, model)
        fitted, resized = _fitted(converted, model)
        _named(replace, fitted, model)
        report = load_state(model, fitted, replace=replace)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    done = tuple(r for r in resized if r.name in report.loaded)
    ignored = (*report.ignored, *(name for name in state if name in left))
    return changed(
        report, ignored=ignored, resized=done, layout=layout.source, part=label, beside=tuple(beside)
    )


# ---------------------------------------------------------------- reading


def _read(path: Path, model: Backbone) -> Mapping[str, Any]:
    if path.is_dir():
        return _read_folder(path, model)
    if not path.is_file():
        raise UserError(f"{path}: no such file or folder; weights are read from here, nothing is downloaded")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except Exception as error:  # safetensors has one kind, broken files also raise OSError and others
            raise UserError(f"{path}: damaged: {one_line(error)}") from None
    if path.suffix not in PICKLES:
        kinds = ", ".join((".safetensors", *PICKLES))
        raise UserError(
            f"{path}: given a {path.suffix or 'file without a suffix'}; allowed: {kinds}, a folder"
        )
    return _unpickled(path)


def _read_folder(folder: Path, model: Backbone) -> Mapping[str, Any]:
    """vitlab's own or Hugging Face's: in either case there is a config.json to compare with."""
    file = next((folder / n for n in (FILES[1], "pytorch_model.bin") if (folder / n).is_file()), None)
    if file is None:
        raise UserError(f"{folder}: no {FILES[1]} in this folder; name a file of weights")
    config = folder / "config.json"
    if config.is_file():
        try:
            told = json.loads(config.read_text("utf8"))
        except ValueError as error:
            raise UserError(f"{config}: damaged: {one_line(error)}") from None
        _compare_heads(told, model, config)
    return _read(file, model)


def _compare_heads(told: Any, model: Backbone, file: Path) -> None:
    """How many heads share the width is in no tensor's shape."""
    ours = getattr(model.config, "num_heads", None)
    ours = list(ours) if isinstance(ours, tuple) else ours
    names = ("num_attention_heads", "num_heads") if isinstance(told, dict) else ()
    theirs = next((told[name] for name in names if name in told), None)
    if type(ours) is type(theirs) and ours != theirs:
        raise UserError(f"{file}: its model has {theirs} attention heads, this one has num_heads {ours}")


def _unpickled(path: Path) -> Mapping[str, Any]:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            # torch wonders about the protocol first; what it then cannot read is an error here
            warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)
            raw = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken or hostile pickle may raise anything
        name = re.search(r"GLOBAL (\S+)", str(error))
        if name is not None:
            raise UserError(
                f"{path}: holds {name[1]}; only tensors and plain data are read, so that no file can run "
                "code; where you trust it, save its tensors as .safetensors"
            ) from None
        reason = one_line(error).partition(". In PyTorch")[0]
        raise UserError(f"{path}: damaged, or no checkpoint of torch: {reason}") from None
    if not isinstance(raw, Mapping):
        raise UserError(f"{path}: holds a {type(raw).__name__}; expected tensors by name")
    return raw


# ---------------------------------------------------------------- envelopes and prefixes


def _unwrap(raw: Mapping[str, Any], part: str | None) -> tuple[Mapping[str, Any], str, list[str]]:
    """(tensors by name, the way to them, what else holds tensors)."""
    way: list[str] = []
    beside: list[str] = []
    while inner := [
        name for name, value in raw.items() if isinstance(value, Mapping) and _has_tensors(value)
    ]:
        wanted = part if part and not way else next((name for name in ENVELOPES if name in inner), None)
        if wanted not in inner:
            given = f"given {part!r}; allowed" if part else "none of the usual ones is there; give one of"
            names = [str(name) for name in inner]
            raise UserError(f"part: {given}: {', '.join(names)}{nearest(str(part), names)}")
        beside += [
            ".".join([*way, str(name)])
            for name, value in raw.items()
            if name != wanted and (isinstance(value, Tensor) or name in inner)
        ]
        way.append(wanted)
        raw = raw[wanted]
    if part and not way:
        raise UserError(f"part: given {part!r}, but these weights have no parts; leave it out")
    return raw, ".".join(way), beside


def _has_tensors(value: Mapping[Any, Any]) -> bool:
    return any(isinstance(v, Tensor) or (isinstance(v, Mapping) and _has_tensors(v)) for v in value.values())


def _tensors(given: Mapping[str, Any]) -> State:
    others = [str(n) for n, v in given.items() if not (isinstance(n, str) and isinstance(v, Tensor))]
    if others:
        raise UserError(f"{len(others)} entries are no named tensors ({some(others)}); give tensors by name")
    if not given:
        raise UserError("no tensors in it")
    return dict(given)


def _unprefixed(state: State, model: Backbone) -> State:
    """Names without what DistributedDataParallel, torch.compile, DINO's multi-crop and others put before.

    `backbone.` may stand before some names only: a head beside it has none.
    """
    own = _firsts(model.state_dict())
    while prefix := next((p for p in WRAPPERS if _wraps(p, state) and p not in own), ""):
        twice = [name for name in state if name.startswith(prefix) and name.removeprefix(prefix) in state]
        if twice:
            raise UserError(f"with and without {prefix!r} there are two of {some(twice)}; keep one of each")
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def _firsts(state: Mapping[str, Tensor]) -> set[str]:
    """Of every name what stands before the first dot, and the dot."""
    return {name.partition(".")[0] + "." for name in state}


def _wraps(prefix: str, state: Mapping[str, Tensor]) -> bool:
    firsts = _firsts(state)
    return prefix in firsts and (len(firsts) == 1 or prefix == "backbone.")


# ---------------------------------------------------------------- layouts and resolutions


def _recognised(state: State, model: Backbone) -> Layout:
    """The layout whose names these are. Without one, strict loading says which names are wrong."""
    known = next((LAYOUTS[family] for family in type(model).mro() if family in LAYOUTS), ())
    fits = [layout for layout in known if layout.fits(state, model)]
    if len(fits) > 1:
        names = " and of ".join(layout.source for layout in fits)
        raise UserError(f"the names are of {names} at once; give the tensors of one model")
    if fits:
        return fits[0]
    if 2 * len(state.keys() & model.state_dict().keys()) < len(state):
        _refuse_other_families(state, model)
    if not state.keys() & model.state_dict().keys():
        sources = ", ".join(layout.source for layout in known) or "vitlab"
        family = type(model).__name__
        raise UserError(
            f"not the names of a {family} ({len(state)} tensors: {some(list(state))}); known: {sources}"
        )
    return OWN


def _refuse_other_families(state: State, model: Backbone) -> None:
    for family, layouts in LAYOUTS.items():
        for layout in layouts:
            if not isinstance(model, family) and layout.fits(state, model):
                raise UserError(
                    f"weights of a {family.__name__} ({layout.source}), but the model is a "
                    f"{type(model).__name__}; give weights of this one, or build that one"
                )


def _named(replace: Collection[str], state: State, model: Backbone) -> None:
    """A prefix of nothing is a slip: what should have started fresh would be loaded in silence."""
    firsts = list(dict.fromkeys(name.partition(".")[0] for name in (*model.state_dict(), *state)))
    known = [*model.heads, *(first for first in firsts if first not in model.heads)]
    for prefix in replace:
        if prefix not in known and not any(
            f"{n}.".startswith(f"{prefix}.") for n in (*model.state_dict(), *state)
        ):
            raise UserError(
                f"replace: given {prefix!r}, which no tensor's name begins with; allowed: {some(known)}"
                f"{nearest(prefix, known)}"
            )


OWN = Layout("vitlab", lambda state, model: True, lambda state, model: state)


def _fitted(state: State, model: Backbone) -> tuple[State, list[Resized]]:
    """Position tables and the like of another resolution, resampled to the model's."""
    own, out, done = model.state_dict(), dict(state), []
    for name, value in state.items():
        if name not in own or own[name].shape == value.shape:
            continue
        table = model.resized(name, value) if value.ndim == own[name].ndim and value.numel() else None
        if table is not None and table.shape == own[name].shape:
            out[name] = table
            done.append(Resized(name, size(value), size(table)))
    return out, done

"""Resume state on disk: sharded, atomic, and readable by any number of workers at any ZeRO stage.

A checkpoint is a folder `step-00000040` with one safetensors file a rank and `meta.json`. A file holds
flat stretches of named tensors, keyed `kind:start:name`; a reader fills each of its own stretches from
whatever stretches overlap it. Everything is written to `….part` and renamed at the end, so a folder with
the final name is whole.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from vitlab.dist import World
from vitlab.engine.strategy import Piece, Strategy

FORMAT = "vitlab-checkpoint/1"


def save(root: Path, step: int, strategy: Strategy, meta: dict[str, Any], world: World) -> Path:
    """Writes the state after `step` steps; returns when it is whole on disk."""
    final = root / f"step-{step:08d}"
    part = final.with_suffix(".part")
    if world.first:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    world.barrier()
    tensors = {f"{p.kind}:{p.start}:{p.name}": p.data.contiguous() for p in strategy.own()}
    _write(part / f"rank-{world.rank:05d}.safetensors", tensors)
    counts = world.gather(sum(t.numel() for t in tensors.values()))
    if world.first:
        text = json.dumps({"format": FORMAT, "step": step, "workers": world.size, "elements": counts, **meta})
        _sync(part / "meta.json", text)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(part, final)
    world.barrier()
    return final


def latest(root: Path) -> Path | None:
    """The newest whole checkpoint."""
    whole = sorted(p for p in root.glob("step-*") if p.suffix != ".part" and (p / "meta.json").is_file())
    return whole[-1] if whole else None


def prune(root: Path, keep: int) -> None:
    """Deletes all but the newest `keep` checkpoints, and what a killed writer left."""
    whole = sorted(p for p in root.glob("step-*") if p.suffix != ".part")
    for folder in [*root.glob("*.part"), *(whole[:-keep] if keep else whole)]:
        shutil.rmtree(folder, ignore_errors=True)


def load(folder: Path, strategy: Strategy) -> dict[str, Any]:
    """Fills the strategy's state; returns the meta data given to `save`."""
    meta: dict[str, Any] = json.loads((folder / "meta.json").read_text())
    if meta["format"] != FORMAT:
        raise RuntimeError(f"{folder} has format {meta['format']}, this vitlab reads {FORMAT}")
    strategy.set_steps(meta["step"])
    files = [folder / f"rank-{rank:05d}.safetensors" for rank in range(meta["workers"])]
    _fill(files, strategy.copies())
    return meta


def _fill(files: list[Path], pieces: Iterable[Piece]) -> None:
    opened = [safe_open(str(f), framework="pt", device="cpu") for f in files]
    saved: dict[tuple[str, str], list[tuple[int, Any, str]]] = defaultdict(list)
    for source in opened:
        names: list[str] = source.keys()  # type: ignore[no-untyped-call]
        for key in names:
            kind, start, name = key.split(":", 2)
            saved[kind, name].append((int(start), source, key))
    for piece in pieces:
        _fill_one(piece, saved[piece.kind, piece.name])


@torch.no_grad()
def _fill_one(piece: Piece, stretches: list[tuple[int, Any, str]]) -> None:
    begin, end = piece.start, piece.start + piece.data.numel()
    missing = end - begin
    for start, source, key in stretches:
        view = source.get_slice(key)
        low, high = max(begin, start), min(end, start + view.get_shape()[0])
        if low < high:
            piece.data[low - begin : high - begin].copy_(view[low - start : high - start])
            missing -= high - low
    if missing:
        raise RuntimeError(
            f"the checkpoint lacks {missing} of {end - begin} elements of {piece.kind} {piece.name}"
        )


def _write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, str(path))
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())

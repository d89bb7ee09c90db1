"""Weights from outside into the chain: found, read, compared with the images, published as a model.

This is loading and no training, so the driver does it, without workers.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vitlab.cache import Artifact, publish
from vitlab.config import UserError, digest
from vitlab.data import Shards, normalisation
from vitlab.jobs.fetching import RUNS, fetch
from vitlab.jobs.place import Place, preprocess
from vitlab.models import TOKENIZERS, Backbone, Report, from_config, load_weights, save_model
from vitlab.models.borrowed import BorrowedConfig, pretrained, published
from vitlab.sections import AdoptConfig
from vitlab.tracking import Store, folder_digest

HUB = "hub"
FRESH = "fresh"  # untrained, drawn from the seed


@dataclass(frozen=True)
class Source:
    """What the weights are, before they are read."""

    digest: str
    path: Path | None  # a file or a folder; None: a library's own weights
    artifact: Artifact | None = None  # of an earlier run


@dataclass(frozen=True)
class AdoptJob:
    config: AdoptConfig
    seed: int
    place: Place
    source: Source


def locate(config: AdoptConfig, store: Store) -> Source:
    """Where the weights are, and the digest of what is there."""
    given = config.weights
    if given == FRESH:
        return Source(digest(FRESH), None)
    if given == HUB:
        assert isinstance(config.model, BorrowedConfig)
        return Source(digest(published(config.model)), None)
    if given.startswith(RUNS):
        found = fetch(given, store)
        return Source(found.digest, found.folder, found)
    path = Path(given).expanduser().absolute()
    if path.is_dir():
        return Source(folder_digest(path), path)
    if not path.is_file():
        raise UserError(
            f"adopt.weights: given {given}; no such file or folder; or give runs:/ID/model, hub or fresh"
        )
    with path.open("rb") as stream:
        return Source(hashlib.file_digest(stream, "sha256").hexdigest(), path)


def run_adoption(job: AdoptJob, note: Callable[[str], None]) -> dict[str, Any]:
    begin = time.perf_counter()
    shards, images = job.place.open(), preprocess(job.place.data)
    torch.manual_seed(job.seed)  # of what starts fresh
    size = job.place.data.image_size
    headless = type(job.config.model) in TOKENIZERS or job.config.model.num_classes == 0
    classes = 0 if headless else len(shards.classes)
    model = from_config(job.config.model, num_classes=classes, image_size=size)
    model.normalised(*normalisation(job.place.data))
    told = f"untrained, drawn from seed {job.seed}: {len(model.state_dict())} tensors"
    if job.config.weights == FRESH:
        note(told)
    else:
        weights, made = _read(job.config, job.source, (size, size))
        _compare(made, images, note)
        _same_classes(job, model, made, shards)
        report = _fill(job.config, model, weights, classes)
        note(str(report))
        told = _told(job, report)
    store = job.place.store()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "report.txt").write_text(told.rstrip() + "\n", "utf8")
        store.upload_file(job.place.run_id, folder / "report.txt", "")
        save_model(model, folder / "model", preprocess=images, labels=shards.classes)
        artifact = publish(store, job.place.run_id, folder / "model", "model")
    return {"artifact": artifact, "metrics": {}, "seconds": {"adopt": time.perf_counter() - begin}}


def _read(config: AdoptConfig, source: Source, size: tuple[int, int]) -> tuple[Any, dict[str, Any]]:
    """What `load_weights` takes, and what is known of the images that the weights were made with."""
    if source.path is None:
        assert isinstance(config.model, BorrowedConfig)
        return pretrained(config.model, size)
    ours, theirs = _json(source.path / "preprocess.json"), _json(source.path / "preprocessor_config.json")
    made = {name: ours.get(name) or theirs.get(f"image_{name}") for name in ("mean", "std")}
    return source.path, made | {"labels": _json(source.path / "labels.json")}


def _json(file: Path) -> Any:
    """What is in a file that may be missing; only a model folder has it."""
    if not file.is_file():
        return {}
    try:
        return json.loads(file.read_text("utf8"))
    except ValueError as error:
        raise UserError(f"{file}: damaged: {error}") from None


def _compare(made: Mapping[str, Any], images: Mapping[str, Any], note: Callable[[str], None]) -> None:
    """Another normalisation costs accuracy in silence, so it is said."""
    for name in ("mean", "std"):
        theirs, ours = made.get(name), images[name]
        if theirs and [round(v, 3) for v in theirs] != [round(v, 3) for v in ours]:
            told = ", ".join(f"{v:.4g}" for v in theirs)
            note(f"these weights saw images of {name} [{told}]; give data.{name} the same")


def _same_classes(job: AdoptJob, model: Backbone, made: Mapping[str, Any], shards: Shards) -> None:
    labels = made.get("labels")
    starts = tuple(f"{prefix}." for prefix in job.config.replace)
    # `head` covers `head.fc`; an encoder has none
    fresh = not model.num_classes or all(f"{head}.".startswith(starts) for head in model.heads)
    if labels and labels != shards.classes and not fresh:
        raise UserError(
            f"adopt.weights: these know {len(labels)} classes ({', '.join(labels[:3])} …), the shards have "
            f"{len(shards.classes)} ({', '.join(shards.classes[:3])} …); {_way(model)}"
        )


def _fill(config: AdoptConfig, model: Backbone, weights: Any, classes: int) -> Report:
    try:
        return load_weights(model, weights, replace=config.replace, part=config.part)
    except UserError as error:
        try:  # is it the head alone?
            load_weights(model, weights, replace=[*config.replace, *model.heads], part=config.part)
        except UserError:
            raise UserError(f"adopt.weights: {error}") from None
    if not classes:
        way = f"give adopt.replace=[{', '.join(model.heads)}] to leave the head out"
        raise UserError(
            f"adopt.weights: {config.weights} has a head, which num_classes: 0 does not want; {way}"
        )
    raise UserError(
        f"adopt.weights: the head in {config.weights} is not one for the {classes} classes of the shards; "
        f"{_way(model)}"
    )


def _way(model: Backbone) -> str:
    return f"give adopt.replace=[{', '.join(model.heads)}] to start the head fresh, or other weights"


def _told(job: AdoptJob, report: Report) -> str:
    """The whole report; its own line shows a handful of names."""
    lines = [f"weights: {job.config.weights}", f"digest: {job.source.digest}", str(report), ""]
    for kind in ("loaded", "fresh", "ignored"):
        lines += [f"{kind}: {name}" for name in getattr(report, kind)]
    return "\n".join(lines) + "\n"

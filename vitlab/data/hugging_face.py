"""Datasets of Hugging Face: of the hub, of a folder, or streamed; images are copied, never re-encoded.

The only module that imports `datasets`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vitlab.config import UserError, nearest
from vitlab.data.sources import Source, encoded, png
from vitlab.data.tars import Sample

IMAGE_NAMES = ("image", "img")
LABEL_NAMES = ("label", "labels", "cls", "class", "target", "fine_label")


def load_hugging_face(name: str) -> Any:
    """`NAME[:split]` of the hub or of a directory, saved by `save_to_disk` or holding data files."""
    import datasets

    name, _, split = name.partition(":")
    try:
        if Path(name, "dataset_info.json").is_file() or Path(name, "dataset_dict.json").is_file():
            found = datasets.load_from_disk(name)
        else:
            found = datasets.load_dataset(name)
    except (OSError, ValueError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"data.source: hf:{name}: cannot be loaded: {first}") from error
    if not isinstance(found, dict):
        return found
    if (split or "train") not in found:
        near = nearest(split, found)
        raise UserError(
            f"data.source: hf:{name}: no split '{split or 'train'}'; there are: {', '.join(found)}{near}"
        )
    return found[split or "train"]


def hugging_face(
    dataset: Any, name: str = "hf", image: str | None = None, label: str | None = None
) -> Source:
    """A `Dataset`, its rows in a fixed mixed order, or an `IterableDataset`, its rows as they come."""
    import datasets

    if not isinstance(dataset, datasets.Dataset | datasets.IterableDataset):
        raise UserError(
            f"{name}: given {type(dataset).__name__}; allowed: a datasets.Dataset or IterableDataset"
        )
    if not dataset.features:
        raise UserError(f"{name}: the dataset does not say what its columns hold; give it `features=`")
    kinds = dataset.features
    images = [column for column, kind in kinds.items() if isinstance(kind, datasets.Image)]
    image = _column(name, "image", image, images, IMAGE_NAMES)
    label = _column(name, "label", label, _label_columns(kinds), LABEL_NAMES)
    names = _label_names(dataset, label)
    rows = dataset.select_columns([image, label]).cast_column(image, datasets.Image(decode=False))
    total = None
    if isinstance(rows, datasets.Dataset):
        total = len(rows)
        rows = rows.select(np.random.default_rng(0).permutation(total), keep_in_memory=True)
    seen: set[int] = set()
    samples = _rows(rows, image, label, names, seen)
    return Source(name, samples, lambda: names or [str(i) for i in range(max(seen, default=0) + 1)], total)


def _label_columns(kinds: Any) -> list[str]:
    import datasets

    classes = [column for column, kind in kinds.items() if isinstance(kind, datasets.ClassLabel)]
    plain = [
        c for c, kind in kinds.items() if getattr(kind, "dtype", "").startswith(("int", "uint", "string"))
    ]
    return classes or [column for column in plain if column in LABEL_NAMES] or plain


def _column(name: str, what: str, given: str | None, fit: list[str], usual: tuple[str, ...]) -> str:
    """The column that was asked for, else the only one that fits, else the one with a usual name."""
    if given is not None:
        if given in fit:
            return given
        allowed = ", ".join(fit) or "none"
        raise UserError(
            f"data.{what}_column: given '{given}'; columns that fit: {allowed}{nearest(given, fit)}"
        )
    if len(fit) == 1:
        return fit[0]
    known = [column for column in usual if column in fit]
    if not known:
        raise UserError(f"{name}: which column is the {what}? those that fit: {', '.join(fit) or 'none'}; "
                        f"name it in data.{what}_column")  # fmt: skip
    return known[0]


def _label_names(dataset: Any, label: str) -> list[str]:
    """The class names; empty where labels are plain numbers. Strings cost one pass over the labels."""
    kind = dataset.features[label]
    names = getattr(kind, "names", None)
    if names is not None:
        return list(names)
    if kind.dtype in ("string", "large_string"):
        return sorted({str(row[label]) for row in dataset.select_columns([label])})
    return []


def _rows(rows: Any, image: str, label: str, names: list[str], seen: set[int]) -> Iterator[Sample]:
    place = {name: i for i, name in enumerate(names)}
    for i, row in enumerate(rows):
        key, given = f"{i:09d}", row[label]
        number = place.get(given, -1) if isinstance(given, str) else -1 if given is None else int(given)
        if number < 0:
            raise UserError(
                f"sample {key}: label {given!r}; allowed: a class or a number from 0; remove the row"
            )
        seen.add(number)
        yield encoded(key, _bytes(row[image], key), number)


def _bytes(value: Any, key: str) -> bytes:
    """The encoded image of a row: given as it is, or in a file, or still pixels."""
    if isinstance(value, dict) and value.get("bytes"):
        return bytes(value["bytes"])
    if isinstance(value, dict) and value.get("path"):
        return Path(value["path"]).read_bytes()
    if value is None or isinstance(value, dict):
        raise UserError(f"sample {key}: no image in this row; remove it, as with dataset.filter")
    return png(value)

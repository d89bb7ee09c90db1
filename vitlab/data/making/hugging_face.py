"""Datasets of Hugging Face: of the hub, of a folder, or streamed; images are copied, never re-encoded.

The only module that imports `datasets`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vitlab.config import UserError, digest, nearest
from vitlab.data.bad import BadInputError
from vitlab.data.making.progress import shown
from vitlab.data.making.sources import IMAGE_NAMES, LABEL_NAMES, Raw, Source, column, png
from vitlab.data.shards.tars import NO_LABEL
from vitlab.face import Face


def load_hugging_face(name: str, streaming: bool = False) -> Any:
    """`NAME[:split]` of the hub or of a directory, saved by `save_to_disk` or holding data files.

    `streaming`: nothing is downloaded before it is asked for.
    """
    import datasets

    name, _, split = name.partition(":")
    try:
        if Path(name, "dataset_info.json").is_file() or Path(name, "dataset_dict.json").is_file():
            found = datasets.load_from_disk(name)
        else:
            found = datasets.load_dataset(name, streaming=streaming)
    except (OSError, ValueError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"data.source: hf:{name}: cannot be loaded: {first}") from error
    if isinstance(found, dict):
        if (split or "train") not in found:
            near = nearest(split, found)
            raise UserError(
                f"data.source: hf:{name}: no split '{split or 'train'}'; there are: {', '.join(found)}{near}"
            )
        others = [f"hf:{name}:{one}" for one in found if one != "train"]
        if others and not split:
            Face().print(f"  hf:{name}: its split train is read; beside it there is {', '.join(others)}")
        found = found[split or "train"]
    if streaming and isinstance(found, datasets.Dataset):
        found = found.to_iterable_dataset()
    return found


def hugging_face(
    dataset: Any, name: str = "hf", image: str | None = None, label: str | None = None
) -> Source:
    """A `Dataset`, its rows in a fixed mixed order, or an `IterableDataset`, its rows as they come.

    A stream is trusted to be the same every time; going on after an interruption, it is read again up to
    the place where that was.
    """
    import datasets

    if not isinstance(dataset, datasets.Dataset | datasets.IterableDataset):
        raise UserError(
            f"{name}: given {type(dataset).__name__}; allowed: a datasets.Dataset or IterableDataset"
        )
    if not dataset.features and isinstance(dataset, datasets.IterableDataset):
        dataset = dataset._resolve_features()  # from its first rows
    if not dataset.features:
        raise UserError(f"{name}: the dataset does not say what its columns hold; give it `features=`")
    kinds = dataset.features
    images = [one for one, kind in kinds.items() if isinstance(kind, datasets.Image)]
    image = column(name, "image", image, images, IMAGE_NAMES)
    label = column(name, "label", label, _label_columns(kinds), LABEL_NAMES)
    names = _label_names(dataset, label)
    rows = dataset.select_columns([image, label]).cast_column(image, datasets.Image(decode=False))
    total = None
    mark = digest([name, str(kinds), image, label])
    if isinstance(rows, datasets.Dataset):
        total = len(rows)
        mark = digest([mark, dataset._fingerprint])
    return Source(name, _samples(rows, image, label, names), names, total, mark)


def _label_columns(kinds: Any) -> list[str]:
    import datasets

    classes = [one for one, kind in kinds.items() if isinstance(kind, datasets.ClassLabel)]
    plain = [
        one for one, kind in kinds.items() if getattr(kind, "dtype", "").startswith(("int", "uint", "string"))
    ]
    return classes or [one for one in plain if one in LABEL_NAMES] or plain


def _label_names(dataset: Any, label: str) -> list[str]:
    """The class names; empty where labels are plain numbers. Strings cost one pass over the labels."""
    kind = dataset.features[label]
    names = getattr(kind, "names", None)
    if names is not None:
        return list(names)
    if kind.dtype in ("string", "large_string"):
        rows = shown(dataset.select_columns([label]), "reading class names", "rows")
        return sorted({str(row[label]) for row in rows if row[label] is not None})
    return []


def _samples(rows: Any, image: str, label: str, names: list[str]) -> Callable[[int], Iterator[Raw]]:
    place = {name: i for i, name in enumerate(names)}

    def samples(start: int) -> Iterator[Raw]:
        for i, row in enumerate(_from(rows, start), start):
            given = row[label]
            number = place[given] if isinstance(given, str) else NO_LABEL if given is None else int(given)
            yield Raw(f"{i:09d}", number, partial(_bytes, row[image]), f"row {i}")

    return samples


def _from(rows: Any, start: int) -> Any:
    import datasets

    if isinstance(rows, datasets.IterableDataset):
        return rows.skip(start) if start else rows
    order = np.random.default_rng(0).permutation(len(rows))
    return rows.select(order[start:], keep_in_memory=True)


def _bytes(value: Any) -> bytes:
    """The encoded image of a row: given as it is, or in a file, or still pixels."""
    if isinstance(value, dict) and value.get("bytes"):
        return bytes(value["bytes"])
    if isinstance(value, dict) and value.get("path"):
        return _file(str(value["path"]))
    if value is None or isinstance(value, dict):
        raise BadInputError("no_image", "no image in this row")
    return png(value)


def _file(path: str) -> bytes:
    """A local file, or one of a stream: there `datasets` knows how to open its addresses."""
    from datasets.utils.file_utils import xopen

    try:
        with xopen(path, "rb") as file:
            return bytes(file.read())
    except OSError as error:
        raise BadInputError("no_image", f"{path} cannot be read: {error.strerror or error}") from None

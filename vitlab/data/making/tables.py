"""A table of images: a CSV file with a header, one image a row, its path below the file's own folder.

Labels are numbers if all of them are, else names. A row that lacks something is a bad sample.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path

from vitlab.config import UserError
from vitlab.data.making.sources import IMAGE_NAMES, LABEL_NAMES, Source, by_hash, column, of_files
from vitlab.data.shards.tars import NO_LABEL


def table(path: Path, image: str | None = None, label: str | None = None) -> Source:
    """`csv:FILE`; tabs separate the columns of a .tsv. The rows come in the order of their paths' hashes."""
    name, (names, rows) = f"csv:{path}", _read(path)
    labels = column(name, "label", label, [n for n in names if n != image], LABEL_NAMES)
    images = column(name, "image", image, [n for n in names if n != labels], IMAGE_NAMES)
    if not rows:
        raise UserError(f"data.source: {name}: no rows below its header; give one row an image")
    given = [(row.get(labels) or "").strip() for row in rows]
    numbers, classes = _classes(given)
    root = path.absolute().parent
    files = [_below(root, (row.get(images) or "").strip()) for row in rows]
    return of_files(name, root, by_hash(list(zip(files, numbers, strict=True))), classes)


def _read(path: Path) -> tuple[Sequence[str], list[dict[str, str]]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
            names, rows = reader.fieldnames or [], list(reader)
    except OSError as error:
        raise UserError(f"data.source: csv:{path}: {error.strerror}; give a file with a header") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"data.source: csv:{path}: no CSV in UTF-8 ({error}); save it as one") from None
    if len(names) < 2:
        raise UserError(
            f"data.source: csv:{path}: its header has {len(names)} columns; "
            "give a first line that names a column of paths and one of labels, separated by commas"
        )
    return names, rows


def _classes(given: Sequence[str]) -> tuple[list[int], list[str]]:
    """Labels as they are written → class numbers, and the names of the classes if they have names."""
    texts = sorted({text for text in given if text})
    if all(text.isascii() and text.isdigit() for text in texts):
        return [int(text) if text else NO_LABEL for text in given], []
    place = {text: i for i, text in enumerate(texts)}
    return [place.get(text, NO_LABEL) for text in given], texts


def _below(root: Path, text: str) -> str:
    """A path as it is seen from the table's folder; one that leads out of it is refused when it is read."""
    return os.path.relpath(text, root) if os.path.isabs(text) else text

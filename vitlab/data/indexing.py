"""An index for tars that are already there: every good sample is found, everything bad is named."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from vitlab.config import UserError
from vitlab.data.index import INDEX, SPLITS, ShardInfo, Shards, describe, save_index
from vitlab.data.tars import Columns, index_tar

PREFIXES = {"train": "train", "val": "val", "held_out": "held_out", "test": "held_out"}


def index_existing(path: Path, classes: Sequence[str] | None = None) -> Shards:
    """An index for tars that are already there; a file's split is the start of its name.

    `train-…`, `val-…`, `held_out-…` or `test-…`; without such names everything is for training.
    Class names: as given, else those of an earlier index, else the numbers.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such directory; give one that holds .tar files")
    tars = sorted(path.glob("*.tar"))
    if not tars:
        raise UserError(f"{path}: no .tar file in it; write shards with `vitlab shards SOURCE DEST`")
    found = {tar: index_tar(tar) for tar in tars}
    columns = {tar: rows for tar, (rows, _) in found.items()}
    bad = [one for _, some in found.values() for one in some]
    names = _class_names(path, columns, classes)
    splits: dict[str, list[ShardInfo]] = {name: [] for name in SPLITS}
    for tar in tars:
        splits[split_of(tar.name)].append(describe(tar, columns[tar]))
    shards = Shards(path, names, splits, {"source": "existing tars"}, bad)
    save_index(shards)
    return shards


def split_of(file: str) -> str:
    return next((split for prefix, split in PREFIXES.items() if file.startswith(prefix + "-")), "train")


def _class_names(path: Path, columns: Mapping[Path, Columns], given: Sequence[str] | None) -> list[str]:
    highest, where = max((max(column.labels), tar) for tar, column in columns.items())
    earlier = _earlier_names(path)
    names = list(given or (earlier if len(earlier) > highest else map(str, range(highest + 1))))
    if highest >= len(names):
        raise UserError(
            f"{where}: has class {highest}, but {len(names)} class names are given; name all classes"
        )
    return names


def _earlier_names(path: Path) -> list[str]:
    """Class names of the index that is about to be replaced; none where it cannot be read."""
    try:
        names = json.loads((path / INDEX).read_text("utf8"))["classes"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return []
    return [str(name) for name in names]

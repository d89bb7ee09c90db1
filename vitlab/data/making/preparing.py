"""The shards of an experiment: opened where they lie, or written on first use and found again."""

from __future__ import annotations

import re
from pathlib import Path

from vitlab.config import digest
from vitlab.data.making.opening import open_source
from vitlab.data.making.sources import limited
from vitlab.data.making.write import write_shards
from vitlab.data.reading.blend import blend
from vitlab.data.settings import ShardsConfig, check_classes, written
from vitlab.data.shards.index import INDEX, Shards, open_shards
from vitlab.home import locked


def prepare(config: ShardsConfig, folder: Path) -> Shards:
    """Those at `config.path`, or of `config.source`, written into `folder`; several sets as one.

    A source is written once. One that has grown is seen again after its shards were deleted.
    """
    shards = blend([_one(part, folder) for part in config.parts()], config.weights)
    check_classes(config, shards)
    return shards


def _one(config: ShardsConfig, folder: Path) -> Shards:
    if config.path is not None:
        return open_shards(config.path, config.max_bad, config.remote)
    kind = re.sub(r"[^\w-]+", "-", str(config.source))[-60:].strip("-")
    dest = folder / f"{kind}-{digest(written(config))[:12]}"
    with locked(dest.with_suffix(".lock")):
        if not (dest / INDEX).is_file():
            source = open_source(str(config.source), config.image_column, config.label_column)
            write_shards(limited(source, config.limit), dest, config)
        return open_shards(dest, config.max_bad)

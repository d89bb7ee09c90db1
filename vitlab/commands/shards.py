"""`vitlab shards`: images become shards, and shards are indexed, verified and looked at."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vitlab.commands import inspecting

EXAMPLES = """for example:
  vitlab shards folder:/data/flowers /data/flowers-shards --held-out 0.2
  vitlab shards index /data/my-tars
  vitlab shards verify /data/flowers-shards --json verified.json
  vitlab shards stats /data/flowers-shards --picture flowers.png"""


def add(commands: Any) -> None:
    shards = commands.add_parser(
        "shards",
        help="write WebDataset shards; index, verify or look at existing ones",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shards.add_argument(
        "source",
        help="digits, folder:PATH, idx:PATH, hf:NAME[:split], to write; or a word for the shards that DEST "
        "holds: `index`: index its tars as they are, `verify`: is every byte and image well, `stats`: "
        "classes, sizes, mean and spread, a picture",
    )
    shards.add_argument("dest", type=Path, help="the folder of the shards")
    _add_writing(shards.add_argument_group("to write"))
    inspecting.add_inspecting(shards.add_argument_group("to verify and look at"))
    shards.set_defaults(action=act)


def _add_writing(group: Any) -> None:
    group.add_argument("--held-out", type=float, default=0.2, help="fraction kept for evaluation (0.2)")
    group.add_argument("--val", type=float, default=0.1, help="fraction kept for validation (0.1)")
    group.add_argument("--limit", type=int, help="no more than the first so many images of the source")
    group.add_argument("--shard-samples", type=int, default=1000, help="images of a shard (1000)")


def act(given: argparse.Namespace) -> None:
    inspecting.check_flags(given)
    if given.source == "verify":
        inspecting.verify(given)
    elif given.source == "stats":
        inspecting.stats(given)
    else:
        _write(given)


def _write(given: argparse.Namespace) -> None:
    from vitlab.config import UserError
    from vitlab.data import index_existing, limited, open_source, write_shards
    from vitlab.face import Face

    if given.limit is not None and given.limit < 1:
        raise UserError(f"--limit: given {given.limit}; allowed: 1 or more")
    if given.source == "index":
        made = index_existing(given.dest)
    else:
        made = write_shards(
            limited(open_source(given.source), given.limit),
            given.dest,
            held_out=given.held_out,
            val=given.val,
            shard_samples=given.shard_samples,
        )
    counts = ", ".join(f"{made.count(split)} {split}" for split in made.splits)
    Face().print(f"{counts} images of {len(made.classes)} classes in {made.path}")

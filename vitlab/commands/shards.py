"""`vitlab shards`: images become shards, and shards are indexed, verified and looked at."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from vitlab.commands import inspecting
from vitlab.config import UserError

EXAMPLES = """for example:
  vitlab shards folder:/data/flowers /data/flowers-shards --held-out 0.2
  vitlab shards index /data/my-tars
  vitlab shards verify /data/flowers-shards --json verified.json
  vitlab shards stats /data/flowers-shards --picture flowers.png"""
SETTING = re.compile(  # one of an experiment's, in a message; not a part of a file's name
    r"(?<![\w./-])(?:data\.(source)|(?:data\.)?"
    r"(held_out|shard_samples|shard_bytes|max_bad|max_pixels|write_workers|image_column|label_column)"
    r"|(val|resize|quality)(?=:))(?![\w/-])"
)


def add(commands: Any) -> None:
    shards = commands.add_parser(
        "shards",
        help="write WebDataset shards; index, verify or look at existing ones",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shards.add_argument(
        "source",
        help="digits, folder:PATH, csv:FILE, npy:FILE.npz or npy:DIR, idx:DIR, tars:DIR, hf:NAME[:split] or "
        "hf-stream:NAME[:split], to write; or a word for the shards that DEST "
        "holds: `index`: index its tars as they are, `verify`: is every byte and image well, `stats`: "
        "classes, sizes, mean and spread, a picture",
    )
    shards.add_argument("dest", type=_place, help="the folder of the shards, or to write an address: s3://…")
    _add_writing(shards.add_argument_group("to write"))
    inspecting.add_inspecting(shards.add_argument_group("to verify and look at"))
    shards.set_defaults(action=act)


def _add_writing(group: Any) -> None:
    group.add_argument("--held-out", type=float, help="fraction kept for evaluation (0.2)")
    group.add_argument("--val", type=float, help="fraction kept for validation (0.1)")
    group.add_argument("--limit", type=int, help="no more than the first so many images of the source")
    group.add_argument("--shard-samples", type=int, metavar="N", help="the most images of a shard (1000)")
    group.add_argument("--shard-bytes", type=_size, metavar="SIZE", help="its most bytes (256MB)")
    group.add_argument("--resize", type=int, metavar="N", help="make larger images smaller: shorter side")
    group.add_argument("--quality", type=int, metavar="Q", help="every image becomes a JPEG of this quality")
    group.add_argument("--max-bad", type=float, metavar="F", help="fraction of bad images to skip (0.001)")
    group.add_argument("--max-pixels", type=int, metavar="N", help="the most of one image (100000000)")
    group.add_argument("--workers", type=int, metavar="N", help="threads (one a core, at most 16)")
    group.add_argument("--image-column", metavar="NAME", help="of csv:, npy:, hf:, where it is not plain")
    group.add_argument("--label-column", metavar="NAME", help="of csv:, npy:, hf:, where it is not plain")


def _place(text: str) -> Path | str:
    from vitlab.data.stores.remote import is_url, local_path

    return text if is_url(text) else local_path(text)


def _size(text: str) -> int:
    """`256MB`, `1.5GiB`, `1000000` → bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)(i?)B?", text, re.IGNORECASE)
    if found is None:
        raise argparse.ArgumentTypeError(f"given '{text}'; allowed: bytes, as 256MB, 1.5GiB or 1000000")
    unit = 1024 if found[3] else 1000
    return int(float(found[1]) * unit ** " KMGT".index(found[2].upper() or " "))


def act(given: argparse.Namespace) -> None:
    inspecting.check_flags(given)
    if given.source == "verify":
        inspecting.verify(given)
    elif given.source == "stats":
        inspecting.stats(given)
    else:
        try:
            _write(given)
        except UserError as error:
            raise UserError(SETTING.sub(_flag, str(error))) from error


def _flag(found: re.Match[str]) -> str:
    """What a setting is called here."""
    name = found[2] or found[3]
    return "SOURCE" if found[1] else "--workers" if name == "write_workers" else f"--{name.replace('_', '-')}"


def _write(given: argparse.Namespace) -> None:
    from vitlab.config import build
    from vitlab.data import WriteOptions, index_existing, limited, open_source, write_shards
    from vitlab.data.stores.remote import shown
    from vitlab.face import Face

    if given.limit is not None and given.limit < 1:
        raise UserError(f"--limit: given {given.limit}; allowed: 1 or more")
    if given.source == "index" and not isinstance(given.dest, Path):
        raise UserError(
            f"{shown(given.dest)}: index looks at folders; index there, then copy all to the address"
        )
    if given.source == "index":
        bound = {} if given.max_bad is None else {"max_bad": given.max_bad}
        made = index_existing(given.dest, **bound)
    else:
        options = {name: getattr(given, name) for name in WriteOptions.model_fields if hasattr(given, name)}
        options["write_workers"] = given.workers
        how = build(WriteOptions, {name: value for name, value in options.items() if value is not None})
        source = open_source(given.source, given.image_column, given.label_column)
        made = write_shards(limited(source, given.limit), given.dest, how)
    bad = f"; {len(made.bad)} bad, named in index.json" if made.bad else ""
    bad += "" if made.classes else "; no labels: there is no KEY.cls beside the images"
    Face().print(f"{made.counted} images of {len(made.classes)} classes in {shown(str(given.dest))}{bad}")

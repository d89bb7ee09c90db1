"""`vitlab shards verify` and `vitlab shards stats`: shards looked at, not written."""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitlab.commands.figures import writable

if TYPE_CHECKING:
    from vitlab.batch import Bad
    from vitlab.data.making.progress import Meter
    from vitlab.data.shards.inspect import Verdict
    from vitlab.data.shards.statistics import Statistics
    from vitlab.face import Face

FIRST = 10  # bad things that are named
CLASSES = 30  # rows of the table of classes
PICTURE = Path("shards-stats.png")
WORDS = {"fast": ("verify",), "json": ("verify", "stats"), "all": ("stats",), "picture": ("stats",)}


def add_inspecting(group: Any) -> None:
    group.add_argument("--json", type=Path, metavar="FILE", help="write what was found there too")
    group.add_argument("--fast", action="store_true", help="verify: hashes and headers, no image is decoded")
    group.add_argument("--all", action="store_true", help="stats: decode all training images, not 5000")
    group.add_argument("--picture", type=Path, metavar="FILE", help=f"stats: where to draw (./{PICTURE})")


def check_flags(given: argparse.Namespace) -> None:
    """A flag that the word does not know would be passed over without a sound."""
    from vitlab.config import UserError

    for flag, words in WORDS.items():
        if getattr(given, flag) and given.source not in words:
            raise UserError(
                f"--{flag}: is for `vitlab shards {' and '.join(words)}`; leave it out with {given.source}"
            )
    if given.json is not None:
        writable(given.json)


def _steps(meter: Meter) -> Callable[[int], None]:
    """Counts so many more images, from any thread."""
    lock = threading.Lock()

    def step(more: int) -> None:
        with lock:
            for _ in range(more):
                meter.add()

    return step


# ---------------------------------------------------------------- verify


def verify(given: argparse.Namespace) -> None:
    """Ends with exit code 1 if anything is bad."""
    from vitlab.config import UserError
    from vitlab.data.making.progress import Meter
    from vitlab.data.shards.inspect import verify as look
    from vitlab.data.stores.remote import shown
    from vitlab.face import Face, duration

    if not isinstance(given.dest, Path):
        raise UserError(
            f"{shown(given.dest)}: verify looks at folders of this machine; copy the shards into one"
        )
    face, begin = Face(), time.monotonic()
    with Meter("verifying", "images", _total(given.dest)) as meter:
        found = look(given.dest, decodes=not given.fast, step=_steps(meter))
    _show(face, found)
    if given.json is not None:
        _write_verdict(given.json, given.dest, found)
    for warning in found.warnings[:FIRST]:
        face.print(f"note: {warning}")
    if len(found.warnings) > FIRST:
        face.print(f"note: … and {len(found.warnings) - FIRST} more of these")
    tars = f"{found.tars} tar{'s' * (found.tars != 1)}"
    size = f"{found.images:,} images in {tars}, {found.bytes / 1e6:,.1f} MB"
    took = duration(time.monotonic() - begin)
    if found.bad:
        face.problem(f"{given.dest}: {len(found.bad):,} bad things found in {size}, {took}")
        sys.exit(1)
    known = f", {found.known} bad members that the index knows" if found.known else ""
    fast = ", images not decoded" if given.fast else ""
    face.print(f"{given.dest}: all well: {size}{known}, {took}{fast}")


def _total(path: Path) -> int:
    """What a progress line counts to; what is wrong with the index is told by the verification."""
    from vitlab.config import UserError
    from vitlab.data.shards.index import read_index

    try:
        shards = read_index(path)
        return sum(map(shards.count, shards.splits))
    except (UserError, TypeError):
        return 0


def _show(face: Face, found: Verdict) -> None:
    from vitlab.data.bad import counts
    from vitlab.data.shards.inspect import MEANING

    if not found.bad:
        return
    rows = [(kind, MEANING[kind], f"{count:,}") for kind, count in counts(found.bad).items()]
    face.listing(("kind", "what it is", "count"), rows, left=2)
    for one in found.bad[:FIRST]:
        face.print(f"  {one.kind}: {one}")
    if len(found.bad) > FIRST:
        face.print(f"  … and {len(found.bad) - FIRST:,} more; --json FILE writes all")
    face.print()


def _write_verdict(file: Path, path: Path, found: Verdict) -> None:
    from vitlab.data.bad import counts

    def rows(some: Sequence[Bad]) -> list[dict[str, str]]:
        return [one._asdict() for one in some]

    data = {"path": str(path), "tars": found.tars, "images": found.images, "bytes": found.bytes}
    listed = {"counts": counts(found.bad), "bad": rows(found.bad), "warnings": rows(found.warnings)}
    text = json.dumps({**data, "known": found.known, **listed}, indent=2, ensure_ascii=False)
    file.write_text(text + "\n", "utf8")


# ---------------------------------------------------------------- stats


def stats(given: argparse.Namespace) -> None:
    from vitlab.data import open_shards
    from vitlab.data.making.progress import Meter
    from vitlab.data.shards.statistics import LOOKED, statistics
    from vitlab.face import Face

    face, picture = Face(), given.picture or PICTURE
    writable(picture, "--picture")
    shards = open_shards(given.dest)
    most = None if given.all else LOOKED
    count = shards.count("train")
    with Meter("decoding", "images", count if most is None else min(most, count)) as meter:
        found = statistics(shards, most, _steps(meter))
    _tables(face, found)
    _sentences(face, found)
    if given.json is not None:
        text = json.dumps(found.plain(), indent=2, ensure_ascii=False)
        given.json.write_text(text + "\n", "utf8")
    with face.waiting("drawing"):
        _draw(shards, found, picture)
    face.print(f"picture: {picture}")


def _tables(face: Face, found: Statistics) -> None:
    splits = {name: split for name, split in found.splits.items() if split.images}
    face.listing(
        ("split", "images", "MB", "classes"),
        [
            (name, f"{s.images:,}", f"{s.bytes / 1e6:,.1f}", str(int((s.counts > 0).sum())))
            for name, s in splits.items()
        ],
    )
    rows = [
        (name, *(f"{s.counts[i]:,}" for s in splits.values()))
        for i, name in enumerate(found.classes[:CLASSES])
    ]
    face.listing(("class", *splits), rows)
    if len(found.classes) > CLASSES:
        total = [sum(some) for some in zip(*(s.counts.tolist() for s in splits.values()), strict=True)]
        more = f"… and {len(found.classes) - CLASSES:,} more"
        ends = [(what, size(total)) for what, size in (("smallest", min), ("largest", max))]
        said = (f"the {what}: {found.classes[total.index(n)]} ({n:,})" for what, n in ends)
        same = f"all of them have {total[0]:,} images"
        face.print(f"{more}; {same if len(set(total)) == 1 else ', '.join(said)}")
        face.print()


def _sentences(face: Face, found: Statistics) -> None:
    from vitlab.data.shards.statistics import spread

    seen = found.seen
    formats = ", ".join(f"{share:.1%} {name}" for name, share in found.formats.items())
    width, height = spread(seen.widths), spread(seen.heights)
    all_of = f"all {found.of:,}" if found.chosen == found.of else f"{found.chosen:,} of {found.of:,}"
    face.print(f"formats: {formats}")
    for name, (low, middle, high) in (("width", width), ("height", height)):
        face.print(
            f"{name}: {low} pixels" if low == high else f"{name}: {low} to {high} pixels, median {middle:g}"
        )
    if seen.broken:
        face.print(f"{seen.broken:,} images cannot be decoded; list them with `vitlab shards verify`")
    how = "" if found.chosen == found.of else ", a fixed random choice; --all takes all"
    face.print(f"sizes, mean and spread are of {all_of} training images{how}")
    face.print()
    if len(seen.mean) == 1:
        face.print("  channels: 1")
    for name, values in (("mean", seen.mean), ("std", seen.std)):
        face.print(f"  {name}: [{', '.join(f'{value:.4f}' for value in values)}]")
    face.print()


def _draw(shards: Any, found: Statistics, picture: Path) -> None:
    from vitlab.data.shards.statistics import examples
    from vitlab.evaluation.data_pictures import data_figure
    from vitlab.evaluation.pictures import save_figure

    counts = {name: split.counts.tolist() for name, split in found.splits.items()}
    images = sum(split.images for split in found.splits.values())
    name = Path(shards.where).name or shards.path.resolve().name
    title = f"{name} · {images:,} images of {len(found.classes):,} classes"
    sizes = (found.seen.widths, found.seen.heights)
    save_figure(data_figure(examples(shards), found.classes, counts, sizes, title), picture)

"""Labelled images to shards: split by content, packed into tars, indexed, all or nothing.

A sample's split follows from the hash of its image bytes alone. Identical images therefore never lie
on both sides of a split, and a sample stays on its side when the data grows or changes its order.

Everything is written into `DEST.partial`, which gets the name DEST when the last file is complete. What a
killed process leaves there is kept: the same command goes on behind the last finished shard, and the result
is the same, byte by byte (see `journal`). To a URL, every finished shard is copied at once, the index last;
then `uploads/` of the home folder holds what is unfinished.

Threads read, check and encode images; the order stays that of the source. One further thread writes tars.
In memory are at most four shards (one unfinished of every split, one that is being written) and four images
for every thread.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from vitlab.batch import Bad
from vitlab.config import UserError, digest
from vitlab.data.bad import BadInputError, counts
from vitlab.data.making.journal import JOURNAL, Entry, begun
from vitlab.data.making.packing import packed, pillow_at_work, side
from vitlab.data.making.progress import Meter
from vitlab.data.making.sources import Raw, Source
from vitlab.data.making.threads import in_order
from vitlab.data.settings import WriteOptions
from vitlab.data.shards.index import (
    FORMAT,
    INDEX,
    SPLITS,
    ShardInfo,
    Shards,
    columns_path,
    open_shards,
    save_index,
    write_json,
)
from vitlab.data.shards.tars import NO_LABEL, Sample, examine, write_tar
from vitlab.data.stores.remote import exists, is_url, join, local_path, shown, upload
from vitlab.home import home, locked

LOCK = ".lock"
MOST_CLASSES = 1_000_000  # a higher number is an id, not a class
MOST_WORKERS = 16
BLOCK = 512
RECORD = 20 * BLOCK  # a tar's length is a multiple of it


class Placed(NamedTuple):
    """A sample ready for a shard, and its position in the source."""

    position: int
    split: str
    sample: Sample


def write_shards(source: Source, dest: Path | str, how: WriteOptions | None = None) -> Shards:
    """All samples of a source as shards in a new directory `dest`, or at a URL."""
    how, url = how or WriteOptions(), str(dest) if is_url(str(dest)) else None
    place = home() / "uploads" / digest(url)[:16] if url else local_path(str(dest)).absolute()
    part = place.with_name(f"{place.name}.partial")
    _check_free(place, url)
    with _mine(part, str(dest)):
        _check_free(place, url)  # another process may just have finished
        writer = _Writer(source, part, how, url)
        with pillow_at_work():
            writer.fill()
        shards = writer.finish()
        if url:
            shutil.rmtree(part)
            return open_shards(url)
        _name(part, place)
        for file in (JOURNAL, LOCK):
            (place / file).unlink()
    return replace(shards, path=local_path(str(dest)))


def _check_free(place: Path, url: str | None) -> None:
    if url and exists(join(url, INDEX)):
        raise UserError(f"{shown(url)}: has shards already; give another address or remove them")
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise UserError(f"{place}: is there already and not empty; give a new directory or remove it")


@contextmanager
def _mine(part: Path, dest: str) -> Iterator[None]:
    """Alone in the folder of what is unfinished. It stays behind only with a finished shard in it."""
    with locked(part / LOCK, wait=False) as mine:
        if not mine:
            raise UserError(f"{dest}: another process is writing it; wait for that one, or choose another")
        try:
            yield
        finally:
            if part.is_dir() and not any(part.glob("*.idx.json")):
                shutil.rmtree(part)


def _name(part: Path, dest: Path) -> None:
    try:
        part.replace(dest)
    except OSError as error:
        raise UserError(
            f"{dest}: cannot be named so ({error.strerror}); did another process write it?"
        ) from error


class _Writer:
    """Packs the samples of a source, from where an earlier process left off."""

    def __init__(self, source: Source, part: Path, how: WriteOptions, url: str | None) -> None:
        self.source, self.part, self.how, self.url = source, part, how, url
        self.journal = begun(part, _command(source, how))
        if not url:
            for entry in self.journal.entries:
                _check_done(part / entry.info.file, entry.info)
        self.before, self.done = self.journal.last, self.journal.last
        self.numbers = dict.fromkeys(SPLITS, 0)
        for entry in self.journal.entries:
            self.numbers[entry.split] += 1
        self.waiting: dict[str, list[Placed]] = {name: [] for name in SPLITS}
        self.bytes = dict.fromkeys(SPLITS, 0)
        self.bad, self.fresh = self.journal.bad, list[tuple[int, Bad]]()
        self.total = self.journal.restart  # positions that were looked at
        self.written: Future[None] | None = None

    def fill(self) -> None:
        """Every sample into a shard."""
        samples = enumerate(self.source.samples(self.journal.restart), self.journal.restart)
        workers = self.how.write_workers or min(len(os.sched_getaffinity(0)), MOST_WORKERS)
        meter = Meter("writing shards", "images", self.source.total, self.journal.restart)
        with (
            meter,
            ThreadPoolExecutor(1, "shards") as self.background,
            closing(in_order(self._pack, samples, workers)) as results,
        ):
            for found in results:
                self.total += 1
                size = 0
                if isinstance(found, Placed):
                    self._add(found)
                    size = len(found.sample.data)
                elif found is not None:
                    self._note(*found)
                meter.add(size)
            for split in SPLITS:
                if self.waiting[split]:
                    self._close(split)
            self._wait()

    def _pack(self, numbered: tuple[int, Raw]) -> Placed | tuple[int, Bad] | None:
        """What a thread does with one image; None: it is in a finished shard."""
        position, raw = numbered
        try:
            _check_label(raw.label, self.source)
            data = raw.read()
            split = raw.split or side(data, self.how.held_out, self.how.val)
            if position <= self.before.get(split, -1):
                return None
            return Placed(position, split, Sample(raw.key, *packed(data, self.how), raw.label))
        except BadInputError as error:
            return position, Bad(error.kind, self.source.name, raw.origin or raw.key, error.reason)

    def _add(self, placed: Placed) -> None:
        split, room = placed.split, _room(placed.sample)
        full = _tar_size(self.bytes[split] + room) > self.how.shard_bytes
        if full and self.waiting[split]:
            self._close(split)
        self.waiting[split].append(placed)
        self.bytes[split] += room
        if len(self.waiting[split]) == self.how.shard_samples:
            self._close(split)

    def _note(self, position: int, bad: Bad) -> None:
        if position not in self.bad:
            self.fresh.append((position, bad))
            self.bad[position] = bad
        if self.source.total is not None:
            self._check_bad(self.source.total, "at least ")

    def _check_bad(self, total: int, some: str = "") -> None:
        """A flood ends the work at once; what is done stays, for a higher bound goes on from there."""
        total += len(self.source.bad)
        if len(self.source.bad) + len(self.bad) > self.how.max_bad * total:
            bad = self._all_bad()
            kinds = ", ".join(f"{n} {kind}" for kind, n in counts(bad).items())
            raise UserError(
                f"{self.source.name}: {some}{len(bad)} of {total} images cannot become samples ({kinds}), "
                f"max_bad allows {self.how.max_bad:.2%}; the first: {bad[0].key}: {bad[0].reason}; "
                "mend or remove them, or raise max_bad"
            )

    def _all_bad(self) -> list[Bad]:
        return [*self.source.bad, *(self.bad[position] for position in sorted(self.bad))]

    def _close(self, split: str) -> None:
        """A shard is full. It is written while the next one fills."""
        placed, self.waiting[split], self.bytes[split] = self.waiting[split], [], 0
        others = [some[0].position for some in self.waiting.values() if some]
        last = placed[-1].position
        restart = min(others, default=max(last, *self.done.values(), -1) + 1)
        self.done[split] = last
        name, bad, self.fresh = f"{split}-{self.numbers[split]:06d}.tar", self.fresh, []
        self.numbers[split] += 1
        self._wait()
        samples = [one.sample for one in placed]
        self.written = self.background.submit(self._write, split, name, samples, last, restart, bad)

    def _write(
        self,
        split: str,
        name: str,
        samples: Sequence[Sample],
        last: int,
        restart: int,
        bad: list[tuple[int, Bad]],
    ) -> None:
        """One tar and its columns; what the columns say is read back from the tar itself."""
        tar = self.part / name
        try:
            write_tar(tar, samples)
            found = examine(tar)
            write_json(columns_path(tar), found.columns.plain())
        except OSError as error:
            raise UserError(
                f"{tar}: cannot be written: {error.strerror}; make room and give the same command again: "
                "what is done is kept"
            ) from error
        assert not found.bad, found.bad
        info = ShardInfo(name, len(found.columns), found.bytes, found.sha256)
        if self.url:
            upload(tar, join(self.url, name))
            upload(columns_path(tar), join(self.url, columns_path(tar).name))
            tar.unlink()
        self.journal.add(Entry(split, info, last, restart, max(found.columns.labels), bad))

    def _wait(self) -> None:
        if self.written is not None:
            self.written.result()

    def finish(self) -> Shards:
        """The index, when all shards are there."""
        self._check_bad(self.total)
        splits: dict[str, list[ShardInfo]] = {name: [] for name in SPLITS}
        for entry in self.journal.entries:
            splits[entry.split].append(entry.info)
        if not splits["train"]:
            shutil.rmtree(self.part)
            raise UserError(
                f"{self.source.name}: no samples for training; give more images or a smaller held_out and val"
            )
        highest = max(entry.highest for entry in self.journal.entries)
        classes = list(self.source.classes) or [str(i) for i in range(highest + 1)]
        shards = Shards(self.part, classes, splits, _made(self.source, self.how), self._all_bad())
        save_index(shards)
        if self.url:
            upload(self.part / INDEX, join(self.url, INDEX))
        return shards


def _command(source: Source, how: WriteOptions) -> dict[str, Any]:
    """What has to be the same for a process to go on where another one stopped."""
    import PIL

    options = how.model_dump(include={"held_out", "val", "shard_samples", "shard_bytes", "resize", "quality"})
    drawn = {"max_pixels": how.max_pixels, "Pillow": PIL.__version__} if how.resize or how.quality else {}
    return {
        "source": source.name,
        "images": source.fingerprint[:16],
        **options,
        **drawn,
        "format": FORMAT,
    }


def _made(source: Source, how: WriteOptions) -> dict[str, Any]:
    rule = "u = sha256(image bytes) / 2^256; held_out: u < held_out; val: u < held_out + val; else train"
    options = ("held_out", "val", "shard_samples", "shard_bytes", "resize", "quality")
    given = {name: getattr(how, name) for name in options}
    return {"source": source.name, "rule": "the tars' own splits" if source.split else rule, **given}


def _check_done(tar: Path, info: ShardInfo) -> None:
    if not tar.is_file() or tar.stat().st_size != info.bytes or not columns_path(tar).is_file():
        raise UserError(f"{tar}: was written, but is missing or cut; remove {tar.parent} and start again")


def _check_label(label: int, source: Source) -> None:
    if label == NO_LABEL and source.labelled:
        raise BadInputError("no_label", "it has no label")
    most = len(source.classes) or MOST_CLASSES
    if not NO_LABEL <= label < most:
        raise BadInputError("wrong_label", f"it has the label {label}; allowed: 0 to {most - 1}")


def _room(sample: Sample) -> int:
    """The bytes that a sample takes in a tar: two headers, the image, its label."""
    return 3 * BLOCK + -(-len(sample.data) // BLOCK) * BLOCK


def _tar_size(members: int) -> int:
    return -(-(members + 2 * BLOCK) // RECORD) * RECORD

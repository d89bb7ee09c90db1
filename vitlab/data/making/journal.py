"""What an unfinished directory of shards holds, one line for every shard that is done.

The first line names the source and the options: only the same command goes on. Each further line is a
finished shard, written after its tar is safe on disk. A process that is killed may leave a torn last line;
it counts as not written.

The samples of several splits interleave, so a writer does not go on behind the last shard but at the first
position that is in no finished shard (`restart`). What comes again from there is told by its split: shards
hold the samples of their split in order, so all up to the split's last position are done.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vitlab.batch import Bad
from vitlab.config import UserError
from vitlab.data.shards.index import ShardInfo

JOURNAL = "journal.jsonl"


@dataclass(frozen=True)
class Entry:
    """One finished shard."""

    split: str
    info: ShardInfo
    last: int  # the position of its last sample in the source
    restart: int  # the first position that is neither in it nor in an earlier shard
    highest: int  # its highest label
    bad: list[tuple[int, Bad]] = field(default_factory=list)  # by position, found since the shard before


@dataclass
class Journal:
    """The shards that are done, in a file and here."""

    path: Path
    entries: list[Entry] = field(default_factory=list)

    @property
    def restart(self) -> int:
        return self.entries[-1].restart if self.entries else 0

    @property
    def last(self) -> dict[str, int]:
        return {entry.split: entry.last for entry in self.entries}

    @property
    def bad(self) -> dict[int, Bad]:
        return {position: bad for entry in self.entries for position, bad in entry.bad}

    def add(self, entry: Entry) -> None:
        _append(self.path, asdict(entry))
        self.entries.append(entry)


def begun(folder: Path, command: dict[str, Any]) -> Journal:
    """The journal of a folder for this command, from where an earlier process left it."""
    path = folder / JOURNAL
    lines = _whole_lines(path)
    if len(lines) > 1:
        _same(folder, lines[0], command)
        return Journal(path, [_entry(path, line) for line in lines[1:]])
    path.unlink(missing_ok=True)  # nothing was done yet: whose it was does not matter
    _append(path, command)
    return Journal(path)


def _append(path: Path, data: dict[str, Any]) -> None:
    with path.open("ab") as file:
        file.write(json.dumps(data, ensure_ascii=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a journal; a torn one at its end is cut off, for the next is written behind it."""
    if not path.is_file():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.truncate(path, len(whole))
    try:
        return [dict(json.loads(line)) for line in whole.splitlines()]
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error}); remove {path.parent} and start again") from None


def _same(folder: Path, found: dict[str, Any], command: dict[str, Any]) -> None:
    differ = [name for name in {**found, **command} if found.get(name) != command.get(name)]
    if differ:
        now = ", ".join(f"{name} {found.get(name)}, now {command.get(name)}" for name in differ[:3])
        raise UserError(
            f"{folder}: holds the unfinished shards of another command ({now}); "
            "go on with that command, or remove the folder"
        )


def _entry(path: Path, line: dict[str, Any]) -> Entry:
    try:
        bad = [(int(position), Bad(*one)) for position, one in line["bad"]]
        entry = Entry(**{**line, "info": ShardInfo(**line["info"]), "bad": bad})
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(f"{path}: not as this version writes it ({error!r}); remove {path.parent}") from None
    return entry

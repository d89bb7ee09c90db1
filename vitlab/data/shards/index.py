"""The index of a directory of shards: what is in it, and proof that it is whole.

`index.json` is written last, so a directory that has one was written to the end. Beside every tar lies
a small file with its columns (keys, offsets, sizes, extensions, labels), read only when the tar is.
The digest names the data by content: the same shards have the same digest wherever they lie.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from vitlab.batch import Bad
from vitlab.config import UserError, digest, nearest
from vitlab.data.settings import RemoteConfig
from vitlab.data.shards.tars import Columns, sha256_file
from vitlab.data.stores.local_cache import Cache
from vitlab.data.stores.remote import Missing, Patience, is_url, local_path, shown
from vitlab.home import home

FORMAT = "vitlab-shards/1"
INDEX = "index.json"
SPLITS = ("train", "val", "held_out")
GONE = (errno.ENOENT, errno.ELOOP, errno.ENOTDIR)  # no file there, rather than none for us


@dataclass(frozen=True)
class ShardInfo:
    """One tar: its file name, how many samples and bytes it has, and the hash of those bytes."""

    file: str
    count: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Shards:
    """Labelled images, on disk or at a URL. `made` and `bad` are for people, not hashed."""

    path: Path  # of the folder; for a URL, of what is kept here of it
    classes: list[str]
    splits: dict[str, list[ShardInfo]]
    made: dict[str, Any] = field(default_factory=dict)  # how they came to be
    bad: list[Bad] = field(default_factory=list)  # what was in the tars, but could not become a sample
    cache: Cache | None = None  # of those at a URL
    lost: dict[str, int] = field(default_factory=dict)  # tars that are not whole → bytes that are there

    @property
    def where(self) -> str:
        """Their place as people may see it."""
        return shown(self.cache.url) if self.cache else str(self.path)

    @property
    def address(self) -> str:
        """What opens them again."""
        return self.cache.url if self.cache else str(self.path)

    @property
    def content(self) -> str:
        """The name of what was written: independent of where it lies and of how it came to be."""
        hashes = {name: [info.sha256 for info in infos] for name, infos in self.splits.items() if infos}
        return digest({"format": FORMAT, "classes": self.classes, "splits": hashes})

    @property
    def digest(self) -> str:
        """The name of what is read: that of the content, unless some of it is lost."""
        return digest({"content": self.content, "lost": self.lost}) if self.lost else self.content

    def split(self, name: str) -> list[ShardInfo]:
        """The tars of a split that has samples."""
        infos = self.splits.get(name)
        if not infos:
            names = [n for n, some in self.splits.items() if some]
            raise UserError(
                f"{self.where}: no split '{name}'; there are: {', '.join(names)}{nearest(name, names)}"
            )
        return infos

    def count(self, name: str) -> int:
        return sum(info.count for info in self.splits.get(name, []))

    @property
    def counted(self) -> str:
        return ", ".join(f"{self.count(split)} {split}" for split in self.splits)

    @property
    def described(self) -> str:
        """A line for people."""
        return f"{self.counted} images of {len(self.classes)} classes in {self.where}"

    def tars(self, split: str) -> list[Tar]:
        """Every tar of a split, with what reading it takes."""
        return [Tar(self, info) for info in self.split(split)]

    def file(self, info: ShardInfo) -> Path:
        """The tar on this machine."""
        if self.cache:
            return self.cache.tar(info.file, info.bytes, info.sha256)
        return self.path / info.file

    def open(self, info: ShardInfo) -> int:
        """A tar's file descriptor; -1 where there is no such file."""
        try:
            if self.cache:
                return self.cache.open_tar(info.file, info.bytes, info.sha256)
            return os.open(self.path / info.file, os.O_RDONLY)
        except Missing:
            return -1
        except OSError as error:
            if error.errno in GONE:
                return -1
            why = f"cannot be opened ({error.strerror}); allow it or copy it again"
            raise UserError(f"{self.path / info.file}: {why}") from None

    def columns(self, info: ShardInfo) -> Columns:
        """The samples of one tar, checked to lie inside it."""
        path = columns_path(self.path / info.file)
        if self.cache is None:
            return _columns(path, info)
        near = _near(self.cache, path.name)
        try:
            return _columns(near, info)
        except UserError:
            self.cache.forget(path.name)  # what came was no file of columns: once more
        near = _near(self.cache, path.name)
        try:
            return _columns(near, info)
        except UserError as error:
            self.cache.forget(path.name)
            what = str(error).partition(": ")[2].partition("; make it anew")[0]
            raise UserError(f"{self.where}/{path.name}: {what}; copy it there again") from None


class Tar(NamedTuple):
    """One tar of a split, and where it lies."""

    shards: Shards
    info: ShardInfo
    labels: tuple[int, ...] | None = None  # the number here of each of its classes, if that is another
    set: str = ""  # before its name, where several sets may have a file of that name

    @property
    def name(self) -> str:
        return self.set + self.info.file


def _columns(path: Path, info: ShardInfo) -> Columns:
    data = _json(path)
    names = [f.name for f in dataclasses.fields(Columns)]
    if not isinstance(data, dict) or sorted(data) != sorted(names):
        raise UserError(f"{path}: expected the columns {', '.join(names)}; {_anew(path.parent)}")
    columns = Columns(**data)
    numbers = (columns.offsets, columns.sizes, columns.labels)
    fits = all(isinstance(column, list) and len(column) == info.count for column in data.values())
    fits = fits and all(type(n) is int for column in numbers for n in column)
    pairs = zip(columns.offsets, columns.sizes, strict=True) if fits else ()
    if not fits or any(o < 0 or s < 0 or o + s > info.bytes for o, s in pairs):
        raise UserError(
            f"{path}: does not fit {info.file} with its {info.count} samples; {_anew(path.parent)}"
        )
    return columns


def columns_path(tar: Path) -> Path:
    return tar.with_name(tar.name.removesuffix(".tar") + ".idx.json")


def _anew(path: Path) -> str:
    return f"make it anew with `vitlab shards index {path}`"


def describe(tar: Path, columns: Columns) -> ShardInfo:
    """Writes the columns beside a finished tar and returns its entry for the index."""
    write_json(columns_path(tar), columns.plain())
    return ShardInfo(tar.name, len(columns), tar.stat().st_size, sha256_file(tar))


def save_index(shards: Shards) -> None:
    """The last file of a directory of shards."""
    splits = {name: [dataclasses.asdict(info) for info in infos] for name, infos in shards.splits.items()}
    data = {"format": FORMAT, "digest": shards.digest, "classes": shards.classes, "splits": splits}
    write_json(shards.path / INDEX, {**data, "made": shards.made, "bad": [list(one) for one in shards.bad]})


def write_json(path: Path, data: Any) -> None:
    """Whole or not at all."""
    part = path.with_name(path.name + ".partial")
    with part.open("w", encoding="utf8") as file:
        json.dump(data, file, ensure_ascii=False, indent=None if "keys" in data else 1)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {_anew(path.parent)}") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); {_anew(path.parent)}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); allow it or copy it again") from None


def open_shards(where: str | Path, max_bad: float = 0.0, remote: RemoteConfig | None = None) -> Shards:
    """The shards of a directory, after a look at every file's size, or those at a URL.

    `max_bad`: the fraction of samples that may be lost with missing and cut files; the reader names them.
    """
    if is_url(str(where)):
        return _open_remote(str(where), remote or RemoteConfig())
    path = local_path(str(where))
    if not path.is_dir():
        here = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
        near = nearest(path.name, here)
        raise UserError(
            f"{path}: no such directory; write shards there with `vitlab shards SOURCE {path}`{near}"
        )
    if not (path / INDEX).is_file():
        raise UserError(
            f"{path}: no {INDEX} in it: no shards, or not written to the end; "
            f"for tars of your own make one with `vitlab shards index {path}`"
        )
    shards = read_index(path)
    gone: dict[str, int] = {}
    for split, infos in shards.splits.items():
        lost = {info.file: _lost(shards, info) for info in infos}
        missing, total = sum(one.samples for one in lost.values()), sum(info.count for info in infos)
        first = next((one.why for one in lost.values() if one.why), "")
        if missing > max_bad * total or (first and not max_bad):
            how = f" ({missing} of {total} {split} samples lost, data.max_bad allows {max_bad:.2%})"
            raise UserError(f"{first}{how if max_bad else ''}; copy it again or {_anew(path)}")
        gone |= {file: one.there for file, one in lost.items() if one.why}
    return dataclasses.replace(shards, lost=gone)


def _open_remote(url: str, config: RemoteConfig) -> Shards:
    """The index is fetched anew each time; tars come when they are needed, by the content's name."""
    folder = Path(config.cache) if config.cache else home() / "cache" / "shards"
    patience = Patience(config.retries, config.stall)
    cache = Cache(url.rstrip("/"), folder, int(config.cache_gb * 1e9), patience, digest({"url": url})[:16])
    shards = read_index(_near(cache, INDEX, refresh=True).parent)
    cache = dataclasses.replace(cache, name=shards.digest[:16])
    return dataclasses.replace(shards, path=cache.path, cache=cache)


def _near(cache: Cache, name: str, refresh: bool = False) -> Path:
    try:
        return cache.small(name, refresh)
    except Missing:
        raise UserError(
            f"{shown(cache.url)}: no {name} there; write shards with `vitlab shards SOURCE URL`, or copy tars"
            " there after `vitlab shards index DIR`"
        ) from None


def read_index(path: Path) -> Shards:
    """What the index says, without a look at the tars."""
    data = _json(path / INDEX)
    given = data.get("format") if isinstance(data, dict) else type(data).__name__
    if given != FORMAT:
        raise UserError(f"{path / INDEX}: format is {given!r}, expected '{FORMAT}'; {_anew(path)}")
    try:
        splits = {name: [ShardInfo(**info) for info in infos] for name, infos in data["splits"].items()}
        bad = [Bad(*one) for one in data.get("bad", [])]
        shards = Shards(path, list(data["classes"]), splits, dict(data.get("made", {})), bad)
        whole = data["digest"] == shards.digest
        counted = all(
            type(info.count) is type(info.bytes) is int for some in splits.values() for info in some
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path / INDEX}: not as this version writes it ({error!r}); {_anew(path)}") from None
    if not whole or not counted:
        raise UserError(
            f"{path / INDEX}: its digest does not fit its content, it was changed by hand; {_anew(path)}"
        )
    return shards


class _Lost(NamedTuple):
    samples: int = 0
    there: int = 0  # bytes
    why: str = ""


def _lost(shards: Shards, info: ShardInfo) -> _Lost:
    """What is not there any more of a tar, and why; a file that has grown is another one."""
    tar = shards.path / info.file
    if Path(info.file).name != info.file:
        raise UserError(f"{shards.path / INDEX}: {info.file!r} is no plain file name; {_anew(shards.path)}")
    if not tar.is_file():
        return _Lost(info.count, 0, f"{tar}: the index names this file, but it is missing")
    size = tar.stat().st_size
    if size == info.bytes:
        return _Lost()
    why = f"{tar}: has {size} bytes, but {info.bytes} in the index"
    if size > info.bytes:
        raise UserError(f"{why}; copy it again or {_anew(shards.path)}")
    columns = shards.columns(info)
    return _Lost(sum(o + s > size for o, s in zip(columns.offsets, columns.sizes, strict=True)), size, why)

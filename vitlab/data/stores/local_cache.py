"""Shards of a store in a bounded folder of this machine, shared by all its processes.

A file is there whole or not at all: it is written under another name, checked and renamed. Whoever wants
one that is not there takes the kernel's lock on it; the others wait and find the file, or the error. The
kernel frees the lock of a process that was killed, and what it left behind is removed.

Tars are evicted by the time of their last use, before another comes: what lies there and what is on its
way never exceed the bound. An evicted file stays readable to those that have it open, and keeps its room
on the disk until they close it; so readers open it for each read.

    FOLDER/.vitlab-cache            these files may be deleted
    FOLDER/NAME/train-000000.tar    evicted when room is needed
    FOLDER/NAME/train-000000.idx.json    small files stay
    FOLDER/NAME/.train-000001.tar.lock   on its way: how many bytes, and why it failed
    FOLDER/NAME/.train-000001.tar.partial-…
"""

from __future__ import annotations

import fcntl
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from vitlab.config import UserError
from vitlab.data.stores.remote import Missing, Patience, download, join, shown
from vitlab.home import locked

MARK = ".vitlab-cache"
TOUCH = 1.0  # seconds: a use is noted no more often
AGED = 60.0  # seconds that a tar counts as older when it is done with
SHOW_AFTER, SHOW_EVERY = 2.0, 10.0  # seconds


@dataclass(frozen=True)
class Cache:
    """The files of one address. Travels to other processes; many caches may share a folder and its bound."""

    url: str = field(repr=False)  # of the directory; may hold a password
    folder: Path
    most_bytes: int  # of all tars in `folder`
    patience: Patience = field(default_factory=Patience)
    name: str = ""  # of the part of the folder for this address; best the digest of the shards

    def __post_init__(self) -> None:
        try:
            _own(self.folder)
            _sweep(self.folder)
        except OSError as error:
            raise UserError(
                f"{self.folder}: no folder for a cache of shards: {error.strerror}; name another"
            ) from error

    @property
    def path(self) -> Path:
        """Where the files of this address lie, by the names they have there."""
        return self.folder / self.name

    def check_room(self, largest: int, at_once: int) -> None:
        """Refuses a bound that cannot hold what is read at the same time."""
        if self.most_bytes < largest * at_once:
            shards = "one shard" if at_once == 1 else f"{at_once} shards"
            raise UserError(
                f"{self.folder}: the cache may hold {_size(self.most_bytes)}, but {shards} of up to "
                f"{_size(largest)} must lie there at once; allow at least {_size(largest * at_once)}"
            )

    def small(self, name: str, refresh: bool = False) -> Path:
        """A file that is kept for ever and not counted; `refresh` fetches it anew."""
        path, line = self._place(name), _Line(self, name, None)
        began = time.time()
        if path.is_file() and not refresh:
            return path
        with _alone(self._lock(name), line.tick):
            if not path.is_file() or (refresh and path.stat().st_mtime < began):
                self._fetch(path, None, None, line.tick)
        return path

    def tar(self, name: str, size: int, sha256: str, quiet: bool = False) -> Path:
        """The local file, fetched if it is not there; `quiet` if nobody waits for it."""
        path, line = self._place(name), _Line(self, name, size, quiet)
        if _use(path, size):
            return path
        self.check_room(size, 1)
        with _alone(self._lock(name), line.tick) as claim:
            if not _use(path, size):
                self._make_room(claim, size, line.tick)
                self._fetch(path, size, sha256, line.tick)
        return path

    def open_tar(self, name: str, size: int, sha256: str) -> int:
        """`tar`, open for reading: a file descriptor, which the caller closes soon."""
        while True:
            try:
                fd = os.open(self._place(name), os.O_RDONLY)
            except FileNotFoundError:  # not there, or evicted a moment ago
                self.tar(name, size, sha256)
                continue
            if _noted(fd, os.fstat(fd), size):
                return fd
            os.close(fd)
            self.tar(name, size, sha256)

    def touch(self, name: str, size: int) -> bool:
        """Notes that a tar is going to be used; False if it is not there."""
        return _use(self._place(name), size)

    def release(self, name: str) -> None:
        """Notes that a tar is done with here: it goes first, unless somebody else uses it from now on."""
        then = time.time() - AGED
        with suppress(OSError):
            os.utime(self._place(name), (then, then))

    def forget(self, name: str) -> None:
        """Removes a local file, so that it is fetched again."""
        self._place(name).unlink(missing_ok=True)

    def arrived(self, name: str) -> int:
        """Bytes so far of a file that this process or another one fetches."""
        sizes = [0]
        for part in self.path.glob(f".{name}.partial-*"):
            with suppress(FileNotFoundError):
                sizes.append(part.stat().st_size)
        return max(sizes)

    def _place(self, name: str) -> Path:
        if "/" in name or name[:1] in ("", "."):
            raise UserError(
                f"{shown(self.url)}: {name!r} is no plain file name; the index is not to be trusted"
            )
        return self.path / name

    def _lock(self, name: str) -> Path:
        return self.path / f".{name}.lock"

    def _fetch(self, path: Path, size: int | None, sha256: str | None, tick: Callable[[], None]) -> None:
        beside = path.with_name(f".{path.name}.partial-{os.getpid()}-{secrets.token_hex(4)}")
        url = join(self.url, path.name)
        part = download(url, beside, self.patience, size=size, sha256=sha256, tick=tick)
        with part.open("rb") as file:
            os.fsync(file.fileno())  # or a power cut could leave the name without the bytes
        os.utime(part)
        part.replace(path)

    def _make_room(self, claim: TextIO, size: int, tick: Callable[[], None]) -> None:
        """Evicts what was used least recently, and notes in the lock how much is on its way."""
        while True:
            with locked(self.folder / ".room"):
                if self._evict(self.most_bytes - size):
                    claim.write(f"{size}\n")
                    claim.flush()
                    return
            tick()  # too much is on its way; once it is there it can go
            time.sleep(0.05)

    def _evict(self, most: int) -> bool:
        """Down to so many bytes, if that can be."""
        most -= _on_the_way(self.folder)
        if most < 0:
            return False
        found = []
        for path in self.folder.rglob("*.tar"):
            with suppress(FileNotFoundError):
                stat = path.stat()
                found.append((stat.st_mtime_ns, stat.st_size, path))
        there = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if there <= most:
                break
            path.unlink(missing_ok=True)
            there -= size
        return True


def _use(path: Path, size: int) -> bool:
    """Whether a tar is there; notes the use."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return False
    return _noted(path, stat, size)


def _noted(file: Path | int, stat: os.stat_result, size: int) -> bool:
    if stat.st_size != size:
        return False
    if time.time() - stat.st_mtime > TOUCH:
        with suppress(OSError):  # evicted, or of another user: then it counts as older than it is
            os.utime(file)
    return True


# ---------------------------------------------------------------- one process at a time


@contextmanager
def _alone(lock: Path, tick: Callable[[], None]) -> Iterator[TextIO]:
    """Holds the lock of a file. Raises what its former holder failed with while this one waited.

    The lock's file goes with the lock, so one that was waited for may be another's no more.
    """
    while True:
        lock.parent.mkdir(parents=True, exist_ok=True)
        with lock.open("a+") as file:
            _take(file, tick)
            if _named(file, lock):
                try:
                    yield file
                except (UserError, Missing) as error:
                    file.write(f"{'' if _written(file) else '0'}\n{type(error).__name__}\n{error}\n")
                    raise
                finally:
                    lock.unlink(missing_ok=True)
                return
            _raise_noted(file)


def _take(file: TextIO, tick: Callable[[], None]) -> None:
    pause = 0.005
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tick()
            time.sleep(pause)
            pause = min(pause * 1.5, 0.1)


def _named(file: TextIO, path: Path) -> bool:
    """Whether an open file still has this name."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False


def _written(file: TextIO) -> bool:
    return os.fstat(file.fileno()).st_size > 0


def _raise_noted(file: TextIO) -> None:
    file.seek(0)
    note = [line for line in file.read().split("\n")[1:] if line]
    if note:
        raise (Missing if note[0] == Missing.__name__ else UserError)(" ".join(note[1:]))


def _on_the_way(folder: Path) -> int:
    """Bytes that processes have made room for and are fetching. Removes what killed ones left behind."""
    total = 0
    for lock in folder.rglob(".*.lock"):
        with suppress(FileNotFoundError), lock.open("r+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                first = file.readline()
                total += int(first) if first.endswith("\n") else 0
                continue
            if _named(file, lock):
                for part in lock.parent.glob(f"{lock.name.removesuffix('.lock')}.partial-*"):
                    part.unlink(missing_ok=True)
                lock.unlink(missing_ok=True)
    return total


# ---------------------------------------------------------------- the folder


def _own(folder: Path) -> None:
    """Marks a new folder as one whose tars may be deleted; refuses one with other files."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()) and not (folder / MARK).is_file():  # the mark is the first file of any process
        raise UserError(
            f"{folder}: holds files, and is no cache that vitlab made; old shards in a cache are deleted, "
            "so give a new or an empty folder"
        )
    (folder / MARK).touch()


def _sweep(folder: Path) -> None:
    """At a start: what no living process writes any more."""
    with locked(folder / ".room"):
        _on_the_way(folder)
        for part in folder.rglob(".*.partial-*"):
            if not part.with_name(part.name.partition(".partial-")[0] + ".lock").exists():
                part.unlink(missing_ok=True)


class _Line:
    """Says on stderr what is waited for, once that takes longer than a moment; one process for all."""

    def __init__(self, cache: Cache, name: str, size: int | None, quiet: bool = False) -> None:
        self.cache, self.name, self.size, self.quiet = cache, name, size, quiet
        self.begin = time.monotonic()
        self.first: tuple[float, int] | None = None  # when the bytes were first looked at, and how many

    def tick(self) -> None:
        now = time.monotonic()
        if self.quiet or now - self.begin < SHOW_AFTER / 2:
            return
        if self.first is None:
            self.first = now, self.cache.arrived(self.name)
        if now - self.begin < SHOW_AFTER or not self._mine():
            return
        from rich.console import Console

        done = self.cache.arrived(self.name)
        rate = max(done - self.first[1], 0) / max(now - self.first[0], 1e-9)
        of = f" of {_size(self.size)}" if self.size else ""
        text = f"waiting for {self.name} from {shown(self.cache.url)}: {_size(done)}{of}, {_size(rate)}/s"
        Console(stderr=True, soft_wrap=True).print(text, markup=False, highlight=False)

    def _mine(self) -> bool:
        """Whether it is time, and no other process that uses the folder has spoken just now."""
        said = self.cache.folder / ".said"
        with suppress(FileNotFoundError):
            if time.time() - said.stat().st_mtime < SHOW_EVERY:
                return False
        said.touch()
        return True


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.4g} GB"

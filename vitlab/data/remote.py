"""Files at a URL: read, written and kept near by, whatever kind of store it is.

The only module that imports `fsspec`. Its file systems differ in how long they wait and in what they
try again, so none of that is used: a transfer runs in a thread of its own and reports every byte that
moves; one that falls silent is left behind, and tried again after a pause. What an abandoned thread still
does goes to a file that nobody reads.

Passwords and query strings (signed addresses) never come into a message.
"""

from __future__ import annotations

import errno
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from vitlab.config import UserError, nearest, without_password

T = TypeVar("T")
URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
USUAL = ("https", "http", "s3", "gs", "memory", "file")
LONGEST_WAIT = 30.0  # seconds between two tries at most
AT_ONCE, SLOWEST = 128e6, 1e6  # bytes that a store may take without a sign, at so many a second
LOCAL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # errors of this machine: no other try will help
AGAIN = (408, 425, 429)  # the answers of a web server from 400 to 499 that ask for another try


class Missing(Exception):  # noqa: N818 - not an error where a file may be missing
    """The store answers that there is no such file. Final: it was not tried again."""


@dataclass(frozen=True)
class Patience:
    """How long a store may be silent, and how often a transfer is tried again from its beginning."""

    retries: int = 6
    stall: float = 20.0  # seconds without a byte until a try is given up
    first_wait: float = 0.5  # seconds until the second try; doubled each time

    @property
    def waits(self) -> list[float]:
        return [min(self.first_wait * 2**k, LONGEST_WAIT) for k in range(self.retries)]

    @property
    def longest(self) -> float:
        """Seconds from the last byte of a store that has fallen silent to the error that says so."""
        return self.stall * (self.retries + 1) + sum(self.waits)


# ---------------------------------------------------------------- addresses


def is_url(text: str) -> bool:
    """Whether this names a store; a path and `file://` do not. What is unknown is refused on its use."""
    found = URL.match(text)
    return found is not None and found[1].lower() != "file"


def _web(url: str) -> bool:
    return url.lower().startswith(("http://", "https://"))


def local_path(text: str) -> Path:
    """`/a/b` and `file:///a/b` → the path."""
    return Path(re.sub(r"^file://(localhost(?=/))?", "", text, flags=re.IGNORECASE))


def join(url: str, name: str) -> str:
    """A file of a directory; the query of a signed web address stays at the end."""
    base, mark, rest = url.partition("?") if _web(url) else (url, "", "")
    return f"{base.rstrip('/')}/{name}{mark}{rest}"


def shown(text: str) -> str:
    """A text as people may see it: its addresses without passwords and query strings."""
    return re.sub(r"(://[^\s'\"?#]*)[?#][^\s'\"]*", r"\1", without_password(text))


_stores: dict[tuple[int, str, float], Any] = {}  # by process: a forked one must not share connections


def _store(url: str, patience: Patience) -> tuple[Any, str]:
    """The file system of an address, and the address as that file system calls it."""
    scheme, _, rest = url.partition("://")
    key = (os.getpid(), f"{scheme}://{rest.partition('/')[0]}", patience.stall)
    if key not in _stores:
        _stores[key] = _connect(url, scheme.lower(), patience)
    store = _stores[key]
    return store, str(store._strip_protocol(url))


def _connect(url: str, scheme: str, patience: Patience) -> Any:
    import fsspec

    options: dict[str, Any] = {}
    try:
        fsspec.get_filesystem_class(scheme)
        if _web(url):
            import aiohttp

            # Its own bound is five minutes for a whole file. Ours is the watch on the bytes; that of the
            # socket only ends what was left behind.
            silent = aiohttp.ClientTimeout(
                total=None, sock_connect=patience.stall, sock_read=2 * patience.stall
            )
            options["client_kwargs"] = {"timeout": silent, "trust_env": True}
        return fsspec.core.url_to_fs(url, skip_instance_cache=True, **options)[0]
    except ImportError as error:
        how = "pip install vitlab[s3]" if scheme in ("s3", "s3a") else _reason(error)
        raise UserError(f"{shown(url)}: {scheme}:// needs a package that is not here: {how}") from None
    except ValueError:
        if scheme in fsspec.available_protocols():
            raise
        near = nearest(scheme, fsspec.available_protocols())
        raise UserError(
            f"{shown(url)}: unknown kind of address '{scheme}'; allowed: a path, or an address with "
            f"{', '.join(f'{name}://' for name in USUAL)} or another protocol of fsspec{near}"
        ) from None


# ---------------------------------------------------------------- one transfer


class _LeftBehind(Exception):  # noqa: N818 - ends a thread that nobody waits for
    pass


class _Attempt:
    """One try, in a thread of its own: a transfer that stands still can be left behind."""

    def __init__(self, work: Callable[[_Attempt], Any], stops: bool) -> None:
        self.work, self.stops = work, stops
        self.moved, self.left = time.monotonic(), False
        self.result: Any = None
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, daemon=True, name="transfer")
        self.thread.start()

    def _run(self) -> None:
        try:
            self.result = self.work(self)
        except BaseException as error:  # handed over to the thread that waits
            self.error = error

    def sign(self, *_: Any, **__: Any) -> None:
        """Bytes have moved. Ends the thread instead when nobody waits for them any more."""
        if self.left and self.stops:
            raise _LeftBehind
        self.moved = time.monotonic()

    def callback(self) -> Any:
        from fsspec.callbacks import Callback

        return Callback(hooks={"sign": self.sign})

    def wait(self, stall: float, tick: Callable[[], None]) -> Any:
        try:
            while self.thread.is_alive():
                self.thread.join(min(0.25, stall / 4))
                tick()
                if time.monotonic() - self.moved > stall and self.thread.is_alive():
                    raise TimeoutError(f"no byte for {stall:g} s")
        finally:
            self.left = True
        if self.error is not None:
            raise self.error
        return self.result


def _patiently(
    url: str,
    patience: Patience,
    work: Callable[[_Attempt], T],
    tick: Callable[[], None] = lambda: None,
    stops: bool = True,
) -> T:
    """Tries until it works, the store says no, or the patience ends: then one line."""
    begin = time.monotonic()
    for tries, wait in enumerate([*patience.waits, None], start=1):
        try:
            return _Attempt(work, stops).wait(patience.stall, tick)  # type: ignore[no-any-return]
        except UserError:
            raise
        except Exception as error:
            if _is_missing(error):
                raise Missing(f"{shown(url)}: no such file") from None
            if _is_final(error):
                raise UserError(f"{shown(url)}: {_reason(error)}; {_remedy(error)}") from None
            if wait is None:
                took = time.monotonic() - begin
                raise UserError(
                    f"{shown(url)}: given up after {tries} tries in {took:.3g} s, at last: {_reason(error)}; "
                    "see whether the store can be reached, then start again: what is done is kept"
                ) from None
        _pause(wait, tick)
    raise AssertionError("the last try returns or raises")


def _pause(seconds: float, tick: Callable[[], None]) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(left, 0.25))
        tick()


def _is_missing(error: BaseException) -> bool:
    return isinstance(error, FileNotFoundError) or getattr(error, "status", None) in (404, 410)


def _is_final(error: BaseException) -> bool:
    """Whether another try would end the same way."""
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return status == 501 or (400 <= status < 500 and status not in AGAIN)
    if isinstance(error, OSError) and error.errno in LOCAL:
        return True
    kinds = (PermissionError, NotImplementedError, IsADirectoryError, ValueError, TypeError, AttributeError)
    return isinstance(error, kinds) or type(error).__name__ == "NoCredentialsError"


def _remedy(error: BaseException) -> str:
    if getattr(error, "errno", None) in LOCAL:
        return "make room on this machine or choose another folder"
    if getattr(error, "status", 0) in (405, 501) or isinstance(error, NotImplementedError):
        return "this store cannot be written to; choose another, as s3://BUCKET/FOLDER"
    return "check the address and the credentials"


def _reason(error: BaseException) -> str:
    status, message = getattr(error, "status", None), getattr(error, "message", None)
    if isinstance(status, int):
        return f"HTTP {status} {message or ''}".strip()
    lines = str(error).strip().splitlines()
    return shown(f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__)


def _download(url: str, path: Path, patience: Patience, tick: Callable[[], None] = lambda: None) -> None:
    """The bytes at an address into a file of this try alone, `path`, which may hold less after an error."""

    def get(attempt: _Attempt) -> None:
        store, name = _store(url, patience)
        path.parent.mkdir(parents=True, exist_ok=True)
        store.get_file(name, str(path), callback=attempt.callback())

    _patiently(url, patience, get, tick)


# ---------------------------------------------------------------- single files


def upload(local: Path, url: str, patience: Patience = Patience()) -> None:
    """Copies a file to an address; what is there is replaced.

    Some stores take much at once and give no sign meanwhile: the patience grows with the size. A try that
    was left behind may end its work, with the same bytes.
    """
    size = local.stat().st_size
    patience = replace(patience, stall=patience.stall + min(size, AT_ONCE) / SLOWEST)

    def put(attempt: _Attempt) -> None:
        store, name = _store(url, patience)
        extra = {"method": "put"} if _web(url) else {}
        store.put_file(str(local), name, callback=attempt.callback(), **extra)
        there = size if _web(url) else store.info(name)["size"]
        if there != size:
            raise OSError(f"{there} of {size} bytes are there")

    _patiently(url, patience, put, stops=False)


def exists(url: str, patience: Patience = Patience()) -> bool:
    """Whether the store has this file; one that cannot be asked is an error."""

    def look(_: _Attempt) -> None:
        store, name = _store(url, patience)
        store.invalidate_cache()
        try:
            store.info(name)
        except FileNotFoundError as error:  # of a web address, that is any failure; what it was is the cause
            raise (_web(url) and error.__cause__) or error from None

    try:
        _patiently(url, patience, look)
    except Missing:
        return False
    return True


def read_bytes(url: str, patience: Patience = Patience()) -> bytes:
    """A small file; `Missing` if there is none."""
    with tempfile.TemporaryDirectory(prefix="vitlab-", ignore_cleanup_errors=True) as folder:
        path = Path(folder, "file")
        _download(url, path, patience)
        return path.read_bytes()

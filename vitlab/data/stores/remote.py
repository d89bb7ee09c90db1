"""Files at a URL: read, written and kept near by, whatever kind of store it is.

The only module that imports `fsspec`. Its file systems differ in how long they wait and in what they
try again, so none of that is relied on; see `patience`. A process has file systems of its own:
connections and threads do not survive a fork.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from vitlab.config import UserError, nearest
from vitlab.data.stores.patience import PATIENT, Attempt, Missing, Patience, patiently, reason, shown

__all__ = [
    "Missing",
    "Patience",
    "download",
    "exists",
    "is_url",
    "join",
    "local_path",
    "read_bytes",
    "shown",
    "upload",
]

URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
USUAL = ("https", "http", "s3", "gs", "memory", "file")
LEFT = 60.0  # seconds until a connection that was left behind is closed, if it stays silent
AT_ONCE, SLOWEST = 128e6, 1e6  # bytes that a store may take without a sign, at so many a second


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


_stores: dict[tuple[int, str, float], Any] = {}  # by process: a forked one must not share connections


def _known(url: str) -> None:
    """Loads what this kind of address needs, before any time is taken; one line if that is not here."""
    import fsspec

    scheme = url.partition("://")[0].lower()
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        how = "pip install vitlab[s3]" if scheme in ("s3", "s3a") else reason(error)
        raise UserError(f"{shown(url)}: {scheme}:// needs a package that is not here: {how}") from None
    except ValueError:
        near = nearest(scheme, fsspec.available_protocols())
        raise UserError(
            f"{shown(url)}: unknown kind of address '{scheme}'; allowed: a path, or an address with "
            f"{', '.join(f'{name}://' for name in USUAL)} or another protocol of fsspec{near}"
        ) from None


def _store(url: str, patience: Patience) -> tuple[Any, str]:
    """The file system of an address, and the address as that file system calls it."""
    scheme, _, rest = url.partition("://")
    key = (os.getpid(), f"{scheme}://{rest.partition('/')[0]}", patience.stall)
    if key not in _stores:
        _stores[key] = _connect(url, patience)
    store = _stores[key]
    return store, str(store._strip_protocol(url))


def _connect(url: str, patience: Patience) -> Any:
    import fsspec

    options: dict[str, Any] = {}
    if _web(url):
        import aiohttp

        # Its own bound is five minutes for a whole file. Ours is the watch on the bytes; that of the
        # socket only ends what was left behind.
        silent = aiohttp.ClientTimeout(
            total=None, sock_connect=patience.stall, sock_read=patience.stall + LEFT
        )
        options["client_kwargs"] = {"timeout": silent, "trust_env": True}
    return fsspec.core.url_to_fs(url, skip_instance_cache=True, **options)[0]


def _callback(attempt: Attempt) -> Any:
    from fsspec.callbacks import Callback

    return Callback(hooks={"sign": attempt.sign})


# ---------------------------------------------------------------- single files


def download(
    url: str,
    beside: Path,
    patience: Patience,
    *,
    size: int | None = None,
    sha256: str | None = None,
    tick: Callable[[], None] = lambda: None,
) -> Path:
    """A file with the bytes of an address, checked against `size` and `sha256`; its name begins as `beside`.

    The caller renames it. Every try has a file of its own, so that one that was left behind cannot write
    into another's. `tick` is called a few times a second.
    """
    _known(url)
    parts: list[Path] = []
    whole = None

    def get(attempt: Attempt) -> Path:
        attempt.file = part = beside.with_name(f"{beside.name}-{len(parts)}")
        parts.append(part)
        try:
            store, name = _store(url, patience)
            part.parent.mkdir(parents=True, exist_ok=True)
            store.get_file(name, str(part), callback=_callback(attempt))
            _check(part, size, sha256, attempt.sign)
            attempt.sign()
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        return part

    try:
        whole = patiently(url, patience, get, tick)
        return whole
    finally:
        for part in parts:
            if part != whole:
                part.unlink(missing_ok=True)


def _check(path: Path, size: int | None, sha256: str | None, sign: Callable[[], None]) -> None:
    found = path.stat().st_size
    if size is not None and found != size:
        raise OSError(f"{found} bytes came, {size} are in the index")
    if sha256 is None:
        return
    value = hashlib.sha256()
    with path.open("rb") as file:  # in memory still: it was written a moment ago
        while block := file.read(1 << 20):
            value.update(block)
            sign()
    if value.hexdigest() != sha256:
        raise OSError(f"the bytes have sha256 {value.hexdigest()[:12]}…, in the index it is {sha256[:12]}…")


def upload(local: Path, url: str, patience: Patience = PATIENT) -> None:
    """Copies a file to an address; what is there is replaced.

    Some stores take much at once and give no sign meanwhile: the patience grows with the size. A try that
    was left behind may end its work, with the same bytes.
    """
    _known(url)
    size = local.stat().st_size
    patience = replace(patience, stall=patience.stall + min(size, AT_ONCE) / SLOWEST)

    def put(attempt: Attempt) -> None:
        store, name = _store(url, patience)
        extra = {"method": "put"} if _web(url) else {}
        store.put_file(str(local), name, callback=_callback(attempt), **extra)
        there = size if _web(url) else store.info(name)["size"]
        if there != size:
            raise OSError(f"{there} of {size} bytes are there")

    try:
        patiently(url, patience, put, stops=False)
    except Missing:
        raise UserError(f"{shown(url)}: no such bucket or folder to write to; make it first") from None


def exists(url: str, patience: Patience = PATIENT) -> bool:
    """Whether the store has this file; one that cannot be asked is an error."""
    _known(url)

    def look(_: Attempt) -> None:
        store, name = _store(url, patience)
        store.invalidate_cache()
        try:
            store.info(name)
        except FileNotFoundError as error:  # of a web address, that is any failure; what it was is the cause
            raise (_web(url) and error.__cause__) or error from None

    try:
        patiently(url, patience, look)
    except Missing:
        return False
    return True


def read_bytes(url: str, patience: Patience = PATIENT) -> bytes:
    """A small file; `Missing` if there is none."""
    with tempfile.TemporaryDirectory(prefix="vitlab-", ignore_cleanup_errors=True) as folder:
        return download(url, Path(folder, "file"), patience).read_bytes()

"""Transfers that may fail or fall silent: each tried again, with growing pauses, up to a stated time.

A transfer runs in a thread of its own and reports every byte that moves. One that stands still is left
behind: no store's own bounds of time are relied on. `Missing` and refusals are final at once.

Passwords and query strings (signed addresses) never come into a message.
"""

from __future__ import annotations

import errno
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from vitlab.config import UserError, without_password

T = TypeVar("T")
LONGEST_WAIT = 30.0  # seconds between two tries at most
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


PATIENT = Patience()


def shown(text: str) -> str:
    """A text as people may see it: its addresses without passwords and query strings."""
    return re.sub(r"(://[^\s'\"?#]*)[?#][^\s'\"]*", r"\1", without_password(text))


class _LeftBehind(Exception):  # noqa: N818 - ends a thread that nobody waits for
    pass


class Attempt:
    """One try, in a thread of its own: a transfer that stands still can be left behind."""

    def __init__(self, work: Callable[[Attempt], Any], stops: bool) -> None:
        self.work, self.stops = work, stops
        self.moved, self.left = time.monotonic(), False
        self.file: Path | None = None  # that grows; some stores give no other sign
        self.bytes = 0
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

    def _look(self) -> None:
        try:
            size = self.file.stat().st_size if self.file else 0
        except FileNotFoundError:
            return
        if size != self.bytes:
            self.bytes, self.moved = size, time.monotonic()

    def wait(self, stall: float, tick: Callable[[], None]) -> Any:
        try:
            while self.thread.is_alive():
                left = self.moved + stall - time.monotonic()
                self.thread.join(min(max(left, 0.001), 0.25))
                tick()
                self._look()
                if time.monotonic() - self.moved > stall and self.thread.is_alive():
                    raise TimeoutError(f"no byte for {stall:g} s")
        finally:
            self.left = True
        if self.error is not None:
            raise self.error
        return self.result


def patiently(
    url: str,
    patience: Patience,
    work: Callable[[Attempt], T],
    tick: Callable[[], None] = lambda: None,
    stops: bool = True,
) -> T:
    """Tries until it works, the store says no, or the patience ends: then one line."""
    begin = time.monotonic()
    for tries, wait in enumerate([*patience.waits, None], start=1):
        try:
            return Attempt(work, stops).wait(patience.stall, tick)  # type: ignore[no-any-return]
        except UserError:
            raise
        except Exception as error:
            if _is_missing(error):
                raise Missing(f"{shown(url)}: no such file") from None
            if _is_final(error):
                raise UserError(f"{shown(url)}: {reason(error)}; {_remedy(error)}") from None
            if wait is None:
                took = time.monotonic() - begin
                raise UserError(
                    f"{shown(url)}: given up after {tries} tries in {took:.3g} s, at last: {reason(error)}; "
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


def reason(error: BaseException) -> str:
    """One line, fit to be shown."""
    status, message = getattr(error, "status", None), getattr(error, "message", None)
    if isinstance(status, int):
        return f"HTTP {status} {message or ''}".strip()
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    ours = type(error) in (OSError, TimeoutError)  # a sentence of its own
    return shown(lines[0] if ours else f"{type(error).__name__}: {lines[0]}")

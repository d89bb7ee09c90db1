"""Fetches shards before they are needed: what the coming steps read, as far as depth and room allow.

The order in which shards are needed is known in advance (`reading/order.py`), so nothing is guessed. One
thread walks through the steps, others fetch. What is needed from the consumer's step on is the window: it
is touched every second and what leaves it is released, so among the files of a cache those that have been
consumed go first, although they were used last.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Self

from vitlab.data.shards.index import ShardInfo
from vitlab.data.stores.local_cache import Cache
from vitlab.data.stores.remote import Missing

TOUCH = 1.0  # seconds


@dataclass
class _Need:
    """A shard of the window, with the first and the last of the walked steps that read it."""

    info: ShardInfo
    first: int
    last: int


class Ahead:
    """Keeps a cache ahead of its consumer, who says with `reach` which step he is at.

    `steps` yields, for every step from the consumer's first one on, the shards that the step reads. At
    most `depth` shards that are not consumed yet are held, of at most `most_bytes` together; but what the
    consumer's own step needs is always fetched. Threads only, and daemons: they end with this object.
    """

    def __init__(
        self,
        cache: Cache,
        steps: Iterable[Collection[ShardInfo]],
        *,
        depth: int,
        most_bytes: int | None = None,
        lanes: int = 2,
        horizon: int = 1000,
    ) -> None:
        self._window = _Window(cache, depth, cache.most_bytes if most_bytes is None else most_bytes, horizon)
        targets = [self._window.fetch] * lanes
        threads = [threading.Thread(target=target, daemon=True, name="ahead") for target in targets]
        threads.append(threading.Thread(target=self._window.walk, args=(steps,), daemon=True, name="ahead"))
        for thread in threads:
            thread.start()
        self._end = weakref.finalize(self, self._window.close)

    def reach(self, step: int) -> None:
        """The consumer begins this step, counted from 0. Raises what failed for it or for one before."""
        self._window.reach(step)

    def close(self) -> None:
        """No further file is begun. One that is on its way may still arrive."""
        self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Window:
    """What the threads share. They must not hold the `Ahead`, or it would never be collected."""

    def __init__(self, cache: Cache, depth: int, most_bytes: int, horizon: int) -> None:
        self.cache, self.depth, self.most_bytes, self.horizon = cache, depth, most_bytes, horizon
        self.changed = threading.Condition()
        self.step = 0
        self.needs: dict[str, _Need] = {}
        self.todo: deque[_Need] = deque()
        self.failed: tuple[int, Exception] | None = None  # the step that cannot be reached, and why
        self.closed = False

    def reach(self, step: int) -> None:
        with self.changed:
            self.step = step
            for name in [name for name, need in self.needs.items() if need.last < step]:
                del self.needs[name]
                self.cache.release(name)
            self.changed.notify_all()
            if self.failed is not None and step >= self.failed[0]:
                raise self.failed[1]

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.needs.clear()
            self.changed.notify_all()

    # ------------------------------------------------------------ the thread that walks

    def walk(self, steps: Iterable[Collection[ShardInfo]]) -> None:
        number = 0
        try:
            for number, infos in enumerate(steps):
                while not self._take(number, infos):
                    self._touch()
                if self.closed:
                    return
        except Exception as error:  # of the caller's iterator: it is his to see
            self._fail(number + 1, error)
        while not self.closed:
            with self.changed:
                self.changed.wait(TOUCH)
            self._touch()

    def _take(self, step: int, infos: Collection[ShardInfo]) -> bool:
        """Puts what a step needs into the window; after a while without room returns False."""
        with self.changed:
            if not self._fits(step, infos):
                self.changed.wait(TOUCH)
            if not self._fits(step, infos):
                return False
            if self.closed or step < self.step:
                return True
            for info in infos:
                if info.file in self.needs:
                    self.needs[info.file].last = step
                else:
                    self.needs[info.file] = need = _Need(info, step, step)
                    self.todo.append(need)
                    self.changed.notify_all()
            return True

    def _fits(self, step: int, infos: Collection[ShardInfo]) -> bool:
        if self.closed or step <= self.step:
            return True
        new = {info.file: info.bytes for info in infos if info.file not in self.needs}
        held = sum(need.info.bytes for need in self.needs.values())
        fits = len(self.needs) + len(new) <= self.depth and held + sum(new.values()) <= self.most_bytes
        return step <= self.step + self.horizon and (fits or not new)

    def _touch(self) -> None:
        with self.changed:
            infos = [need.info for need in self.needs.values()]
        for info in infos:
            self.cache.touch(info.file, info.bytes)

    # ------------------------------------------------------------ the threads that fetch

    def fetch(self) -> None:
        while (need := self._next()) is not None:
            try:
                self.cache.tar(need.info.file, need.info.bytes, need.info.sha256, quiet=True)
            except Missing:
                continue  # the reader meets it too, and counts it among what is bad
            except Exception as error:  # raised where the consumer needs the file
                self._fail(need.first, error)

    def _next(self) -> _Need | None:
        """The next shard that somebody will still need; None at the end or after a failure."""
        with self.changed:
            while not self.closed and self.failed is None:
                while self.todo:
                    need = self.todo.popleft()
                    if self.needs.get(need.info.file) is need:
                        return need
                self.changed.wait()
            return None

    def _fail(self, step: int, error: Exception) -> None:
        with self.changed:
            if self.failed is None or step < self.failed[0]:
                self.failed = step, error
            self.changed.notify_all()

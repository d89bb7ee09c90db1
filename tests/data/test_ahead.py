"""Shards are there before they are needed: in order, no more than allowed, and failures are not lost."""

from __future__ import annotations

import gc
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from server import Server

from vitlab.config import UserError
from vitlab.data.shards.index import ShardInfo
from vitlab.data.stores import ahead
from vitlab.data.stores.ahead import Ahead
from vitlab.data.stores.local_cache import Cache
from vitlab.data.stores.remote import Patience

SIZE = 3200
FILES = {f"train-{i:06d}.tar": hashlib.sha256(bytes([i])).digest() * 100 for i in range(12)}
INFOS = [ShardInfo(name, 1, SIZE, hashlib.sha256(data).hexdigest()) for name, data in FILES.items()]
EACH = [[info] for info in INFOS]  # one shard a step


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(dict(FILES)) as server:
        yield server


def made(server: Server, folder: Path, tars: int = 100) -> Cache:
    return Cache(server.url, folder / "cache", tars * SIZE, Patience(1, 5, 0.05))


def until(what: Callable[[], object]) -> None:
    end = time.monotonic() + 5
    while not what():
        assert time.monotonic() < end
        time.sleep(0.005)


def here(cache: Cache) -> list[int]:
    return [i for i, name in enumerate(FILES) if (cache.path / name).exists()]


def threads() -> int:
    return sum(thread.name == "ahead" for thread in threading.enumerate())


def test_no_more_than_the_depth_is_fetched(server: Server, tmp_path: Path) -> None:
    cache = made(server, tmp_path)
    with Ahead(cache, EACH, depth=3, lanes=1) as front:
        until(lambda: here(cache) == [0, 1, 2])
        time.sleep(0.2)
        assert here(cache) == [0, 1, 2]
        front.reach(1)
        until(lambda: here(cache) == [0, 1, 2, 3])
        front.reach(5)
        until(lambda: here(cache) == [0, 1, 2, 3, 5, 6, 7] or 4 in here(cache))
        time.sleep(0.1)
        assert set(here(cache)) - {4} == {0, 1, 2, 3, 5, 6, 7}
    assert list(server.asked) == sorted(server.asked)  # in the order of need


def test_no_more_than_the_room_is_fetched(server: Server, tmp_path: Path) -> None:
    cache = made(server, tmp_path)
    with Ahead(cache, EACH, depth=9, most_bytes=2 * SIZE):
        until(lambda: here(cache) == [0, 1])
        time.sleep(0.2)
        assert here(cache) == [0, 1]


def test_a_shard_that_many_steps_read_counts_once(server: Server, tmp_path: Path) -> None:
    """Two streams, each five steps in a shard; the second one is half a shard behind."""
    steps = [[INFOS[(t // 5) * 2], INFOS[((t + 2) // 5) * 2 + 1]] for t in range(25)]
    cache = made(server, tmp_path, 4)
    with Ahead(cache, steps, depth=4) as front:
        for step, infos in enumerate(steps):
            front.reach(step)
            until(lambda infos=infos: all(cache.touch(info.file, SIZE) for info in infos))  # type: ignore[misc]
    assert dict(server.asked) == {info.file: 1 for infos in steps for info in infos}


def test_a_step_without_room_gets_its_shards(server: Server, tmp_path: Path) -> None:
    cache = made(server, tmp_path)
    with Ahead(cache, [INFOS[:1], INFOS[1:5], INFOS[5:6]], depth=2) as front:
        until(lambda: here(cache) == [0])
        front.reach(1)
        until(lambda: here(cache) == [0, 1, 2, 3, 4])


def test_what_was_consumed_is_evicted_before_what_is_coming(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitlab.data.stores.local_cache.TOUCH", 0.0)
    cache = made(server, tmp_path, 4)
    with Ahead(cache, EACH, depth=4) as front:
        until(lambda: here(cache) == [0, 1, 2, 3])
        for step in range(1, 9):
            assert cache.touch(INFOS[step - 1].file, SIZE)  # the last use of all, and done with
            front.reach(step)
            until(lambda step=step: here(cache) == [step, step + 1, step + 2, step + 3])  # type: ignore[misc]
    assert server.total == 12


def test_what_is_coming_is_touched(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "TOUCH", 0.02)
    cache = made(server, tmp_path)
    with Ahead(cache, EACH, depth=1):
        until(lambda: here(cache) == [0])
        path = cache.path / INFOS[0].file
        os.utime(path, (1, 1))
        until(lambda: path.stat().st_mtime > 1)


def test_a_failure_waits_for_its_step(server: Server, tmp_path: Path) -> None:
    server.rule = lambda number, name: "403" if name == INFOS[2].file else "well"
    with Ahead(made(server, tmp_path), EACH, depth=9) as front:
        until(lambda: front._window.failed)
        front.reach(1)
        for step in (2, 3):
            with pytest.raises(UserError, match=rf"{INFOS[2].file}: HTTP 403 Forbidden; check the address"):
                front.reach(step)


def test_a_missing_shard_is_left_to_the_reader(server: Server, tmp_path: Path) -> None:
    del server.files[INFOS[1].file]
    cache = made(server, tmp_path)
    with Ahead(cache, EACH[:4], depth=9) as front:
        until(lambda: here(cache) == [0, 2, 3])
        front.reach(3)


def test_an_error_of_the_order_is_raised(server: Server, tmp_path: Path) -> None:
    def steps() -> Iterator[list[ShardInfo]]:
        yield INFOS[:1]
        raise UserError("no further")

    with Ahead(made(server, tmp_path), steps(), depth=9) as front:
        until(lambda: front._window.failed)
        front.reach(0)
        with pytest.raises(UserError, match=r"^no further$"):
            front.reach(1)


def test_only_so_many_steps_are_walked(server: Server, tmp_path: Path) -> None:
    walked = []

    def steps() -> Iterator[list[ShardInfo]]:
        for step in range(1000):
            walked.append(step)
            yield INFOS[:1]

    with Ahead(made(server, tmp_path), steps(), depth=9, horizon=10) as front:
        until(lambda: len(walked) == 12)  # the one at which it waits is known already
        front.reach(5)
        until(lambda: len(walked) == 17)
        time.sleep(0.05)
        assert len(walked) == 17


@pytest.mark.parametrize("how", ["close", "forget"])
def test_the_threads_end_with_their_owner(server: Server, tmp_path: Path, how: str) -> None:
    until(lambda: threads() == 0)
    front: Ahead | None = Ahead(made(server, tmp_path), EACH, depth=2)
    assert threads() == 3
    time.sleep(0.1)
    assert front is not None
    if how == "close":
        front.close()
        front.close()
    del front
    gc.collect()
    until(lambda: threads() == 0)

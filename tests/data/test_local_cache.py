"""The cache of shards: whole files, one download for all processes, a bound that is never exceeded."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from server import Server

from vitlab.config import UserError
from vitlab.data.stores import local_cache
from vitlab.data.stores.local_cache import Cache
from vitlab.data.stores.remote import Missing, Patience

CALM = Patience(retries=2, stall=5, first_wait=0.05)
QUICK = Patience(retries=2, stall=0.3, first_wait=0.05)  # where silence is meant
KB = 1000


def body(i: int) -> bytes:
    return hashlib.sha256(bytes([i])).digest() * (100 * KB // 32)


FILES = {f"train-{i:06d}.tar": body(i) for i in range(12)}
SIZE = len(body(0))
NAMES = list(FILES)
HASHES = {name: hashlib.sha256(data).hexdigest() for name, data in FILES.items()}


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(FILES | {"index.json": b"one"}) as server:
        yield server


def made(url: str, folder: Path, tars: float = 100, **settings: Any) -> Cache:
    return Cache(url, folder, int(tars * SIZE), CALM, **settings)


def get(cache: Cache, name: str) -> Path:
    return cache.tar(name, SIZE, HASHES[name])


def there(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and path.name[0] != ".")


def hidden(folder: Path) -> list[str]:
    """What should be there for a while only."""
    return [path.name for path in folder.rglob(".train*")]


def at_once(work: Callable[[Any], object], items: list[Any]) -> None:
    threads = [threading.Thread(target=work, args=(item,)) for item in items]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def start(work: Callable[..., None], *args: object) -> Any:
    """In a process of its own, which knows vitlab already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vitlab.data.reading.loading", "torchvision.transforms.v2"])
    process = context.Process(target=work, args=args)
    process.start()
    return process


# ---------------------------------------------------------------- one process


def test_a_file_is_fetched_once(server: Server, tmp_path: Path) -> None:
    cache = made(server.url, tmp_path / "cache", name="digest")
    path = get(cache, NAMES[0])
    assert path == tmp_path / "cache" / "digest" / NAMES[0] == cache.path / NAMES[0]
    assert path.read_bytes() == FILES[NAMES[0]]
    assert get(cache, NAMES[0]) == path
    assert get(made(server.url, tmp_path / "cache", name="digest"), NAMES[0]) == path
    assert server.total == 1
    cache.forget(NAMES[0])
    get(cache, NAMES[0])
    assert server.total == 2
    assert hidden(tmp_path) == []


def test_a_cut_file_is_fetched_anew(server: Server, tmp_path: Path) -> None:
    cache = made(server.url, tmp_path / "cache")
    os.truncate(get(cache, NAMES[0]), 10)
    assert get(cache, NAMES[0]).read_bytes() == FILES[NAMES[0]]


def test_small_files_stay(server: Server, tmp_path: Path) -> None:
    cache = made(server.url, tmp_path / "cache", 1)
    assert cache.small("index.json").read_bytes() == b"one"
    server.files["index.json"] = b"two"
    for name in NAMES[:3]:
        get(cache, name)
    assert cache.small("index.json").read_bytes() == b"one"
    assert server.asked["index.json"] == 1
    assert cache.small("index.json", refresh=True).read_bytes() == b"two"
    with pytest.raises(Missing, match=rf"^{server.url}/none\.json: no such file$"):
        cache.small("none.json")
    assert there(tmp_path) == ["index.json", NAMES[2]]


def test_the_least_recently_used_goes_first(server: Server, tmp_path: Path) -> None:
    cache = made(server.url, tmp_path / "cache", 3.5)
    now = time.time()
    for i, name in enumerate(NAMES[:3]):
        os.utime(get(cache, name), (now - 100 + i, now - 100 + i))
    get(cache, NAMES[0])  # a use: now NAMES[1] is the oldest
    get(cache, NAMES[3])
    assert there(tmp_path) == [NAMES[0], NAMES[2], NAMES[3]]
    get(cache, NAMES[4])
    assert there(tmp_path) == [NAMES[0], NAMES[3], NAMES[4]]
    assert server.total == 5


def test_a_use_is_noted_once_a_second(server: Server, tmp_path: Path) -> None:
    cache = made(server.url, tmp_path / "cache")
    path = get(cache, NAMES[0])
    for ago, noted in ((0.5, False), (1.5, True)):
        then = time.time() - ago
        os.utime(path, (then, then))
        assert cache.touch(NAMES[0], SIZE)
        assert (path.stat().st_mtime > then + 0.3) is noted
    assert not cache.touch(NAMES[1], SIZE)


def test_two_addresses_share_the_bound(server: Server, tmp_path: Path) -> None:
    get(made(server.url, tmp_path / "cache", 1.5, name="a"), NAMES[0])
    get(made(server.url, tmp_path / "cache", 1.5, name="b"), NAMES[1])
    assert there(tmp_path) == [NAMES[1]]


def test_what_is_open_stays_readable(server: Server, tmp_path: Path) -> None:
    cache = made(server.url, tmp_path / "cache", 1)
    fd = cache.open_tar(NAMES[0], SIZE, HASHES[NAMES[0]])
    get(cache, NAMES[1])
    assert there(tmp_path) == [NAMES[1]]
    assert os.pread(fd, SIZE, 0) == FILES[NAMES[0]]
    os.close(fd)


def test_too_little_room_is_refused(server: Server, tmp_path: Path) -> None:
    cache = made(server.url, tmp_path / "cache", 3.5)
    cache.check_room(SIZE, 3)
    with pytest.raises(UserError) as caught:
        cache.check_room(SIZE, 4)
    assert str(caught.value) == (
        f"{tmp_path}/cache: the cache may hold 350 kB, but 4 shards of up to 100 kB must lie there at once; "
        "allow at least 400 kB"
    )
    with pytest.raises(UserError, match=r"may hold 50 kB, but one shard of up to 100 kB must lie there"):
        get(made(server.url, tmp_path / "cache", 0.5), NAMES[0])


def test_a_folder_of_others_is_refused(server: Server, tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "precious.tar").touch()
    with pytest.raises(
        UserError, match=r"own: holds files, and is no cache that vitlab made; old shards in a"
    ):
        made(server.url, tmp_path / "own")
    with pytest.raises(UserError, match=r"precious.tar: no folder for a cache of shards: File exists; name"):
        made(server.url, tmp_path / "own" / "precious.tar")


def test_a_name_cannot_lead_out(server: Server, tmp_path: Path) -> None:
    cache = made(server.url, tmp_path / "cache")
    for name in ("../a.tar", "/a.tar", ".a.tar", "a/b.tar"):
        with pytest.raises(
            UserError, match=rf"'{name}' is no plain file name; the index is not to be trusted"
        ):
            cache.tar(name, SIZE, "")


def test_a_wrong_file_never_gets_its_name(server: Server, tmp_path: Path) -> None:
    cache = made(server.url, tmp_path / "cache")
    with pytest.raises(UserError, match="given up after 3 tries"):
        cache.tar(NAMES[0], SIZE, HASHES[NAMES[1]])
    assert there(tmp_path) == []
    assert hidden(tmp_path) == []


def test_memory_as_a_store(tmp_path: Path) -> None:
    from vitlab.data.stores.remote import upload

    (tmp_path / "a").write_bytes(FILES[NAMES[0]])
    upload(tmp_path / "a", f"memory://{tmp_path.name}/{NAMES[0]}", CALM)
    cache = made(f"memory://{tmp_path.name}", tmp_path / "cache")
    assert get(cache, NAMES[0]).read_bytes() == FILES[NAMES[0]]


def test_a_wait_is_shown(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(local_cache, "SHOW_AFTER", 0.35)
    server.rule = lambda number, name: "slow"
    cache = made(server.url.replace("//", "//me:pw@") + "?sig=secret", tmp_path / "cache")
    cache.tar(NAMES[0], SIZE, HASHES[NAMES[0]], quiet=True)
    assert capsys.readouterr().err == ""
    at_once(lambda _: get(cache, NAMES[1]), [1, 2])  # one line for both
    line = capsys.readouterr().err
    assert re.fullmatch(
        rf"waiting for {NAMES[1]} from {server.url}: [\d.]+ k?B of 100 kB, [\d.]+ [kM]?B/s\n", line
    ), line


# ---------------------------------------------------------------- several at once


def test_one_fetches_for_all_threads(server: Server, tmp_path: Path) -> None:
    server.rule = lambda number, name: "slow"
    cache, found = made(server.url, tmp_path / "cache"), []
    at_once(lambda _: found.append(get(cache, NAMES[0]).read_bytes()), list(range(5)))
    assert found == [FILES[NAMES[0]]] * 5
    assert server.total == 1


@pytest.mark.parametrize(("rule", "kind"), [("silent", UserError), ("404", Missing)])
def test_one_fails_for_all_that_waited(server: Server, tmp_path: Path, rule: str, kind: type) -> None:
    """Else every process would wait for the end of the patience of all before it."""
    server.rule = lambda number, name: time.sleep(0.1) or rule  # type: ignore[func-returns-value]
    cache, errors = replace(made(server.url, tmp_path / "cache"), patience=QUICK), []

    def fail(_: int) -> None:
        try:
            get(cache, NAMES[0])
        except (UserError, Missing) as error:
            errors.append(error)

    begin = time.monotonic()
    at_once(fail, [1, 2, 3])
    assert time.monotonic() - begin < 2 * QUICK.longest
    assert [type(error) for error in errors] == [kind] * 3
    assert len({str(error) for error in errors}) == 1
    assert server.total == (3 if rule == "silent" else 1)
    server.rule = lambda number, name: "well"
    assert get(cache, NAMES[0]).read_bytes() == FILES[NAMES[0]]
    assert hidden(tmp_path) == []


def _read_all(cache: Cache, start: int, rounds: int) -> None:
    for i in range(rounds):
        name = NAMES[(start + 5 * i) % len(NAMES)]
        fd = cache.open_tar(name, SIZE, HASHES[name])
        assert os.pread(fd, SIZE + 1, 0) == FILES[name]
        os.close(fd)


def test_the_bound_holds_with_three_processes(server: Server, tmp_path: Path) -> None:
    folder, most = tmp_path / "cache", 0
    processes = [start(_read_all, made(server.url, folder, 4.5), 3 * i, 25) for i in range(3)]
    while any(process.is_alive() for process in processes):
        sizes = []
        for path in folder.rglob("*.tar*"):
            try:
                sizes.append(path.stat().st_size)
            except FileNotFoundError:
                continue
        most = max(most, sum(sizes))
        time.sleep(0.001)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert SIZE < most <= 4.5 * SIZE
    assert server.total > len(NAMES)  # there was no room for all
    assert hidden(tmp_path) == []


def test_a_killed_process_leaves_no_harm(server: Server, tmp_path: Path) -> None:
    server.rule = lambda number, name: "stuck" if number <= 2 else "well"
    cache = Cache(server.url, tmp_path / "cache", SIZE, Patience(stall=60))
    processes = [start(cache.tar, name, SIZE, HASHES[name]) for name in NAMES[:1]]
    while cache.arrived(NAMES[0]) < SIZE // 2:
        time.sleep(0.01)
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert len(hidden(tmp_path)) == 2  # the lock's file and half of the tar
    server.rule = lambda number, name: "well"
    cache = made(server.url, tmp_path / "cache", 1)  # a start
    assert hidden(tmp_path) == []
    assert get(cache, NAMES[1]).read_bytes() == FILES[NAMES[1]]
    assert get(cache, NAMES[0]).read_bytes() == FILES[NAMES[0]]


def test_what_a_killed_process_claimed_is_free_again(server: Server, tmp_path: Path) -> None:
    cache = made(server.url, tmp_path / "cache", 1)
    (tmp_path / "cache" / f".{NAMES[0]}.lock").write_text(f"{SIZE}\n")
    (tmp_path / "cache" / f".{NAMES[0]}.partial-1-0").touch()
    assert get(cache, NAMES[1]).read_bytes() == FILES[NAMES[1]]
    assert hidden(tmp_path) == []

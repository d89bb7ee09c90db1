"""Epochs read from a web server that fails and stalls, and from one that goes away."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from samples import all_same, config, plan, shards
from server import Server

from vitlab.config import UserError
from vitlab.data import Shards, eval_batches, open_shards, train_batches
from vitlab.data.settings import RemoteConfig
from vitlab.data.shards.index import columns_path
from vitlab.data.stores.patience import Patience
from vitlab.dist import World

STALL = 0.3  # seconds


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("vitlab.data.shards.index.Patience", partial(Patience, first_wait=0.05))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return shards(tmp_path_factory.mktemp("data") / "a", n=120, size=6)


@pytest.fixture
def server(made: Shards) -> Iterator[Server]:
    with Server({file.name: file.read_bytes() for file in made.path.iterdir()}) as one:
        yield one


def remote(folder: Path, tars: float, made: Shards, **more: object) -> RemoteConfig:
    largest = max(info.bytes for infos in made.splits.values() for info in infos)
    given = {"cache": str(folder), "cache_gb": tars * largest / 1e9, "stall": STALL, "ahead": 2}
    return RemoteConfig.model_validate({**given, **more})


@pytest.mark.parametrize("loaders", [0, 2])
def test_a_bad_server_changes_nothing(made: Shards, server: Server, tmp_path: Path, loaders: int) -> None:
    """Every third answer is an error and every tenth never comes; the cache does not hold all shards."""
    wanted = list(train_batches(made, config(made.path), plan()))

    def rule(number: int, name: str) -> str:
        return "silent" if number % 10 == 0 else "500" if number % 3 == 0 else "well"

    server.rule = rule
    there = remote(tmp_path / "cache", 12.1, made)
    found = open_shards(server.url, remote=there)
    assert found.digest == made.digest
    assert len(made.split("train")) > 12
    settings = config(Path(server.url), remote=there.model_dump())
    assert all_same(list(train_batches(found, settings, plan(loaders=loaders))), wanted)
    assert server.total > 20
    kept = sum(tar.stat().st_size for tar in (tmp_path / "cache").rglob("*.tar"))
    assert kept <= there.cache_gb * 1e9


def test_evaluation_over_the_web(made: Shards, server: Server, tmp_path: Path) -> None:
    there = remote(tmp_path / "cache", 100, made)
    found, world = open_shards(server.url, remote=there), World()
    near, far = (
        list(eval_batches(s, config(s.path, remote=there.model_dump()), "held_out", 8, world))
        for s in (made, found)
    )
    assert all_same(near, far)


@pytest.mark.parametrize("loaders", [0, 1])
def test_a_server_that_is_gone_is_one_line_in_the_stated_time(
    made: Shards, server: Server, tmp_path: Path, loaders: int
) -> None:
    there = remote(tmp_path / "cache", 12.1, made, retries=1)
    found = open_shards(server.url, remote=there)
    batches = train_batches(found, config(Path(server.url), remote=there.model_dump()), plan(loaders=loaders))
    next(batches)
    server.rule = lambda number, name: "silent"
    begin = time.monotonic()
    with pytest.raises(UserError, match=r"/shards/train-\d+\.(tar|idx\.json): .*2 tr") as caught:
        list(batches)
    allowed = Patience(1, STALL, 0.05).longest + (4 if loaders else 0.5)  # a loader process has to begin
    assert time.monotonic() - begin < allowed
    assert "copy it there again" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_shard_that_is_missing_there_is_counted(made: Shards, server: Server, tmp_path: Path) -> None:
    gone = made.split("train")[1]
    lost = set(made.columns(gone).keys)
    del server.files[gone.file]
    there = remote(tmp_path / "cache", 100, made)
    found = open_shards(server.url, remote=there)
    settings = config(Path(server.url), remote=there.model_dump())
    batches = list(train_batches(found, settings, plan(epochs=1)))
    whole = list(train_batches(made, config(made.path), plan(epochs=1)))
    assert [b.keys for b in batches] == [b.keys for b in whole]
    bad = {(one.kind, one.shard, one.key) for b in batches for one in b.bad}
    seen = {key for b in whole for key in b.keys} & lost
    assert bad == {("missing_shard", gone.file, key) for key in seen}
    assert sum(b.weight.sum().item() for b in batches) == len(whole) * 16 - len(seen)


def test_a_cache_without_room_is_refused(made: Shards, server: Server, tmp_path: Path) -> None:
    there = remote(tmp_path / "cache", 2, made)
    found = open_shards(server.url, remote=there)
    with pytest.raises(UserError, match=r"12 shards of up to .* must lie there at once; allow at least"):
        train_batches(found, config(Path(server.url), remote=there.model_dump()), plan())


@pytest.mark.parametrize("mended", [True, False])
def test_columns_that_came_broken_are_fetched_once_more(
    made: Shards, server: Server, tmp_path: Path, mended: bool
) -> None:
    info = made.split("train")[0]
    name = columns_path(Path(info.file)).name
    whole = server.files[name]
    server.files[name] = b"<html>busy</html>"
    found = open_shards(server.url, remote=remote(tmp_path / "cache", 100, made))
    cache = found.cache
    assert cache is not None
    assert cache.small(name).read_bytes() == b"<html>busy</html>"
    if mended:
        server.files[name] = whole
        assert found.columns(info) == made.columns(info)
        return
    with pytest.raises(UserError, match=rf"^{server.url}/{name}: not valid JSON .*; copy it there again$"):
        found.columns(info)
    assert not (cache.path / name).exists(), "the next run asks anew"

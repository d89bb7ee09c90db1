"""A hit only if all of it is there; one process at a time on a key; half a result is none."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from vitlab import cache
from vitlab.cache import Artifact, Claim, Fence, claim, content_key, publish
from vitlab.config import Config, free
from vitlab.tracking import Store, TrackingConfig, folder_digest


class Stage(Config):
    epochs: int = 1
    threads: int = free(1)


@pytest.fixture
def store(home: Path) -> Store:
    return Store(TrackingConfig(), home)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "made"
    (made / "sub").mkdir(parents=True)
    (made / "weights").write_bytes(b"123")
    (made / "sub/config").write_text("c")
    return made


def finished(store: Store, folder: Path, key: str = "k") -> Artifact:
    run = store.start("r", {"vitlab.key": key}, {})
    artifact = publish(store, run, folder, "model")
    store.metrics(run, {"val/top1": 0.5})
    store.status(run, "FINISHED")
    return artifact


def look(store: Store, key: str = "k") -> Claim:
    told: list[str] = []
    with claim(store, key, told.append) as found:
        assert told == []
        return found


# ---------------------------------------------------------------- the key


def test_the_key_changes_with_what_decides_and_with_nothing_else() -> None:
    base = content_key("finetune", 1, Stage(), {"data": "d", "init": "i"})
    assert content_key("finetune", 1, Stage(threads=8), {"init": "i", "data": "d"}) == base
    others = [
        content_key("pretrain", 1, Stage(), {"data": "d", "init": "i"}),
        content_key("finetune", 2, Stage(), {"data": "d", "init": "i"}),
        content_key("finetune", 1, Stage(epochs=2), {"data": "d", "init": "i"}),
        content_key("finetune", 1, Stage(), {"data": "e", "init": "i"}),
        content_key("finetune", 1, Stage(), {"data": "d"}),
    ]
    assert len({base, *others}) == 6


# ---------------------------------------------------------------- hits


def test_what_is_finished_and_whole_is_a_hit(store: Store, folder: Path) -> None:
    assert look(store) == Claim("k", None, {}, None)
    made = finished(store, folder)
    found = look(store)
    assert found.artifact == made
    assert found.metrics == {"val/top1": 0.5}
    assert found.unfinished is None
    assert made.uri == f"runs:/{made.run_id}/model"
    assert folder_digest(made.folder) == made.digest == folder_digest(folder)
    assert look(store, "l").artifact is None


def _delete_one(folder: Path) -> None:
    (folder / "sub/config").unlink()


def _change_a_byte(folder: Path) -> None:
    (folder / "weights").write_bytes(b"124")


def _add_one(folder: Path) -> None:
    (folder / "more").touch()


def _rename_one(folder: Path) -> None:
    (folder / "weights").rename(folder / "weight")


@pytest.mark.parametrize("harm", [_delete_one, _change_a_byte, _add_one, _rename_one, shutil.rmtree])
def test_what_is_damaged_is_no_hit_and_is_never_gone_on_with(
    harm: object, store: Store, folder: Path
) -> None:
    made = finished(store, folder)
    assert callable(harm)
    harm(made.folder)
    assert look(store) == Claim("k", None, {}, None)
    again = finished(store, folder)
    assert again.run_id != made.run_id
    assert look(store).artifact == again


def test_an_older_whole_run_serves_when_the_newest_is_damaged(store: Store, folder: Path) -> None:
    first, second = finished(store, folder), finished(store, folder)
    _change_a_byte(second.folder)
    assert look(store).artifact == first


@pytest.mark.parametrize("status", ["RUNNING", "FAILED", "KILLED"])
def test_what_is_not_finished_is_gone_on_with(status: str, store: Store, folder: Path) -> None:
    run = store.start("r", {"vitlab.key": "k"}, {})
    publish(store, run, folder, "model")
    store.status(run, status)
    assert look(store) == Claim("k", None, {}, run)


def test_the_newest_unfinished_run_is_gone_on_with(store: Store) -> None:
    store.start("old", {"vitlab.key": "k"}, {})
    time.sleep(0.002)
    newer = store.start("new", {"vitlab.key": "k"}, {})
    assert look(store).unfinished == newer


def test_an_unfinished_run_older_than_a_damaged_one_is_gone_on_with(store: Store, folder: Path) -> None:
    older = store.start("r", {"vitlab.key": "k"}, {})
    store.status(older, "KILLED")
    shutil.rmtree(finished(store, folder).folder)
    assert look(store).unfinished == older


def test_a_run_of_another_home_is_a_hit_when_finished_and_left_alone_when_not(
    store: Store, folder: Path, tmp_path: Path
) -> None:
    """Two people with one server: the lease and the checkpoints of one are nothing to the other."""
    theirs = Store(TrackingConfig(uri=store.uri), tmp_path / "another home")
    running = theirs.start("r", {"vitlab.key": "k"}, {})
    assert look(store).unfinished is None
    assert look(theirs).unfinished == running
    made = finished(theirs, folder)
    assert look(store).artifact == made


def test_a_deleted_run_is_no_hit(store: Store, folder: Path) -> None:
    made = finished(store, folder)
    store.client.delete_run(made.run_id)
    assert look(store) == Claim("k", None, {}, None)


# ---------------------------------------------------------------- publishing


def test_half_an_upload_is_no_artifact(store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = store.start("r", {"vitlab.key": "k"}, {})
    real = store.client.log_artifacts

    def half(run_id: str, local: str, path: str) -> None:
        real(run_id, str(Path(local) / "sub"), path)
        raise KeyboardInterrupt

    monkeypatch.setattr(store.client, "log_artifacts", half)
    with pytest.raises(KeyboardInterrupt):
        publish(store, run, folder, "model")
    monkeypatch.undo()
    assert cache.present(store, run, store.get(run).tags) is None
    assert look(store) == Claim("k", None, {}, run)
    # The next attempt leaves nothing of the first one.
    (folder / "sub/config").rename(folder / "config")
    assert publish(store, run, folder, "model") == cache.present(store, run, store.get(run).tags)


def test_an_upload_that_arrives_changed_is_an_error(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = store.start("r", {"vitlab.key": "k"}, {})
    monkeypatch.setattr(store.client, "log_artifacts", lambda run_id, local, path: None)
    with pytest.raises(RuntimeError, match="came back different"):
        publish(store, run, folder, "model")
    assert "vitlab.artifact" not in store.get(run).tags


# ---------------------------------------------------------------- two at once

HOLD = """
import sys, time
from pathlib import Path
from vitlab import cache
from vitlab.tracking import Store, TrackingConfig
store = Store(TrackingConfig(), Path(sys.argv[1]))
with cache.claim(store, "k", print) as found:
    assert found.artifact is None
    run = store.start("r", {"vitlab.key": "k"}, {})
    print(run, flush=True)
    sys.stdin.readline()
    cache.publish(store, run, Path(sys.argv[2]), "model")
    store.status(run, "FINISHED")
"""


LEASE = """
import sys, time
from pathlib import Path
from vitlab import cache
with cache._lease(Path(sys.argv[1]) / "leases/k.lock", print):
    print("mine", flush=True)
    time.sleep(60)
"""


def started(program: str, *words: Path) -> subprocess.Popen[str]:
    call = [sys.executable, "-W", "ignore", "-c", program, *map(str, words)]
    return subprocess.Popen(call, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_the_second_waits_is_told_who_works_and_then_hits(store: Store, folder: Path) -> None:
    told: list[str] = []
    with started(HOLD, store.home, folder) as other:
        assert other.stdout is not None
        assert other.stdin is not None
        run = other.stdout.readline().strip()
        go = threading.Timer(0.7, lambda: print(file=other.stdin, flush=True))

        def waits(text: str) -> None:
            told.append(text)
            go.start()  # a second time is an error

        begin = time.monotonic()
        with claim(store, "k", waits) as found:
            assert time.monotonic() - begin > 0.5
            assert found.artifact is not None
            assert (found.artifact.run_id, found.unfinished) == (run, None)
    assert len(told) == 1, "once is enough in half a minute"
    assert told[0].startswith(f"process {other.pid} on ")
    assert told[0].endswith(" s")


def test_a_killed_holder_frees_its_lease_and_its_run_is_gone_on_with(store: Store) -> None:
    run = store.start("r", {"vitlab.key": "k"}, {})
    told: list[str] = []
    with started(LEASE, store.home) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "mine\n"

        def waits(text: str) -> None:
            told.append(text)
            os.kill(other.pid, signal.SIGKILL)

        begin = time.monotonic()
        with claim(store, "k", waits) as found:
            assert time.monotonic() - begin < 30  # of the 60 s that it would have held it
            assert found == Claim("k", None, {}, run)
    assert len(told) == 1


def test_other_keys_do_not_wait(store: Store) -> None:
    with claim(store, "k", lambda text: None), claim(store, "l", lambda text: None) as found:
        assert found.key == "l"


def test_who_waits_long_is_told_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "LOOK_EVERY", 0.01)
    monkeypatch.setattr(cache, "TELL_EVERY", 0.1)
    told: list[str] = []

    def wait() -> None:
        with claim(store, "k", told.append):
            told.append("mine")

    with claim(store, "k", told.append):
        waiter = threading.Thread(target=wait)
        waiter.start()
        time.sleep(0.35)
        (store.home / "leases/k.lock").write_text("")  # its holder is just writing it
        time.sleep(0.2)
    waiter.join()
    assert 4 <= len(told) <= 9
    assert told[-1] == "mine"
    assert told[0].startswith(f"process {os.getpid()} on ")
    assert "another process" in told


# ---------------------------------------------------------------- the fence


def test_the_last_to_take_the_fence_holds_it(tmp_path: Path) -> None:
    fence = Fence(tmp_path / "checkpoints")
    assert not fence.holds("")
    first = fence.take()
    assert fence.holds(first)
    second = Fence(tmp_path / "checkpoints").take()
    assert not fence.holds(first)
    assert fence.holds(second)
    shutil.rmtree(tmp_path / "checkpoints")
    assert not fence.holds(second)

"""The store: runs, metrics that arrive once and in order, artifacts, and servers that do not answer."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from vitlab import server
from vitlab.config import UserError, build
from vitlab.tracking import Metrics, Store, TrackingConfig, folder_digest


@pytest.fixture
def store(home: Path) -> Store:
    return Store(TrackingConfig(), home)


@pytest.fixture
def run(store: Store) -> str:
    return store.start("r", {}, {})


def curve(store: Store, run: str, name: str) -> list[tuple[int, float]]:
    return [(p.step, p.value) for p in store.client.get_metric_history(run, name)]


# ---------------------------------------------------------------- runs


def test_a_run_as_it_is_started(store: Store) -> None:
    params = {f"p{i}": i for i in range(250)} | {
        "text": "x",
        "none": None,
        "list": [1, 2],
        "long": "y" * 9000,
    }
    run = store.start("name", {"vitlab.key": "k"}, params)
    found = store.client.get_run(run)
    assert len(found.data.params) == 254
    assert found.data.params["p249"] == "249"
    assert (found.data.params["text"], found.data.params["none"], found.data.params["list"]) == (
        "x",
        "null",
        "[1, 2]",
    )
    assert len(found.data.params["long"]) == 6000
    assert found.data.params["long"].endswith("y…")
    assert found.info.status == "RUNNING"
    assert store.get(run).name == "name"
    assert store.get(run).tags["vitlab.home"] == store.home_id


def test_children_and_status(store: Store, run: str) -> None:
    child = store.start("child", {"vitlab.stage": "finetune"}, {}, parent=run)
    assert [r.run_id for r in store.find({"mlflow.parentRunId": run})] == [child]
    for status in ("FAILED", "RUNNING", "FINISHED"):
        store.status(child, status)
        assert store.get(child).status == status


def test_find_by_several_tags_newest_first(store: Store) -> None:
    runs = []
    for i in range(3):
        runs.append(store.start(str(i), {"vitlab.key": "k", "vitlab.stage": str(i % 2)}, {}))
        time.sleep(0.002)
    store.start("other", {"vitlab.key": "l"}, {})
    assert [r.run_id for r in store.find({"vitlab.key": "k"})] == runs[::-1]
    assert [r.run_id for r in store.find({"vitlab.key": "k", "vitlab.stage": "0"})] == [runs[2], runs[0]]
    assert store.find({"vitlab.key": "m"}) == []


def test_a_start_that_was_killed_half_way_is_found_by_nobody(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(store.client, "log_batch", killed)
    with pytest.raises(KeyboardInterrupt):
        store.start("r", {"vitlab.key": "k"}, {"a": 1})
    monkeypatch.undo()
    assert store.find({"vitlab.key": "k"}) == []


def test_a_deleted_experiment_is_one_line(store: Store, home: Path) -> None:
    store.client.delete_experiment(store.experiment_id)
    with pytest.raises(UserError, match=r"tracking\.experiment: given 'vitlab', which was deleted"):
        Store(TrackingConfig(), home)
    assert Store(TrackingConfig(experiment="other"), home).experiment_id != store.experiment_id


def test_another_machine_may_make_the_experiment_first(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    real, asked = store.client.get_experiment_by_name, []

    def late(name: str) -> Any:
        asked.append(name)
        return None if len(asked) == 1 else real(name)

    monkeypatch.setattr(store.client, "get_experiment_by_name", late)
    assert store._experiment() == store.experiment_id
    assert len(asked) == 2


def test_the_home_keeps_its_id(store: Store, home: Path) -> None:
    assert Store(TrackingConfig(), home).home_id == store.home_id


def test_links(store: Store) -> None:
    link = store.curves("finetune")
    assert link.startswith(f"http://127.0.0.1:5000/#/experiments/{store.experiment_id}/runs?")
    assert "tags.`vitlab.stage` = 'finetune'" in unquote(link)
    assert unquote(store.comparison(["a", "b"])).endswith(
        f'/#/compare-runs?runs=["a", "b"]&experiments=["{store.experiment_id}"]&workflowType=machine_learning'
    )


# ---------------------------------------------------------------- metrics


def test_metrics_arrive_in_order_and_in_batches(
    store: Store, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store answers nothing until all is logged: `log` does not wait for it."""
    sizes: list[int] = []
    logged, real = threading.Event(), store.client.log_batch

    def counted(run_id: str, metrics: list[Any]) -> None:
        assert logged.wait(60), "log waited for the store"
        sizes.append(len(metrics))
        real(run_id, metrics=metrics)

    monkeypatch.setattr(store.client, "log_batch", counted)
    metrics = Metrics(store, run)
    for step in range(1, 1001):
        metrics.log(step, {"train/loss": 1 / step, "train/lr": float(step)})
    assert sizes == []
    logged.set()
    metrics.flush()
    assert curve(store, run, "train/loss") == [(i, 1 / i) for i in range(1, 1001)]
    assert sum(sizes) == 2000
    assert max(sizes) <= 900
    assert len(sizes) <= 8
    metrics.log(1001, {"train/loss": math.nan})
    metrics.close()
    assert math.isnan(store.get(run).metrics["train/loss"])


def test_a_lone_point_arrives_without_a_flush(store: Store, run: str) -> None:
    metrics = Metrics(store, run)
    metrics.log(1, {"a": 1.0})
    deadline = time.monotonic() + 5
    while "a" not in store.get(run).metrics and time.monotonic() < deadline:
        time.sleep(0.05)
    assert store.get(run).metrics == {"a": 1.0}
    metrics.close()


def test_a_resumed_run_has_no_point_twice_and_none_missing(store: Store, run: str) -> None:
    first = Metrics(store, run)
    for step in range(1, 8):
        first.log(step, {"loss": float(step)} | ({"val": float(step)} if step % 2 == 0 else {}))
    first.close()
    second = Metrics(store, run)  # from a checkpoint at step 3
    for step in range(4, 13):
        second.log(step, {"loss": float(step)} | ({"val": float(step)} if step % 2 == 0 else {}))
    second.log(12, {"loss": 99.0, "new": 5.0})
    second.close()
    assert curve(store, run, "loss") == [(i, float(i)) for i in range(1, 13)]
    assert curve(store, run, "val") == [(i, float(i)) for i in range(2, 13, 2)]
    assert curve(store, run, "new") == [(12, 5.0)]


def test_a_store_that_fails_is_told_at_the_flush_and_after(
    store: Store, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full\nsecond line")

    metrics = Metrics(store, run)
    monkeypatch.setattr(store.client, "log_batch", broken)
    metrics.log(1, {"a": 1.0})
    for ask in (metrics.flush, metrics.flush, lambda: metrics.log(2, {"a": 1.0}), metrics.close):
        with pytest.raises(RuntimeError, match=r"could not be written to sqlite:.*mlflow\.db: disk full$"):
            ask()
    metrics.thread.join(2)
    assert not metrics.thread.is_alive()


def test_a_store_whose_file_is_gone_is_told(store: Store, run: str, home: Path) -> None:
    metrics = Metrics(store, run)
    (home / "mlflow.db").unlink()
    (home / "mlflow.db").mkdir()
    metrics.log(1, {"a": 1.0})
    with pytest.raises(RuntimeError, match="metrics could not be written"):
        metrics.flush()


def test_closed_metrics_take_nothing(store: Store, run: str) -> None:
    metrics = Metrics(store, run)
    metrics.close()
    with pytest.raises(RuntimeError, match="closed"):
        metrics.log(1, {"a": 1.0})


# ---------------------------------------------------------------- artifacts


def test_artifacts_up_and_down(store: Store, run: str, tmp_path: Path) -> None:
    folder = tmp_path / "f"
    (folder / "sub").mkdir(parents=True)
    (folder / "a").write_text("1")
    (folder / "sub/b").write_text("2")
    assert store.download(run, "model") is None
    store.upload(run, folder, "model")
    store.upload_file(run, folder / "a", "")
    found = store.download(run, "model")
    assert found is not None
    assert found.is_relative_to(store.home / "artifacts"), "a copy was made of what is local already"
    assert folder_digest(found) == folder_digest(folder)
    store.clear(run, "model")
    store.clear(run, "model")
    assert store.download(run, "model") is None


def test_folder_digest(tmp_path: Path) -> None:
    def made(name: str, files: dict[str, str]) -> str:
        for file, text in files.items():
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_text(text)
        return folder_digest(tmp_path / name)

    first = made("1", {"a": "x", "d/b": "y"})
    assert made("2", {"d/b": "y", "a": "x"}) == first
    others = [{"a": "x", "d/b": "z"}, {"a": "x", "b": "y"}, {"a": "x"}, {"a": "x", "d/b": "y", "c": ""}]
    assert len({first, *(made(f"o{i}", files) for i, files in enumerate(others))}) == 5


# ---------------------------------------------------------------- several processes, a quiet console

LIFE = """
import sys
from pathlib import Path
from vitlab.tracking import Metrics, Store, TrackingConfig
home = Path(sys.argv[1])
store = Store(TrackingConfig(), home)
run = store.start("r", {"vitlab.key": "k"}, {"a": 1})
metrics = Metrics(store, run)
for step in range(8):
    metrics.log(step, {"a": 1.0})
    metrics.flush()
folder = home / run
folder.mkdir()
(folder / "f").write_text("1")
store.upload(run, folder, "model")
store.download(run, "model")
store.status(run, "FINISHED")
print(store.experiment_id)
"""


def test_two_processes_make_one_store_and_nothing_is_printed(tmp_path: Path) -> None:
    """The home folder's name has a space and an umlaut in it; the database is made here."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW")}
    home = str(tmp_path / "a hömе")
    call = [sys.executable, "-c", LIFE, home]
    both = [subprocess.Popen(call, stdout=-1, stderr=-1, text=True, env=env) for _ in range(2)]
    outputs = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert outputs[0] == outputs[1]
    assert re.fullmatch(r"\d+\n", outputs[0][0])
    assert outputs[0][1] == ""
    assert len(Store(TrackingConfig(), Path(home)).find({"vitlab.key": "k"})) == 2


# ---------------------------------------------------------------- addresses and servers


@pytest.mark.parametrize(
    "uri", ["http://", "localhost:5000", "sqlite:///mlflow.db", "file:///x", "postgresql://me:secret@h/d"]
)
def test_addresses_that_are_none(uri: str) -> None:
    with pytest.raises(
        UserError, match=r"tracking\.uri: given .*; allowed: an MLflow server, http://HOST:5000"
    ) as caught:
        build(TrackingConfig, {"uri": uri})
    assert "secret" not in str(caught.value)


def test_the_environment_names_the_server_and_the_config_wins(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "mlruns")
    with pytest.raises(UserError, match=r"tracking\.uri: given 'mlruns'"):
        Store(TrackingConfig(), home)
    assert not Store(TrackingConfig(uri=f"sqlite:///{home}/mlflow.db"), home).remote
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{home}/mlflow.db")
    assert Store(TrackingConfig(), home).config.uri == f"sqlite:///{home}/mlflow.db"


@contextmanager
def listening(answer: Callable[[socket.socket], None]) -> Iterator[int]:
    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            answer(self.request)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as tcp:
        tcp.daemon_threads, tcp.block_on_close = True, False
        threading.Thread(target=tcp.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        try:
            yield tcp.server_address[1]
        finally:
            tcp.shutdown()


def refused(home: Path, port: int, within: float = 2.0) -> str:
    begin = time.monotonic()
    with pytest.raises(UserError) as caught:
        Store(TrackingConfig(uri=f"http://me:secret@127.0.0.1:{port}/"), home)
    assert time.monotonic() - begin < within
    text = str(caught.value)
    assert text.startswith(f"tracking.uri: http://127.0.0.1:{port} does not answer as an MLflow server (")
    assert "\n" not in text
    assert "secret" not in text
    return text


@pytest.fixture
def clean_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Store` puts the address's name and password into the environment; they go with the test."""
    for name in ("USERNAME", "PASSWORD"):
        monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", "")


@pytest.mark.usefixtures("clean_names")
def test_a_port_where_nobody_listens(home: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        assert "(Connection refused); start it or mend the address" in refused(home, taken.getsockname()[1])


@pytest.mark.usefixtures("clean_names")
def test_a_host_that_there_is_not(home: Path) -> None:
    with pytest.raises(
        UserError, match=r"http://no\.such\.invalid:5000 does not answer as an MLflow server \(.+\)"
    ):
        Store(TrackingConfig(uri="http://me:secret@no.such.invalid:5000"), home)


@pytest.mark.usefixtures("clean_names")
def test_a_port_that_never_answers(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "PATIENCE", 0.5)
    with listening(lambda s: time.sleep(3)) as port:
        assert "(no answer within 0.5 s)" in refused(home, port)


def dripping(s: socket.socket) -> None:
    for letter in b"HTTP/1.1 200 OK\r\nX: " + b"x" * 50:
        try:
            s.send(bytes([letter]))
        except OSError:  # the other side has had enough, which is what is tested
            return
        time.sleep(0.1)


@pytest.mark.usefixtures("clean_names")
def test_a_port_that_answers_drop_by_drop(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "PATIENCE", 0.5)
    with listening(dripping) as port:
        assert "no answer within" in refused(home, port)


@pytest.mark.usefixtures("clean_names")
@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (b"SSH-2.0-OpenSSH\r\n", "(SSH-2.0-OpenSSH"),
        (b"", "(Remote end closed connection without response)"),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "(HTTP 404 Not Found for /health)"),
        (
            b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n",
            "(HTTP 401 Unauthorized for /health; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD)",
        ),
    ],
)
def test_a_port_where_something_else_answers(answer: bytes, says: str, home: Path) -> None:
    def send(s: socket.socket) -> None:
        s.recv(4096)
        s.sendall(answer)

    with listening(send) as port:
        assert says in refused(home, port)


@pytest.mark.usefixtures("clean_names")
def test_name_and_password_reach_the_server_and_no_text(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []

    def health_then_500(s: socket.socket) -> None:
        heard.append(s.recv(4096).decode())
        body = b'{"error_code": "INTERNAL_ERROR", "message": "no"}'
        status = b"200 OK" if "/health" in heard[-1] else b"501 no"
        s.sendall(b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body))

    config = TrackingConfig(uri="http://me:se%40cret@127.0.0.1:5000")
    assert "cret" not in repr(config)
    with listening(health_then_500) as port, pytest.raises(UserError, match="cannot be used") as caught:
        Store(TrackingConfig(uri=f"http://me:se%40cret@127.0.0.1:{port}"), home)
    assert "cret" not in str(caught.value)
    assert len(heard) > 1
    assert all("authorization: basic bwu6c2vay3jldA==".lower() in text.lower() for text in heard)


@contextmanager
def mlflow_server(folder: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    call = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    call += [
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination",
        str(folder / "served"),
    ]
    env = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(call, stdout=log, stderr=log, env=env, start_new_session=True)
    try:
        uri, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 60
        while server._health(uri):
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        yield uri
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_real_server(tmp_path: Path, empty_database: Path) -> None:
    folder, home, files = tmp_path / "server", tmp_path / "home", tmp_path / "files"
    folder.mkdir()
    (files / "sub").mkdir(parents=True)
    (files / "a").write_text("1")
    (files / "sub/b").write_bytes(os.urandom(1000))
    shutil.copy(empty_database, folder / "mlflow.db")
    with mlflow_server(folder) as uri:
        store = Store(TrackingConfig(uri=uri + "/"), home)
        assert (store.remote, store.ui()) == (True, uri)
        run = store.start("r", {"vitlab.key": "k"}, {f"p{i}": i for i in range(150)} | {"long": "x" * 7000})
        metrics = Metrics(store, run)
        for step in range(1200):
            metrics.log(step, {"loss": float(step)})
        metrics.close()
        assert curve(store, run, "loss") == [(i, float(i)) for i in range(1200)]
        store.upload(run, files, "model")
        for _ in range(2):
            found = store.download(run, "model")
            assert found is not None
            assert found.is_relative_to(home / "downloads")
            assert folder_digest(found) == folder_digest(files)
            (found / "left").write_text("of an earlier download")
        store.clear(run, "model")
        assert store.download(run, "model") is None
        store.status(run, "FINISHED")
        again = Store(TrackingConfig(uri=uri), tmp_path / "second home").find({"vitlab.key": "k"})
        assert [(r.run_id, r.status, r.metrics["loss"]) for r in again] == [(run, "FINISHED", 1199.0)]
        assert again[0].tags["vitlab.home"] == store.home_id
        assert json.loads(store.client.get_run(run).data.params["p149"]) == 149

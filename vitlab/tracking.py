"""MLflow: runs, metrics, artifacts and the links that show them. The only file that knows MLflow.

Without a server the store is a SQLite file in the home folder, beside the artifacts. Everything goes
through explicit clients; no global "active run" exists.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import queue
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlparse

from pydantic import Field

from vitlab.config import Config, UserError, free
from vitlab.home import locked

UI = "http://127.0.0.1:5000"
BATCH = 900  # MLflow takes at most 1000 metrics in one call


class TrackingConfig(Config):
    uri: str | None = free(None, description="an MLflow server; by default a SQLite file in the home folder")
    experiment: str = free("vitlab", min_length=1)


class Found(NamedTuple):
    """A run as a search returns it."""

    run_id: str
    status: str
    tags: dict[str, str]
    metrics: dict[str, float]
    name: str


class Store:
    """One MLflow experiment in one tracking store."""

    def __init__(self, config: TrackingConfig, home: Path) -> None:
        self.config, self.home = config, home
        self.uri = config.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home}/mlflow.db"
        self.remote = self.uri.startswith("http")
        if self.remote:
            _reach(self.uri)
        self.client = _client(self.uri)
        with locked(home / "mlflow.lock"):  # two processes that create one SQLite file break each other
            self.experiment_id = self._experiment()

    def _experiment(self) -> str:
        found = self.client.get_experiment_by_name(self.config.experiment)
        if found is not None:
            return str(found.experiment_id)
        place = None if self.remote else (self.home / "artifacts").as_uri()
        return str(self.client.create_experiment(self.config.experiment, artifact_location=place))

    # ------------------------------------------------------------ runs

    def start(self, name: str, tags: Mapping[str, str], params: Mapping[str, Any], parent: str | None = None) -> str:
        links = {"mlflow.parentRunId": parent} if parent else {}
        tags = {"mlflow.source.name": "vitlab", "mlflow.user": _user(), **tags, **links}
        run = self.client.create_run(self.experiment_id, tags=tags, run_name=name)
        entities = _entities()
        items = [entities.Param(key, _param(value)) for key, value in params.items()]
        for begin in range(0, len(items), 100):
            self.client.log_batch(run.info.run_id, params=items[begin : begin + 100])
        return str(run.info.run_id)

    def status(self, run_id: str, status: str) -> None:
        if status == "RUNNING":
            self.client.update_run(run_id, status=status)
        else:
            self.client.set_terminated(run_id, status=status)

    def tag(self, run_id: str, tags: Mapping[str, str]) -> None:
        entities = _entities()
        self.client.log_batch(run_id, tags=[entities.RunTag(k, v) for k, v in tags.items()])

    def find(self, tags: Mapping[str, str], limit: int = 50) -> list[Found]:
        """Runs that carry these tags, newest first."""
        query = " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
        runs = self.client.search_runs([self.experiment_id], query, max_results=limit, order_by=["start_time DESC"])
        return [
            Found(r.info.run_id, r.info.status, dict(r.data.tags), dict(r.data.metrics), r.info.run_name or "")
            for r in runs
        ]

    def metrics(self, run_id: str, values: Mapping[str, float], step: int = 0) -> None:
        entities, now = _entities(), int(time.time() * 1000)
        points = [entities.Metric(k, float(v), now, step) for k, v in values.items()]
        for begin in range(0, len(points), BATCH):
            self.client.log_batch(run_id, metrics=points[begin : begin + BATCH])

    # ------------------------------------------------------------ artifacts

    def upload(self, run_id: str, folder: Path, path: str) -> None:
        self.client.log_artifacts(run_id, str(folder), path)

    def upload_file(self, run_id: str, file: Path, path: str) -> None:
        self.client.log_artifact(run_id, str(file), path)

    def download(self, run_id: str, path: str) -> Path | None:
        """A local copy (the files themselves if they are local), or None if they are not there."""
        if not self.client.list_artifacts(run_id, path):
            return None
        if self.remote:
            target = self.home / "downloads" / run_id
            target.mkdir(parents=True, exist_ok=True)
            return Path(self.client.download_artifacts(run_id, path, str(target)))
        return Path(self.client.download_artifacts(run_id, path))

    # ------------------------------------------------------------ what a person opens

    def ui(self) -> str:
        return self.uri.rstrip("/") if self.remote else UI

    def curves(self, stage: str | None = None) -> str:
        """All curves overlaid in the chart view, without a click."""
        only = quote(f"tags.`vitlab.stage` = '{stage}'", safe="") if stage else ""
        search = f"&searchFilter={only}" if stage else ""
        view = "workflowType=machine_learning&compareRunsMode=CHART"
        return f"{self.ui()}/#/experiments/{self.experiment_id}/runs?{view}{search}"

    def comparison(self, run_ids: list[str]) -> str:
        """Params side by side."""
        runs, ids = quote(json.dumps(run_ids)), quote(json.dumps([self.experiment_id]))
        return f"{self.ui()}/#/compare-runs?runs={runs}&experiments={ids}"


class Metrics:
    """Metrics of one run, written in batches by a thread; `log` never waits for the store.

    A resumed run repeats steps that it had already logged: a point at or before a metric's last step is
    dropped, so a curve has neither hole nor double point.
    """

    def __init__(self, store: Store, run_id: str) -> None:
        self.store, self.run_id = store, run_id
        self.last = self._last_steps()
        self.points: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.error: Exception | None = None
        self.thread = threading.Thread(target=self._write, name="vitlab-metrics", daemon=True)
        self.thread.start()

    def _last_steps(self) -> dict[str, int]:
        client = self.store.client
        names = client.get_run(self.run_id).data.metrics
        return {n: max(p.step for p in client.get_metric_history(self.run_id, n)) for n in names}

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._check()
        now = int(time.time() * 1000)
        fresh = {n: v for n, v in values.items() if step > self.last.get(n, -1)}
        self.last |= dict.fromkeys(fresh, step)
        if fresh:
            self.points.put((step, now, fresh))

    def flush(self) -> None:
        """Returns when everything logged before is in the store."""
        done = threading.Event()
        self.points.put(done)
        while not done.wait(0.2) and self.thread.is_alive():
            pass
        self._check()

    def close(self) -> None:
        self.flush()
        self.points.put(None)
        self.thread.join()

    def _check(self) -> None:
        if self.error is not None:
            raise RuntimeError(f"metrics could not be written to {self.store.uri}: {self.error}") from self.error

    def _write(self) -> None:
        entities = _entities()
        going = True
        while going:
            items = [self.points.get()]
            time.sleep(0.2 if not isinstance(items[0], threading.Event) and items[0] else 0)
            while not self.points.empty():
                items.append(self.points.get())
            points = [entities.Metric(n, v, t, s) for i in items if isinstance(i, tuple) for s, t, vs in [i] for n, v in vs.items()]
            try:
                for begin in range(0, len(points), BATCH):
                    self.store.client.log_batch(self.run_id, metrics=points[begin : begin + BATCH])
            except Exception as error:  # handed to the thread that logs
                self.error, going = error, False
            for item in items:
                if isinstance(item, threading.Event):
                    item.set()
                going = going and item is not None


def folder_digest(folder: Path) -> str:
    """sha256 over the names and contents of all files below a folder."""
    total = hashlib.sha256()
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        total.update(f"{file.relative_to(folder).as_posix()}\0{content}\n".encode())
    return total.hexdigest()


def _client(uri: str) -> Any:
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def _entities() -> Any:
    from mlflow import entities

    return entities


def _reach(uri: str) -> None:
    """A server that does not answer is one line now, not two minutes of retries later."""
    parts = urlparse(uri)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=5).close()
    except OSError as error:
        raise UserError(
            f"tracking.uri: {parts.scheme}://{parts.hostname}:{port} does not answer ({error.strerror or error}); "
            "start the MLflow server, or leave tracking.uri out to use a local file"
        ) from None


def _user() -> str:
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container without a user entry
        return str(os.getuid())


def _param(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

"""MLflow: runs, metrics, artifacts and the links that show them. The only file that knows MLflow.

Without a server the store is a SQLite file in the home folder, beside the artifacts. Everything goes
through explicit clients; no global "active run" exists.
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import re
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import quote, unquote, urlsplit

from pydantic import field_validator

from vitlab.config import Config, UserError, free, without_password
from vitlab.home import locked
from vitlab.server import check_address, reach, sign_in

UI = "http://127.0.0.1:5000"
BATCH = 900  # MLflow takes at most 1000 metrics in one call,
PARAMS = 100  # so many params,
PARAM_LENGTH = 6000  # and so long a param
GATHER = 0.2  # seconds in which points are gathered for one call


class TrackingConfig(Config):
    uri: str | None = free(
        None, repr=False, description="an MLflow server; by default a SQLite file in the home folder"
    )
    experiment: str = free("vitlab", min_length=1)

    @field_validator("uri")
    @classmethod
    def _known(cls, uri: str | None) -> str | None:
        if uri is not None:
            check_address(uri)
        return uri


class Found(NamedTuple):
    """A run as a search returns it."""

    run_id: str
    status: str
    tags: dict[str, str]
    metrics: dict[str, float]
    name: str


class Store:
    """One MLflow experiment in one tracking store.

    `config` holds the address that was found, whoever gave it: hand that one to other processes.
    """

    def __init__(self, config: TrackingConfig, home: Path) -> None:
        given = config.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home}/mlflow.db"
        check_address(given)
        self.config, self.home = config.model_copy(update={"uri": given}), home
        self.uri = without_password(given).rstrip("/")
        self.remote = given.startswith("http")
        if self.remote:
            sign_in(given)
            reach(self.uri)
        with locked(home / "mlflow.lock"):  # two processes that create one SQLite file break each other
            self.home_id = _home_id(home)
            self.client = _client(self.uri)
            self.experiment_id = self._experiment()

    def _experiment(self) -> str:
        from mlflow.exceptions import MlflowException

        name = self.config.experiment
        place = None if self.remote else (self.home / "artifacts").as_uri()
        try:
            found = self.client.get_experiment_by_name(name)
            if found is None:
                try:
                    return str(self.client.create_experiment(name, artifact_location=place))
                except MlflowException as error:
                    if error.error_code != "RESOURCE_ALREADY_EXISTS":
                        raise
                    found = self.client.get_experiment_by_name(name)  # another machine was faster
        except MlflowException as error:
            raise UserError(f"tracking.uri: {self.uri} cannot be used: {_first_line(error)}") from None
        if found.lifecycle_stage != "active":
            raise UserError(
                f"tracking.experiment: given {name!r}, which was deleted in MLflow; give another name, "
                f"or restore it: mlflow experiments restore -x {found.experiment_id}"
            )
        return str(found.experiment_id)

    # ------------------------------------------------------------ runs

    def start(
        self, name: str, tags: Mapping[str, str], params: Mapping[str, Any], parent: str | None = None
    ) -> str:
        """A new run. Its tags come last: a run that was killed half-way here is found by nobody."""
        first = {"mlflow.source.name": "vitlab", "mlflow.user": _user()}
        first |= {"mlflow.parentRunId": parent} if parent else {}
        run_id = str(self.client.create_run(self.experiment_id, tags=first, run_name=name).info.run_id)
        entities = _entities()
        items = [entities.Param(_plain(key), _param(value)) for key, value in params.items()]
        for begin in range(0, len(items), PARAMS):
            self.client.log_batch(run_id, params=items[begin : begin + PARAMS])
        self.tag(run_id, {"vitlab.home": self.home_id, **tags})
        return run_id

    def status(self, run_id: str, status: str) -> None:
        if status == "RUNNING":
            self.client.update_run(run_id, status=status)
        else:
            self.client.set_terminated(run_id, status=status)

    def tag(self, run_id: str, tags: Mapping[str, str]) -> None:
        entities = _entities()
        self.client.log_batch(run_id, tags=[entities.RunTag(_plain(k), v) for k, v in tags.items()])

    def find(self, tags: Mapping[str, str], limit: int = 50) -> list[Found]:
        """Runs that carry these tags, newest first."""
        query = " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
        runs = self.client.search_runs(
            [self.experiment_id], query, max_results=limit, order_by=["start_time DESC"]
        )
        return [_found(run) for run in runs]

    def get(self, run_id: str) -> Found:
        return _found(self.client.get_run(run_id))

    def metrics(self, run_id: str, values: Mapping[str, float], step: int = 0) -> None:
        entities, now = _entities(), int(time.time() * 1000)
        points = [entities.Metric(_plain(k), float(v), now, step) for k, v in values.items()]
        for begin in range(0, len(points), BATCH):
            self.client.log_batch(run_id, metrics=points[begin : begin + BATCH])

    # ------------------------------------------------------------ artifacts

    def upload(self, run_id: str, folder: Path, path: str) -> None:
        self.client.log_artifacts(run_id, str(folder), path)

    def upload_file(self, run_id: str, file: Path, path: str) -> None:
        self.client.log_artifact(run_id, str(file), path)

    def clear(self, run_id: str, path: str) -> None:
        """Removes a folder of artifacts, if there is one."""
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        if self.client.list_artifacts(run_id, path):
            place = self.client.get_run(run_id).info.artifact_uri
            get_artifact_repository(place, tracking_uri=self.uri).delete_artifacts(path)

    def download(self, run_id: str, path: str) -> Path | None:
        """A local copy of a folder (the folder itself if it is local), or None if it is not there."""
        if not self.client.list_artifacts(run_id, path):
            return None
        if not self.remote:  # MLflow would copy it to a temporary folder that nobody removes
            place = urlsplit(self.client.get_run(run_id).info.artifact_uri)
            return Path(unquote(place.path)) / path
        target = self.home / "downloads" / run_id / path
        with (
            locked(target.with_name(f"{target.name}.lock")),
            tempfile.TemporaryDirectory(dir=target.parent) as scratch,
        ):
            fresh = Path(self.client.download_artifacts(run_id, path, scratch))
            if target.exists():  # what an earlier download left must not mix with this one
                if folder_digest(target) == folder_digest(fresh):
                    return target
                shutil.rmtree(target)
            fresh.replace(target)
        return target

    # ------------------------------------------------------------ what a person opens

    def ui(self) -> str:
        return self.uri if self.remote else UI

    def curves(self, stage: str) -> str:
        """All curves of a stage's runs overlaid in the chart view, without a click.

        Sorted by a metric, because MLflow then lists the trials of a search flat, beside the other runs;
        else it hides them, and their curves, under the search.
        """
        only = quote(f"tags.`vitlab.stage` = '{stage}'", safe="")
        order = quote("metrics.`val/top1`" if stage == "finetune" else "metrics.`train/loss`", safe="")
        view = f"workflowType=machine_learning&compareRunsMode=CHART&searchFilter={only}"
        first = f"orderByKey={order}&orderByAsc={'false' if stage == 'finetune' else 'true'}"
        return f"{self.ui()}/#/experiments/{self.experiment_id}/runs?{view}&{first}"

    def comparison(self, run_ids: list[str]) -> str:
        """Params side by side."""
        runs, ids = quote(json.dumps(run_ids)), quote(json.dumps([self.experiment_id]))
        return f"{self.ui()}/#/compare-runs?runs={runs}&experiments={ids}&workflowType=machine_learning"


class Metrics:
    """Metrics of one run, written in batches by a thread; `log` never waits for the store.

    A resumed run repeats steps that it had already logged: a point at or before a metric's last step is
    dropped, so a curve has neither hole nor double point.
    """

    def __init__(self, store: Store, run_id: str, may_write: Callable[[], bool] = lambda: True) -> None:
        """`may_write` is asked before every write; once it says no, another process owns the run."""
        self.store, self.run_id, self.may_write = store, run_id, may_write
        self.last = self._last_steps()
        self.points: queue.SimpleQueue[Any] = queue.SimpleQueue()  # points; an event: flush; None: the end
        self.error: Exception | None = None
        self.thread = threading.Thread(target=self._write, name="vitlab-metrics", daemon=True)
        self.thread.start()

    def _last_steps(self) -> dict[str, int]:
        client = self.store.client
        names = client.get_run(self.run_id).data.metrics
        return {n: max(p.step for p in client.get_metric_history(self.run_id, n)) for n in names}

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._check()
        fresh = {n: float(v) for n, v in values.items() if step > self.last.get(n, -1)}
        self.last |= dict.fromkeys(fresh, step)
        if fresh:
            self.points.put((step, int(time.time() * 1000), fresh))

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
            text = f"metrics could not be written to {self.store.uri}: {_first_line(self.error)}"
            raise RuntimeError(text) from self.error
        if not self.thread.is_alive():
            raise RuntimeError("these metrics were closed before")

    def _write(self) -> None:
        going = True
        while going:
            points, end = self._gather()
            try:
                if points and not self.may_write():
                    raise RuntimeError(f"another process has taken over run {self.run_id}")
                for begin in range(0, len(points), BATCH):
                    self.store.client.log_batch(self.run_id, metrics=points[begin : begin + BATCH])
            except Exception as error:  # handed to the thread that logs
                self.error = error
            going = end is not None and self.error is None
            if end:
                end.set()

    def _gather(self) -> tuple[list[Any], threading.Event | Literal[False] | None]:
        """Points of a short while, and what ended it: a flush, the close (None), or the time (False)."""
        entities, points = _entities(), list[Any]()
        item, until = self.points.get(), time.monotonic() + GATHER
        while isinstance(item, tuple):
            step, when, values = item
            points += [entities.Metric(name, value, when, step) for name, value in values.items()]
            try:
                item = self.points.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                return points, False
        return points, item


def _found(run: Any) -> Found:
    info, data = run.info, run.data
    return Found(info.run_id, info.status, dict(data.tags), dict(data.metrics), info.run_name or "")


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
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def _entities() -> Any:
    from mlflow import entities

    return entities


def _home_id(home: Path) -> str:
    """Tells home folders on different machines apart, and stays when a folder is moved."""
    file = home / "id"
    if not file.is_file():
        file.write_text(uuid.uuid4().hex)
    return file.read_text()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return without_password(lines[0]) if lines else type(error).__name__


def _user() -> str:
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container without a user entry
        return str(os.getuid())


def _plain(name: str) -> str:
    """A name with other characters than MLflow takes (a class is called `colt's foot`) loses those."""
    return re.sub(r"[^\w./: -]", "_", name)


def _param(value: Any) -> str:
    text = without_password(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    return text if len(text) <= PARAM_LENGTH else text[: PARAM_LENGTH - 1] + "…"

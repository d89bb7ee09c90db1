"""A session: one group of workers that serves all stages of a chain, one job after the other.

Ray Train starts the group once. Its workers fetch jobs from the desk, a small actor beside the driver;
starting a group costs tens of seconds, fetching a job none. When a worker dies, Ray Train restarts the
group, which fetches the same job again and goes on from its last checkpoint. With `workers: 0` the job
runs in this process, without Ray.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from vitlab.config import Config, UserError, free
from vitlab.dist import World, backend, world_of_group

Post = Callable[[str, Any], None]
Work = Callable[[Any, World, Post], dict[str, Any]]

# What a collective says when the other side has died; anything else is this worker's own fault.
PEER_LOST = (
    "connection closed by peer",
    "connection reset by peer",
    "connection refused",
    "broken pipe",
    "timed out waiting",
    "pair closure",  # gloo
    "communicator was aborted",  # NCCL
    "remote process exited",
)


class ClusterConfig(Config):
    """Where it runs. Nothing here decides a result."""

    workers: int = free(2, ge=0, description="0: in this process, without Ray")
    zero: Literal[0, 1, 2, 3] | None = free(None, description="DeepSpeed's stage; none: plain, one worker")
    loaders: int = free(0, ge=0, description="processes that read and decode for each worker")
    threads: int = free(1, gt=0, description="CPU threads of a worker")
    cpus_per_worker: float = free(1.0, gt=0)
    gpus_per_worker: float | None = free(None, ge=0, description="none: 1 where the cluster has GPUs")
    address: str | None = free(None, description="a Ray cluster; none: $RAY_ADDRESS, else one of our own")
    max_failures: int = free(3, ge=0, description="times that a worker may die before the stage fails")


class JobFailed(RuntimeError):  # noqa: N818  (it reads as what happened)
    """A stage failed on its workers; the text names the log."""


class Session:
    def __init__(self, config: ClusterConfig, home: Path, work: Work, on_event: Post, **of: bool) -> None:
        """`of`: `local_store`, runs are kept in a file of this machine; `trial`, this is part of a search."""
        self.config, self.work, self.on_event = config, work, on_event
        self.local_store, self.trial = of.get("local_store", False), of.get("trial", False)
        self.logs = home / "logs" / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        self.home = home
        self.desk: Any = None
        self.fit: threading.Thread | None = None
        self.fit_error: BaseException | None = None
        self.own_ray = False

    def run(self, job: Any) -> dict[str, Any]:
        """One job on all workers; returns rank 0's result."""
        if self.config.workers == 0:
            import torch

            torch.set_num_threads(self.config.threads)
            return self.work(job, World(), self.on_event)
        if self.desk is None:
            self._start()
        import ray

        ray.get(self.desk.post.remote(job))
        while True:
            events = ray.get(self.desk.poll.remote())
            for kind, payload in events:
                if kind == "done":
                    return dict(payload)
                if kind == "failed":
                    self._raise(payload)
                self.on_event(kind, payload)
            if self.fit_error is not None:
                raise JobFailed(f"the workers ended: {_first_line(self.fit_error)}; logs: {self.logs}")
            time.sleep(0.2 if not events else 0.05)

    def close(self) -> None:
        """Lets the workers go; waits for them only if they are idle."""
        if self.desk is None:
            return
        import ray

        ray.get(self.desk.close.remote())
        assert self.fit is not None
        if sys.exc_info()[0] is None:
            self.fit.join(timeout=20)
        if self.own_ray:
            ray.shutdown()
        self.desk = None

    def _raise(self, payload: dict[str, str]) -> None:
        if payload["user"]:
            raise UserError(payload["text"])
        raise JobFailed(f"{payload['text']} (on {payload['where']}); log: {payload['log']}")

    # ------------------------------------------------------------ start

    def _start(self) -> None:
        elsewhere = self.config.address or os.environ.get("RAY_ADDRESS")
        self.on_event("say", f"joining Ray at {elsewhere}" if elsewhere else "starting Ray")
        self.logs.mkdir(parents=True, exist_ok=True)
        self.own_ray = connect(self.config, int(self.config.workers * self.config.cpus_per_worker) + 1)
        import ray

        if self.local_store and len([n for n in ray.nodes() if n["Alive"]]) > 1:
            raise UserError(
                "tracking.uri: a file on this machine cannot serve a cluster of several nodes; "
                "start an MLflow server and set tracking.uri=http://HOST:5000"
            )
        self.on_event("say", f"starting {self.config.workers} workers")
        self.desk = ray.remote(num_cpus=0, max_concurrency=1000)(Desk).remote()
        trainer = self._trainer()
        self.fit = threading.Thread(target=self._fit, args=(trainer,), name="vitlab-fit", daemon=True)
        self.fit.start()

    def _trainer(self) -> Any:
        import ray
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        gpus = self.config.gpus_per_worker
        if gpus is None:
            gpus = 1.0 if ray.cluster_resources().get("GPU", 0) else 0.0
        resources = {"CPU": self.config.cpus_per_worker} | ({"GPU": gpus} if gpus else {})
        trainer = TorchTrainer if self.trial else _without_cleaner(TorchTrainer)
        return trainer(
            serve,
            train_loop_config={
                "desk": self.desk,
                "work": self.work,
                "logs": str(self.logs),
                "threads": self.config.threads,
            },
            scaling_config=ScalingConfig(
                num_workers=self.config.workers, use_gpu=gpus > 0, resources_per_worker=resources
            ),
            torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
            run_config=RunConfig(
                name=self.logs.name,
                storage_path=str(self.home / "ray"),
                failure_config=FailureConfig(max_failures=self.config.max_failures),
                worker_runtime_env={"env_vars": _environment(self.config.threads)},
            ),
        )

    def _fit(self, trainer: Any) -> None:
        try:
            trainer.fit()
        except BaseException as error:  # handed to the thread that waits for the job
            self.fit_error = error


def _without_cleaner(trainer: Any) -> Any:
    """A trainer without Ray Train's placement-group cleaner.

    The cleaner asks whichever Ray cluster it finds on this machine whether our controller is alive. With
    a second cluster beside ours the answer is no, and it takes our workers away in the middle of a step.
    Ray frees the group anyway when the driver ends; only the trials of a search need the cleaner.
    """

    class Trainer(trainer):  # type: ignore[misc]
        def _create_default_callbacks(self) -> list[Any]:
            callbacks = super()._create_default_callbacks()
            return [c for c in callbacks if type(c).__name__ != "PlacementGroupCleanerCallback"]

    return Trainer


def connect(config: ClusterConfig, cpus: int, dashboard: bool = False) -> bool:
    """Joins a Ray cluster, or starts one here with at least so many CPUs; whether it is ours to stop."""
    environment = _environment(config.threads)
    for name, value in environment.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        return False
    address = config.address or os.environ.get("RAY_ADDRESS")
    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    if address:
        os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")  # else a job's own variables are a clash
        here = {name: os.environ[name] for name in ("VITLAB_HOME", "VITLAB_GIT_SHA") if name in os.environ}
        ray.init(address=address, runtime_env={"env_vars": environment | here}, **quiet)
    else:
        # Without the dashboard Ray is up sooner; a search needs it, to clean up after trials it stops.
        ray.init(
            address="local", num_cpus=max(os.cpu_count() or 1, cpus), include_dashboard=dashboard, **quiet
        )
    return True


class Desk:
    """Between the driver and the workers: holds the job in work, passes events and results on."""

    def __init__(self) -> None:
        self.number, self.job, self.closed = 0, None, False
        self.finished = True
        self.events: list[tuple[str, Any]] = []
        self.attempts = 0

    async def post(self, job: dict[str, Any]) -> None:
        self.number, self.job, self.finished = self.number + 1, job, False  # type: ignore[assignment]

    async def next(self, rank: int, after: int) -> tuple[int, dict[str, Any] | None]:
        """The job in work, unless this worker has done it; None when there will be no more."""
        if rank == 0 and after == 0:
            self.attempts += 1
            if self.attempts > 1:
                self.events.append(("restarted", self.attempts))
        while not self.closed and (self.finished or self.number <= after):
            await asyncio.sleep(0.05)
        return self.number, None if self.closed else self.job

    async def event(self, kind: str, payload: Any) -> None:
        self.events.append((kind, payload))

    async def finish(self, result: dict[str, Any]) -> None:
        self.finished = True
        self.events.append(("done", result))

    async def fail(self, payload: dict[str, Any]) -> None:
        self.closed = True
        self.events.append(("failed", payload))

    async def poll(self) -> list[tuple[str, Any]]:
        events, self.events = self.events, []
        return events

    async def close(self) -> None:
        self.closed = True


# ---------------------------------------------------------------- on the workers


def serve(config: dict[str, Any]) -> None:
    """A worker's life: fetch a job, do it with the others, fetch the next."""
    import ray
    import torch

    desk, work = config["desk"], config["work"]
    torch.set_num_threads(config["threads"])
    world = world_of_group()
    assert world.size == 1 or torch.distributed.get_backend() == backend(world.device)
    log = _redirect(Path(config["logs"]) / f"worker-{world.rank}.log")
    sys.stdout.write(f"worker {world.rank} of {world.size} on {socket.gethostname()}, pid {os.getpid()}\n")
    sys.stdout.flush()
    number = 0
    while True:
        number, job = ray.get(desk.next.remote(world.rank, number))
        if job is None:
            return
        try:
            result = work(job, world, lambda kind, payload: desk.event.remote(kind, payload))
            world.barrier()
        except Exception as error:
            traceback.print_exc()
            if not _peer_lost(error):
                failure = {"user": isinstance(error, UserError), "text": _first_line(error)}
                ray.get(desk.fail.remote(failure | {"where": socket.gethostname(), "log": str(log)}))
            raise
        if world.first:
            ray.get(desk.finish.remote(result))


def _peer_lost(error: Exception) -> bool:
    from torch.distributed import DistError

    if isinstance(error, DistError):
        return True
    return isinstance(error, RuntimeError | OSError) and any(text in str(error).lower() for text in PEER_LOST)


def _redirect(path: Path) -> Path:
    """Everything that frameworks print on this worker goes to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.close(file)
    return path


def _environment(threads: int) -> dict[str, str]:
    """What Ray's processes must know before they import anything."""
    return {
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads slow shared machines down tenfold
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        "RAY_TRAIN_ENABLE_V2": "1",
        "RAY_AIR_NEW_OUTPUT": "0",  # Tune's own progress; the live line has it
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "TORCHDYNAMO_DISABLE": "1",  # torch.compile is not used yet; its import costs seconds
    }


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__

"""A session: one group of workers that serves all stages of a chain, one job after the other.

Ray Train starts the group once. Its workers fetch jobs from the desk, a small actor beside the driver;
starting a group costs tens of seconds, fetching a job none. When a worker dies, Ray Train restarts the
group, which fetches the same job again and goes on from its last checkpoint. With `workers: 0` the job
runs in this process, without Ray.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any, Literal

from vitlab.config import Config, UserError, free
from vitlab.dist import World
from vitlab.engine.serve import Desk, Post, Work, first_line, serve
from vitlab.environment import TORCH


class ClusterConfig(Config):
    """Where it runs. Nothing here decides a result."""

    workers: int = free(2, ge=0, description="0: in this process, without Ray")
    zero: Literal[0, 1, 2, 3] | None = free(None, description="DeepSpeed's stage; none: plain, one worker")
    loaders: int = free(0, ge=0, description="processes that read and decode for each worker")
    threads: int = free(1, gt=0, description="CPU threads of a worker")
    cpus_per_worker: float = free(1.0, gt=0)
    gpus_per_worker: Literal[0, 1] | None = free(None, description="none: 1 if every worker can have one")
    autoscale: bool = free(False, description="the cluster grows when asked: wait for what it lacks")
    address: str | None = free(None, description="a Ray cluster; none: $RAY_ADDRESS, else one of our own")
    max_failures: int = free(3, ge=0, description="losses of workers that a stage survives")


class JobFailed(RuntimeError):  # noqa: N818  (it reads as what happened)
    """A stage failed on its workers; the text names the log."""


ENDS_WITHIN = 40.0  # seconds that a group of workers may take to end


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

        try:
            return self._follow(ray.get(self.desk.post.remote(job)))
        except BaseException:
            self.on_event("note", "stopping the workers")
            self.close()  # the workers may be anywhere; the next job gets new ones
            raise

    def _follow(self, number: int) -> dict[str, Any]:
        """Passes a job's events on until its result comes."""
        import ray

        restarted = False
        while True:
            alive = self.fit is not None and self.fit.is_alive()
            events = ray.get(self.desk.poll.remote())
            for kind, payload in events:
                if kind == f"done {number}":
                    if restarted:
                        self.close()  # each stage has its own `max_failures`: the next one starts a group
                    return dict(payload)
                if kind == f"failed {number}":
                    self._raise(payload)
                restarted = restarted or kind == "restarted"
                self.on_event(kind, payload)
            if not alive and not events:
                why = first_line(self.fit_error) if self.fit_error else "without a word"
                raise JobFailed(f"the workers ended: {why}; logs: {self.logs}")
            time.sleep(0.2 if not events else 0.05)

    def close(self) -> None:
        """Lets the workers go: idle ones return, busy ones end; either way the group is gone after it."""
        if self.desk is None:
            return
        import ray

        desk, self.desk = self.desk, None
        try:
            ray.get(desk.close.remote())
        except ray.exceptions.RayError as error:  # the desk itself was lost, and with it all that it served
            self.on_event("note", f"the workers' desk was lost: {first_line(error)}")
        assert self.fit is not None
        self.fit.join(timeout=ENDS_WITHIN)
        if self.own_ray and not self.fit.is_alive():  # Ray crashes a thread that still waits for an answer
            ray.shutdown()

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
        gpus = self._gpus(ray.cluster_resources())
        self.on_event("say", f"starting {self.config.workers} workers")
        self.fit_error = None
        self.desk = ray.remote(num_cpus=0, max_concurrency=1000)(Desk).remote()
        trainer = self._trainer(gpus)
        self.fit = threading.Thread(target=self._fit, args=(trainer,), name="vitlab-fit", daemon=True)
        self.fit.start()

    def _gpus(self, has: dict[str, float]) -> int:
        """GPUs of a worker; what the cluster can never give is an error now, not an endless wait."""
        config, workers = self.config, self.config.workers
        cpus, gpus = has.get("CPU", 0), has.get("GPU", 0)
        needs_cpus = workers * config.cpus_per_worker
        if needs_cpus > cpus and not config.autoscale:
            raise UserError(
                f"cluster.workers: given {workers} of {config.cpus_per_worker:g} CPUs each; the cluster has "
                f"{cpus:g}; give fewer workers, or cluster.autoscale=true if it grows when asked"
            )
        if config.gpus_per_worker is None:
            if 0 < gpus < workers:
                self.on_event("note", f"runs on CPUs: {gpus:g} GPUs cannot serve {workers} workers")
            return int(gpus >= workers)
        if config.gpus_per_worker * workers > gpus and not config.autoscale:
            raise UserError(
                f"cluster.gpus_per_worker: given 1 with {workers} workers; the cluster has {gpus:g} GPUs; "
                "give fewer workers, or cluster.gpus_per_worker=0"
            )
        return config.gpus_per_worker

    def _trainer(self, gpus: int) -> Any:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        environment = _environment(self.config.threads) | ({} if gpus else {"CUDA_VISIBLE_DEVICES": ""})
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
                worker_runtime_env={"env_vars": environment},
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


def _environment(threads: int) -> dict[str, str]:
    """What Ray's processes must know before they import anything."""
    return {
        "OMP_NUM_THREADS": str(threads),
        **TORCH,
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        "RAY_TRAIN_ENABLE_V2": "1",
        "RAY_AIR_NEW_OUTPUT": "0",  # Tune's own progress; the live line has it
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # what Ray would print here is in its logs; we say what matters
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "TORCHDYNAMO_DISABLE": "1",  # its import costs seconds; a job that compiles takes this back
    }

"""A search over the fine-tune stage with Ray Tune: ASHA (Li et al., 2018) over random samples.

A trial calls the same stage as a pipeline does, with the same content key, so a finished trial is a hit
for whoever needs that model later. Trials are MLflow children of the search's run.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

from vitlab.cache import Artifact, present, publish
from vitlab.config import Config, UserError, build, resolved
from vitlab.data import Named, Shards, named, open_named
from vitlab.engine.launch import JobFailed, connect
from vitlab.evaluation import save_figure
from vitlab.evaluation.search import Trial, search_figure
from vitlab.experiment import Experiment, trial_stages
from vitlab.face import Face, Line
from vitlab.jobs import forget
from vitlab.sections import Between, TrainConfig, TuneConfig, changed
from vitlab.stages import Result, Run


class Space(Config):
    """What decides a search's result."""

    stage: TrainConfig
    search: TuneConfig


def search(run: Run, *, data: Shards, init: Artifact | None = None) -> Artifact:
    """Searches the experiment's fine-tune stage as its `tune` section says; the model of the best trial."""
    exp = run.experiment
    if exp.tune is None:
        raise UserError("tune: missing; a search needs the section, see experiments/digits_tune.yaml")
    if not data.count("val"):
        raise UserError(f"tune.metric: given {exp.tune.metric!r}; the shards have no images in the split val")
    inputs = {"init": init} if init is not None else {}
    both = Space(stage=exp.need("finetune"), search=exp.tune)

    def do(run_id: str) -> Result:
        return _search(run, both, run_id, data, init)

    run.stage("search", "search", both, data, inputs, do)
    best = _best(run, run.done["search"].artifact)
    if best is None:
        raise UserError(
            "search: the best trial's model was deleted; delete the search's run too, then start again"
        )
    return best


def _best(run: Run, found: Artifact) -> Artifact | None:
    report = json.loads((found.folder / "search.json").read_text())
    return present(run.store, report["best"], run.store.get(report["best"]).tags)


def _search(run: Run, both: Space, run_id: str, data: Shards, init: Artifact | None) -> Result:
    begin, config = time.monotonic(), both.search
    if run.line is not None:
        run.line.say("starting Ray")
    run.session.close()  # its workers would keep the CPUs that the trials need
    cluster = run.experiment.cluster
    each = max(1.0, config.workers * cluster.cpus_per_worker)
    ours = connect(cluster, int(config.concurrent * each) + 1, dashboard=True)
    from ray import tune as ray_tune  # after `connect`: Ray reads what is to be quiet when it is imported

    try:
        trial = ray_tune.with_parameters(
            _trial,
            experiment=_of_trials(run, both),
            metric=config.metric,
            search=run_id,
            shards=named(data),
            init=init,
        )
        tuner = ray_tune.Tuner(
            ray_tune.with_resources(trial, _resources(run.experiment, both)),
            param_space={name: _sampler(span) for name, span in config.space.items()},
            tune_config=_settings(both, run.experiment.seed),
            run_config=ray_tune.RunConfig(
                name=f"search-{run_id[:8]}-{int(time.time())}",
                storage_path=str(run.home / "ray"),
                verbose=0,
                callbacks=[_watcher(run.line, config)] if run.line is not None else [],
            ),
        )
        grid = tuner.fit()
    finally:
        if ours:
            import ray

            ray.shutdown()
    return _report(run, both, run_id, grid, time.monotonic() - begin)


def _resources(experiment: Experiment, both: Space) -> dict[str, float]:
    """A trial that has workers of its own needs next to nothing itself; any other is a worker."""
    import ray

    if both.search.workers:
        return {"CPU": 0.01}
    gpus = experiment.cluster.gpus_per_worker
    if gpus is None:
        gpus = 1 if ray.cluster_resources().get("GPU", 0) else 0
    return {"CPU": experiment.cluster.cpus_per_worker} | ({"GPU": gpus} if gpus else {})


def _settings(both: Space, seed: int) -> Any:
    from ray.tune import TuneConfig as RayTuneConfig
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.basic_variant import BasicVariantGenerator

    config, most = both.search, most_epochs(both)
    asha = ASHAScheduler(
        time_attr="epoch",
        max_t=most,
        grace_period=min(config.grace_epochs, most),
        reduction_factor=config.reduction,
    )
    sampler = BasicVariantGenerator(random_state=seed, max_concurrent=config.concurrent)
    return RayTuneConfig(
        metric="figure", mode=config.mode, num_samples=config.trials, scheduler=asha, search_alg=sampler
    )


def most_epochs(both: Space) -> int:
    """Of the longest trial."""
    return max(stage.epochs for stage in trial_stages(both.search, both.stage))


def _sampler(span: Between | list[Any]) -> Any:
    from ray import tune as ray_tune

    if isinstance(span, list):
        return ray_tune.choice(span)
    return (ray_tune.loguniform if span.log else ray_tune.uniform)(span.low, span.high)


def _of_trials(run: Run, both: Space) -> dict[str, Any]:
    """The experiment as a trial runs it: plain data, on the trial's own workers, into the same store."""
    tree = resolved(run.experiment) | {"tracking": resolved(run.store.config)}
    workers = both.search.workers
    tree["cluster"] |= {"workers": workers, "address": None}
    if workers == 0:
        tree["cluster"]["zero"] = None
    return tree | {"finetune": resolved(both.stage), "pretrain": None, "distill": None, "tune": None}


# ---------------------------------------------------------------- in the trial's process


def _trial(
    choice: dict[str, Any],
    experiment: dict[str, Any],
    metric: str,
    search: str,
    shards: Named,
    init: Artifact | None,
) -> None:
    from ray import tune as ray_tune

    tree = {**experiment, "finetune": changed(experiment["finetune"], choice)}
    exp = build(Experiment, tree)
    config = exp.need("finetune")

    def listen(kind: str, payload: Any) -> None:
        if kind != "validated":
            return
        part, figures = payload
        _refuse(metric, figures)
        if part < 1:
            ray_tune.report({"figure": figures[metric], "epoch": round(part * config.epochs, 6)})

    with Run(exp, "search", face=Face(quiet=True), search=search, listen=listen) as run:
        model = run.finetune(config, data=open_named(shards, exp.data), init=init)
        metrics = run.done["finetune"].metrics
    _refuse(metric, metrics)
    ray_tune.report({"figure": metrics[metric], "epoch": config.epochs, "run_id": model.run_id})


def _refuse(metric: str, figures: dict[str, float]) -> None:
    if metric not in figures:
        raise UserError(f"tune.metric: given {metric!r}; a trial has: {', '.join(sorted(figures))}")


# ---------------------------------------------------------------- what came of it


def _watcher(line: Line, config: TuneConfig) -> Any:
    """Shows on the live line how far the search is."""
    from ray.tune import Callback

    class Watcher(Callback):  # type: ignore[misc]
        def __init__(self, line: Line | None) -> None:
            self.line, self.best = line, None

        def __getstate__(self) -> dict[str, Any]:
            return {"line": None, "best": None}  # Tune writes its callbacks down; a screen cannot be

        def on_trial_result(
            self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any
        ) -> None:
            figure = result["figure"]
            better = max if config.mode == "max" else min
            self.best = figure if self.best is None else better(self.best, figure)
            self.tell(trials)

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
            self.tell(trials)

        def tell(self, trials: list[Any]) -> None:
            ended = sum(trial.is_finished() for trial in trials)
            running = sum(trial.status == "RUNNING" for trial in trials)
            best = "" if self.best is None else f" · best {config.metric} {self.best:.4f}"
            if self.line is not None:
                self.line.say(f"trials {ended}/{config.trials} ended, {running} running{best}")

    return Watcher(line)


def _report(run: Run, both: Space, run_id: str, grid: Any, seconds: float) -> Result:
    """Writes down every trial, closes what ASHA left open, and names the best that ran to the end."""
    config = both.search
    trials = [
        Trial(r.config, r.metrics["figure"], r.metrics["epoch"], r.metrics.get("run_id"))
        for r in grid
        if r.metrics and "figure" in r.metrics
    ]
    errors = [r for r in grid if r.error is not None]
    whole = [trial for trial in trials if trial.run_id]
    if not whole:
        cause = str(errors[0].error).strip().splitlines()[-1] if errors else "all were stopped early"
        log = f"; log: {errors[0].path}" if errors else ""
        raise JobFailed(f"search: none of {config.trials} trials ran to its end: {cause}{log}")
    ranked = sorted(trials, key=lambda trial: trial.figure, reverse=config.mode == "max")
    best = next(trial for trial in ranked if trial.run_id)
    for child in run.store.find({"mlflow.parentRunId": run_id}, limit=1000):
        if child.status in ("RUNNING", "KILLED"):
            # Without its checkpoints nobody can go on with it, so its key must not be found either.
            run.store.tag(child.run_id, {"vitlab.stopped": "asha", "vitlab.key": f"stopped {child.run_id}"})
            run.store.status(child.run_id, "KILLED")
            forget(run.home / "checkpoints" / child.run_id)
    report = {
        "best": best.run_id,
        "metric": config.metric,
        "choice": best.choice,
        "trials": [trial._asdict() for trial in ranked],
        "failed": len(errors),
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        logs = {name for name, span in config.space.items() if isinstance(span, Between) and span.log}
        save_figure(
            search_figure(trials, config.metric, logs, lowest=config.mode == "min"), folder / "search.png"
        )
        (folder / "search.json").write_text(json.dumps(report, indent=2) + "\n")
        artifact = publish(run.store, run_id, folder, "search")
    metrics = {
        config.metric: best.figure,
        "search/trials": float(len(trials)),
        "search/stopped": float(len(trials) - len(whole)),
    }
    run.store.metrics(run_id, metrics)
    run.store.tag(run_id, {"vitlab.best": str(best.run_id)})
    return {"artifact": artifact, "metrics": metrics, "seconds": {"search": seconds}}

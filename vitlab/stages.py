"""The stages of a chain: adopt, pretrain, finetune, distill, evaluate. Typed inputs → `Artifact`.

A pipeline is plain calls on a `Run`; lineage is the arguments. Each call looks its content key up,
and is a hit, goes on with an unfinished run, or starts one.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import yaml

from vitlab import cache
from vitlab.cache import Artifact, Claim, Fence, content_key
from vitlab.config import Config, UserError, digest, flatten, resolved, without_password
from vitlab.data import Shards, ShardsConfig, named, prepare
from vitlab.engine import checkpoint
from vitlab.engine.launch import Session
from vitlab.evaluation import EvaluateConfig
from vitlab.experiment import Experiment, check_shards, from_anywhere
from vitlab.face import Face, Line, Row
from vitlab.home import git_sha, home
from vitlab.jobs import EvaluateJob, Place, TrainJob, forget, work
from vitlab.jobs.adopting import AdoptJob, locate, run_adoption
from vitlab.jobs.looking import log_data
from vitlab.jobs.naming import ended, figured, title
from vitlab.sections import AdoptConfig, TrainConfig
from vitlab.tracking import Store

# Raised when the same config must give another result than before: part of every key of the stage.
REVISION = {
    "adopt": 1,
    "tokenizer": 1,
    "pretrain": 1,
    "finetune": 1,
    "distill": 1,
    "evaluate": 1,
    "search": 1,
}
SEEN = (
    "image_size",
    "channels",
    "streams",
    "window",
    "mean",
    "std",
    "max_pixels",
)  # data settings that decide a result
Result = dict[str, Any]  # of a job: artifact, metrics, seconds


class Done(NamedTuple):
    """A stage of this run that is done."""

    stage: str
    artifact: Artifact
    metrics: dict[str, float]


class Run:
    """One run of a pipeline: its MLflow run, its workers, and what it prints."""

    def __init__(
        self,
        experiment: Experiment,
        pipeline: str = "notebook",
        *,
        face: Face | None = None,
        search: str | None = None,
        listen: Callable[[str, Any], None] | None = None,
    ) -> None:
        """`search`: the MLflow run of the search that this is a trial of; `listen` hears the workers."""
        self.experiment, self.pipeline = experiment, pipeline
        self.face = face or Face()
        self.home = home()
        self.search, self.listen = search, listen
        self.done: dict[str, Done] = {}  # by label
        self.within = ""  # of a comparison: the variant and seed, before every label
        self.images: Shards | None = None
        self.line: Line | None = None

    def __enter__(self) -> Self:
        self.began = time.monotonic()
        self.home.mkdir(parents=True, exist_ok=True)
        self.face.print(f"{self.pipeline} · {self.experiment.name}")
        self.store = Store(self.experiment.tracking, self.home)
        cluster = self.experiment.cluster
        place = {"local_store": not self.store.remote, "trial": self.search is not None}
        self.session = Session(cluster, self.home, work, self._event, **place)
        self.git_sha = git_sha()
        self.run_id = self.search or self._start_pipeline()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        try:
            self.session.close()
        finally:
            if self.search is None:
                self.store.status(self.run_id, ended(kind))
        if kind is None and self.search is None:
            self._summary()

    @contextmanager
    def under(self, experiment: Experiment, name: str) -> Iterator[dict[str, dict[str, float]]]:
        """Goes by another experiment inside; what its stages measured is in the dict afterwards, by label."""
        before, found = (self.experiment, self.done), dict[str, dict[str, float]]()
        self.experiment, self.done, self.within = experiment, {}, f"{name} · "
        try:
            yield found
            found |= {label: done.metrics for label, done in self.done.items()}
        finally:
            (self.experiment, others), self.within = before, ""
            self.done = others | self.done  # the last of each label stands for the run

    # ------------------------------------------------------------ the stages

    def shards(self, config: ShardsConfig) -> Shards:
        """The images: written on first use, then found by their config; refuses what they cannot serve."""
        shards = prepare(from_anywhere(config), self.home / "shards")
        if config == self.experiment.data:
            check_shards(self.experiment, shards, evaluates=self.pipeline != "notebook")
            self.images = shards
        self.face.print(f"  data: {shards.described}")
        log_data(self.store, self.run_id, shards, self.home / "pictures")
        return shards

    def adopt(self, config: AdoptConfig, *, data: Shards, label: str = "adopt") -> Artifact:
        """Weights from outside as a model of this chain: a teacher, or a start for finetune."""
        source = locate(config, self.store)
        inputs = {"weights": source.artifact} if source.artifact is not None else {}

        def do(run_id: str) -> Result:
            job = AdoptJob(config, self.experiment.seed, self._place(run_id, data), source)
            return run_adoption(job, lambda text: self._event("note", text))

        return self.stage("adopt", label, config, data, inputs, do, {"weights": source.digest})

    def tokenizer(self, config: TrainConfig, *, data: Shards, label: str = "tokenizer") -> Artifact:
        return self._train("tokenizer", label, config, data, {})

    def pretrain(
        self,
        config: TrainConfig,
        *,
        data: Shards,
        tokenizer: Artifact | None = None,
        label: str = "pretrain",
    ) -> Artifact:
        return self._train("pretrain", label, config, data, {"tokenizer": tokenizer})

    def finetune(
        self, config: TrainConfig, *, data: Shards, init: Artifact | None = None, label: str = "finetune"
    ) -> Artifact:
        return self._train("finetune", label, config, data, {"init": init})

    def distill(
        self,
        config: TrainConfig,
        *,
        data: Shards,
        teacher: Artifact,
        init: Artifact | None = None,
        label: str = "distill",
    ) -> Artifact:
        return self._train("distill", label, config, data, {"teacher": teacher, "init": init})

    def evaluate(
        self, config: EvaluateConfig, *, data: Shards, model: Artifact, label: str = "evaluate"
    ) -> Artifact:
        if not data.count(config.split):
            have = ", ".join(split for split in data.splits if data.count(split))
            raise UserError(f"evaluate.split: given {config.split!r}; the shards have: {have}")
        inputs = {"model": model}

        def do(run_id: str) -> Result:
            place, named = self._place(run_id, data), self.within + label
            return self.session.run(EvaluateJob(config, place, model.folder, named))

        return self.stage("evaluate", label, config, data, inputs, do)

    def _train(
        self, stage: str, label: str, config: TrainConfig, data: Shards, inputs: dict[str, Artifact | None]
    ) -> Artifact:
        given = {name: artifact for name, artifact in inputs.items() if artifact is not None}
        folders = {name: artifact.folder for name, artifact in given.items()}

        def do(run_id: str) -> Result:
            experiment, kept = self.experiment, self._checkpoints(run_id)
            token, place = Fence(kept).take(), self._place(run_id, data)
            job = TrainJob(
                stage, config, experiment.seed, place, experiment.cluster.zero, kept, token, **folders
            )
            return self.session.run(job)

        return self.stage(stage, label, config, data, given, do)

    def _place(self, run_id: str, data: Shards) -> Place:
        experiment = self.experiment
        loaders = experiment.cluster.loaders
        return Place(self.home, self.store.config, run_id, named(data), experiment.data, loaders)

    # ------------------------------------------------------------ hit, resume or run

    def stage(
        self,
        stage: str,
        label: str,
        config: Config,
        data: Shards,
        inputs: dict[str, Artifact],
        do: Callable[[str], Result],
        beside: Mapping[str, str] | None = None,
    ) -> Artifact:
        """One stage by its content key; `do` gets the MLflow run to write to when there is work.

        `beside`: digests of inputs that are no artifacts.
        """
        begin = time.monotonic()
        seen = {name: getattr(self.experiment.data, name) for name in SEEN}
        digests = {name: artifact.digest for name, artifact in inputs.items()}
        digests |= {
            **(beside or {}),
            "data": data.digest,
            "seen": digest(seen),
            "seed": str(self.experiment.seed),
        }
        key = content_key(stage, REVISION[stage], config, digests)
        with self.face.stage(label) as self.line:
            waiting = self.line.note
            with cache.claim(self.store, key, lambda holder: waiting(f"waits for {holder}")) as claim:
                if claim.artifact is not None:
                    forget(self._checkpoints(claim.artifact.run_id))  # a kill may have come just before
                    return self._done(label, "hit", begin, Done(stage, claim.artifact, claim.metrics))
                run_id, resumed = self._open(stage, label, config, claim, inputs, data)
                result = self._do(run_id, do)
        outcome: cache.Outcome = "resumed" if resumed else "ran"
        return self._done(label, outcome, begin, Done(stage, result["artifact"], result["metrics"]))

    def _open(
        self, stage: str, label: str, config: Config, claim: Claim, inputs: dict[str, Artifact], data: Shards
    ) -> tuple[str, bool]:
        """The MLflow run to write to, and whether there is a checkpoint to go on from."""
        if claim.unfinished is not None:
            found = checkpoint.latest(self._checkpoints(claim.unfinished))
            self.store.status(claim.unfinished, "RUNNING")
            self.store.tag(claim.unfinished, {"vitlab.git_sha": self.git_sha, "vitlab.pipeline": self.run_id})
            if found and self.line:
                self.line.note(f"goes on from {found.name} of run {claim.unfinished[:8]}")
            return claim.unfinished, found is not None
        tags = {
            "vitlab.stage": stage,
            "vitlab.key": claim.key,
            "vitlab.inputs": " ".join(f"{name}={artifact.uri}" for name, artifact in inputs.items())
            or "none",
            "vitlab.pipeline": self.run_id,
            "vitlab.git_sha": self.git_sha,
            "vitlab.data_digest": data.digest,
            "vitlab.revision": str(REVISION[stage]),
        }
        params = {"seed": self.experiment.seed} | flatten(
            {stage: resolved(config), "data": resolved(self.experiment.data)}
        )
        return self.store.start(title(self.within + label, config), tags, params, self.search), False

    def _do(self, run_id: str, do: Callable[[str], Result]) -> Result:
        try:
            result = do(run_id)
        except BaseException as error:
            self.store.status(run_id, ended(type(error)))
            raise
        self.store.metrics(run_id, {f"wall/{name}_s": t for name, t in result["seconds"].items()})
        self.store.status(run_id, "FINISHED")
        forget(self._checkpoints(run_id))
        return result

    def _checkpoints(self, run_id: str) -> Path:
        return self.home / "checkpoints" / run_id

    def _done(self, label: str, outcome: cache.Outcome, begin: float, done: Done) -> Artifact:
        self.done[label] = done
        _, artifact, metrics = done
        figure = figured(metrics, self.experiment.evaluate.split)
        label = self.within + label
        self.face.done(Row(label, outcome, time.monotonic() - begin, figure, artifact.run_id))
        if self.search is not None:
            return artifact
        plain = label.replace(" · ", "/")  # MLflow takes no dot like that in a name
        self.store.tag(
            self.run_id, {f"vitlab.run.{plain}": artifact.run_id, f"vitlab.outcome.{plain}": outcome}
        )
        shown = {n: v for n, v in metrics.items() if n.startswith(("val/", "eval/")) and n.count("/") == 1}
        self.store.metrics(self.run_id, {f"{plain}/{n}": v for n, v in shown.items()})
        return artifact

    def _event(self, kind: str, payload: Any) -> None:
        if self.line is not None and kind == "say":
            self.line.say(payload)
        elif self.line is not None and kind == "progress":
            self.line.progress(*payload)
        elif self.line is not None and kind == "restarted":
            where = self.session.logs
            self.line.note(f"a worker was lost; the group goes on from the last checkpoint (logs: {where})")
        elif self.line is not None and kind == "note":
            self.line.note(payload)
        if self.listen is not None:
            self.listen(kind, payload)

    # ------------------------------------------------------------ the pipeline's own run

    def _start_pipeline(self) -> str:
        tags = {
            "vitlab.stage": "pipeline",
            "vitlab.git_sha": self.git_sha,
            "vitlab.pipeline_name": self.pipeline,
        }
        params = flatten(resolved(self.experiment))
        run_id = self.store.start(f"{self.pipeline} · {self.experiment.name}", tags, params)
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "experiment.yaml"
            text = yaml.safe_dump(resolved(self.experiment), sort_keys=False, allow_unicode=True)
            file.write_text(without_password(text), "utf8")
            self.store.upload_file(run_id, file, "")
        return run_id

    def _summary(self) -> None:
        total = time.monotonic() - self.began
        self.face.table(f"{self.pipeline} · {self.experiment.name} · {total:.0f} s")
        if not self.store.remote:
            self.face.print("open     make ui   (or: vitlab ui; then these links show the runs)")
        runs: dict[str, list[str]] = {}
        for done in self.done.values():
            runs.setdefault(done.stage, []).append(done.artifact.run_id)
        stage = next((s for s in ("search", "finetune", "distill", "pretrain") if s in runs), None)
        if stage is None:
            return
        mine = runs[stage]
        if stage == "search":
            stage, mine = "finetune", [self.store.get(mine[0]).tags["vitlab.best"]]
        self.face.print(f"curves   {self.store.curves(stage)}")
        found = self.store.find({"vitlab.stage": stage})
        others = [r.run_id for r in found if r.status == "FINISHED" and r.run_id not in mine]
        self.face.print(f"compare  {self.store.comparison([*mine, *others][:5])}")

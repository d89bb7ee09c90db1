"""The command `vitlab`, and what starts a pipeline: arguments in, exit code out.

Exit codes: 0 done; 1 failed while running; 2 the experiment asks for what cannot be, with few exceptions
(a loss that is not a number) before anything starts; 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitlab.experiment import Experiment

HERE = Path(__file__).resolve().parents[1]  # a checkout, or the copy of one that a Ray job runs in


def pipeline(
    main: Callable[[Experiment], None],
    default: str,
    needs: Sequence[str] = (),
    argv: Sequence[str] | None = None,
    *,
    compares: bool = False,
) -> None:
    """Runs a pipeline as a program: `python pipelines/NAME.py [experiment.yaml] [key=value …]`.

    `compares`: its chain loops over `each(run)`, so an experiment may have a `compare` section.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read once, when torch is imported
    name = Path(sys.argv[0]).name
    section = next((need for need in needs if need in ("finetune", "pretrain")), "pretrain")
    parser = argparse.ArgumentParser(
        prog=f"python pipelines/{name}",
        description=(main.__doc__ or "").strip() or None,
        epilog=f"example: python pipelines/{name} {default} {section}.optim.lr=5e-4 cluster.workers=4",
    )
    parser.add_argument("experiment", nargs="?", default=default, help=f"a YAML file (default {default})")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help=f"changes to the file, as {section}.epochs=5"
    )
    given = parser.parse_intermixed_args(argv)
    words = [given.experiment, *given.overrides]  # the file may stand anywhere among the changes
    file = next((word for word in words if "=" not in word), default)
    changes = [word for word in words if word != file]
    sys.exit(guarded(lambda: _start(main, file, changes, needs, compares)))


def _start(
    main: Callable[[Experiment], None],
    file: str,
    overrides: Sequence[str],
    needs: Sequence[str],
    compares: bool,
) -> None:
    from vitlab.compare import trials
    from vitlab.config import UserError
    from vitlab.experiment import read

    path = Path(file)
    experiment = read(path if path.exists() else HERE / file, overrides)
    if experiment.compare is not None and not compares:
        raise UserError(
            "compare: this pipeline runs its chain once; loop over each(run) in it, or leave it out"
        )
    for trial in trials(experiment):
        try:
            trial.experiment.require(*needs)
        except UserError as error:
            raise UserError(
                f"compare.variants: {trial.variant}: {error}" if trial.variant else str(error)
            ) from None
    main(experiment)


def guarded(action: Callable[[], None]) -> int:
    """Runs an action; a problem that a person can mend is one line, anything else keeps its traceback."""
    from vitlab.config import UserError
    from vitlab.engine.launch import JobFailed
    from vitlab.face import Face

    face = Face()
    try:
        action()
    except UserError as error:
        face.problem(str(error))
        return 2
    except KeyboardInterrupt:
        face.problem("interrupted; the same command goes on from the last checkpoint")
        sys.stdout.flush()
        os._exit(130)  # Ray's own way out would wait for workers in the middle of a step
    except JobFailed as error:
        face.problem(str(error))
        return 1
    return 0


# ---------------------------------------------------------------- vitlab …


def main() -> None:
    parser = argparse.ArgumentParser(prog="vitlab", description="Experiments with vision transformers.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    shards = commands.add_parser(
        "shards",
        help="write WebDataset shards, or index existing ones",
        epilog="example: vitlab shards folder:/data/flowers /data/flowers-shards --held-out 0.2",
    )
    shards.add_argument(
        "source", help="digits, folder:PATH, idx:PATH, hf:NAME[:split], or `index` to index DEST as it is"
    )
    shards.add_argument("dest", type=Path, help="the folder of the shards")
    shards.add_argument("--held-out", type=float, default=0.2, help="fraction kept for evaluation (0.2)")
    shards.add_argument("--val", type=float, default=0.1, help="fraction kept for validation (0.1)")
    shards.add_argument("--limit", type=int, help="no more than the first so many images of the source")
    shards.add_argument("--shard-samples", type=int, default=1000, help="images of a shard (1000)")
    shards.set_defaults(action=_shards)

    run = commands.add_parser(
        "run", help="run a pipeline", epilog="example: vitlab run mae_then_finetune finetune.epochs=5"
    )
    run.add_argument(
        "pipeline", help=f"one of: {', '.join(sorted(p.stem for p in (HERE / 'pipelines').glob('*.py')))}"
    )
    run.add_argument("arguments", nargs=argparse.REMAINDER, help="[experiment.yaml] [key=value …]")
    run.set_defaults(action=_run)

    export = commands.add_parser(
        "export",
        help="write a trained model for other tools",
        epilog="example: vitlab export runs:/RUN/model model.onnx --format onnx",
    )
    export.add_argument("model", help="a model folder, or runs:/RUN/model")
    export.add_argument("dest", type=Path, help="the file to write")
    export.add_argument(
        "--format",
        choices=["onnx", "timm", "safetensors"],
        required=True,
        help="onnx: images to logits; timm: tensors under timm's names; safetensors: under vitlab's",
    )
    export.set_defaults(action=_export)

    models = commands.add_parser(
        "models", help="list the models and their cost", epilog="example: vitlab models --json models.json"
    )
    models.add_argument("--json", type=Path, metavar="FILE", help="write the list there too")
    models.set_defaults(action=_models)

    ui = commands.add_parser(
        "ui", help="open the MLflow UI on this machine", epilog="example: vitlab ui --port 5001"
    )
    ui.add_argument("--port", type=int, default=5000)
    ui.set_defaults(action=_ui)

    _add_bench(commands)
    given = parser.parse_args()
    sys.exit(guarded(lambda: given.action(given)))


def _add_bench(commands: Any) -> None:
    bench = commands.add_parser(
        "bench", help="measure against a peer", epilog="example: vitlab bench step --help"
    )
    kinds = bench.add_subparsers(dest="what", required=True, metavar="what")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")

    step = kinds.add_parser(
        "step",
        parents=[common],
        help="seconds of forward, backward and optimizer of a model or an objective",
        epilog="example: vitlab bench step vit_small dino/lightly --json step.json",
    )
    step.add_argument(
        "cases",
        nargs="*",
        help="models: vit_small, deit_small, swin_tiny, coatnet_0, cvt_13; objectives: mae, mae/lightly, "
        "simmim/lightly, beit/transformers, dino/lightly, msn/lightly, distill/timm, distill_soft/timm; "
        "default: all",
    )
    step.add_argument("--batch", type=int, help="images of a step (8)")
    step.add_argument("--image-size", type=int, help="pixels a side (224)")
    step.add_argument("--rounds", type=int, help="measured rounds; medians are shown (9)")
    step.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (all cores)")
    step.add_argument("--compile", action="store_true", help="our side by torch.compile, the peer eager")
    step.add_argument(
        "--precision", choices=["fp32", "bf16", "auto"], default="fp32", help="auto: bf16 on GPUs (fp32)"
    )

    memory = kinds.add_parser(
        "memory",
        parents=[common],
        help="bytes of a worker under ZeRO-3 with a teacher, against plain PyTorch, in fp32",
        epilog="example: vitlab bench memory --workers 2 --persist 0",
    )
    memory.add_argument("--batch", type=int, help="images of a step, over all workers (16)")
    memory.add_argument("--image-size", type=int, help="pixels a side (64)")
    memory.add_argument("--rounds", type=int, help="measured rounds, of the seconds (5)")
    memory.add_argument("--threads", type=int, help="CPU threads of a worker (1)")
    memory.add_argument("--workers", type=int, nargs="+", help="numbers of workers (1 2 4)")
    memory.add_argument(
        "--persist", type=int, nargs="+", help="largest parameters that are never sharded (0 10000 100000)"
    )
    bench.set_defaults(action=_bench)


def _shards(given: argparse.Namespace) -> None:
    from vitlab.config import UserError
    from vitlab.data import index_existing, limited, open_source, write_shards
    from vitlab.face import Face

    if given.limit is not None and given.limit < 1:
        raise UserError(f"--limit: given {given.limit}; allowed: 1 or more")
    if given.source == "index":
        made = index_existing(given.dest)
    else:
        made = write_shards(
            limited(open_source(given.source), given.limit),
            given.dest,
            held_out=given.held_out,
            val=given.val,
            shard_samples=given.shard_samples,
        )
    counts = ", ".join(f"{made.count(split)} {split}" for split in made.splits)
    Face().print(f"{counts} images of {len(made.classes)} classes in {made.path}")


def _run(given: argparse.Namespace) -> None:
    from vitlab.config import UserError, nearest

    names = sorted(p.stem for p in (HERE / "pipelines").glob("*.py"))
    if given.pipeline not in names:
        raise UserError(
            f"{given.pipeline}: no such pipeline; allowed: {', '.join(names)}{nearest(given.pipeline, names)}"
        )
    file = HERE / "pipelines" / f"{given.pipeline}.py"
    sys.argv = [str(file), *given.arguments]
    runpy.run_path(str(file), run_name="__main__")


def _bench(given: argparse.Namespace) -> None:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read once, when torch is imported
    import torch

    from vitlab.bench import MemoryOptions, StepOptions, bench_memory, bench_step, print_rows, write_json
    from vitlab.dist import device
    from vitlab.face import Face

    if given.json is not None:
        _writable(given.json)

    def say(text: str) -> None:
        Face().print(f"  {text}")

    def options(kind: Any) -> Any:
        values = {field.name: getattr(given, field.name, None) for field in fields(kind)}
        fit = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items() if v is not None}
        return kind(**fit)

    if given.what == "memory":
        how = options(MemoryOptions)
        rows = bench_memory(how, say)
    else:
        how = options(StepOptions)
        rows = bench_step(given.cases, how, say)
    precision = getattr(how, "precision", "fp32")
    title = f"bench {given.what} · {precision} · batch {how.batch} · {how.threads} threads"
    print_rows(title, rows)
    if given.json is not None:
        place = torch.device("cpu") if given.what == "memory" else device(0)
        write_json(given.json, given.what, rows, place, how.threads)


def _export(given: argparse.Namespace) -> None:
    from vitlab.face import Face
    from vitlab.jobs.fetching import load
    from vitlab.models import export_model

    face = Face()
    with face.waiting(f"writing {given.dest} and reading it back"):
        written = export_model(load(given.model).model, given.dest, given.format)
    check = f"largest difference from the model {written.difference:.1e}" if written.difference else "equal"
    face.print(f"{written.path}: {written.bytes / 1000:,.0f} kB, read back: {check}")


def _models(given: argparse.Namespace) -> None:
    from vitlab.face import Face
    from vitlab.models.cost import costs

    face = Face()
    if given.json is not None:
        _writable(given.json)
    with face.waiting("counting the parameters and operations of every preset"):
        rows = list(costs())
    if given.json is not None:
        text = json.dumps([row._asdict() for row in rows], indent=2)
        given.json.write_text(text + "\n", "utf8")
    face.listing(
        ("name", "family", "parameters", "GFLOPs", "image size"),
        [(r.name, r.family, f"{r.params / 1e6:.2f} M", f"{r.gflops:.2f}", str(r.image_size)) for r in rows],
        left=2,
    )
    face.print("GFLOPs: 1e9 multiply-adds of one image forward; 10 classes at image size 32, else 1000")
    face.print("torchvision, timm: any classifier by its name there, as {name: timm, arch: regnety_160}")


def _writable(file: Path) -> None:
    """Before the work, not after it."""
    from vitlab.config import UserError

    if file.is_dir() or not file.parent.is_dir():
        raise UserError(f"--json: {file}: a file in a folder that exists is needed")


def _ui(given: argparse.Namespace) -> None:
    """Replaces this process by MLflow's server, on loopback."""
    from vitlab.face import Face
    from vitlab.home import home

    place, address = home(), f"http://127.0.0.1:{given.port}"
    Face().print(f"MLflow's UI starts at {address} (some seconds; Ctrl-C ends it)")
    os.environ.setdefault(
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false"
    )  # worker processes that nothing here uses
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(given.port)]
    command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{place}/mlflow.db"]
    command += ["--default-artifact-root", (place / "artifacts").as_uri()]
    os.execv(command[0], command)  # noqa: S606


if __name__ == "__main__":
    main()

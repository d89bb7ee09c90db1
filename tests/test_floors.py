"""The house keeps its shape: imports go down, each vendor enters by one door, files stay small."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A file imports only from lower floors, or from its own room. The longest matching path is its room.
FLOORS = {
    "vitlab/wording.py": 0,
    "vitlab/environment.py": 0,
    "vitlab/config.py": 1,
    "vitlab/dist.py": 1,
    "vitlab/batch.py": 1,
    "vitlab/face.py": 2,
    "vitlab/tracking.py": 3,
    "vitlab/home.py": 2,
    "vitlab/server.py": 2,
    "vitlab/data/": 3,
    "vitlab/models/": 3,
    "vitlab/methods/": 4,
    "vitlab/engine/": 5,
    "vitlab/evaluation/": 5,
    "vitlab/cache.py": 6,
    "vitlab/sections.py": 6,
    "vitlab/experiment.py": 7,
    "vitlab/jobs/": 8,
    "vitlab/stages.py": 9,
    "vitlab/tune.py": 10,
    "vitlab/compare.py": 10,
    "vitlab/bench/": 10,
    "vitlab/commands/": 11,
    "vitlab/cli.py": 12,
    "vitlab/__init__.py": 13,
    "pipelines/": 14,
}

# The only files that may import a vendor. Ray's core belongs to the session, its libraries to their room.
DOORS = {
    "ray": {"vitlab/engine/launch.py", "vitlab/engine/serve.py", "vitlab/tune.py"},
    "ray.train": {"vitlab/engine/launch.py"},
    "ray.tune": {"vitlab/tune.py"},
    "deepspeed": {"vitlab/engine/zero.py"},
    "mlflow": {"vitlab/tracking.py"},
    "webdataset": {"vitlab/data/shards/tars.py", "vitlab/bench/data.py"},
    "datasets": {"vitlab/data/making/hugging_face.py", "vitlab/bench/data.py"},
    "fsspec": {"vitlab/data/stores/remote.py"},
    "simplejpeg": {"vitlab/data/images/decode.py", "vitlab/bench/data.py"},
    "timm": {"vitlab/models/borrowed.py"},
    "onnxruntime": {"vitlab/models/export.py"},
}

NEVER = {("vitlab/methods/", "vitlab/data/"), ("vitlab/evaluation/", "vitlab/engine/")}

SOURCES = sorted(
    p.relative_to(ROOT).as_posix() for d in ("vitlab", "pipelines") for p in (ROOT / d).rglob("*.py")
)


def room(path: str) -> str:
    fits = [
        prefix for prefix in FLOORS if path == prefix or (prefix.endswith("/") and path.startswith(prefix))
    ]
    assert fits, f"{path} stands on no floor; give it one in tests/test_floors.py"
    return max(fits, key=len)


def floor(path: str) -> int:
    return FLOORS[room(path)]


def imports(path: str) -> list[str]:
    names = []
    for node in ast.walk(ast.parse((ROOT / path).read_text("utf8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write imports in full"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def file_of(name: str) -> str | None:
    """`vitlab.engine.loop.train` → `vitlab/engine/loop.py`."""
    parts = name.split(".")
    for n in range(len(parts), 0, -1):
        base = "/".join(parts[:n])
        for path in (f"{base}.py", f"{base}/__init__.py"):
            if (ROOT / path).is_file():
                return path
    return None


@pytest.mark.parametrize("path", SOURCES)
def test_imports_go_down(path: str) -> None:
    for name in imports(path):
        target = file_of(name) if name.split(".")[0] in ("vitlab", "pipelines") else None
        if target is None or target == path:
            continue
        assert floor(target) < floor(path) or room(target) == room(path), (
            f"{path} (floor {floor(path)}) imports {target} (floor {floor(target)})"
        )
        assert not any(path.startswith(a) and target.startswith(b) for a, b in NEVER), (
            f"{path} imports {target}"
        )
        assert not target.startswith("pipelines/"), f"{path} imports a pipeline"


@pytest.mark.parametrize("path", SOURCES)
def test_each_vendor_has_one_door(path: str) -> None:
    for name in imports(path):
        fits = [v for v in DOORS if name == v or name.startswith(v + ".")]
        if fits:
            vendor = max(fits, key=len)
            assert path in DOORS[vendor], f"{path} imports {name}; only {sorted(DOORS[vendor])} may"


@pytest.mark.parametrize("path", SOURCES)
def test_sizes(path: str) -> None:
    text = (ROOT / path).read_text("utf8")
    assert text.count("\n") <= 350, f"{path} is longer than 350 lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 80, f"{path}: {node.name} is longer than 80 lines"
            args = node.args
            count = len(args.posonlyargs) + len(args.args) + len(args.kwonlyargs)
            assert count - (args.args[:1] != [] and args.args[0].arg in ("self", "cls")) <= 8, (
                f"{path}: {node.name}"
            )


def test_top_level() -> None:
    folders = {p.name for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith(".")}
    allowed = {"pipelines", "vitlab", "cluster", "tests", "experiments", "docs"}
    built = {"runs", "data", "build", "dist", "vitlab.egg-info", "__pycache__"}
    assert folders - built <= allowed


def test_a_start_is_light() -> None:
    """Seconds of every command and worker: what only some jobs need is imported by them."""
    heavy = [
        "torch._dynamo",
        "ray",
        "deepspeed",
        "mlflow",
        "datasets",
        "torchvision",
        "timm",
        "matplotlib",
        "onnx",
    ]
    code = f"import sys, vitlab.experiment; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

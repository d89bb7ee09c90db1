"""The documents say what the code has: every key with its default, and commands that are there."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from vitlab.compare import trials
from vitlab.config import build, resolved
from vitlab.data import AugmentConfig, RandAugmentConfig, ShardsConfig
from vitlab.data.settings import RemoteConfig, SetConfig
from vitlab.engine.launch import ClusterConfig
from vitlab.engine.optim import OptimConfig
from vitlab.evaluation import EvaluateConfig, ProbeConfig
from vitlab.experiment import Experiment, read
from vitlab.methods import (
    BEiTConfig,
    DINOConfig,
    DistillConfig,
    DVAETrainingConfig,
    MAEConfig,
    MSNConfig,
    SimMIMConfig,
    SupervisedConfig,
)
from vitlab.methods.hints import Hint
from vitlab.models import (
    BackboneConfig,
    BorrowedConfig,
    CoAtNetConfig,
    CompactConfig,
    CvTConfig,
    DVAEConfig,
    SwinConfig,
    ViTConfig,
)
from vitlab.sections import AdoptConfig, Between, CompareConfig, TrainConfig, TuneConfig
from vitlab.stages import SEEN
from vitlab.tracking import TrackingConfig

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "experiments.md").read_text("utf8")
DOCUMENTS = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "cluster").glob("*.md")),
]

SECTIONS: dict[str, type[BaseModel]] = {
    "The file": Experiment,
    "`data`": ShardsConfig,
    "A set of `data.sets`": SetConfig,
    "`data.remote`": RemoteConfig,
    "`cluster`": ClusterConfig,
    "`tracking`": TrackingConfig,
    "`adopt`": AdoptConfig,
    "`tokenizer`, `pretrain`, `finetune`, `distill`": TrainConfig,
    "`probe`": ProbeConfig,
    "`model`: ViT and DeiT": ViTConfig,
    "`model`: Swin": SwinConfig,
    "`model`: CvT": CvTConfig,
    "`model`: CoAtNet": CoAtNetConfig,
    "`model`: compact transformers": CompactConfig,
    "`model`: torchvision and timm": BorrowedConfig,
    "`model`: discrete VAE": DVAEConfig,
    "`method: {name: supervised}`": SupervisedConfig,
    "`method: {name: mae}`": MAEConfig,
    "`method: {name: simmim}`": SimMIMConfig,
    "`method: {name: beit}`": BEiTConfig,
    "`method: {name: msn}`": MSNConfig,
    "`method: {name: dino}`": DINOConfig,
    "`method: {name: distill}`": DistillConfig,
    "A pair of `distill.method.hints`": Hint,
    "`method: {name: dvae}`": DVAETrainingConfig,
    "`augment`": AugmentConfig,
    "`augment.rand_augment`": RandAugmentConfig,
    "`optim`": OptimConfig,
    "`evaluate`": EvaluateConfig,
    "`tune`": TuneConfig,
    "A range of `tune.space`": Between,
    "`compare`": CompareConfig,
}


def preset(schema: type[BaseModel]) -> set[str]:
    """Keys that a model's name gives."""
    presets = schema.presets.values() if issubclass(schema, BackboneConfig) else ()
    return {key for sizes in presets for key in sizes}


def rows(title: str) -> dict[str, tuple[str, str]]:
    """The table below a heading: key → (default, in the content key)."""
    part = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    return {key: (default.strip("`"), inside) for key, default, inside in _ROW.findall(part)}


_ROW = re.compile(r"^\| `(\w+)` \| (\S.*?) \| (\w*) ?\| ", re.MULTILINE)


def written(value: Any) -> Any:
    return {} if isinstance(value, BaseModel) else to_jsonable_python(value)


@pytest.mark.parametrize("title", SECTIONS)
def test_every_key_is_documented(title: str) -> None:
    schema, table = SECTIONS[title], rows(title)
    assert set(table) == set(schema.model_fields)
    for name, field in schema.model_fields.items():
        default = table[name][0]
        if field.is_required():
            assert default == ("preset" if name in preset(schema) else "-"), name
        else:
            assert yaml.safe_load(default) == written(field.default) or float(default) == field.default, name


@pytest.mark.parametrize("title", SECTIONS)
def test_the_content_key_is_documented(title: str) -> None:
    schema = SECTIONS[title]
    for name, (_, said) in rows(title).items():
        extra = schema.model_fields[name].json_schema_extra
        free = isinstance(extra, dict) and bool(extra.get("free"))
        if schema in (ShardsConfig, SetConfig):
            expected = "no" if free or name == "num_classes" else "yes" if name in SEEN else "data"
            assert said == expected, name
        elif schema is Experiment:
            assert said == {"name": "no", "seed": "yes"}.get(name, "no" if free else ""), name
        elif said:
            assert said == ("no" if free else "yes"), name
        else:
            assert not free, name


def test_every_section_has_a_table() -> None:
    headings = set(re.findall(r"^## (.+)$", PAGE, re.MULTILINE)) - {"A small one"}
    assert headings == set(SECTIONS)
    assert _below(Experiment) == set(SECTIONS.values())


def _below(annotation: Any) -> set[type[BaseModel]]:
    """All sections that a type leads to."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        inner = [_below(field.annotation) for field in annotation.model_fields.values()]
        return {annotation}.union(*inner)
    return set[type[BaseModel]]().union(*(_below(arg) for arg in getattr(annotation, "__args__", ())))


def test_the_example_is_an_experiment() -> None:
    text = PAGE.split("```yaml\n")[1].split("```")[0]
    assert resolved(build(Experiment, yaml.safe_load(text)))["name"] == "flowers"


def test_the_floors_are_those_of_the_test() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text("utf8")
    told = {
        f"{'' if path == 'pipelines/' else 'vitlab/'}{path}": int(floor)
        for floor, paths in re.findall(r"^\| (-?\d+) \| (`.*?`) \|", text, re.MULTILINE)
        for path in re.findall(r"`(.+?)`", paths)
    }
    assert told == runpy.run_path(str(ROOT / "tests" / "test_floors.py"))["FLOORS"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_links_and_files_are_there(document: Path) -> None:
    text = document.read_text("utf8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("http") or (document.parent / target).exists(), target
    for path in re.findall(r"(?:pipelines|experiments)/\w+\.(?:py|yaml)", text):
        assert (ROOT / path).is_file() or "mine" in path, path


def test_make_targets_are_there() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text("utf8"), re.MULTILINE))
    used = {t for d in DOCUMENTS for t in re.findall(r"^ *make (\w+)", d.read_text("utf8"), re.MULTILINE)}
    assert {"demo", "test"} <= used <= targets


@pytest.mark.parametrize("command", ["shards", "run", "models", "ui"])
def test_commands_have_help(command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vitlab.cli", command, "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "example:" in done.stdout
    readme = (ROOT / "README.md").read_text("utf8")
    assert f"vitlab {command}" in readme or f"make {command}" in readme


def test_flags_in_the_documents_are_there() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vitlab.cli", "shards", "--help"], capture_output=True, text=True, check=False
    )
    for flag in re.findall(r"`(--[\w-]+)", (ROOT / "docs" / "data.md").read_text("utf8")):
        assert flag in done.stdout, flag


@pytest.mark.parametrize("file", sorted((ROOT / "experiments").glob("*.yaml")), ids=lambda p: p.stem)
def test_an_experiment_has_what_its_command_needs(file: Path) -> None:
    """The command of its header names a pipeline, whose sections are there."""
    head = file.read_text("utf8").split("\nname:")[0]
    found = re.search(r"# +command +(?:\S+ pipelines/(\w+)\.py|vitlab run (\w+)|make (demo))", head)
    assert found, head
    name = found[1] or found[2] or "mae_then_finetune"
    text = (ROOT / "pipelines" / f"{name}.py").read_text("utf8")
    needs = re.search(r"needs=\(([^)]*)\)", text)
    experiment = read(file)
    for trial in trials(experiment):
        trial.experiment.require(*re.findall(r'"([^"]+)"', needs[1] if needs else ""))
    assert experiment.compare is None or "compares=True" in text

"""A wrong experiment is one line that says how to go on; a right one has one canonical form."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, ValidationError, model_validator

from vitlab.config import (
    Config,
    UserError,
    build,
    deciding,
    digest,
    flatten,
    free,
    load,
    parse,
    resolved,
    without_password,
)


class Optim(Config):
    lr: float = Field(default=0.1, gt=0)
    decay: float = Field(default=0.0, ge=0, lt=1)
    betas: tuple[float, float] = Field(default=(0.9, 0.99), strict=False)
    log_every: int = free(10, gt=0)


class Square(Config):
    name: Literal["square"] = "square"
    side: int = 1

    @model_validator(mode="after")
    def _even(self) -> Square:
        if self.side % 2 and self.side > 1:
            raise ValueError(f"side {self.side} is not even")
        return self


class Circle(Config):
    name: Literal["circle"] = "circle"
    radius: float = 1.0
    colour: str = free("red")


class Between(Config):
    low: float
    high: float
    note: str = free("")

    @model_validator(mode="after")
    def _ordered(self) -> Between:
        if self.low >= self.high:
            raise ValueError(f"low {self.low} must be below high {self.high}")
        return self


class Stage(Config):
    epochs: int = Field(gt=0)
    optim: Optim = Optim()
    shape: Annotated[Square | Circle, Field(discriminator="name")] = Square()


class Whole(Config):
    name: str = Field(default="x", min_length=1)
    stage: Stage | None = None
    zero: Literal[0, 1, 2, 3] | None = free(None)
    kind: Literal["hard", "soft"] = "hard"
    flag: bool = True
    sizes: list[int] = Field(default=[1], min_length=1, max_length=2)
    parts: list[Optim] = Field(default=[])
    space: dict[str, Between | list[Any]] = Field(default={})
    workers: Optim = free(Optim())

    @model_validator(mode="after")
    def _fits(self) -> Whole:
        if self.name == "forbidden":
            raise UserError("name: given 'forbidden'; any other will do")
        return self


def problem(tree: Any) -> str:
    with pytest.raises(UserError) as caught:
        build(Whole, tree)
    text = str(caught.value)
    assert "\n" not in text
    return text


WHOLE = "name, stage, zero, kind, flag, sizes, parts, space, workers"
OPTIM = "lr, decay, betas, log_every"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        # a key that is not there: at the top, nested, in a union's member, in lists and dicts
        (
            "nam: x",
            f"nam: unknown key (given \"x\"); allowed: {WHOLE}; did you mean 'name'?",
        ),
        (
            "stage: {epoch: 3}",
            "stage.epoch: unknown key (given 3); allowed: epochs, optim, shape; did you mean 'epochs'?",
        ),
        (
            "stage: {epochs: 1, optim: {rl: 1}}",
            f"stage.optim.rl: unknown key (given 1); allowed: {OPTIM}; did you mean 'lr'?",
        ),
        (
            "stage: {epochs: 1, shape: {name: circle, side: 2}}",
            "stage.shape.side: unknown key (given 2); allowed: name, radius, colour",
        ),
        (
            "parts: [{}, {lrr: 1}]",
            f"parts[1].lrr: unknown key (given 1); allowed: {OPTIM}; did you mean 'lr'?",
        ),
        (
            "space: {a.b: {lo: 1, high: 2}}",
            "space.a.b.lo: unknown key (given 1); allowed: low, high, note; did you mean 'low'?",
        ),
        ("1: x", "1: given 1; a key must be text; put it in quotes"),
        # a value of a wrong type
        ("stage: {epochs: 1.5}", "stage.epochs: given 1.5; must be a whole number"),
        ("stage: {epochs: '3'}", 'stage.epochs: given "3"; must be a whole number'),
        ("stage: {epochs: true}", "stage.epochs: given true; must be a whole number"),
        ("stage: {epochs: 1, optim: {lr: fast}}", 'stage.optim.lr: given "fast"; must be a number'),
        ("stage: {epochs: 1, optim: {lr: .inf}}", "stage.optim.lr: given Infinity; must be a finite number"),
        ("stage: {epochs: 1, optim: {lr: .nan}}", "stage.optim.lr: given NaN; must be a finite number"),
        ("name: 3", "name: given 3; must be text; put it in quotes"),
        ("name: on", "name: given true; must be text; put it in quotes"),
        ("name: 2024-01-02", 'name: given "2024-01-02"; must be text; put it in quotes'),
        ("name:", "name: given null; must be text"),
        ("name: ''", 'name: given ""; must not be empty'),
        ("flag: 1", "flag: given 1; must be true or false"),
        ("stage: 3", "stage: given 3; must be a section with keys of: epochs, optim, shape"),
        (
            "stage: {epochs: 1, optim: [1]}",
            f"stage.optim: given [1]; must be a section with keys of: {OPTIM}",
        ),
        (
            "stage: {epochs: 1, shape: 3}",
            "stage.shape: given 3; must be a section with name: square or circle",
        ),
        ("space: 3", "space: given 3; must be a section of `key: value`"),
        (
            "space: {a: 3}",
            "space.a: given 3; must be a section with keys of: low, high, note or a list, as [1, 2]",
        ),
        ("space: {a: {low: x, high: 2}}", 'space.a.low: given "x"; must be a number'),
        ("sizes: 3", "sizes: given 3; must be a list, as [1, 2]"),
        ("sizes: [1, x]", 'sizes[1]: given "x"; must be a whole number'),
        ("sizes: []", "sizes: given []; must have at least 1 item"),
        ("sizes: [1, 2, 3]", "sizes: given [1, 2, 3]; must have at most 2 items"),
        ("stage: {epochs: 1, optim: {betas: [0.9]}}", "stage.optim.betas: given [0.9]; must have 2 items"),
        # a value out of bounds
        ("stage: {epochs: 0}", "stage.epochs: given 0; must be greater than 0"),
        ("stage: {epochs: 1, optim: {lr: -1.0}}", "stage.optim.lr: given -1.0; must be greater than 0"),
        ("parts: [{decay: 2}]", "parts[0].decay: given 2; must be at least 0 and less than 1"),
        # a choice that there is not
        ("kind: hart", "kind: given \"hart\"; allowed: hard, soft; did you mean 'hard'?"),
        ("zero: 7", "zero: given 7; allowed: 0, 1, 2, 3"),
        ("zero: false", "zero: given false; allowed: 0, 1, 2, 3"),
        ("zero: true", "zero: given true; allowed: 0, 1, 2, 3"),
        (
            "stage: {epochs: 1, shape: {name: cirkle}}",
            "stage.shape.name: given \"cirkle\"; allowed: square, circle; did you mean 'circle'?",
        ),
        ("stage: {epochs: 1, shape: {side: 2}}", "stage.shape.name: missing; allowed: square, circle"),
        # what is missing; what does not fit together
        ("stage: {}", "stage.epochs: missing; it has no default, add it to the experiment file"),
        ("space: {a: {low: 1}}", "space.a.high: missing; it has no default, add it to the experiment file"),
        ("stage: {epochs: 1, shape: {name: square, side: 3}}", "stage.shape: side 3 is not even"),
        ("space: {a: {low: 2, high: 1}}", "space.a: low 2.0 must be below high 1.0"),
        ("name: forbidden", "name: given 'forbidden'; any other will do"),
    ],
)
def test_one_line_for(text: str, line: str) -> None:
    assert problem(parse(text, "x.yaml")) == line


def test_a_typo_is_named_before_what_it_leaves_missing() -> None:
    assert problem({"stage": {"epoch": 1, "optim": {"lr": -1}}}).startswith("stage.epoch: unknown key")


def test_a_long_value_is_cut_and_a_password_is_not_shown() -> None:
    assert len(problem({"kind": "x" * 500})) < 120
    text = problem({"uri": "http://me:secret@host:5000/x"})
    assert "secret" not in text
    assert "http://host:5000/x" in text
    assert without_password("at http://me:a@b@h, sqlite:////x/a@b") == "at http://h, sqlite:////x/a@b"


# ---------------------------------------------------------------- YAML


@pytest.mark.parametrize("text", ["1e-3", "1.e-3", "1.0e-3", "+1E-3", "0.001", ".1e-2"])
def test_numbers_as_people_write_them(text: str) -> None:
    assert parse(f"a: {text}", "x") == {"a": 1e-3}
    assert parse("1e3", "x") == 1000.0


def test_what_only_resembles_a_number_stays_text() -> None:
    assert parse("[1e, e3, 1e3x, vit_1e3, 1.2.3, '1e3']", "x") == [
        "1e",
        "e3",
        "1e3x",
        "vit_1e3",
        "1.2.3",
        "1e3",
    ]
    assert parse("[1, 1.5, -2, 0x10]", "x") == [1, 1.5, -2, 16]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: [1", "f.yaml, line 1: not valid YAML: expected ',' or ']', but got '<stream end>'"),
        ("a: 1\n\tb: 2", "f.yaml, line 2: not valid YAML: found character '\\t' that cannot start any token"),
        ("a: *b", "f.yaml, line 1: not valid YAML: found undefined alias 'b'"),
        ("a: 1\nb: 2\na: 3", "f.yaml, line 3: not valid YAML: the key 'a' is given twice, first in line 1"),
        (
            "x:\n  b: {c: 1,\n    c: 1}",
            "f.yaml, line 3: not valid YAML: the key 'c' is given twice, first in line 2",
        ),
        ("a: {b: 1}\na: 2", "f.yaml, line 2: not valid YAML: the key 'a' is given twice, first in line 1"),
        ("{}: 1", "f.yaml, line 1: not valid YAML: found unhashable key"),
        ("a: \x00", "f.yaml: not valid YAML: special characters are not allowed"),
        ("a: 2024-13-45", "f.yaml: not valid YAML: month must be in 1..12; put text in quotes"),
    ],
)
def test_yaml_problems(text: str, line: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(text, "f.yaml")
    assert str(caught.value) == line


def test_yaml_makes_no_objects() -> None:
    with pytest.raises(UserError, match="line 1: not valid YAML: could not determine a constructor"):
        parse("a: !!python/object/apply:os.system ['true']", "f.yaml")


def test_merge_keys_are_no_repeated_keys() -> None:
    # `base` is merged by `late` before its own turn comes, because it lies deeper.
    text = (
        "zero: &z {x: 1}\ndeep: {base: &b {<<: *z, x: 2}}\nlate: {<<: *b, y: 3}\nboth: {<<: [*b, *z], y: 4}"
    )
    found = parse(text, "f.yaml")
    assert found["deep"]["base"] == {"x": 2}
    assert found["late"] == {"x": 2, "y": 3}
    assert found["both"] == {"x": 2, "y": 4}


# ---------------------------------------------------------------- files and overrides

FILE = """
name: demo
stage: &stage {epochs: 3, optim: &optim {lr: 1e-3}, shape: {name: circle}}
parts: [*optim, *optim]
workers: *optim
space: {optim.lr: {low: 1, high: 2}}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "demo.yaml"
    path.write_text(FILE, "utf8")
    return path


def test_overrides(file: Path) -> None:
    given = load(
        Whole,
        file,
        [
            "stage.epochs=7",
            "stage.optim.lr=1e3",
            "stage.optim.betas=[0.5,0.6]",
            "stage.shape={name: square, side: 2}",
            "name=text with spaces = and more",
            "zero=1",
            "zero=null",
            "space.optim.lr.high=3",
            "space.new=[1, a]",
            " sizes = [4]",
        ],
    )
    assert given.stage is not None
    assert (given.stage.epochs, given.stage.optim.lr, given.stage.optim.betas) == (7, 1000.0, (0.5, 0.6))
    assert given.stage.shape == Square(side=2)
    assert (given.name, given.zero, given.sizes) == ("text with spaces = and more", None, [4])
    assert given.space == {"optim.lr": Between(low=1, high=3), "new": [1, "a"]}


def test_an_override_touches_no_other_section_with_the_same_anchor(file: Path) -> None:
    given = load(Whole, file, ["stage.optim.lr=5.0"])
    assert given.stage is not None
    assert (given.stage.optim.lr, given.workers.lr, given.parts[0].lr) == (5.0, 1e-3, 1e-3)


def test_an_override_makes_the_sections_above_it(tmp_path: Path) -> None:
    path = tmp_path / "demo.yaml"
    path.write_text("name: x\nstage: null\n")
    given = load(Whole, path, ["stage.epochs=2", "stage.optim.lr=3"])
    assert given.stage == Stage(epochs=2, optim=Optim(lr=3.0))


@pytest.mark.parametrize(
    ("item", "line"),
    [
        ("stage.epochs", "stage.epochs: not an override; write key.sub=value, as finetune.optim.lr=1e-3"),
        ("=1", "=1: not an override; write key.sub=value, as finetune.optim.lr=1e-3"),
        (
            "stage..epochs=1",
            "stage..epochs=1: not an override; write key.sub=value, as finetune.optim.lr=1e-3",
        ),
        ("stage.=1", "stage.=1: not an override; write key.sub=value, as finetune.optim.lr=1e-3"),
        ("name=[1", "name, line 1: not valid YAML: expected ',' or ']', but got '<stream end>'"),
        (
            "parts.0.lr=1",
            'parts.0.lr: parts holds [{"lr": 0.001}, {"lr": 0.001}], no keys; give all of it: parts=VALUE',
        ),
        ("name.x=1", 'name.x: name holds "demo", no keys; give all of it: name=VALUE'),
        ("stag.epochs=1", 'stag: unknown key (given {"epochs": 1}); allowed: '),
        ("stage.optim.lr=-1", "stage.optim.lr: given -1; must be greater than 0"),
        (
            "http://me:secret@host",
            "http://host: not an override; write key.sub=value, as finetune.optim.lr=1e-3",
        ),
    ],
)
def test_overrides_that_are_wrong(file: Path, item: str, line: str) -> None:
    with pytest.raises(UserError) as caught:
        load(Whole, file, [item])
    assert str(caught.value).startswith(line)


def test_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "demo.yaml"
    with pytest.raises(UserError, match=r"demo\.yaml: no such experiment file$"):
        load(Whole, path)
    path.write_text("")
    with pytest.raises(UserError, match="given an empty file; an experiment has sections"):
        load(Whole, path)
    path.write_text("- a")
    with pytest.raises(UserError, match="given a list; an experiment has sections"):
        load(Whole, path)
    path.write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(UserError, match="cannot be read: not UTF-8 text"):
        load(Whole, path)
    with pytest.raises(
        UserError, match=r"dmeo\.yaml: no such .*; in .*: demo\.yaml; did you mean 'demo\.yaml'\?"
    ):
        load(Whole, tmp_path / "dmeo.yaml")


def test_the_experiments_of_the_repository_are_valid() -> None:
    from vitlab.experiment import read

    files = sorted((Path(__file__).parents[1] / "experiments").glob("*.yaml"))
    assert files
    for file in files:
        assert read(file).name


# ---------------------------------------------------------------- the canonical form


def test_free_fields_do_not_decide_anywhere() -> None:
    one = Whole(stage=Stage(epochs=1), parts=[Optim()], space={"a": Between(low=1, high=2)})
    two = Whole(
        stage=Stage(epochs=1, optim=Optim(log_every=99)),
        parts=[Optim(log_every=99)],
        space={"a": Between(low=1, high=2, note="n")},
        zero=2,
        workers=Optim(lr=5.0),
    )
    assert resolved(one) != resolved(two)
    assert deciding(one) == deciding(two)
    assert "log_every" not in str(deciding(two))
    assert {"zero", "workers"}.isdisjoint(deciding(two))
    assert deciding(Stage(epochs=1, shape=Circle(colour="blue")))["shape"] == {
        "name": "circle",
        "radius": 1.0,
    }


def test_deciding_fields_decide() -> None:
    base = Stage(epochs=1)
    for other in (
        Stage(epochs=2),
        Stage(epochs=1, optim=Optim(betas=(0.9, 0.9))),
        Stage(epochs=1, shape=Circle()),
    ):
        assert digest(deciding(base)) != digest(deciding(other))


def test_a_config_comes_back_from_its_resolved_form() -> None:
    one = Whole(
        stage=Stage(epochs=1, shape=Circle()), parts=[Optim()], space={"a": Between(low=1, high=2), "b": [1]}
    )
    assert build(Whole, resolved(one)) == one
    assert digest(resolved(build(Whole, resolved(one)))) == digest(resolved(one))


def test_one_number_has_one_form() -> None:
    assert digest(deciding(build(Optim, {"lr": 1}))) == digest(deciding(build(Optim, {"lr": 1.0})))


def test_digest_is_canonical() -> None:
    assert digest({"a": 1, "b": {"c": 2, "ä": 3}}) == digest({"b": {"ä": 3, "c": 2}, "a": 1})
    assert digest({"a": [1, 2]}) != digest({"a": [2, 1]})
    assert digest({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    with pytest.raises(ValueError, match="JSON"):
        digest({"a": math.nan})


def test_flatten() -> None:
    assert flatten({"a": {"b": 1, "c": {"d": [1]}}, "e": {}, "f": None}) == {
        "a.b": 1,
        "a.c.d": [1],
        "e": {},
        "f": None,
    }


def test_nothing_mutates() -> None:
    whole = Whole(stage=Stage(epochs=1))
    assert whole.stage is not None
    with pytest.raises(ValidationError, match="frozen"):
        whole.name = "y"  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        whole.stage.optim.lr = 2.0  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        del whole.name

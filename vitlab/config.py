"""Strict configuration: one YAML file becomes one frozen, typed object, or one clear line.

A section of the file is a subclass of `Config`, declared beside the class it configures. A field that
does not decide the result (worker count, logging, storage) is declared with `free(...)`: it stays out
of the content key, so that it may change between two runs of the same stage.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError, to_jsonable_python

from vitlab.wording import nearest, one_line, options_of, show, without_password

__all__ = [
    "Config",
    "UserError",
    "build",
    "deciding",
    "digest",
    "flatten",
    "free",
    "load",
    "nearest",
    "parse",
    "resolved",
    "without_password",
]

C = TypeVar("C", bound="Config")


class UserError(ValueError):
    """Something a person can put right. Printed as one line, without a traceback; exit code 2."""


class Config(BaseModel):
    """Base of every section: unknown keys are errors, values keep their type, nothing mutates."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=()
    )

    @model_validator(mode="before")
    @classmethod
    def _no_lookalike(cls, data: Any) -> Any:
        """Where 0 and 1 are choices, `false` and `true` are not, although Python finds them equal."""
        for name, field in cls.model_fields.items() if isinstance(data, dict) else ():
            options, given = options_of(field.annotation), data.get(name)
            if isinstance(given, bool | float) and given in options and type(given) not in map(type, options):
                context = {"key": name, "options": options, "given": given}
                raise PydanticCustomError("lookalike", "not one of the choices", context)
        return data


def free(default: Any, **constraints: Any) -> Any:
    """A field that does not decide the result: it is left out of the content key."""
    return Field(default, json_schema_extra={"free": True}, **constraints)


# ---------------------------------------------------------------- canonical form


def resolved(config: BaseModel) -> dict[str, Any]:
    """The whole config as plain data, defaults written out."""
    return config.model_dump(mode="json")


def deciding(config: BaseModel) -> dict[str, Any]:
    """The part of a config that decides the result: what goes into the content key."""
    out: dict[str, Any] = {}
    for name, field in type(config).model_fields.items():
        extra = field.json_schema_extra
        if not (isinstance(extra, dict) and extra.get("free")):
            out[name] = _deciding(getattr(config, name))
    return out


def _deciding(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return deciding(value)
    if isinstance(value, list | tuple):
        return [_deciding(item) for item in value]
    if isinstance(value, Mapping):
        return {name: _deciding(item) for name, item in value.items()}
    return to_jsonable_python(value)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"optim": {"lr": 1}}` → `{"optim.lr": 1}`."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def digest(data: Any) -> str:
    """sha256 of the canonical JSON of plain data."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


# ---------------------------------------------------------------- from file and command line


class _Loader(yaml.SafeLoader):
    """SafeLoader that also reads `1e-3` as a number and refuses a key given twice."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Checked here, not when objects are made: by then `<<` has mixed merged keys with the own ones.
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        first: dict[tuple[str, str], yaml.ScalarNode] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and first.setdefault((key.tag, key.value), key) is not key:
                line = first[key.tag, key.value].start_mark.line + 1
                problem = f"the key '{key.value}' is given twice, first in line {line}"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
        return node


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_FLOAT = re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*(?:[eE][-+]?[0-9]+)|\.[0-9]+(?:[eE][-+]?[0-9]+)?)$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def parse(text: str, where: str) -> Any:
    """YAML text to plain data; a syntax error is one line."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506  (_Loader is a SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or error
        raise UserError(f"{where}{line}: not valid YAML: {problem}") from None
    except ValueError as error:  # a date such as 2024-13-45, a number such as 0b
        raise UserError(f"{where}: not valid YAML: {error}; put text in quotes") from None


def load(schema: type[C], path: Path, overrides: Iterable[str] = ()) -> C:
    """One YAML file plus `key.sub=value` overrides → one resolved config."""
    if not path.is_file():
        there = sorted(p.name for p in path.parent.glob("*.yaml"))
        hint = f"; in {path.parent}: {', '.join(there)}{nearest(path.name, there)}" if there else ""
        raise UserError(f"{path}: no such experiment file{hint}")
    try:
        text = path.read_text("utf8")
    except (OSError, UnicodeDecodeError) as error:
        reason = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise UserError(f"{path}: cannot be read: {reason}; an experiment is a YAML file") from None
    tree = parse(text, str(path))
    if not isinstance(tree, dict):
        given = {"NoneType": "an empty file", "list": "a list"}.get(type(tree).__name__, show(tree))
        raise UserError(
            f"{path}: given {given}; an experiment has sections, as `data:`, see experiments/ for one"
        )
    for item in overrides:
        _override(tree, item)
    return build(schema, tree)


def _override(tree: dict[str, Any], item: str) -> None:
    key, equals, text = item.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise UserError(
            f"{without_password(item)}: not an override; write key.sub=value, as finetune.optim.lr=1e-3"
        )
    done: list[str] = []
    while True:
        # A name may hold dots itself, as in `tune.space`: the longest one that is there counts.
        ends = (n for n in range(len(names), 0, -1) if ".".join(names[:n]) in tree)
        end = next(ends, 1)
        name, names = ".".join(names[:end]), names[end:]
        done.append(name)
        if not names:
            tree[name] = parse(text, key.strip())
            return
        below = tree.get(name)
        if below is not None and not isinstance(below, dict):
            here = ".".join(done)
            raise UserError(
                f"{key.strip()}: {here} holds {show(below)}, no keys; give all of it: {here}=VALUE"
            )
        tree[name] = dict(below or {})  # a copy: with a YAML anchor two sections share one object
        tree = tree[name]


def build(schema: type[C], tree: Mapping[str, Any]) -> C:
    """Plain data → config; the first problem becomes one `UserError` line."""
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        raise UserError(one_line(schema, error.errors())) from None

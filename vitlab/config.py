"""Strict configuration: one YAML file becomes one frozen, typed object, or one clear line.

A section of the file is a subclass of `Config`, declared beside the class it configures. A field that
does not decide the result (worker count, logging, storage) is declared with `free(...)`: it stays out
of the content key, so that it may change between two runs of the same stage.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

C = TypeVar("C", bound="Config")


class UserError(ValueError):
    """Something a person can put right. Printed as one line, without a traceback; exit code 2."""


class Config(BaseModel):
    """Base of every section: unknown keys are errors, values keep their type, nothing mutates."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


def free(default: Any, **constraints: Any) -> Any:
    """A field that does not decide the result: it is left out of the content key."""
    return Field(default, json_schema_extra={"free": True}, **constraints)


def nearest(given: str, allowed: Iterable[str]) -> str:
    """`; did you mean 'lr'?`, or nothing when no allowed name is near."""
    match = difflib.get_close_matches(given, list(allowed), n=1, cutoff=0.5)
    return f"; did you mean '{match[0]}'?" if match else ""


# ---------------------------------------------------------------- canonical form


def resolved(config: BaseModel) -> dict[str, Any]:
    """The whole config as plain data, defaults written out."""
    return config.model_dump(mode="json")


def deciding(config: BaseModel) -> dict[str, Any]:
    """The part of a config that decides the result: what goes into the content key."""
    out: dict[str, Any] = {}
    for name, field in type(config).model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("free"):
            continue
        value = getattr(config, name)
        out[name] = deciding(value) if isinstance(value, BaseModel) else config.model_dump(mode="json")[name]
    return out


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

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
        if twice is not None:
            raise UserError(f"{twice}: given twice, the second time in line {node.start_mark.line + 1} or below")
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_FLOAT = r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*(?:[eE][-+]?[0-9]+)|\.[0-9]+(?:[eE][-+]?[0-9]+)?)$"
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", __import__("re").compile(_FLOAT), list("-+0123456789."))


def parse(text: str, where: str) -> Any:
    """YAML text to plain data; a syntax error is one line."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506  (_Loader is a SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{where}{line}: not valid YAML: {getattr(error, 'problem', error)}") from None


def load(schema: type[C], path: Path, overrides: Iterable[str] = ()) -> C:
    """One YAML file plus `key.sub=value` overrides → one resolved config."""
    if not path.is_file():
        near = nearest(path.name, (p.name for p in path.parent.glob("*.yaml")))
        raise UserError(f"{path}: no such experiment file{near}")
    tree = parse(path.read_text("utf8"), str(path))
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected sections like `pretrain:`, given {type(tree).__name__}")
    for item in overrides:
        _override(tree, item)
    return build(schema, tree)


def _override(tree: dict[str, Any], item: str) -> None:
    key, equals, text = item.partition("=")
    if not equals or not key:
        raise UserError(f"{item}: an override reads key.sub=value, as in finetune.optim.lr=1e-3")
    *parents, leaf = key.split(".")
    for name in parents:
        below = tree.get(name)
        tree[name] = dict(below) if isinstance(below, dict) else {}
        tree = tree[name]
    tree[leaf] = parse(text, key)


def build(schema: type[C], tree: Mapping[str, Any]) -> C:
    """Plain data → config; the first problem becomes one `UserError` line."""
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        raise UserError(_one_line(schema, first)) from None


def _one_line(schema: type[BaseModel], error: Any) -> str:
    path, section = _where(schema, error["loc"])
    given, kind, text = error.get("input"), error["type"], error["msg"]
    if kind == "extra_forbidden":
        names = _names(section)
        name = path.rsplit(".", 1)[-1]
        return f"{path}: unknown key (given {_show(given)}); allowed: {', '.join(names)}{nearest(name, names)}"
    if kind == "missing":
        return f"{path}: missing; it has no default, add it to the experiment file"
    if kind == "value_error":
        text = str(error["ctx"]["error"])
        return f"{path}: {text}" if path and not text.startswith(path) else text
    if kind in ("union_tag_invalid", "literal_error"):
        expected = error["ctx"].get("expected_tags") or error["ctx"].get("expected", "")
        names = [n.strip(" '") for n in expected.replace(" or ", ", ").split(",")]
        if kind == "union_tag_invalid":
            path, given = f"{path}.name", error["ctx"].get("tag")
        return f"{path}: given {_show(given)}; allowed: {', '.join(names)}{nearest(str(given), names)}"
    if kind == "union_tag_not_found":
        return f"{path}.name: missing; say which one"
    return f"{path}: given {_show(given)}; {text[0].lower() + text[1:]}"


def _where(schema: type[BaseModel], loc: tuple[Any, ...]) -> tuple[str, type[BaseModel] | None]:
    """Error location → dotted key as the person wrote it, and the section it stands in.

    Pydantic puts a union's tag into the location; it is not a key of the file and is left out.
    """
    keys: list[str] = []
    choices: list[type[BaseModel]] = [schema]
    section: type[BaseModel] | None = schema
    for part in loc:
        section = choices[0] if len(choices) == 1 else section
        if len(choices) > 1:  # `part` is the tag that picked one of a union
            choices = [c for c in choices if part in _tags(c)] or choices[:1]
            section = choices[0]
            continue
        keys.append(str(part))
        field = choices[0].model_fields.get(str(part)) if choices else None
        choices = _sections(field.annotation) if field else []
    return ".".join(keys), section


def _tags(section: type[BaseModel]) -> tuple[Any, ...]:
    field = section.model_fields.get("name")
    return typing.get_args(field.annotation) if field else ()


def _sections(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated):
        return [s for arg in typing.get_args(annotation) for s in _sections(arg)]
    return []


def _names(section: type[BaseModel] | None) -> list[str]:
    return list(section.model_fields) if section else []


def _show(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."

"""What is wrong with a configuration, in one line: what was given, what is allowed.

Pydantic reports every problem it finds, each with a location of its own making; here the one that helps
most is picked, put under the key that the person wrote, and said in plain words.
"""

from __future__ import annotations

import difflib
import json
import re
import types
import typing
from collections.abc import Iterable, Sized
from typing import Any, NamedTuple

from pydantic import BaseModel

WANTED = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "string_type": "must be text",
    "bool_type": "must be true or false",
    "list_type": "must be a list, as [1, 2]",
    "tuple_type": "must be a list, as [1, 2]",
    "dict_type": "must be a section of `key: value`",
    "invalid_key": "a key must be text; put it in quotes",
}
BOUNDS = {"gt": "greater than", "ge": "at least", "lt": "less than", "le": "at most"}
BOUND_ERRORS = ("greater_than", "greater_than_equal", "less_than", "less_than_equal")


class _Spot(NamedTuple):
    """Where an error stands: as the person wrote it, and what the schema has there."""

    path: str
    section: type[BaseModel] | None  # that the key belongs to
    expected: tuple[Any, ...]  # the types that may stand there
    limits: list[Any]  # the field's constraints


def one_line(schema: type[BaseModel], errors: list[Any]) -> str:
    """A wrong key explains a missing one, so it goes first; of a union, the member that fits best."""
    wrong = next((e for e in errors if e["type"] in ("extra_forbidden", "invalid_key")), None)
    error = wrong or errors[0]
    spot = _spot(schema, error["loc"])
    inside = (f"{spot.path}.", f"{spot.path}[")
    deeper = [e for e in errors if _spot(schema, e["loc"]).path.startswith(inside)]
    if wrong is None and spot.path and deeper:
        error = deeper[0]
        spot = _spot(schema, error["loc"])
    if error["type"] == "missing" and isinstance(error["loc"][-1], int):  # a list that is too short
        spot = _spot(schema, error["loc"][:-1])
        wanted = _count(typing.get_args(spot.expected[0]))
        return f"{spot.path}: given {show(error['input'])}; must have {wanted}"
    text = _sentence(error, spot)
    if not error["type"].endswith("_type"):
        return text
    same = [e for e in errors if e is not error and _spot(schema, e["loc"]).path == spot.path]
    return " or ".join([text, *(_wanted(e, spot).removeprefix("must be ") for e in same)])


def _sentence(error: Any, spot: _Spot) -> str:
    path, kind, given, context = spot.path, error["type"], error.get("input"), error.get("ctx", {})
    if kind == "extra_forbidden":
        names, name = _names(spot.section), str(error["loc"][-1])
        return f"{path}: unknown key (given {show(given)}); allowed: {', '.join(names)}{nearest(name, names)}"
    if kind == "missing":
        return f"{path}: missing; it has no default, add it to the experiment file"
    if kind == "value_error":
        text = str(context["error"])
        return f"{path}: {text}" if path and not text.startswith(path) else text
    if kind in ("union_tag_not_found", "union_tag_invalid", "literal_error", "lookalike"):
        options = [str(o) for o in context.get("options") or _choices(spot.expected)]
        path += ".name" if kind.startswith("union") else f".{context['key']}" if kind == "lookalike" else ""
        if kind == "union_tag_not_found":
            return f"{path}: missing; allowed: {', '.join(options)}"
        given = context.get("tag", context.get("given", given))
        path = path.removeprefix(".")
        return f"{path}: given {show(given)}; allowed: {', '.join(options)}{nearest(str(given), options)}"
    return f"{path}: given {show(given)}; {_wanted(error, spot)}"


def _wanted(error: Any, spot: _Spot) -> str:
    """What is allowed, in words."""
    kind, context = error["type"], error.get("ctx", {})
    if kind in BOUND_ERRORS:
        found = ((word, getattr(limit, name, None)) for name, word in BOUNDS.items() for limit in spot.limits)
        bounds = [f"{word} {value:g}" for word, value in found if value is not None]
        return f"must be {' and '.join(bounds)}" if bounds else _plain(error["msg"])
    if kind in ("model_type", "model_attributes_type"):
        sections = [member for member in spot.expected if _is_section(member)]
        if kind == "model_type" and sections:
            return f"must be a section with keys of: {', '.join(_names(sections[0]))}"
        return f"must be a section with name: {' or '.join(_choices(spot.expected))}"
    if kind == "string_type" and error["input"] is not None:
        return "must be text; put it in quotes"
    if kind == "string_too_short" and context["min_length"] == 1:
        return "must not be empty"
    if kind == "too_short":
        return f"must have at least {_count(range(context['min_length']))}"
    if kind == "too_long":
        return f"must have at most {_count(range(context['max_length']))}"
    return WANTED.get(kind) or _plain(error["msg"])


def _count(items: Sized) -> str:
    return "1 item" if len(items) == 1 else f"{len(items)} items"


def _plain(message: str) -> str:
    text = message.replace("Input should be", "must be").replace("should", "must")
    return text[0].lower() + text[1:]


def _spot(schema: type[BaseModel], location: tuple[Any, ...]) -> _Spot:
    """Follows an error's location down the schema.

    Below a union, pydantic puts the member that it tried into the location; that is no key of the file.
    """
    path, section, limits = "", None, list[Any]()
    members: tuple[Any, ...] = (schema,)
    for part in location:
        if len(members) > 1:
            members = (_member(members, str(part)),)
        elif part == "[key]":
            continue
        elif members and _is_section(members[0]):
            section = members[0]
            field = section.model_fields.get(str(part))
            path += f".{part}"
            members = _members(field.annotation) if field else ()
            limits = list(field.metadata) if field else []
        else:
            path += f"[{part}]" if isinstance(part, int) else f".{part}"
            inside = typing.get_args(members[0]) if members else ()
            members, limits = (_members(inside[-1]) if inside else ()), []
    return _Spot(path.removeprefix("."), section, members, limits)


def _members(annotation: Any) -> tuple[Any, ...]:
    """The types that an annotation allows, without None."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _members(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return tuple(m for arg in typing.get_args(annotation) for m in _members(arg))
    return () if annotation is type(None) else (annotation,)


def _member(members: tuple[Any, ...], label: str) -> Any:
    """The member of a union that pydantic means by a tag, or by a type's description."""
    by_tag = (m for m in members if label in _tags(m))
    by_name = (m for m in members if (typing.get_origin(m) or m).__name__ in label)
    return next(by_tag, None) or next(by_name, members[0])


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _tags(section: Any) -> tuple[Any, ...]:
    field = section.model_fields.get("name") if _is_section(section) else None
    return typing.get_args(field.annotation) if field else ()


def options_of(annotation: Any) -> list[Any]:
    """The values that a literal allows; of a union, its members' names."""
    return _choices(_members(annotation))


def _choices(expected: Iterable[Any]) -> list[Any]:
    """The values of a literal, or the names of a union's members."""
    return [c for e in expected for c in (_tags(e) if _is_section(e) else _literal(e))]


def _literal(annotation: Any) -> tuple[Any, ...]:
    return typing.get_args(annotation) if typing.get_origin(annotation) is typing.Literal else ()


def _names(section: type[BaseModel] | None) -> list[str]:
    return list(section.model_fields) if section else []


def nearest(given: str, allowed: Iterable[str]) -> str:
    """`; did you mean 'lr'?`, or nothing when no allowed name is near."""
    match = difflib.get_close_matches(given, list(allowed), n=1, cutoff=0.5)
    return f"; did you mean '{match[0]}'?" if match else ""


def without_password(text: str) -> str:
    """`https://user:secret@host/file?signature=…` → `https://host/file`, wherever it stands in a text."""
    text = re.sub(r"(?<=://)[^/\s\"']*@", "", text)
    return re.sub(r"(://[^\s\"'?#]*)\?[^\s\"']*", r"\1", text)


def show(value: Any) -> str:
    text = without_password(json.dumps(value, default=str, ensure_ascii=False))
    return text if len(text) <= 60 else text[:57] + "..."

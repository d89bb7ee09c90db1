"""The sources by the names that an experiment and the command line give them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from vitlab.config import UserError, nearest
from vitlab.data.making.sources import Source, digits, folder

PATHS = ("folder", "csv", "npy", "idx", "tars")  # kinds whose name is a path
FORMS = "digits, folder:PATH or an existing directory, csv:FILE, npy:FILE.npz or npy:DIR, idx:DIR, tars:DIR, "
FORMS += "hf:NAME[:split], hf-stream:NAME[:split]"


def open_source(text: str, image: str | None = None, label: str | None = None) -> Source:
    """A source by its name, see `FORMS`; `image` and `label` choose columns where there are any."""
    kind, _, rest = text.partition(":")
    if text == "digits":
        return digits()
    if rest and kind in ("hf", "hf-stream"):
        from vitlab.data.making.hugging_face import hugging_face, load_hugging_face

        return hugging_face(load_hugging_face(rest, kind == "hf-stream"), text, image, label)
    if rest and kind in PATHS:
        return _of_path(kind)(Path(rest), image, label)
    if Path(text).is_dir():
        return folder(Path(text))
    near = nearest(kind if rest else text, ("digits", *PATHS, "hf", "hf-stream"))
    raise UserError(f"data.source: given '{text}'; allowed: {FORMS}{near}")


def _of_path(kind: str) -> Callable[[Path, str | None, str | None], Source]:
    from vitlab.data.making.pixels import idx, npy
    from vitlab.data.making.reshard import tars
    from vitlab.data.making.tables import table

    return {
        "folder": lambda path, image, label: folder(path),
        "csv": table,
        "npy": npy,
        "idx": lambda path, image, label: idx(path),
        "tars": lambda path, image, label: tars(path),
    }[kind]


def absolute(text: str) -> str:
    """The same source named by an absolute path: `folder:images` is other data in another directory."""
    kind, _, rest = text.partition(":")
    name, *split = rest.split(":", 1)
    if kind in PATHS and rest:
        return f"{kind}:{Path(rest).resolve()}"
    if kind in ("hf", "hf-stream") and name and Path(name).is_dir():
        return ":".join([kind, str(Path(name).resolve()), *split])
    if text != "digits" and Path(text).is_dir():
        return str(Path(text).resolve())
    return text

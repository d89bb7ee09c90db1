"""`vitlab export`: a trained model as a file for other tools."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
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
    export.set_defaults(action=act)


def act(given: argparse.Namespace) -> None:
    from vitlab.face import Face
    from vitlab.jobs.fetching import load
    from vitlab.models import export_model

    face = Face()
    with face.waiting(f"writing {given.dest} and reading it back"):
        written = export_model(load(given.model).model, given.dest, given.format)
    check = f"largest difference from the model {written.difference:.1e}" if written.difference else "equal"
    face.print(f"{written.path}: {written.bytes / 1000:,.0f} kB, read back: {check}")

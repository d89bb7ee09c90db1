"""`vitlab models`: every preset and what it costs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from vitlab.commands.figures import writable


def add(commands: Any) -> None:
    models = commands.add_parser(
        "models", help="list the models and their cost", epilog="example: vitlab models --json models.json"
    )
    models.add_argument("--json", type=Path, metavar="FILE", help="write the list there too")
    models.set_defaults(action=act)


def act(given: argparse.Namespace) -> None:
    from vitlab.face import Face
    from vitlab.models.cost import costs

    face = Face()
    if given.json is not None:
        writable(given.json)
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

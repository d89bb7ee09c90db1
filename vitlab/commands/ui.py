"""`vitlab ui`: MLflow's own, over the store of this machine."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any


def add(commands: Any) -> None:
    ui = commands.add_parser(
        "ui", help="open the MLflow UI on this machine", epilog="example: vitlab ui --port 5001"
    )
    ui.add_argument("--port", type=int, default=5000)
    ui.set_defaults(action=act)


def act(given: argparse.Namespace) -> None:
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

"""The address of an MLflow server: whether it is one, and whether anybody answers there."""

from __future__ import annotations

import base64
import http.client
import os
import queue
import threading
import urllib.error
import urllib.request
from urllib.parse import unquote, urlsplit

from vitlab.config import UserError, without_password

PATIENCE = 5.0  # seconds that a server has to say that it is there


def check_address(uri: str) -> None:
    parts = urlsplit(uri)
    server = parts.scheme in ("http", "https") and parts.hostname
    file = parts.scheme == "sqlite" and uri.startswith("sqlite:////")
    if not server and not file:
        raise UserError(
            f"tracking.uri: given {without_password(uri)!r}; allowed: an MLflow server, http://HOST:5000, "
            "or a file by its absolute path, sqlite:////PATH/mlflow.db"
        )


def sign_in(uri: str) -> None:
    """MLflow takes a name and a password from the environment; in the address they would be printed."""
    parts = urlsplit(uri)
    if parts.username is not None:
        os.environ["MLFLOW_TRACKING_USERNAME"] = unquote(parts.username)
        os.environ["MLFLOW_TRACKING_PASSWORD"] = unquote(parts.password or "")


def reach(uri: str) -> None:
    """A server that does not answer is one line now, not two minutes of retries later."""
    found: queue.SimpleQueue[str] = queue.SimpleQueue()
    # In a thread: neither a slow name server nor a slowly dripping answer is covered by urlopen's timeout.
    threading.Thread(target=lambda: found.put(_health(uri)), daemon=True).start()
    try:
        problem = found.get(timeout=PATIENCE)
    except queue.Empty:
        problem = f"no answer within {PATIENCE:g} s"
    if problem:
        raise UserError(
            f"tracking.uri: {uri} does not answer as an MLflow server ({problem}); "
            "start it or mend the address, or leave tracking.uri out to use a local file"
        )


def _health(uri: str) -> str:
    """What is wrong with a server; empty if nothing is."""
    request = urllib.request.Request(f"{uri}/health")  # noqa: S310  (check_address: http or https)
    name, password = (os.environ.get(f"MLFLOW_TRACKING_{n}") for n in ("USERNAME", "PASSWORD"))
    if name:
        token = base64.b64encode(f"{name}:{password or ''}".encode()).decode()
        request.add_header("Authorization", f"Basic {token}")
    try:
        with urllib.request.urlopen(request, timeout=2 * PATIENCE) as answer:  # noqa: S310
            answer.read(100)
    except urllib.error.HTTPError as error:
        error.close()
        hint = "; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" if error.code == 401 else ""
        return f"HTTP {error.code} {error.reason} for /health{hint}"
    except urllib.error.URLError as error:
        return str(getattr(error.reason, "strerror", None) or error.reason)
    except (OSError, http.client.HTTPException, ValueError) as error:
        return " ".join(str(error).split()) or type(error).__name__
    return ""

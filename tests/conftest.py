"""What tests of several rooms share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite file with MLflow's tables and nothing else; making one takes seconds, copying it none."""
    from vitlab.tracking import _client

    file = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    _client(f"sqlite:///{file}")
    return file


@pytest.fixture
def home(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh home folder whose store is ready."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / "home"
    folder.mkdir()
    shutil.copy(empty_database, folder / "mlflow.db")
    monkeypatch.setenv("VITLAB_HOME", str(folder))
    return folder

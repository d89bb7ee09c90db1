"""Models by their addresses: `runs:/RUN/model`, or a folder."""

from __future__ import annotations

from pathlib import Path

from vitlab.cache import Artifact
from vitlab.config import UserError
from vitlab.home import home
from vitlab.models import Loaded, load_model
from vitlab.tracking import Store, TrackingConfig, folder_digest

RUNS = "runs:/"


def fetch(uri: str, store: Store) -> Artifact:
    """An artifact of a run by `runs:/RUN/PATH`; without a path, its model."""
    run_id, _, path = uri.removeprefix(RUNS).partition("/")
    folder = store.download(run_id, path or "model")
    if folder is None:
        raise UserError(
            f"{uri}: this run has no such artifact; given path {path or 'model'!r}, expected 'model'"
        )
    return Artifact(run_id, path or "model", folder_digest(folder), folder)


def load(uri: str, tracking: TrackingConfig | None = None) -> Loaded:
    """A trained model by `runs:/RUN/model`, or by its folder: model, preprocessing, labels."""
    if uri.startswith(RUNS):
        loaded = load_model(fetch(uri, Store(tracking or TrackingConfig(), home())).folder)
    else:
        loaded = load_model(Path(uri))
    loaded.model.eval()
    return loaded

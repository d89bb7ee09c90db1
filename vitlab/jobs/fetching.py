"""Models by their addresses: `runs:/RUN/model`, or a folder."""

from __future__ import annotations

import re
from pathlib import Path

from vitlab.cache import Artifact
from vitlab.config import UserError
from vitlab.home import home
from vitlab.models import Loaded, load_model
from vitlab.tracking import Store, TrackingConfig, folder_digest

RUNS = "runs:/"


def fetch(uri: str, store: Store) -> Artifact:
    """An artifact of a run by `runs:/RUN/PATH`; without a path, its model."""
    name, _, path = uri.removeprefix(RUNS).partition("/")
    run_id = run_named(name, store)
    folder = store.download(run_id, path or "model")
    if folder is None:
        raise UserError(
            f"{uri}: this run has no such artifact; given path {path or 'model'!r}, expected 'model'"
        )
    return Artifact(run_id, path or "model", folder_digest(folder), folder)


def run_named(text: str, store: Store) -> str:
    """A run's id, given whole or by its first letters, as the table of a chain shows it."""
    found = []
    if re.fullmatch("[0-9a-f]{4,32}", text):
        experiments = [experiment.experiment_id for experiment in store.client.search_experiments()]
        query = f"attributes.run_id LIKE '{text}%'"
        found = [run.info.run_id for run in store.client.search_runs(experiments, query, max_results=2)]
    if len(found) != 1:
        many = "several runs begin with that; give more letters" if found else "no such run in this store"
        raise UserError(f"{RUNS}{text}: {many}; the id stands in a chain's table and in the UI")
    return str(found[0])


def load(uri: str, tracking: TrackingConfig | None = None) -> Loaded:
    """A trained model by `runs:/RUN/model`, or by its folder: model, preprocessing, labels."""
    if uri.startswith(RUNS):
        loaded = load_model(fetch(uri, Store(tracking or TrackingConfig(), home())).folder)
    else:
        loaded = load_model(Path(uri))
    loaded.model.eval()
    return loaded

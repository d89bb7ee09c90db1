"""The loop's figures on their way: to MLflow in batches, and now and then to the driver's screen."""

from __future__ import annotations

import time
from collections.abc import Callable

from vitlab.engine.serve import Post
from vitlab.jobs.place import Place
from vitlab.tracking import Metrics

SHOW_EVERY = 0.3  # seconds between two messages to the driver


class Recorder:
    """The loop's figures: to MLflow in batches, and now and then to the driver's screen."""

    def __init__(self, place: Place, post: Post, may_write: Callable[[], bool]) -> None:
        self.metrics, self.post, self.shown = Metrics(place.store(), place.run_id, may_write), post, 0.0

    def log(self, step: int, values: dict[str, float]) -> None:
        self.metrics.log(step, values)

    def flush(self) -> None:
        self.metrics.flush()

    def progress(self, step: int, total: int, values: dict[str, float]) -> None:
        now = time.monotonic()
        validated = any(name.startswith("val/") for name in values)
        probed = any(name.startswith("probe/") for name in values)
        if validated or probed or now - self.shown > SHOW_EVERY:
            self.shown = now
            self.post("progress", (step, total, values))
        if validated:
            self.post("validated", (step / total, values))

    def say(self, text: str) -> None:
        self.post("say", text)

    def note(self, text: str) -> None:
        self.post("note", text)

    def close(self) -> None:
        self.metrics.close()


class Silent:
    """The recorder of every rank but the first."""

    def log(self, step: int, values: dict[str, float]) -> None: ...

    def flush(self) -> None: ...

    def progress(self, step: int, total: int, values: dict[str, float]) -> None: ...

    def say(self, text: str) -> None: ...

    def note(self, text: str) -> None: ...

    def close(self) -> None: ...

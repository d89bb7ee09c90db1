"""What tests of several rooms share."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from xdist.scheduler import LoadScopeScheduling

from vitlab.environment import set_for_torch

if TYPE_CHECKING:
    from vitlab.cache import Artifact
    from vitlab.tracking import Store

TINY = Path(__file__).parent / "integration" / "tiny.yaml"


def pytest_configure() -> None:
    """One thread, waiting asleep: on busy cores small nets are a hundred times slower with spinning ones."""
    set_for_torch()
    import torch

    torch.set_num_threads(1)


ROOMS = ("integration", "engine")  # each shares one head of Ray, or one launch of workers; they take longest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where several processes test (`-n`), what takes longest begins first."""
    if hasattr(config, "workerinput"):
        order = {room: place for place, room in enumerate(ROOMS)}
        items.sort(key=lambda item: order.get(item.path.parent.name, len(ROOMS)))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """A file stays in one process, for what its tests share; so does a room of `ROOMS`."""

    class Rooms(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return next((room for room in ROOMS if f"/{room}/" in file), file)

    config.option.loadscopereorder = False
    return Rooms(config, log)


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite file with MLflow's tables and nothing else; making one takes seconds, copying it none."""
    from vitlab.tracking import _client

    file = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    _client(f"sqlite:///{file}")
    return file


@pytest.fixture(scope="session")
def new_home(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Callable[[], Path]:
    """Makes fresh home folders whose store is ready."""

    def make() -> Path:
        folder = tmp_path_factory.mktemp("home")
        shutil.copy(empty_database, folder / "mlflow.db")
        return folder

    return make


@pytest.fixture
def home(new_home: Callable[[], Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh home folder whose store is ready."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = new_home()
    monkeypatch.setenv("VITLAB_HOME", str(folder))
    return folder


@pytest.fixture(scope="module")
def shared_home(new_home: Callable[[], Path]) -> Iterator[Path]:
    """The same for all tests of a file: what one of them has made is a hit for the next."""
    folder = new_home()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setenv("VITLAB_HOME", str(folder))
        yield folder


@pytest.fixture
def finetuned() -> Iterator[Callable[..., tuple[Artifact, Store]]]:
    """Fine-tunes the tiny experiment in this process, in the home that the environment names."""
    import torch

    import vitlab
    from vitlab.face import Face

    def finetune(*overrides: str) -> tuple[Artifact, Store]:
        exp = vitlab.read(TINY, ["cluster.workers=0", "cluster.zero=null", *overrides])
        with vitlab.Run(exp, "notebook", face=Face(quiet=True)) as run:
            artifact = run.finetune(exp.need("finetune"), data=run.shards(exp.data))
            assert run.face.rows[-1].outcome == "ran"
        return artifact, run.store

    threads = torch.get_num_threads()
    yield finetune
    torch.set_num_threads(threads)

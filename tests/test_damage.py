"""Bad samples in a whole stage: passed over, counted, listed and bounded."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from vitlab.cache import Artifact
from vitlab.config import UserError
from vitlab.data import Shards, WriteOptions, digits, open_shards, write_shards
from vitlab.tracking import Store

Finetuned = Callable[..., tuple[Artifact, Store]]
SHORT = ("finetune.epochs=2", "finetune.optim.warmup_epochs=0", "finetune.log_every=1")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    folder = tmp_path_factory.mktemp("shards") / "digits"
    return write_shards(digits(), folder, WriteOptions(shard_samples=200))


def damaged(made: Shards, folder: Path, images: int, shard: bool = False) -> set[tuple[str, str]]:
    """A copy without the pixels of some images, and without a whole shard if asked; what is lost."""
    shutil.copytree(made.path, folder)
    first, *_, last = made.split("train")
    columns = made.columns(first)
    with (folder / first.file).open("r+b") as tar:
        for row in range(images):
            tar.seek(columns.offsets[row] + 40)  # behind the header of a PNG
            tar.write(bytes(columns.sizes[row] - 40))
    lost = {(first.file, key) for key in columns.keys[:images]}
    if shard:
        (folder / last.file).unlink()
        lost |= {(last.file, key) for key in made.columns(last).keys}
    return lost


def test_bad_samples_are_passed_over_counted_and_listed(
    made: Shards, tmp_path: Path, finetuned: Finetuned, home: Path
) -> None:
    lost = damaged(made, tmp_path / "d", 3, shard=True)
    missing = len(lost) - 3
    found, store = finetuned(*SHORT, "data.source=null", f"data.path={tmp_path / 'd'}", "data.max_bad=0.3")
    metrics = store.get(found.run_id).metrics
    assert metrics["data/bad"] == len(lost)
    assert metrics["data/bad/broken_image"] + metrics.get("data/bad/cut_image", 0) == 3
    assert metrics["data/bad/missing_shard"] == missing
    folder = store.download(found.run_id, "data")
    assert folder is not None
    with (folder / "bad_samples.csv").open(newline="") as text:
        rows = list(csv.DictReader(text))
    assert {(row["shard"], row["key"]) for row in rows} == lost
    assert {row["kind"] for row in rows} <= {"broken_image", "cut_image", "missing_shard"}
    assert all(row["reason"] for row in rows)


def test_a_flood_is_one_line(made: Shards, tmp_path: Path, finetuned: Finetuned, home: Path) -> None:
    damaged(made, tmp_path / "d", 20)
    assert open_shards(tmp_path / "d").digest == made.digest
    with pytest.raises(UserError, match=r"of 1261 samples cannot be read \(.*max_bad allows 0\.10%") as e:
        finetuned(*SHORT, "data.source=null", f"data.path={tmp_path / 'd'}")
    assert "\n" not in str(e.value)
    assert made.split("train")[0].file in str(e.value)


def test_a_missing_shard_is_told_before_anything_starts(
    made: Shards, tmp_path: Path, finetuned: Finetuned, home: Path
) -> None:
    damaged(made, tmp_path / "d", 0, shard=True)
    with pytest.raises(
        UserError, match=r"the index names this file, but it is missing \(\d+ of 1261 train"
    ) as e:
        finetuned(*SHORT, "data.source=null", f"data.path={tmp_path / 'd'}")
    assert "\n" not in str(e.value)

"""Bad samples of a job: met by every worker, counted over all of them, told to MLflow.

A worker that meets too many by itself ends the job at once. What all of them met together is known when they
settle, after every epoch: only then do they speak with each other.
"""

from __future__ import annotations

import csv
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from vitlab.batch import Bad, Batch
from vitlab.config import UserError
from vitlab.data import Shards, check_bound, counts, sets_of, write_json
from vitlab.dist import World
from vitlab.jobs.place import Place


class Ledger:
    """What could not be read so far, by split; each sample once."""

    def __init__(
        self,
        place: Place,
        shards: Shards,
        world: World,
        note: Callable[[str], None] | None = None,
        kept: Path | None = None,
    ) -> None:
        """`kept`: a folder for what was met, for when the job goes on after it was stopped."""
        self.place, self.shards, self.world, self.note = place, shards, world, note
        self.kept = kept / "bad.json" if kept else None
        self.met: dict[str, dict[tuple[str, str], Bad]] = {}
        self.told = 0
        for split, *bad in world.from_first(self._earlier() if world.first else None):
            self.met.setdefault(split, {})[bad[1], bad[2]] = Bad(*bad)

    def watch(self, batches: Iterable[Batch], split: str) -> Iterator[Batch]:
        """Passes the batches on and keeps what is bad in them."""
        met = self.met.setdefault(split, {})
        for batch in batches:
            met.update({(one.shard, one.key): one for one in batch.bad})
            if batch.bad:
                self._check(split)
            yield batch

    def settle(self) -> dict[str, float]:
        """How many of each kind all workers have met, and the index names. All ranks call it together."""
        for theirs in self.world.gather(self.met):
            for split, met in theirs.items():
                self.met.setdefault(split, {}).update(met)
        for split in self.met:
            self._check(split)
        self._tell()
        if self.world.first and self.kept and any(self.met.values()):
            self.kept.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.kept, [[split, *one] for split, met in self.met.items() for one in met.values()])
        bad = self.all()
        return {"data/bad": float(len(bad))} | {f"data/bad/{k}": float(n) for k, n in counts(bad).items()}

    def _earlier(self) -> list[list[str]]:
        if self.kept is None or not self.kept.is_file():
            return []
        found: list[list[str]] = json.loads(self.kept.read_text("utf8"))
        return found

    def _tell(self) -> None:
        """A line for the person when there are more than before."""
        met = [one for some in self.met.values() for one in some.values()]
        if len(met) > self.told and self.world.first and self.note:
            kinds = ", ".join(f"{n} {kind}" for kind, n in counts(met).items())
            self.note(
                f"{len(met)} bad so far, passed over: {kinds}; the run's data/bad_samples.csv lists them"
            )
        self.told = len(met)

    def all(self) -> list[Bad]:
        """Those of the index and those met, by shard and key."""
        whole = {(one.shard, one.key): one for one in self.shards.bad}
        for met in self.met.values():
            whole.update(met)
        return sorted(whole.values(), key=lambda one: (one.shard, one.key))

    def publish(self) -> None:
        """`data/bad_samples.csv` in the job's run, if there is anything to list."""
        bad = self.all()
        if not bad:
            return
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "bad_samples.csv"
            with file.open("w", encoding="utf8", newline="") as text:
                csv.writer(text, lineterminator="\n").writerows([Bad._fields, *bad])
            self.place.store().upload_file(self.place.run_id, file, "data")

    def _check(self, split: str) -> None:
        met, bound, where = self.met[split].values(), self.place.data.max_bad, self.shards.where
        local = not any(part.cache for part in sets_of(self.shards))
        verify = " and ".join(f"`vitlab shards verify {part.where}`" for part in sets_of(self.shards))
        listed = f"list them with {verify}, " if local else ""
        way = f"{listed}mend them or raise data.max_bad"
        try:
            check_bound(met, self.shards.count(split), bound, where, way)
        except UserError:
            if self.world.first:
                with suppress(Exception):  # the line matters more than the list
                    self.publish()
            raise

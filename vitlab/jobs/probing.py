"""Online probes of a training without labels, on the workers that train: features in, figures out.

All ranks forward the same number of batches, as ZeRO-3 needs; the first one judges. Nothing is drawn from a
global generator and no module changes, so that the training is the same to the bit with and without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from vitlab.data import Shards, chosen, eval_batches
from vitlab.dist import World
from vitlab.engine.loop import Probe
from vitlab.engine.strategy import Strategy
from vitlab.evaluation.features import Found, collect
from vitlab.evaluation.probe import collapse, probe_figures
from vitlab.jobs.damage import Ledger
from vitlab.jobs.place import Place, mover
from vitlab.methods import Method
from vitlab.sections import TrainConfig


def feature_probes(
    config: TrainConfig,
    place: Place,
    method: Method,
    shards: Shards,
    world: World,
    ledger: Ledger,
    note: Callable[[str], None],
) -> list[Probe]:
    """None for a method that trains a classifier, of which `val/top1` tells, and a model without features."""
    if not method.headless or not config.probe.bank or "pooled" not in method.exported().gives:
        return []
    collapses = not method.one_view  # what compares views can learn to answer all images alike
    return [
        Probe(config.probe.every, Look(config, place, shards, world, ledger, note if collapses else None))
    ]


@dataclass
class Look:
    """One probe of one training."""

    config: TrainConfig
    place: Place
    shards: Shards
    world: World
    ledger: Ledger
    note: Callable[[str], None] | None  # tells of a collapse, once

    def __call__(self, strategy: Strategy, step: int) -> Iterator[tuple[str, float]]:
        probe = self.config.probe
        bank = self._pass(strategy, "train", probe.bank)
        queries = self._pass(strategy, "val", probe.queries) if self.shards.count("val") else None
        if not self.world.first:
            return
        figures = dict(probe_figures(bank, queries, len(self.shards.classes), probe))
        trouble = collapse(figures, bank.features.shape[1])
        if trouble and self.note:
            self.note(f"step {step}: {trouble}")
            self.note = None
        yield from figures.items()

    def _pass(self, strategy: Strategy, split: str, most: int) -> Found:
        """Features of at most so many images of a split, always the same ones, without augmentation."""
        place, world = self.place, self.world
        numbers = chosen(self.shards.count(split), most)
        batches = eval_batches(
            self.shards,
            place.data,
            split,
            self.config.batch_size,
            world,
            loaders=place.loaders,
            numbers=numbers,
        )
        to_device = mover(place.data, world)
        watched = (to_device(b) for b in self.ledger.watch(batches, split))
        found = collect(lambda batch: strategy.forward(batch, "features"), watched, world)
        return found.to(world.device)

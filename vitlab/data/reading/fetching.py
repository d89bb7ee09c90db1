"""Shards at a URL, on their way before a worker needs them: what is read is known in advance.

The requests for micro-batches are a pure function, so a second copy of them runs ahead and tells which shards
come next. Of the shards of a folder on this machine nothing is fetched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from vitlab.data.shards.index import ShardInfo, Shards, Tar
from vitlab.data.stores.ahead import Ahead


class Micro(NamedTuple):
    """The request for one micro-batch. Samples of -1 are empty slots."""

    epoch: int
    positions: np.ndarray  # places in the epoch's order, for the random numbers
    samples: np.ndarray


class Reach(NamedTuple):
    """What a worker reads at a time."""

    split: str
    ahead: int  # shards beyond those
    streams: int  # that this worker serves
    workers: int  # that may share the cache
    window: int = 0  # how far a stream mixes
    early: int = 0  # requests that loader processes take before their batches are read


def fetched_ahead(requests: Callable[[], Iterator[Micro]], shards: Shards, reach: Reach) -> Iterator[Micro]:
    """The requests, while the shards of those to come are fetched; raises when a store is gone."""
    tars = shards.tars(reach.split)
    homes = {id(tar.shards): tar.shards for tar in tars if tar.shards.cache is not None}
    if not homes:
        return requests()
    _check_room([*homes.values()], reach)
    share = 1 / (reach.workers * len(homes))  # of the cache
    fetchers = [_begin(requests(), tars, home, reach, share) for home in homes.values()]
    return _told(requests(), fetchers, reach.early)


def _told(requests: Iterator[Micro], fetchers: Sequence[Ahead], early: int) -> Iterator[Micro]:
    for number, micro in enumerate(requests):
        for fetcher in fetchers:
            fetcher.reach(max(0, number - early))
        yield micro


def _begin(requests: Iterator[Micro], tars: Sequence[Tar], home: Shards, reach: Reach, share: float) -> Ahead:
    assert home.cache is not None
    depth, most = _near(home, reach) + reach.ahead, int(home.cache.most_bytes * share)
    return Ahead(home.cache, _shards_of(requests, tars, home), depth=depth, most_bytes=most)


def _near(home: Shards, reach: Reach) -> int:
    """How many shards of a set a worker's streams mix at a time."""
    infos = home.split(reach.split)
    mean = sum(info.count for info in infos) / len(infos)
    return min(len(infos), reach.streams * (1 + math.ceil(reach.window / max(mean, 1))))


def _shards_of(requests: Iterator[Micro], tars: Sequence[Tar], home: Shards) -> Iterator[list[ShardInfo]]:
    ends = np.cumsum([tar.info.count for tar in tars])
    for micro in requests:
        places = np.unique(np.searchsorted(ends, micro.samples[micro.samples >= 0], side="right"))
        yield [tars[i].info for i in places.tolist() if tars[i].shards is home]


def _check_room(homes: Sequence[Shards], reach: Reach) -> None:
    """All that is mixed at a time must fit, or the same shards would be fetched again and again."""
    infos = [home.split(reach.split) for home in homes]
    at_once = sum(
        min(len(some), _near(home, reach) * reach.workers) for home, some in zip(homes, infos, strict=True)
    )
    assert homes[0].cache is not None
    homes[0].cache.check_room(max(info.bytes for some in infos for info in some), at_once)

"""What can be wrong with input, by kind: each bad sample is named, counted and skipped, up to a bound.

A sample found bad while reading keeps its slot in the batch with weight 0, so no other sample moves. What
cannot even become a sample (a tar that ends early, a name that leads out of it) is named by the index.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from vitlab.batch import Bad
from vitlab.config import UserError

KINDS = {
    "broken_header": "a tar header that is none",
    "cut_tar": "a tar ends early",
    "missing_shard": "a shard's file is missing",
    "empty_shard": "a shard without samples",
    "unsafe_name": "a member name that leads out of the tar",
    "not_a_file": "a link or another member that is no plain file",
    "duplicate_key": "a key that the tar has already",
    "no_image": "a sample without an image",
    "no_label": "a sample without a label, among samples that have one",
    "wrong_label": "a label that is no class of the shards",
    "cut_image": "an image file that ends early",
    "broken_image": "an image file that cannot be decoded",
    "unknown_format": "a file that is no image of a known format",
    "too_large": "an image of more pixels than data.max_pixels",
}


class BadInputError(Exception):
    """One sample, or one member of a tar, that cannot be read. The reader catches it and names the sample."""

    def __init__(self, kind: str, reason: str) -> None:
        assert kind in KINDS, kind
        super().__init__(reason)
        self.kind, self.reason = kind, reason


def counts(bad: Collection[Bad]) -> dict[str, int]:
    """How many of each kind, the most frequent first."""
    return dict(Counter(one.kind for one in bad).most_common())


def check_bound(bad: Collection[Bad], total: int, bound: float, where: str, way: str) -> None:
    """Refuses a flood: more bad samples than the bound allows of so many. `way`: how to go on."""
    if len(bad) <= bound * total:
        return
    kinds = ", ".join(f"{n} {kind}" for kind, n in counts(bad).items())
    first = min(bad, key=lambda one: (one.shard, one.key))
    raise UserError(
        f"{where}: {len(bad)} of {total} samples cannot be read ({kinds}), max_bad allows {bound:.2%}; "
        f"the first: {first}; {way}"
    )

"""The `data` section of an experiment: which images, how they are split, in which shape models see them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from vitlab.config import Config, UserError, deciding, free

if TYPE_CHECKING:
    from vitlab.data.shards.index import Shards

Channel = Annotated[list[float], Field(min_length=1, max_length=3)]


class WriteOptions(Config):
    """How images become shards. All of it shapes them but the last two."""

    held_out: float = Field(default=0.2, ge=0, lt=1)  # fraction for the final evaluation
    val: float = Field(default=0.1, ge=0, lt=1)  # fraction for choices during the work
    shard_samples: int = Field(default=1000, ge=1)  # the most images of a shard
    shard_bytes: int = Field(default=256_000_000, ge=1)  # its most bytes, where an image is no larger
    resize: int | None = Field(default=None, ge=1)  # larger images: their shorter side in pixels
    quality: int | None = Field(default=None, ge=1, le=100)  # every image becomes a JPEG of this quality
    max_pixels: int = Field(default=100_000_000, ge=1)  # of one decoded image; a larger one is a bad sample
    max_bad: float = free(0.001, ge=0, le=1)  # the fraction of bad samples that is passed over
    write_workers: int = free(0, ge=0)  # threads that read and encode; 0: one a core, at most 16

    @model_validator(mode="after")
    def _leaves_training(self) -> Self:
        if self.held_out + self.val >= 1:
            raise ValueError(
                f"held_out + val: given {self.held_out} + {self.val}; "
                "allowed: below 1, so that samples are left for training"
            )
        return self


class Origin(Config):
    """Where images come from."""

    source: str | None = None  # see `open_source`
    path: str | None = free(None)  # existing shards; what they are is told by their digest
    image_column: str | None = None  # of a table, where the choice is not plain
    label_column: str | None = None
    limit: int | None = Field(default=None, ge=1)  # no more than the first so many of the source

    def check_origin(self) -> None:
        if (self.source is None) == (self.path is None):
            given = "both" if self.path is not None else "neither"
            raise ValueError(
                f"give exactly one of source (to write shards) and path (existing ones); given {given}"
            )
        if self.path is not None and self.limit is not None:
            raise ValueError(f"limit: given {self.limit}; it is for a source, shards in path are read whole")


class SetConfig(Origin):
    """One of several sets of images that are read as one."""

    weight: float | None = Field(default=None, gt=0)  # its share of every batch, in any unit; see `blend`

    @model_validator(mode="after")
    def _fits(self) -> Self:
        self.check_origin()
        return self


class RemoteConfig(Config):
    """Shards at a URL: a bounded folder here that holds them, and patience with where they come from."""

    cache: str | None = free(None)  # the folder, absolute; default cache/shards of the home folder
    cache_gb: float = free(50.0, gt=0)  # the most that all shards in it take together
    ahead: int = free(4, ge=0)  # shards fetched before a worker needs them, beside those it reads
    retries: int = free(6, ge=0)  # of one transfer, after pauses that double from half a second
    stall: float = free(20.0, gt=0)  # seconds without a byte until a transfer is tried again

    @model_validator(mode="after")
    def _absolute(self) -> Self:
        if self.cache is not None and not Path(self.cache).is_absolute():
            raise ValueError(f"cache: given {self.cache!r}; give an absolute path, as /scratch/shards")
        return self


class ShardsConfig(Origin, WriteOptions):
    """The images: where they come from, how they are split, in which shape models see them."""

    sets: list[SetConfig] = Field(default=[])  # several origins instead of one; other keys hold for all
    remote: RemoteConfig = free(RemoteConfig())
    image_size: int = Field(ge=1)  # the side in pixels that models see
    channels: Literal[1, 3] = 3
    num_classes: int | None = Field(default=None, ge=1)  # checked against the shards
    streams: int = Field(default=8, ge=1)  # canonical streams: the most workers that can read
    window: int = Field(default=1000, ge=1)  # how far shuffling carries a sample inside a stream
    mean: Channel | None = None  # of values in 0..1, one per channel; default 0.5 each
    std: Channel | None = None  # default 0.5 each: values in -1..1

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.sets:
            self._check_sets()
        else:
            self.check_origin()
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) != self.channels:
                raise ValueError(
                    f"{name}: given {len(values)} numbers; expected one per channel, {self.channels}"
                )
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"std: given {self.std}; allowed: numbers above 0")
        return self

    def _check_sets(self) -> None:
        for name in Origin.model_fields:
            if getattr(self, name) is not None:
                raise ValueError(
                    f"{name}: given beside sets; write it into one of the sets or leave sets out"
                )
        weighted = sum(one.weight is not None for one in self.sets)
        if 0 < weighted < len(self.sets):
            raise ValueError(
                f"sets: {weighted} of {len(self.sets)} have a weight; give it to all of them or to none"
            )

    def parts(self) -> list[ShardsConfig]:
        """A section for each set, as if it were the only one. Classes are counted over all of them."""
        if not self.sets:
            return [self]
        names = set(type(self).model_fields) - {"sets", "num_classes"} - set(Origin.model_fields)
        common = {name: getattr(self, name) for name in names}
        origins = [{name: getattr(one, name) for name in Origin.model_fields} for one in self.sets]
        return [type(self)(**common, **origin) for origin in origins]

    @property
    def weights(self) -> list[float | None]:
        """Of the sets; what `blend` takes beside the shards of the parts."""
        return [one.weight for one in self.sets] or [None]


def written(config: ShardsConfig) -> dict[str, Any]:
    """What decides the shards that are made of a source."""
    names = set(WriteOptions.model_fields) | set(Origin.model_fields)
    return {name: value for name, value in deciding(config).items() if name in names}


def normalisation(config: ShardsConfig) -> tuple[Tensor, Tensor]:
    """mean and std as `Batch.to` takes them, each C 1 1."""
    mean, std = (torch.tensor(v or [0.5] * config.channels) for v in (config.mean, config.std))
    return mean.view(-1, 1, 1), std.view(-1, 1, 1)


def check_classes(config: ShardsConfig, shards: Shards) -> None:
    """The experiment and the data agree about the number of classes."""
    given, found = config.num_classes, len(shards.classes)
    if given is not None and given != found:
        raise UserError(
            f"data.num_classes: given {given}, but the shards hold {found} classes; "
            f"leave it out or give {found}"
        )

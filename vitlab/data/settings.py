"""The `data` section of an experiment: which images, how they are split, in which shape models see them."""

from __future__ import annotations

from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from vitlab.config import Config, UserError, free
from vitlab.data.index import Shards

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


class ShardsConfig(WriteOptions):
    """The images: where they come from, how they are split, in which shape models see them."""

    source: str | None = None  # see `open_source`
    path: str | None = free(None)  # existing shards; what they are is told by their digest
    image_column: str | None = None  # of a table, where the choice is not plain
    label_column: str | None = None
    limit: int | None = Field(default=None, ge=1)  # no more than the first so many of the source
    image_size: int = Field(ge=1)  # the side in pixels that models see
    channels: Literal[1, 3] = 3
    num_classes: int | None = Field(default=None, ge=1)  # checked against the shards
    streams: int = Field(default=8, ge=1)  # canonical streams: the most workers that can read
    window: int = Field(default=1000, ge=1)  # how far shuffling carries a sample inside a stream
    mean: Channel | None = None  # of values in 0..1, one per channel; default 0.5 each
    std: Channel | None = None  # default 0.5 each: values in -1..1

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.source is None) == (self.path is None):
            given = "both" if self.path is not None else "neither"
            raise ValueError(
                f"give exactly one of source (to write shards) and path (existing ones); given {given}"
            )
        if self.path is not None and self.limit is not None:
            raise ValueError(f"limit: given {self.limit}; it is for a source, shards in path are read whole")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) != self.channels:
                raise ValueError(
                    f"{name}: given {len(values)} numbers; expected one per channel, {self.channels}"
                )
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"std: given {self.std}; allowed: numbers above 0")
        return self


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

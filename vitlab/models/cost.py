"""What a model costs: parameters, and multiply-adds of one image forward.

Counted without memory: the model stands on the meta device, where shapes pass through it and no numbers.
A multiply-add is one multiplication with its addition, in units of 1e9: GFLOPs or GMACs to the papers.
Dense layers, convolutions and the products of attention are counted, softmax, norms and activations
are not.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from vitlab.models.borrowed import BorrowedConfig
from vitlab.models.compact import CompactConfig
from vitlab.models.families import BUILT, MODELS, TOKENIZERS, create_model, from_config
from vitlab.models.features import Backbone, BackboneConfig, Size

IMAGENET = (224, 1000)  # image size, classes
CIFAR = (32, 10)
LARGE = ("cct_14_7x2",)  # the compact model that its authors made for ImageNet


class Cost(NamedTuple):
    params: int
    gflops: float  # 1e9 multiply-adds


class Listed(NamedTuple):
    """One preset in the list of models."""

    name: str
    family: str
    params: int
    gflops: float
    image_size: int


def cost(model: str | BackboneConfig, image_size: int | Size, num_classes: int = 1000) -> Cost:
    """Of a preset by its name, or of a config."""
    with torch.device("meta"):
        if isinstance(model, str):
            return cost_of(create_model(model, num_classes=num_classes, image_size=image_size))
        return cost_of(from_config(model, num_classes=num_classes, image_size=image_size))


def cost_of(model: Backbone, want: Collection[str] = ("logits", "tokens")) -> Cost:
    """Of a model on the meta device; it is moved there if it is not.

    The papers count every token in every block. A model that reads its class token alone leaves the others
    out of its last block: `want` of ("logits",) counts what is then computed.
    """
    model = model.to("meta").eval()
    images = torch.empty(1, model.config.in_chans, *model.image_size, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(images, model.gives & frozenset(want))
    return Cost(sum(p.numel() for p in model.parameters()), counter.get_total_flops() / 2e9)


def costs() -> Iterator[Listed]:
    """All presets. Compact models for small images are counted on CIFAR's, all others on ImageNet's; of a
    tokenizer the operations are those of naming the codes."""
    for name, config in MODELS.items():
        if config is not BorrowedConfig:  # these have as many sizes as the libraries have nets
            small = config is CompactConfig and name not in LARGE
            image_size, num_classes = CIFAR if small else IMAGENET
            params, gflops = cost(name, image_size, 0 if config in TOKENIZERS else num_classes)
            yield Listed(name, BUILT[config].__name__, params, round(gflops, 4), image_size)

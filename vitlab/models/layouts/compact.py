"""Weights of compact transformers: ours are the authors' names, which vit-pytorch's CCT has as well."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from vitlab.models.features import Backbone
from vitlab.models.layouts.base import Layout, State

MARKS = ("tokenizer.conv_layers.0.0.weight", "classifier.blocks.0.self_attn.qkv.weight")


def _fits(state: Mapping[str, Tensor], model: Backbone) -> bool:
    own = {name for name, _ in model.named_parameters()}
    return all(name in own and name in state for name in MARKS)


def _same(state: State, model: Backbone) -> State:
    return state


LAYOUTS = (Layout("SHI-Labs/Compact-Transformers", _fits, _same),)

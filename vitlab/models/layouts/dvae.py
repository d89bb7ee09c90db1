"""Weights of discrete VAEs: ours are the names of openai/DALL-E, behind `encoder.` and `decoder.`."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from vitlab.models.features import Backbone
from vitlab.models.layouts.base import Layout, State

MARKS = ("encoder.blocks.input.w", "decoder.blocks.input.w")
OURS = ("mean", "std")  # what images are normalised with, which OpenAI's encoder never sees


def _fits(state: Mapping[str, Tensor], model: Backbone) -> bool:
    return all(name in state for name in MARKS) and not any(name in state for name in OURS)


def _completed(state: State, model: Backbone) -> State:
    own = model.state_dict()
    return {**state, **{name: own[name] for name in OURS}}


LAYOUTS = (Layout("openai/DALL-E", _fits, _completed),)

"""Weights of CoAtNet: only timm gave some out, and timm's names are this project's."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from vitlab.models.features import Backbone
from vitlab.models.layouts.base import Layout, State


def _fits(state: Mapping[str, Tensor], model: Backbone) -> bool:
    return any(re.match(r"stages\.\d+\.blocks\.\d+\.(conv1_1x1|attn\.qkv)\.", name) for name in state)


def _same(state: State, model: Backbone) -> State:
    return state


LAYOUTS = (Layout("timm", _fits, _same),)

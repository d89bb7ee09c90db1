"""How the weights of one source are laid out, and how they become ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor

from vitlab.models.features import Backbone

State = dict[str, Tensor]


class Layout(NamedTuple):
    """`fits` looks at names (and shapes) alone; `convert` returns every tensor under this project's name.

    A tensor that `convert` does not know keeps its name, so that strict loading names it.
    """

    source: str  # who writes weights so: "timm", "Hugging Face", "facebookresearch/mae", …
    fits: Callable[[Mapping[str, Tensor], Backbone], bool]
    convert: Callable[[State, Backbone], State]

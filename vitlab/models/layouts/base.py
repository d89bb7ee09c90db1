"""How the weights of one source are laid out, and how they become ours."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

from torch import Tensor

from vitlab.models.features import Backbone

State = dict[str, Tensor]


def nothing(state: Mapping[str, Tensor], model: Backbone) -> Collection[str]:
    """The weights hold no tensor that is known to be another's."""
    return ()


class Layout(NamedTuple):
    """`fits` looks at names (and shapes) alone; `convert` returns every tensor under this project's name.

    A tensor that `convert` does not know keeps its name, so that strict loading names it. Tensors that
    such weights are known to hold beside the model, as a decoder, are named by `leaves` in the source's
    own words; they are left out before `convert` and stand in the report.
    """

    source: str  # who writes weights so: "timm", "Hugging Face", "facebookresearch/mae", …
    fits: Callable[[Mapping[str, Tensor], Backbone], bool]
    convert: Callable[[State, Backbone], State]
    leaves: Callable[[Mapping[str, Tensor], Backbone], Collection[str]] = nothing

"""Plain state dicts of torchvision and timm for a borrowed net: `net.` before all names, the head apart.

Older files of torchvision's DenseNet have a dot more in some names (`norm.1` for `norm1`). Auxiliary
classifiers, which a borrowed net does not have, are left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from vitlab.models.borrowed import Borrowed
from vitlab.models.features import Backbone
from vitlab.models.layouts.base import Layout, State

AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")
_OLD = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])\.")


def _name(name: str, classifier: str) -> str:
    if name.startswith(f"{classifier}."):
        return f"head{name.removeprefix(classifier)}"
    return "net." + _OLD.sub(r"\1\2.", name)


def _names(state: Mapping[str, Tensor], model: Borrowed) -> dict[str, str]:
    """Theirs → ours."""
    return {name: _name(name, model.classifier) for name in state}


def _leaves(state: Mapping[str, Tensor], model: Backbone) -> list[str]:
    return [name for name in state if name.startswith(AUXILIARY)]


def _fits(state: Mapping[str, Tensor], model: Backbone) -> bool:
    """Most names are the net's; those that are not, strict loading names."""
    if not isinstance(model, Borrowed) or not state:
        return False
    own = model.state_dict()
    ours = _names(state, model)
    return 2 * sum(name in own for name in ours.values()) > len(state)


def _convert(state: State, model: Backbone) -> State:
    assert isinstance(model, Borrowed)
    return {ours: state[theirs] for theirs, ours in _names(state, model).items()}


LAYOUTS = (Layout("torchvision or timm", _fits, _convert, _leaves),)

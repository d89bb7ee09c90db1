"""CvT weights of Hugging Face and of the authors.

The authors' names (microsoft/CvT) are this project's. Hugging Face's `CvtModel` has no final norm and no
head: strict loading names what is missing.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from vitlab.models.features import Backbone
from vitlab.models.layouts.base import Layout, State

PARTS = (  # of a dotted name, longest first
    ("embedding.convolution_embeddings.projection.", "patch_embed.proj."),
    ("embedding.convolution_embeddings.normalization.", "patch_embed.norm."),
    (".layers.", ".blocks."),
    (".convolution_projection.convolution.", ".conv."),
    (".convolution_projection.normalization.", ".bn."),
    (".attention.attention.convolution_projection_query.", ".attn.conv_proj_q."),
    (".attention.attention.convolution_projection_key.", ".attn.conv_proj_k."),
    (".attention.attention.convolution_projection_value.", ".attn.conv_proj_v."),
    (".attention.attention.projection_query.", ".attn.proj_q."),
    (".attention.attention.projection_key.", ".attn.proj_k."),
    (".attention.attention.projection_value.", ".attn.proj_v."),
    (".attention.output.dense.", ".attn.proj."),
    (".intermediate.dense.", ".mlp.fc1."),
    (".output.dense.", ".mlp.fc2."),
    (".layernorm_before.", ".norm1."),
    (".layernorm_after.", ".norm2."),
)
STARTS = (("stages.", "stage"), ("layernorm.", "norm."), ("classifier.", "head."))
FIRST = "stages.0.embedding.convolution_embeddings.projection.weight"


def _is_hugging_face(state: Mapping[str, Tensor], model: Backbone) -> bool:
    return any(_short(name) == FIRST for name in state)


def _from_hugging_face(state: State, model: Backbone) -> State:
    return {_renamed(name): value for name, value in state.items()}


def _renamed(name: str) -> str:
    name = _short(name)
    for old, new in PARTS:
        name = name.replace(old, new)
    for old, new in STARTS:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _short(name: str) -> str:
    """Without what the classifier and the model put before the encoder's names."""
    return name.removeprefix("cvt.").removeprefix("encoder.")


def _is_own(state: Mapping[str, Tensor], model: Backbone) -> bool:
    return "stage0.patch_embed.proj.weight" in state


LAYOUTS = (
    Layout("Hugging Face", _is_hugging_face, _from_hugging_face),
    Layout("microsoft/CvT", _is_own, lambda state, model: state),
)

"""Where weights of Swin come from: Microsoft's own code and Hugging Face's. timm's names are ours.

- microsoft/Swin-Transformer: merging closes a stage instead of opening the next, the head is one layer, and
  index tables and masks are saved beside the weights. They follow from the sizes, so they are left out.
- the same authors' SimMIM: the model under `encoder.`, beside the decoder of the pretraining, left out.
- Hugging Face `SwinModel`, `SwinForImageClassification`: three layers for Q, K and V. Files on disk and
  models in memory have different names inside a block; both are read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from vitlab.models.features import Backbone
from vitlab.models.layouts.base import Layout, State

COMPUTED = re.compile(r"(^|\.)(relative_position_index|attn_mask)$")
MERGING = re.compile(r"^layers\.(\d+)\.downsample\.")
PART = re.compile(r"^(.*\.attn\.)(query|key|value)\.(weight|bias)$")
HUGGING_FACE = {
    r"^swin\.": "",
    r"^embeddings\.mask_token$": "mask_token",
    r"^embeddings\.patch_embeddings\.projection\.": "patch_embed.proj.",
    r"^embeddings\.norm\.": "patch_embed.norm.",
    r"^encoder\.": "",
    r"^layernorm\.": "norm.",
    r"^classifier\.": "head.fc.",
    r"\.layernorm_before\.": ".norm1.",
    r"\.layernorm_after\.": ".norm2.",
    r"\.intermediate\.dense\.": ".mlp.fc1.",
    r"(blocks\.\d+)\.output\.dense\.": r"\1.mlp.fc2.",
    r"\.attention\.(output\.dense|o_proj)\.": ".attn.proj.",
    r"\.attention\.(?:self\.)?(query|key|value)\.": r".attn.\1.",
    r"\.attention\.q_proj\.": ".attn.query.",
    r"\.attention\.k_proj\.": ".attn.key.",
    r"\.attention\.v_proj\.": ".attn.value.",
    r"\.attention\.(self|relative_position_bias)\.relative_position": ".attn.relative_position",
}


def _computed(state: Mapping[str, Tensor], model: Backbone) -> list[str]:
    return [name for name in state if COMPUTED.search(name)]


# ---------------------------------------------------------------- Microsoft


def _is_microsoft(state: Mapping[str, Tensor], model: Backbone) -> bool:
    """A stage that merges at its end, or, with one stage alone, a head without `fc`."""
    return "layers.0.blocks.0.norm1.weight" in state and (
        "layers.0.downsample.reduction.weight" in state or "head.weight" in state
    )


def _microsoft(state: State, model: Backbone) -> State:
    return {_renamed(name): value for name, value in state.items()}


def _renamed(name: str) -> str:
    name = MERGING.sub(lambda found: f"layers.{int(found[1]) + 1}.downsample.", name)
    return re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", name)


def _is_simmim(state: Mapping[str, Tensor], model: Backbone) -> bool:
    return "encoder.patch_embed.proj.weight" in state and any(n.startswith("decoder.") for n in state)


def _simmim(state: State, model: Backbone) -> State:
    inner = {name.removeprefix("encoder."): value for name, value in state.items()}
    return _microsoft(inner, model)


def _beside_simmim(state: Mapping[str, Tensor], model: Backbone) -> list[str]:
    token = [] if model.config.mask_token else ["encoder.mask_token"]
    decoder = [name for name in state if name.startswith("decoder.")]
    return [*_computed(state, model), *decoder, *(name for name in token if name in state)]


# ---------------------------------------------------------------- Hugging Face


def _is_hugging_face(state: Mapping[str, Tensor], model: Backbone) -> bool:
    return any(name.removeprefix("swin.").startswith("embeddings.patch_embeddings.") for name in state)


def _hugging_face(state: State, model: Backbone) -> State:
    """Names as here, then Q, K and V as one; merging closes a stage as in Microsoft's."""
    out: State = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        new = name
        for old, ours in HUGGING_FACE.items():
            new = re.sub(old, ours, new)
        found = PART.match(new)
        if found:
            parts.setdefault(f"{found[1]}qkv.{found[3]}", {})[found[2]] = value
        else:
            out[_renamed(new)] = value
    for name, three in parts.items():
        if len(three) == 3 and len({value.shape for value in three.values()}) == 1:
            out[name] = torch.cat([three["query"], three["key"], three["value"]])
        else:  # strict loading names what is left
            out |= {name.replace("qkv", part): value for part, value in three.items()}
    return out


LAYOUTS: tuple[Layout, ...] = (
    Layout("microsoft/Swin-Transformer", _is_microsoft, _microsoft, _computed),
    Layout("microsoft/SimMIM", _is_simmim, _simmim, _beside_simmim),
    Layout("Hugging Face", _is_hugging_face, _hugging_face, _computed),
)

"""Weights of BEiT (Bao et al. 2021, arXiv 2106.08254): the authors' own code and Hugging Face.

Both keep a bias of queries and one of values apart, and tables of relative positions: one for all blocks in
pre-training, one a block in fine-tuning. A shared one goes to every block of a model with `relative: block`;
a model with a bias of keys gets zeros there. The head of masked image modelling is left out.

Letters: D width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from vitlab.models.features import Backbone
from vitlab.models.layouts.base import Layout, State
from vitlab.models.layouts.vit import OUTSIDE, PARTS

TABLE = "relative_position_bias_table"
INDEX = "relative_position_index"

# ---------------------------------------------------------------- the authors' names

OWN = {
    r"blocks\.(\d+)\.attn\.([qv])_bias": r"blocks.\1.attn.qkv.\2_bias",
    r"blocks\.(\d+)\.gamma_([12])": r"blocks.\1.ls\2.gamma",
    rf"blocks\.(\d+)\.attn\.{TABLE}": r"rel_pos_bias.\1.table",
    rf"rel_pos_bias\.{TABLE}": r"rel_pos_bias.0.table",
}


def _is_unilm(state: Mapping[str, Tensor], model: Backbone) -> bool:
    return any(re.fullmatch(pattern, name) for name in state for pattern in OWN)


def _unilm(state: State, model: Backbone) -> State:
    return _biased({_renamed(name, OWN): value for name, value in state.items()}, model)


def _renamed(name: str, patterns: Mapping[str, str]) -> str:
    for pattern, ours in patterns.items():
        if match := re.fullmatch(pattern, name):
            return match.expand(ours)
    return name


def _biased(state: State, model: Backbone) -> State:
    """One bias for queries, keys and values where the model has that; a table for every block."""
    state = dict(state)
    for name in [n for n in state if n.endswith(".qkv.q_bias")] if model.config.key_bias else ():
        q, v = state.pop(name), state.pop(name.replace("q_bias", "v_bias"))
        state[name.replace("q_bias", "bias")] = torch.cat([q, torch.zeros_like(q), v])
    return model.adapted(state)


# ---------------------------------------------------------------- Hugging Face's names

ROOT = re.compile(r"^beit\.")
BLOCK = r"(?:encoder\.)?layers?\.(\d+)\."
HF = {
    rf"{BLOCK}lambda_([12])": r"blocks.\1.ls\2.gamma",
    rf"{BLOCK}(?:attention\.attention\.)?relative_position_bias\.{TABLE}": r"rel_pos_bias.\1.table",
    rf"(?:shared_position_bias|encoder\.relative_position_bias)\.{TABLE}": r"rel_pos_bias.0.table",
    rf"{BLOCK}attention\.(?:q_proj|attention\.query)\.bias": r"blocks.\1.attn.qkv.q_bias",
    rf"{BLOCK}attention\.(?:v_proj|attention\.value)\.bias": r"blocks.\1.attn.qkv.v_bias",
    r"pooler\.layernorm\.(\w+)": r"fc_norm.\1",
}
THIRDS = [rf"{BLOCK}attention\.(?:{b[0]}_proj|attention\.{b})\.weight" for b in ("query", "key", "value")]


def _is_hugging_face(state: Mapping[str, Tensor], model: Backbone) -> bool:
    marks = list(HF)[:3]
    return any(re.fullmatch(mark, ROOT.sub("", name)) for name in state for mark in marks)


def _hugging_face(state: State, model: Backbone) -> State:
    out: State = {}
    thirds: dict[str, dict[int, Tensor]] = {}
    for theirs, value in state.items():
        name = ROOT.sub("", theirs)
        third = next((i for i, one in enumerate(THIRDS) if re.fullmatch(one, name)), None)
        part = re.fullmatch(rf"{BLOCK}(.+)\.(weight|bias)", name)
        if third is not None and part:
            thirds.setdefault(f"blocks.{part[1]}.attn.qkv.weight", {})[third] = value
        elif part and part[2] in PARTS:
            out[f"blocks.{part[1]}.{PARTS[part[2]]}.{part[3]}"] = value
        else:
            out[OUTSIDE.get(name, _renamed(name, HF))] = value
    out |= {name: torch.cat([parts[i] for i in sorted(parts)]) for name, parts in thirds.items()}
    return _biased(out, model)


def _beside(state: Mapping[str, Tensor], model: Backbone) -> list[str]:
    spare = ("lm_head",) if model.config.mask_token else ("lm_head", "mask_token")
    return [n for n in state if n.endswith(INDEX) or set(n.split(".")) & set(spare)]


LAYOUTS: tuple[Layout, ...] = (
    Layout("microsoft/unilm beit", _is_unilm, _unilm, _beside),
    Layout("Hugging Face BEiT", _is_hugging_face, _hugging_face, _beside),
)

"""Weights of plain vision transformers: timm, their authors' own code, Hugging Face.

timm's names are this project's; DeiT (Touvron et al. 2020, arXiv 2012.12877), the encoder of MAE (He et
al. 2021, 2111.06377), DINO (Caron et al. 2021, 2104.14294), DINOv2 (Oquab et al. 2023, 2304.07193) and MSN
(Assran et al. 2022, 2204.07141) have the same. What their checkpoints hold beside it is left out: MAE's
decoder with its mask token, the projection heads of DINO and MSN, Hugging Face's pooler.

Hugging Face keeps queries, keys and values apart, and writes other names to files than its models have in
memory: both are read. Its configs mostly have layer_norm_eps 1e-12, where the papers' codes and this
project have 1e-6; the numbers differ by less than what fp32 shows.

Letters: D width.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

from vitlab.models.features import Backbone
from vitlab.models.layouts.base import Layout, State

MAE = ("decoder_embed", "decoder_pos_embed", "decoder_blocks", "decoder_norm", "decoder_pred", "mask_token")
DINO = ("head.mlp", "head.last_layer")
MSN = ("fc.fc1", "fc.bn1", "fc.fc2", "fc.bn2", "fc.fc3")


def _holds(state: Mapping[str, Tensor], prefix: str) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for name in state)


def _named(state: Mapping[str, Tensor], prefixes: Collection[str]) -> list[str]:
    return [name for name in state if any(name == p or name.startswith(p + ".") for p in prefixes)]


# ---------------------------------------------------------------- timm's names


def _timm(state: Mapping[str, Tensor]) -> bool:
    return any(re.match(r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc\d)\.", name) for name in state)


def _same(state: State, model: Backbone) -> State:
    return state


def _with(source: str, mark: str, beside: Collection[str]) -> Layout:
    """timm's names and, told by `mark`, other parts `beside` the model."""
    return Layout(
        source,
        lambda state, model: _timm(state) and _holds(state, mark),
        _same,
        lambda state, model: _named(state, beside),
    )


def _plain(state: Mapping[str, Tensor], model: Backbone) -> bool:
    marked = any(_holds(state, mark) for mark in ("decoder_embed", "fc.fc1", *DINO))
    return _timm(state) and not marked and not _flat_mask(state) and not _beit(state)


def _beit(state: Mapping[str, Tensor]) -> bool:
    """The tensors that BEiT's authors have in a block beside those of timm's ViT."""
    lasts = {name.rpartition(".")[2] for name in state if ".qkv." not in name}
    return bool(lasts & {"q_bias", "gamma_1", "relative_position_bias_table"})


def _flat_mask(state: Mapping[str, Tensor]) -> bool:
    """DINOv2's mask token has two dimensions, 1 D."""
    return "mask_token" in state and state["mask_token"].ndim == 2


def _mask_token(state: State, model: Backbone) -> State:
    return {n: v[None] if n == "mask_token" else v for n, v in state.items()}


def _spare_mask(state: Mapping[str, Tensor], model: Backbone) -> list[str]:
    return [] if model.config.mask_token else [n for n in state if n.endswith("mask_token")]


# ---------------------------------------------------------------- Hugging Face's names

ROOT = re.compile(r"^(vit|deit|vit_mae|vit_msn|dinov2)\.(?=embeddings|encoder|layers|layernorm|pooler)")
LAYER = re.compile(r"^(?:encoder\.)?layers?\.(\d+)\.(.+)\.(weight|bias|lambda1)$")
PARTS = {  # of a layer: as in files, as in memory
    "attention.output.dense": "attn.proj",
    "attention.o_proj": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "layer_scale1": "ls1",
    "layer_scale2": "ls2",
} | {name: name for name in ("mlp.fc1", "mlp.fc2", "norm1", "norm2")}
JOINED = {  # which third of qkv
    **{f"attention.attention.{name}": i for i, name in enumerate(("query", "key", "value"))},
    **{f"attention.{name}_proj": i for i, name in enumerate("qkv")},
}
OUTSIDE = {
    "embeddings.cls_token": "cls_token",
    "embeddings.distillation_token": "dist_token",
    "embeddings.mask_token": "mask_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
} | {
    f"{theirs}.{kind}": f"{ours}.{kind}"
    for kind in ("weight", "bias")
    for theirs, ours in {
        "layernorm": "norm",
        "classifier": "head",
        "cls_classifier": "head",
        "distillation_classifier": "head_dist",
    }.items()
}


def _hugging_face(state: State, model: Backbone) -> State:
    out: State = {}
    thirds: dict[str, dict[int, str]] = {}  # our qkv → third → their name
    for theirs, value in state.items():
        name = ROOT.sub("", theirs)
        layer = LAYER.match(name)
        number, part, kind = layer.groups() if layer else ("", "", "")
        if part in JOINED:
            thirds.setdefault(f"blocks.{number}.attn.qkv.{kind}", {})[JOINED[part]] = theirs
        elif part in PARTS:
            out[f"blocks.{number}.{PARTS[part]}.{'gamma' if kind == 'lambda1' else kind}"] = value
        else:
            out[OUTSIDE.get(name, theirs)] = value
    for ours, names in thirds.items():
        values = [state[names[i]] for i in sorted(names)]
        if len({value.shape for value in values}) == 1 and len(values) == 3:
            out[ours] = torch.cat(values)
        else:
            out |= {name: state[name] for name in names.values()}
    if "mask_token" in out and out["mask_token"].ndim == 2:
        out = _mask_token(out, model)
    return out


def _other_parts(state: Mapping[str, Tensor], model: Backbone) -> list[str]:
    """The pooler, and the decoders of MAE and of masked image modelling."""
    known = [n for n in state if ROOT.sub("", n).partition(".")[0] in ("pooler", "decoder")]
    return known + [n for n in _spare_mask(state, model) if n not in known]


def _hf(source: str, mark: Callable[[set[str]], bool]) -> Layout:
    def fits(state: Mapping[str, Tensor], model: Backbone) -> bool:
        layers = (LAYER.match(ROOT.sub("", name)) for name in state)
        known = any(layer and (layer[2] in PARTS or layer[2] in JOINED) for layer in layers)
        return known and mark({part for name in state for part in name.split(".")})

    return Layout(source, fits, _hugging_face, _other_parts)


KINDS = {"decoder_embed", "distillation_token", "layer_scale1", "lambda_1", "relative_position_bias_table"}
LAYOUTS: tuple[Layout, ...] = (
    Layout("timm", _plain, _same),
    _with("facebookresearch/mae", "decoder_embed", MAE),
    _with("facebookresearch/dino", "head.last_layer", DINO),
    _with("facebookresearch/msn", "fc.fc1", MSN),
    Layout("facebookresearch/dinov2", lambda s, model: _timm(s) and _flat_mask(s), _mask_token, _spare_mask),
    _hf("Hugging Face ViT", lambda parts: not parts & KINDS),
    _hf("Hugging Face DeiT", lambda parts: "distillation_token" in parts),
    _hf("Hugging Face ViTMAE", lambda parts: "decoder_embed" in parts),
    _hf("Hugging Face DINOv2", lambda parts: "layer_scale1" in parts),
)

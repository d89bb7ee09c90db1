"""Pairs on the same weights: a model of ours and the same one of timm or transformers.

Each side is a module that gives the mean loss of a batch, loss(images, labels), without any randomness.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlab.batch import Batch, uniform
from vitlab.config import UserError, build
from vitlab.methods import MAEConfig, create_method
from vitlab.models import create_model, load_weights

CLASSES = 1000


class Pair(NamedTuple):
    peer: str
    ours: nn.Module
    theirs: nn.Module


class Classifier(nn.Module):
    """Cross-entropy of a model's logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        found = self.model(images)
        return F.cross_entropy(getattr(found, "logits", found), labels)


class Painter(nn.Module):
    """MAE's loss, the masks of both sides drawn from the same numbers; labels are not looked at."""

    def __init__(self, method: nn.Module, ours: bool) -> None:
        super().__init__()
        self.method, self.ours = method, ours

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        count = len(images)
        seeds = torch.arange(count, device=images.device)
        if self.ours:
            batch = Batch([images], labels, images.new_ones(count), seeds, [""] * count)
            loss: Tensor = self.method(batch).loss / count
            return loss
        size = int(self.method.config.patch_size)  # type: ignore[union-attr, arg-type]
        patches = (images.shape[2] // size) * (images.shape[3] // size)
        theirs: Tensor = self.method(images, noise=uniform(seeds, "mask", patches)).loss
        return theirs


def timm_pair(name: str, arch: str, image_size: int) -> Pair:
    """timm's names are ours."""
    timm = needs("timm")
    size: dict[str, Any] = (
        {} if arch.startswith("coatnet") and image_size == 224 else {"img_size": image_size}
    )
    theirs = timm.create_model(arch, num_classes=CLASSES, drop_path_rate=0.0, **size)
    way = {"padding": "timm"} if name.startswith("swin") else {}
    ours = create_model(name, num_classes=CLASSES, image_size=image_size, **way)
    load_weights(ours, theirs.state_dict())
    return Pair(f"timm {timm.__version__}", Classifier(ours), Classifier(theirs))


def cvt_pair(image_size: int) -> Pair:
    """transformers' port has GELU where the released weights have QuickGELU: so has ours here."""
    transformers = needs("transformers")
    theirs = transformers.CvtForImageClassification(
        transformers.CvtConfig(num_labels=CLASSES, drop_path_rate=[0.0, 0.0, 0.0], drop_rate=[0.0, 0.0, 0.0])
    )
    ours = create_model("cvt_13", num_classes=CLASSES, image_size=image_size, activation="gelu")
    load_weights(ours, theirs.state_dict())
    return Pair(f"transformers {transformers.__version__}", Classifier(ours), Classifier(theirs))


def mae_pair(image_size: int) -> Pair:
    """A small encoder under the decoder of the paper's half width."""
    transformers = needs("transformers")
    config = transformers.ViTMAEConfig(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        intermediate_size=1536,
        image_size=image_size,
        layer_norm_eps=1e-6,
        decoder_hidden_size=256,
        decoder_num_hidden_layers=8,
        decoder_num_attention_heads=8,
        decoder_intermediate_size=1024,
        norm_pix_loss=True,
    )
    theirs = transformers.ViTMAEForPreTraining(config)
    encoder = create_model("vit_small", num_classes=0, image_size=image_size, positions="sincos", init="mae")
    settings = {"decoder_dim": 256, "decoder_depth": 8, "decoder_heads": 8}
    ours = create_method(build(MAEConfig, settings), encoder)
    load_weights(encoder, theirs.state_dict())
    ours.load_state_dict(_decoder(theirs.state_dict()), strict=False)
    return Pair(f"transformers {transformers.__version__}", Painter(ours, True), Painter(theirs, False))


def _decoder(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' decoder under our names; Q, K and V are three tensors there."""
    parts = {
        "decoder.decoder_layers.": "decoder_blocks.",
        "decoder.decoder_": "decoder_",
        "decoder.mask_token": "mask_token",
        ".layernorm_before.": ".norm1.",
        ".layernorm_after.": ".norm2.",
        ".attention.o_proj.": ".attn.proj.",
    }
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        ours = name
        for theirs, mine in parts.items():
            ours = ours.replace(theirs, mine)
        if name.startswith("decoder.") and ".q_proj." in name:
            three = [state[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
            found[ours.replace(".attention.q_proj.", ".attn.qkv.")] = torch.cat(three)
        elif name.startswith("decoder.") and "_proj." not in ours.replace(".attn.proj.", ""):
            found[ours] = value
    return found


def needs(name: str) -> Any:
    """A peer is a package that only benchmarks and tests need."""
    try:
        return __import__(name)
    except ImportError:
        raise UserError(f"bench: the peer {name} is not installed; pip install 'vitlab[bench]'") from None

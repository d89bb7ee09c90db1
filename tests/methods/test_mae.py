"""MAE against transformers' implementation on shared weights, and its pictures."""

from __future__ import annotations

import pytest
import torch
from parity import EXACT, THEIR_SIZES, images, redraw, thirds, worst
from steps import halved, part, unlabelled
from torch import Tensor, nn
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from vitlab.batch import Batch, uniform
from vitlab.config import UserError, build
from vitlab.methods import MAE, MAEConfig, create_method
from vitlab.models import create_model

BOTH = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4}
DECODER = {"decoder_dim": 24, "decoder_depth": 2, "decoder_heads": 3}
OFFICIAL = (  # ours → transformers', part by part
    ("model.blocks.", "vit.layers."),
    ("model.patch_embed.proj", "vit.embeddings.patch_embeddings.projection"),
    ("model.cls_token", "vit.embeddings.cls_token"),
    ("model.pos_embed", "vit.embeddings.position_embeddings"),
    ("model.norm.", "vit.layernorm."),
    ("decoder_blocks.", "decoder.decoder_layers."),
    ("decoder_", "decoder.decoder_"),
    ("mask_token", "decoder.mask_token"),
)
INSIDE = (
    (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."),
    (".attn.proj.", ".attention.o_proj."),
)


def method(**more: object) -> MAE:
    model = create_model("vit_tiny", num_classes=0, image_size=16, positions="sincos", init="mae", **BOTH)
    made = create_method(build(MAEConfig, {**DECODER, **more}), model)
    assert isinstance(made, MAE)
    return made


def reference(norm_pix: bool) -> ViTMAEForPreTraining:
    return ViTMAEForPreTraining(
        ViTMAEConfig(
            **THEIR_SIZES,
            image_size=16,
            patch_size=4,
            layer_norm_eps=1e-6,
            decoder_hidden_size=24,
            decoder_num_hidden_layers=2,
            decoder_num_attention_heads=3,
            decoder_intermediate_size=96,
            hidden_act="gelu",
            norm_pix_loss=norm_pix,
        )
    )


def theirs(name: str) -> str:
    for ours, official in OFFICIAL:
        if name.startswith(ours):
            name = official + name.removeprefix(ours)
            break
    for ours, official in INSIDE:
        name = name.replace(ours, official)
    return name


def renamed(ours: dict[str, Tensor], official: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' tensors under our names; Q, K and V are three tensors there."""
    out = {}
    for name in ours:
        kind = name.rpartition(".")[2]
        if ".attn.qkv." in name:
            prefix = theirs(name.partition(".attn.")[0] + ".attention.")
            parts = [official[f"{prefix}{part}_proj.{kind}"] for part in "qkv"]
            out[name] = torch.cat(parts)
        else:
            out[name] = official[theirs(name)]
    return out


def batch(dtype: torch.dtype = torch.float32, n: int = 5) -> Batch:
    return unlabelled(images(n, 16, dtype))


def official_loss(module: nn.Module, of: Batch) -> Tensor:
    loss: Tensor = module(of.views[0], noise=uniform(of.seeds, "mask", 16)).loss
    return loss


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("norm_pix", [True, False])
def test_same_as_transformers(norm_pix: bool, dtype: torch.dtype) -> None:
    official, ours, of = reference(norm_pix), method(norm_pix=norm_pix), batch(dtype)
    redraw(official)
    state = renamed(ours.state_dict(), official.state_dict())
    assert sum(t.numel() for t in state.values()) == sum(t.numel() for t in official.state_dict().values())
    ours.load_state_dict(state)
    ours, official = ours.to(dtype).train(), official.to(dtype).eval()
    loss, expected = ours(of).loss / 5, official_loss(official, of)
    loss.backward()
    expected.backward()
    mine = {name: p.grad for name, p in ours.named_parameters()}
    assert all(gradient is not None for gradient in mine.values())
    other = renamed(mine, {name: p.grad for name, p in official.named_parameters()})
    figures = {
        "loss": worst({"loss": loss}, {"loss": expected}),
        "gradients": worst(mine, other),
    }
    print("MAE", norm_pix, dtype, figures)
    assert all(figure <= EXACT[dtype] for figure in figures.values()), figures
    assert any(name.endswith("qkv.bias.k") for name in thirds(mine))


def test_fixed_positions_are_the_official_ones() -> None:
    """transformers 5 leaves zeros in a fresh model, so its routines are called once more."""
    official, ours = reference(True), method()
    official.vit.embeddings.patch_embeddings.projection._is_hf_initialized = False
    official.vit.embeddings.initialize_weights()
    official.decoder.initialize_weights(16)
    torch.testing.assert_close(ours.model.pos_embed, official.vit.embeddings.position_embeddings.detach())
    torch.testing.assert_close(ours.decoder_pos_embed, official.decoder.decoder_pos_embed.detach())


def test_padded_slots_and_batches_change_nothing() -> None:
    ours, of = method().eval(), batch()
    with torch.no_grad():
        parts = [ours(part(of, slice(i, i + 1))).loss for i in range(5)]
        torch.testing.assert_close(ours(of).loss, torch.stack(parts).sum())
        of.weight[3] = 0
        torch.testing.assert_close(ours(of).loss, torch.stack(parts[:3] + parts[4:]).sum())
    assert float(ours.weigh(of)) == 4


@pytest.mark.parametrize("norm_pix", [True, False])
def test_picture(norm_pix: bool) -> None:
    ours, of = method(norm_pix=norm_pix).eval(), batch()
    picture = ours(of, "picture")
    image = of.views[0]
    assert torch.equal(picture.original, image)
    hidden = (picture.masked == 0).all(1)  # B height width
    assert torch.equal(hidden.float().mean((1, 2)), torch.full((5,), 0.75))
    order = uniform(of.seeds, "mask", 16).argsort(1)
    for sample, visible in enumerate(order[:, :4].tolist()):
        for n in visible:
            assert not hidden[sample, n // 4 * 4 : n // 4 * 4 + 4, n % 4 * 4 : n % 4 * 4 + 4].any()
    assert torch.equal(torch.where(hidden[:, None], 0.0, image), picture.masked)
    assert torch.equal(torch.where(hidden[:, None], 0.0, picture.reconstruction), picture.masked)
    # what is painted is what the loss measures
    target, mean, std = ours._normalise(ours._patches(image))
    error = ((ours._patches(picture.reconstruction) - mean) / std - target).square().mean((1, 2)) * 16 / 12
    torch.testing.assert_close(error.sum(), ours(of).loss.detach())


def test_half_precision_products() -> None:
    halved(method().train(), batch())


def test_perfect_painting_gives_back_the_image() -> None:
    """The mean and spread that normalised targets lost are put back."""
    ours, of = method(norm_pix=True), batch()
    target, mean, std = ours._normalise(ours._patches(of.views[0]))
    torch.testing.assert_close(ours._images(target * std + mean), of.views[0])


def test_layers_decay_and_export() -> None:
    ours = method()
    assert ours.layer_of("model.patch_embed.proj.weight") == 0
    assert ours.layer_of("model.blocks.1.norm1.weight") == 2
    assert ours.layer_of("decoder_blocks.0.norm1.weight") == ours.layer_of("mask_token") == 3
    assert ours.no_decay() == {"model.pos_embed"}
    assert ours.export() is ours.model
    assert ours.views()[0].size == 16


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ({"mask_ratio": 0.99}, "mask_ratio: given 0.99, which leaves no patch of 16 visible"),
        ({"mask_ratio": 1.0}, "mask_ratio: given 1.0"),
        ({"decoder_heads": 5}, "decoder_dim 24 is not divisible by decoder_heads 5"),
        ({"decoder_dim": 18}, "decoder_dim 18 is not divisible by 4"),
    ],
)
def test_wrong_configs(more: dict[str, object], line: str) -> None:
    with pytest.raises(UserError, match=line):
        method(**more)


def test_tables_of_whole_images_are_refused() -> None:
    model = create_model("vit_tiny", num_classes=0, image_size=16, relative="shared", **BOTH)
    with pytest.raises(UserError, match=r"model\.relative: given 'shared', .* allowed: none"):
        create_method(build(MAEConfig, DECODER), model)


def test_a_model_with_a_head_is_refused() -> None:
    model = create_model("vit_tiny", num_classes=3, image_size=16, **BOTH)
    with pytest.raises(UserError, match="given num_classes 3, allowed: 0"):
        create_method(build(MAEConfig, DECODER), model)

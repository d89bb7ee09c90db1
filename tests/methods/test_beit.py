"""BEiT against transformers' implementation and against its equation, with a tokenizer of a few words."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from parity import EXACT, THEIR_SIZES, images, redraw, worst
from steps import halved, one_step, part, strategy_of, unlabelled
from torch import Tensor, nn
from torch.nn.functional import interpolate
from transformers import BeitConfig as TheirConfig
from transformers import BeitForMaskedImageModeling

from vitlab.batch import Batch
from vitlab.config import UserError, build
from vitlab.methods import BEiT, BEiTConfig, Moment, create_method
from vitlab.methods.masks import block_mask
from vitlab.models import Backbone, BackboneConfig, Features, create_model
from vitlab.models.layouts.beit import _hugging_face

SIDE, WORDS, SMALL = 32, 11, 16  # 8×8 patches, for the tokenizer of 2×2 pixels
SIZES = {
    "patch_size": 4,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 4,
    "init_values": 0.1,
    "positions": "none",
    "relative": "shared",
    "key_bias": False,
    "init": "beit",
    "mask_token": True,
}


class WordsConfig(BackboneConfig):
    presets: ClassVar[dict[str, dict[str, Any]]] = {}
    vocab: int = WORDS
    reduce: int = 2

    def grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        return image_size[0] // self.reduce, image_size[1] // self.reduce


class Words(Backbone):
    """A word for every 2×2 pixels."""

    def __init__(self, **more: Any) -> None:
        super().__init__(WordsConfig(name="words", **more), 0, SMALL)
        self.reads = nn.Conv2d(self.config.in_chans, self.config.vocab, 2, 2)
        self.drop = nn.Dropout(0.5)
        redraw(self, 3)

    def compute(self, images: Tensor, want: Any, keep: Any, mask: Any, seeds: Any) -> Features:
        assert want == {"tokens"}
        return Features(tokens=self.drop(self.reads(images)).flatten(2).mT)


def method(tokenizer: Backbone | None = None, more: dict[str, Any] | None = None, **config: Any) -> BEiT:
    torch.manual_seed(0)
    model = create_model("vit_tiny", num_classes=0, image_size=SIDE, **{**SIZES, **(more or {})})
    made = create_method(build(BEiTConfig, config), model, tokenizer=tokenizer or Words())
    assert isinstance(made, BEiT)
    return made


def batch(dtype: torch.dtype = torch.float32, n: int = 5) -> Batch:
    return unlabelled(images(n, SIDE, dtype), images(n, SMALL, dtype).flip(0))


def hidden(of: Batch) -> Tensor:
    return block_mask(of.seeds, (8, 8), 25, 5, 0.3)


def words(of: Batch) -> Tensor:
    """B N, by the tokenizer's own numbers."""
    reads = Words().to(of.views[1].dtype).reads
    return nn.functional.conv2d(of.views[1], reads.weight, reads.bias, 2).argmax(1).flatten(1)


def reference() -> BeitForMaskedImageModeling:
    return BeitForMaskedImageModeling(
        TheirConfig(
            image_size=SIDE,
            patch_size=4,
            **THEIR_SIZES,
            layer_norm_eps=1e-6,
            layer_scale_init_value=0.1,
            vocab_size=WORDS,
            drop_path_rate=0.0,
            use_mask_token=True,
            use_mean_pooling=True,  # its final norm is the head's
            use_shared_relative_position_bias=True,
        )
    )


def renamed(official: dict[str, Tensor], ours: BEiT) -> dict[str, Tensor]:
    own = {n: t for n, t in official.items() if not n.startswith("lm_head.")}
    out = {f"model.{n}": t for n, t in _hugging_face(own, ours.model).items()}
    return out | {n: t for n, t in official.items() if n.startswith("lm_head.")}


def learned(tensors: dict[str, Any]) -> dict[str, Any]:
    return {n: t for n, t in tensors.items() if not n.startswith("tokenizer.")}


@pytest.mark.parametrize("dtype", EXACT)
def test_three_steps_as_transformers(dtype: torch.dtype) -> None:
    official, ours, of = reference(), method(), batch(dtype)
    redraw(official)
    state = renamed(official.state_dict(), ours)
    assert state.keys() == learned(ours.state_dict()).keys()
    ours.load_state_dict(state, strict=False)
    ours, official = ours.to(dtype).train(), official.to(dtype).train()
    mask, labels = hidden(of), words(of)
    eps = 1e-8 if dtype == torch.float64 else 1e-3  # below it an fp32 gradient is rounding alone
    moves = [torch.optim.AdamW(m.parameters(), lr=1e-3, eps=eps) for m in (ours, official)]
    for step in range(3):
        losses = ours(of)
        loss = losses.loss / ours.weigh(of)
        found = official(of.views[0], bool_masked_pos=mask, labels=labels[mask])
        for move, value in zip(moves, (loss, found.loss), strict=True):
            move.zero_grad()
            value.backward()
        right = (found.logits.argmax(-1) == labels)[mask]
        assert float(losses.metrics["mlm_top1"]) == float(right.sum())
        tokens = ours.model(of.views[0], {"tokens"}, mask=mask).tokens
        mine = {n: p.grad for n, p in learned(dict(ours.named_parameters())).items()}
        other = renamed({n: p.grad for n, p in official.named_parameters()}, ours)
        figures = {
            "loss": worst({"loss": loss}, {"loss": found.loss}),
            "logits": worst({"logits": ours.lm_head(tokens)}, {"logits": found.logits}),
            "gradients": worst(mine, other),
        }
        for move in moves:
            move.step()
        figures["weights"] = worst(learned(ours.state_dict()), renamed(official.state_dict(), ours))
        print("BEiT", dtype, step, figures)
        assert all(figure <= EXACT[dtype] for figure in figures.values()), figures


def test_the_equation_written_out() -> None:
    """Σ over hidden patches of -log p(z | x masked), divided by how many there are."""
    ours, of = method().double(), batch(torch.float64)
    redraw(ours.model)
    redraw(ours.lm_head)
    (ours(of).loss / ours.weigh(of)).backward()
    mine = {n: p.grad.clone() for n, p in ours.named_parameters() if p.grad is not None}
    ours.zero_grad()
    mask, labels = hidden(of), words(of)
    tokens = ours.model(of.views[0], {"tokens"}, mask=mask).tokens
    terms = []
    for i in range(5):
        for n in range(64):
            if mask[i, n]:
                scores = ours.lm_head.weight @ tokens[i, n] + ours.lm_head.bias
                terms.append(scores.exp().sum().log() - scores[labels[i, n]])
    assert len(terms) == int(ours.weigh(of))
    torch.stack(terms).mean().backward()
    figure = worst(mine, {n: p.grad for n, p in ours.named_parameters() if p.grad is not None})
    print("BEiT written out", figure)
    assert figure < 1e-10


def test_every_hidden_patch_counts_the_same() -> None:
    """Images whose masks are smaller count for less, in any micro-batch; padding does not count."""
    of = batch(torch.float64, 40)
    counts = hidden(of).sum(1)
    assert len(set(counts.tolist())) > 1
    of.weight[7] = 0
    ours = method(more={"drop_path": 0.5}).double().train()
    whole = ours(of).loss / ours.weigh(of)
    assert float(ours.weigh(of)) == float(counts.sum() - counts[7])
    rows = [slice(0, 3), slice(3, 20), slice(20, 40)]
    parts = [part(of, one) for one in rows]
    weight = torch.stack([ours.weigh(one) for one in parts]).sum()
    torch.testing.assert_close(whole, torch.stack([ours(one).loss for one in parts]).sum() / weight)
    real = part(of, torch.arange(40) != 7)
    torch.testing.assert_close(whole, ours(real).loss / ours.weigh(real))


def trained(cuts: int) -> dict[str, Tensor]:
    """Two optimizer steps, each of so many micro-batches."""
    of, ours = batch(torch.float64, 8), method().double()
    redraw(ours.model)
    plain = strategy_of(ours, 2, torch.float64, clip=1.0)
    parts = [part(of, slice(i, i + 8 // cuts)) for i in range(0, 8, 8 // cuts)]
    for step in range(2):
        one_step(ours, plain, parts, Moment(step, 2, 2))
    return learned(ours.state_dict())


def test_accumulated_steps_are_one_step() -> None:
    whole = trained(1)
    for cuts in (2, 4):
        assert worst(trained(cuts), whole) < 1e-10


def test_the_tokenizer_is_frozen() -> None:
    ours, of = method().train(), batch()
    assert not ours.tokenizer.training
    before = {n: t.clone() for n, t in ours.tokenizer.state_dict().items()}
    ours(of).loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in ours.tokenizer.parameters())
    assert all(torch.equal(before[n], t) for n, t in ours.tokenizer.state_dict().items())
    assert torch.equal(ours._words(of), words(of))


def test_views_have_the_same_grid() -> None:
    ours = method()
    image, small = ours.views()
    assert (image.name, image.size) == ("image", SIDE)
    assert (small.name, small.size, small.draws) == ("tokens", SMALL, "image")


def test_one_plain_view_is_enough_to_validate() -> None:
    ours, of = method().eval(), batch()
    plain = replace(of, views=of.views[:1])
    smaller = interpolate(of.views[0], (SMALL, SMALL), mode="bilinear", antialias=True)
    with torch.no_grad():
        loss = ours(plain).loss
        torch.testing.assert_close(loss, ours(replace(of, views=[of.views[0], smaller])).loss)
    assert BEiT.one_view
    assert bool(loss.isfinite())


def test_half_precision_products() -> None:
    halved(method().train(), batch())


def test_start_decay_layers_and_export() -> None:
    ours = method()
    weight = ours.lm_head.weight.detach()
    assert float(weight.abs().max()) <= 0.02
    assert float(weight.std()) == pytest.approx(0.02 * 0.5397, rel=0.1)
    assert not ours.lm_head.bias.any()
    assert ours.no_decay() == {"model.cls_token"}
    assert method(more={"positions": "learned"}).no_decay() == {"model.cls_token", "model.pos_embed"}
    assert ours.layer_of("lm_head.weight") == 3
    assert ours.export() is ours.model


def test_sizes_of_the_authors() -> None:
    config = build(BEiTConfig, {"mask_ratio": 0.383})
    assert (config.hidden(196), config.least(196)) == (75, 16)
    assert build(BEiTConfig, {}).least(576) == 16
    assert (build(BEiTConfig, {}).hidden(16), build(BEiTConfig, {}).least(16)) == (6, 1)


@pytest.mark.parametrize(
    ("more", "config", "line"),
    [
        ({"mask_token": False}, {}, "beit.model.mask_token: given false; .* allowed: true"),
        ({"patch_size": 32}, {}, "patch_size: given 32, .* into 1 patch; .* allowed: at most 16"),
        ({}, {"mask_ratio": 0.01}, "mask_ratio: given 0.01, which hides no patch of 64; allowed: from 0.016"),
        ({}, {"min_block": 26}, "min_block: given 26; 25 of 64 patches are hidden, allowed: 1 to 25"),
    ],
)
def test_wrong_configs(more: dict[str, Any], config: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        method(more=more, **config)


def test_tokenizers_that_are_none() -> None:
    other = create_model("vit_tiny", num_classes=0, image_size=SIDE, **SIZES)
    with pytest.raises(UserError, match="beit: needs a tokenizer, none was given"):
        create_method(build(BEiTConfig, {}), other)
    with pytest.raises(UserError, match="tokenizer: given a ViT, which names no codes; give a dvae"):
        method(other)
    with pytest.raises(UserError, match="given one for 1 channels, the model has 3"):
        method(Words(in_chans=1))

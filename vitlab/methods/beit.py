"""BEiT: blocks of patches are hidden, and the model names the visual word of every hidden one.

Paper: Bao et al. 2021 (arXiv 2106.08254), with the conventions of the authors' code: words are the most
probable codes of a frozen tokenizer, which sees the same crop of the image at a size of its own, so that both
have the same grid; the loss is the cross-entropy, the mean over all hidden patches of the whole batch, in
which images count by the number they have; one linear layer behind the last norm, started as the model.

  L = - Σ_{i hidden} log p(z_i | x masked) / number of hidden

Departures: `mask_ratio` is the paper's 0.4, of which the code makes 75 of 196 patches (0.383 here); the mean
is that of the global batch, theirs one of the workers' means; smaller grids have smaller least blocks; in
validation, which has one plain view, the tokenizer's image is that view made smaller. Weight decay spares the
class token and absolute positions only, as theirs. Their model has `relative: shared`, `positions: none`,
`init_values: 0.1`, `key_bias: false`, `init: beit` and a mask token.

Letters: B samples, N patches, M most hidden patches of an image, D width, V words.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from vitlab.batch import Batch, View
from vitlab.config import Config, UserError
from vitlab.methods.base import Losses, Method, full
from vitlab.methods.masks import block_mask
from vitlab.models import Backbone, ViT, ViTConfig
from vitlab.models.parts.transformer import pick

OFFICIAL = (16, 196)  # patches of the least block, and of the image


class BEiTConfig(Config):
    name: Literal["beit"] = "beit"
    mask_ratio: float = Field(0.4, gt=0, lt=1)  # at most, mostly that
    min_block: int | None = Field(None, gt=0)  # patches; null: 16, in grids below 14×14 in proportion
    min_aspect: float = Field(0.3, gt=0, le=1)  # of a block; the largest is 1 over it

    def hidden(self, patches: int) -> int:
        return int(patches * self.mask_ratio)

    def least(self, patches: int) -> int:
        block, whole = OFFICIAL
        return self.min_block or max(1, min(block, round(block * patches / whole)))


class BEiT(Method):
    headless = True
    guide = "tokenizer"
    takes = (ViTConfig,)
    model: ViT

    def __init__(self, config: BEiTConfig, model: ViT, image_size: int, tokenizer: Backbone) -> None:
        super().__init__()
        self.config, self.model, self.image_size = config, model, image_size
        self.tokenizer = tokenizer.requires_grad_(False).eval()
        self.token_size = _token_size(tokenizer, model)
        self.lm_head = nn.Linear(model.config.embed_dim, tokenizer.config.vocab)
        nn.init.trunc_normal_(self.lm_head.weight, std=0.02, a=-0.02, b=0.02)
        nn.init.zeros_(self.lm_head.bias)
        self._masks: Any = WeakTensorKeyDictionary()  # a batch is weighed before it is learned from

    @classmethod
    def problems(cls, name: str, config: BEiTConfig, model: Any, side: int) -> Iterator[str]:
        yield from super().problems(name, config, model, side)
        if not isinstance(model, ViTConfig):
            return
        if not model.mask_token:
            yield f"{name}.model.mask_token: given false; beit hides patches behind it, allowed: true"
        try:
            patches = math.prod(model.grid((side, side)))
        except UserError:
            return  # told of the model
        if patches < 4:
            yield (
                f"{name}.model.patch_size: given {model.patch_size}, which cuts {side}×{side} images into "
                f"{patches} patch; no block leaves anything visible, allowed: at most {side // 2}"
            )
        elif not config.hidden(patches):
            least = math.ceil(1000 / patches) / 1000
            given = f"given {config.mask_ratio}, which hides no patch of {patches}"
            yield f"{name}.method.mask_ratio: {given}; allowed: from {least:g}, below 1"
        elif config.least(patches) > config.hidden(patches):
            yield (
                f"{name}.method.min_block: given {config.min_block}; {config.hidden(patches)} of {patches} "
                f"patches are hidden, allowed: 1 to {config.hidden(patches)}"
            )

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.tokenizer.eval()
        return self

    @classmethod
    def view_names(cls, config: BEiTConfig) -> list[str]:
        return ["image", "tokens"]

    def views(self) -> list[View]:
        return [View("image", self.image_size), View("tokens", self.token_size, draws="image")]

    def weigh(self, batch: Batch) -> Tensor:
        """The hidden patches of its real samples: over these the loss is a mean."""
        return (self._hide(batch).sum(1) * batch.weight).sum()

    def losses(self, batch: Batch) -> Losses:
        mask = self._hide(batch)
        tokens = self.model(batch.views[0], {"tokens"}, mask=mask, seeds=batch.seeds).tokens
        most = self.config.hidden(mask.shape[1])
        hidden = mask.byte().argsort(dim=1, descending=True, stable=True)[
            :, :most
        ]  # B M, with some that are not
        logits = full(self.lm_head(pick(tokens, hidden)))  # B M V
        words = self._words(batch).gather(1, hidden)
        weight = mask.gather(1, hidden) * batch.weight[:, None]
        loss = F.cross_entropy(logits.flatten(0, 1), words.flatten(), reduction="none").view_as(weight)
        right = (logits.argmax(-1) == words) * weight
        return Losses((loss * weight).sum(), {"mlm_top1": right.sum().detach()})

    @torch.no_grad()
    def _words(self, batch: Batch) -> Tensor:
        """B N, what the tokenizer calls every patch."""
        images, side = batch.views[-1], self.token_size
        if images.shape[-1] != side:
            images = F.interpolate(images, (side, side), mode="bilinear", antialias=True)
        words: Tensor = self.tokenizer(images, {"tokens"}).tokens.argmax(-1)
        return words

    def _hide(self, batch: Batch) -> Tensor:
        """B N, true where a patch is hidden."""
        if batch.seeds not in self._masks:
            rows, columns = self.model.grid
            config, patches = self.config, rows * columns
            target, least = config.hidden(patches), config.least(patches)
            self._masks[batch.seeds] = block_mask(
                batch.seeds, (rows, columns), target, least, config.min_aspect
            )
        mask: Tensor = self._masks[batch.seeds]
        return mask

    def no_decay(self) -> set[str]:
        """The authors' code decays the mask token, and the tables of relative positions too."""
        return {f"model.{name}" for name in self.model.no_decay() & {"cls_token", "pos_embed"}}

    def export(self) -> ViT:
        return self.model


def _token_size(tokenizer: Backbone, model: ViT) -> int:
    """The side of the tokenizer's images that gives it the model's grid."""
    vocab, reduce = (getattr(tokenizer.config, key, None) for key in ("vocab", "reduce"))
    if not vocab or not reduce:
        raise UserError(f"tokenizer: given a {type(tokenizer).__name__}, which names no codes; give a dvae")
    if tokenizer.config.in_chans != model.config.in_chans:
        raise UserError(
            f"tokenizer: given one for {tokenizer.config.in_chans} channels, the model has "
            f"{model.config.in_chans}; train one on these images"
        )
    side: int = model.grid[0] * reduce
    return side

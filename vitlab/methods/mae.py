"""Masked autoencoding: the encoder sees a quarter of the patches, a small decoder paints the rest.

Paper: He et al. 2021 (arXiv 2111.06377), with the conventions of the authors' code: the order of uniform
noise decides what is hidden; the class token goes along; fixed sine-cosine positions; mean squared error on
hidden patches alone, optionally of pixels normalised patch by patch (unbiased variance, ε = 1e-6). The
decoder's parameter names are theirs, and a patch's numbers are counted row, column, channel.

Departures: a sample's noise comes from its own seed; visible patches are scattered among mask tokens instead
of sorted back (the same numbers); `decoder_pos_embed` is a buffer. The encoder is as its config
says: the paper's has positions: sincos, init: mae and pool: token.

Letters: B samples, N patches, K visible, M = N - K hidden, P prefix tokens, D width, E decoder's width,
p patch side, C channels, S = p·p·C numbers a patch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from vitlab.batch import Batch, uniform
from vitlab.config import Config
from vitlab.methods.base import Losses, Method, full, relative_problems, visible_at_most
from vitlab.models import ViT, ViTConfig
from vitlab.models.parts.transformer import Block, cut, pick, sincos
from vitlab.models.vit import init_linears


class MAEConfig(Config):
    name: Literal["mae"] = "mae"
    mask_ratio: float = Field(0.75, gt=0, lt=1)
    decoder_dim: int = Field(512, gt=0)
    decoder_depth: int = Field(8, gt=0)
    decoder_heads: int = Field(16, gt=0)
    norm_pix: bool = True

    @model_validator(mode="after")
    def _check(self) -> MAEConfig:
        if self.decoder_dim % self.decoder_heads:
            raise ValueError(
                f"decoder_dim {self.decoder_dim} is not divisible by decoder_heads {self.decoder_heads}"
            )
        if self.decoder_dim % 4:
            raise ValueError(
                f"decoder_dim {self.decoder_dim} is not divisible by 4, which fixed positions need"
            )
        return self


class Picture(NamedTuple):
    """Normalised images to look at, B C height width each."""

    original: Tensor
    masked: Tensor | None  # hidden patches are 0, the mean colour; None: nothing is hidden
    reconstruction: Tensor  # visible patches are the original's


class MAE(Method):
    headless = True
    takes = (ViTConfig,)
    model: ViT
    decoder_pos_embed: Tensor

    def __init__(self, config: MAEConfig, model: ViT, image_size: int) -> None:
        super().__init__()
        patches = model.grid[0] * model.grid[1]
        self.visible = int(patches * (1 - config.mask_ratio))
        self.config, self.model, self.image_size = config, model, image_size
        self._add_decoder()

    @classmethod
    def problems(cls, name: str, config: MAEConfig, model: Any, side: int) -> Iterator[str]:
        yield from super().problems(name, config, model, side)
        yield from relative_problems(name, "mae", model)
        patches = math.prod(model.grid((side, side))) if isinstance(model, ViTConfig) else 0
        visible = int(patches * (1 - config.mask_ratio))
        if patches and visible in (0, patches):
            what = "every patch" if visible else "no patch"
            smaller = f"none, give a smaller {name}.model.patch_size"
            allowed = f"above 0, at most {visible_at_most(patches)}" if patches > 1 else smaller
            given = f"given {config.mask_ratio}, which leaves {what} of {patches} visible"
            yield f"{name}.method.mask_ratio: {given}; allowed: {allowed}"

    def _add_decoder(self) -> None:
        """The official sizes and initialisation: Xavier uniform, σ = 0.02 for the mask token."""
        dim, width = self.config.decoder_dim, self.model.config.embed_dim
        pixels = self.model.config.patch_size**2 * self.model.config.in_chans
        ratio, heads = self.model.config.mlp_ratio, self.config.decoder_heads
        self.decoder_embed = nn.Linear(width, dim)
        self.mask_token = nn.Parameter(nn.init.normal_(torch.empty(1, 1, dim), std=0.02))
        self.register_buffer("decoder_pos_embed", sincos(dim, self.model.grid, self.model.prefix))
        names = [f"decoder.{i}" for i in range(self.config.decoder_depth)]
        self.decoder_blocks = nn.ModuleList(Block(dim, heads, ratio, name) for name in names)
        self.decoder_norm = nn.LayerNorm(dim, eps=1e-6)
        self.decoder_pred = nn.Linear(dim, pixels)
        for part in (self.decoder_embed, self.decoder_blocks, self.decoder_pred):
            init_linears(part, "mae")

    def losses(self, batch: Batch) -> Losses:
        """For each sample the mean over its hidden patches."""
        painted, hidden = self._paint(batch)
        target, _, _ = self._normalise(pick(self._patches(batch.views[0]), hidden))
        loss = (painted - target).square().mean((1, 2))
        return Losses((loss * batch.weight).sum(), {})

    def picture(self, batch: Batch) -> Picture:
        painted, hidden = self._paint(batch)
        patches = self._patches(batch.views[0])
        _, mean, std = self._normalise(pick(patches, hidden))
        index = hidden[..., None].expand(-1, -1, patches.shape[-1])
        masked = patches.scatter(1, index, 0.0)
        filled = patches.scatter(1, index, (painted * std + mean).detach().to(patches.dtype))
        return Picture(*(self._images(p) for p in (patches, masked, filled)))

    def _paint(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What the decoder says of the hidden patches (B M S), and which they are (B M)."""
        order = uniform(batch.seeds, "mask", self.model.grid[0] * self.model.grid[1]).argsort(
            dim=1, stable=True
        )
        keep, hidden = order[:, : self.visible], order[:, self.visible :]
        return self._decode(self._encode(batch, keep), keep, hidden), hidden

    def _encode(self, batch: Batch, keep: Tensor) -> Tensor:
        """Visible patches alone → B (P + K) D."""
        features = self.model(batch.views[0], {"prefix", "tokens"}, keep=keep, seeds=batch.seeds)
        return torch.cat([features.prefix, features.tokens], dim=1)

    def _decode(self, latent: Tensor, keep: Tensor, hidden: Tensor) -> Tensor:
        """B (P + K) D → B M S. Hidden patches go first: the last block paints them and no others."""
        x = self.decoder_embed(latent)
        places = self.decoder_pos_embed.expand(len(x), -1, -1)
        prefix, patches = places[:, : self.model.prefix], places[:, self.model.prefix :]
        unseen = self.mask_token.to(x.dtype) + pick(patches, hidden)
        x = torch.cat([unseen, x + torch.cat([prefix, pick(patches, keep)], dim=1)], dim=1)
        last = len(self.decoder_blocks) - 1
        for i, block in enumerate(self.decoder_blocks):
            x = block(x, first=hidden.shape[1] if i == last else None)
        painted: Tensor = self.decoder_pred(self.decoder_norm(x))
        return full(painted)

    def _patches(self, images: Tensor) -> Tensor:
        """B C height width → B N S, a pixel's channels side by side."""
        return cut(images, self.model.config.patch_size).movedim(2, 4).flatten(2)

    def _normalise(self, patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(target, mean, standard deviation), the last two being what turns a target back into pixels."""
        if not self.config.norm_pix:
            return patches, patches.new_zeros(()), patches.new_ones(())
        mean = patches.mean(-1, keepdim=True)
        std = (patches.var(-1, keepdim=True) + 1e-6).sqrt()
        return (patches - mean) / std, mean, std

    def _images(self, patches: Tensor) -> Tensor:
        """B N S → B C height width."""
        p, (rows, columns) = self.model.config.patch_size, self.model.grid
        grid = patches.reshape(len(patches), rows, columns, p, p, -1).permute(0, 5, 1, 3, 2, 4)
        return grid.reshape(len(patches), -1, rows * p, columns * p)

    def no_decay(self) -> set[str]:
        """Only positions: the authors' pretraining code decays every other matrix, tokens too."""
        return {"model.pos_embed"}

    def export(self) -> ViT:
        return self.model

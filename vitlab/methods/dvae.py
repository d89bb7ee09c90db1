"""Training a discrete VAE: what an image's codes let a decoder paint, against what naming them costs.

Paper: Ramesh et al. 2021 (arXiv 2102.12092), section 2.1 and appendix A; ε, μ and b as in openai/DALL-E.

  z_n = softmax((l_n + g_n) / τ)          l: the encoder's logits, g = -ln(-ln u), u uniform: Gumbel's noise
  L = [ Σ_pixels -ln p(x | z) + β · Σ_n KL(softmax l_n ‖ uniform) ] / (C·H·W)
  p: the logit-Laplace density  exp(-|logit x - μ| / b) / (2b · x(1-x))  of pixels x in ε..1-ε, ε = 0.1

A sample's sums are both divided by its C·H·W numbers, as in the paper: the mean over pixels plus β·N/(C·H·W)
times the mean over codes. There that is β/192; images or codes of other sizes keep it with
kl_weight = 6.6/192 · C·H·W/N. After a fraction p of the training, by half a cosine each:

  τ from 1 to 1/16 over the first 0.05 of the steps      (the paper: 150,000 of 3,000,000)
  β from 0 to 6.6  over the first 0.00167 of the steps    (the paper: 5,000)

The paper's optimizer is AdamW with decay 1e-4, β₂ 0.999, a rate from 1e-4 to 1.25e-6, and an average of
the weights of momentum 0.999 (`ema`).

Departures: a sample's noise comes from its own seed, and u is never nearer to 0 than 2⁻²⁵; without training
(validation, pictures) there is no noise and z is the likeliest code alone. KL is in closed form, of which the
paper says nothing; lengths of annealing are fractions, not steps.

`train/perplexity` is exp of the entropy of how often each code was the likeliest, over about the last hundred
steps: so many codes are in use.

Letters: B samples, N parts of an image (codes), V codes to choose from, C channels, H W pixels.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from vitlab.batch import Batch, uniform
from vitlab.config import Config
from vitlab.dist import summed
from vitlab.methods.base import Losses, Method, Moment, full
from vitlab.methods.mae import Picture
from vitlab.models import DVAE, DVAEConfig
from vitlab.models.parts.dvae import map_pixels, unmap_pixels

KEEPS = 0.99  # of the share of each code, at every step
DEAD = 0.01  # so small a part of the codes in use tells of a collapse


class DVAETrainingConfig(Config):
    name: Literal["dvae"] = "dvae"
    kl_weight: float = Field(6.6, ge=0)
    kl_until: float = Field(0.00167, ge=0, le=1)
    temperature: float = Field(1.0, gt=0)
    temperature_end: float = Field(0.0625, gt=0)
    temperature_until: float = Field(0.05, ge=0, le=1)


class DVAETraining(Method):
    headless = True
    takes = (DVAEConfig,)
    model: DVAE
    usage: Tensor  # V, how often each code was the likeliest, lately
    counted: Tensor  # V, the same in this step, on this worker

    def __init__(self, config: DVAETrainingConfig, model: DVAE, image_size: int) -> None:
        super().__init__()
        self.config, self.model, self.image_size = config, model, image_size
        self.register_buffer("usage", torch.zeros(model.config.vocab))
        self.register_buffer("counted", torch.zeros(model.config.vocab), persistent=False)
        self.temperature, self.kl_weight, self.settled = config.temperature, 0.0, False

    def before_step(self, now: Moment) -> None:
        c = self.config
        self.temperature = between(c.temperature, c.temperature_end, now.progress, c.temperature_until)
        self.kl_weight = between(0.0, c.kl_weight, now.progress, c.kl_until)
        self.settled = now.progress >= max(c.temperature_until, c.kl_until)

    def losses(self, batch: Batch) -> Losses:
        model = self.model if self.training else self._exported()
        pixels = full(self.model.pixels(batch.views[0]))
        logits, location, scale = self._paint(model, batch)
        nll = -log_density(map_pixels(pixels), location, scale).flatten(1).sum(1)
        kl = from_uniform(logits).sum(1)
        loss = (nll + self.kl_weight * kl) / pixels[0].numel()
        metrics = {
            "mse": (unmap_pixels(location.sigmoid()) - pixels).square().flatten(1).mean(1),
            "nll": nll / pixels[0].numel(),
            "kl": kl / logits.shape[1],
        }
        if self.training:
            self._count(logits.argmax(2), batch.weight)
            metrics["perplexity"] = perplexity(self.usage).expand_as(nll)
        sums = {name: (value.detach() * batch.weight).sum() for name, value in metrics.items()}
        return Losses((loss * batch.weight).sum(), sums)

    def picture(self, batch: Batch) -> Picture:
        """Nothing is hidden; what is painted from the likeliest codes."""
        model = self._exported()
        _, location, _ = self._paint(model, batch)
        return Picture(batch.views[0], None, model.normal(unmap_pixels(location.sigmoid())))

    def _exported(self) -> DVAE:
        model = self.exported()
        assert isinstance(model, DVAE)
        return model

    def _paint(self, model: DVAE, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Logits B N V; μ and ln b of the pixels' logits, B C H W."""
        images = batch.views[0]
        logits = full(model(images, {"tokens"}, seeds=batch.seeds).tokens)
        noise = gumbel(batch.seeds, logits) if self.training else None
        codes = relaxed(logits, noise, self.temperature)
        location, scale = model.decode(codes, model.config.grid((images.shape[2], images.shape[3])))
        return logits, full(location), full(scale)

    @torch.no_grad()
    def _count(self, codes: Tensor, weight: Tensor) -> None:
        """B N, of samples that count B."""
        each = weight[:, None].expand_as(codes).to(self.counted.dtype)
        self.counted.index_add_(0, codes.flatten(), each.flatten())

    @torch.no_grad()
    def after_step(self) -> None:
        """The global batch's codes, whoever saw them, into the shares."""
        seen = summed(self.counted)
        share = seen / seen.sum().clamp(min=1)
        self.usage.copy_(torch.where(self.usage.any(), self.usage.lerp(share, 1 - KEEPS), share))
        self.counted.zero_()

    def diagnose(self, values: dict[str, float]) -> str | None:
        vocab, used = self.model.config.vocab, values.get("train/perplexity", math.inf)
        if not self.settled or used >= max(2.0, DEAD * vocab):
            return None
        return (
            f"train/perplexity is {used:.1f}: of {vocab} codes almost all are dead; go on with a smaller "
            f"method.kl_weight ({self.config.kl_weight:g}), a longer method.temperature_until "
            f"({self.config.temperature_until:g}) or a smaller model.vocab"
        )

    def export(self) -> DVAE:
        return self.model


def between(start: float, end: float, progress: float, until: float) -> float:
    """Half a cosine from one value to another over the first part of the training."""
    done = min(1.0, progress / until) if until else 1.0
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * done))


def gumbel(seeds: Tensor, like: Tensor) -> Tensor:
    """B N V, each sample's own."""
    n = like[0].numel()
    drawn = uniform(seeds, "gumbel", n).clamp(min=2.0**-25)  # half a step of its grid, for an ln of 0
    return -(-drawn.to(like.dtype).log()).log().view_as(like)


def relaxed(logits: Tensor, noise: Tensor | None, temperature: float) -> Tensor:
    """B N V, sums of 1: a draw that gradients pass through; without noise the likeliest code alone."""
    if noise is None:
        return F.one_hot(logits.argmax(2), logits.shape[2]).to(logits.dtype)
    return ((logits + noise) / temperature).softmax(2)


def from_uniform(logits: Tensor) -> Tensor:
    """B N V → B N: Kullback-Leibler divergence of the codes' distribution from the uniform one, in nats."""
    log = logits.log_softmax(2)
    return (log.exp() * log).sum(2) + math.log(logits.shape[2])


def log_density(x: Tensor, location: Tensor, log_scale: Tensor) -> Tensor:
    """Logit-Laplace, of numbers in 0..1 without the ends."""
    distance = (x.logit() - location).abs()
    return -(distance * (-log_scale).exp() + log_scale + math.log(2) + x.log() + (1 - x).log())


def perplexity(shares: Tensor) -> Tensor:
    """V → as many codes used evenly would have this entropy; 1 where nothing was seen yet."""
    found: Tensor = torch.special.entr(shares).sum().exp()
    return found

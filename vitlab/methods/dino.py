"""Self-distillation without labels: a student says of every view what its own average says of another.

Paper: Caron et al. 2021, DINO (arXiv 2104.14294), algorithm 1, with the conventions of the authors' code. The
student sees all views, the teacher (an exponential average of the student) the global ones:

  p = softmax((t - c) / τ_t)    L = mean over pairs of views v ≠ q of  -p_q · log softmax(s_v / τ_s)
  c ← m c + (1 - m) · mean t    teacher ← λ teacher + (1 - λ) student,  λ rising to 1 by half a cosine

A loss is taken with the centre of the step before. The teacher has no drop path, but its batch normalisation
is live. The last layer of the head stays as it is for the first epochs. Weight decay spares what has one
dimension and nothing else.

Two ways to collapse (section 5.3) show in the curves. `spread` is how many nats of the teacher's answers tell
the images of a batch apart: the entropy of its mean answer minus its mean entropy, over both global views of
the global batch of the step before (0 at the first). Of a teacher that says one thing of everything it is 0:
evenly over all dimensions, then `teacher_entropy` is log K, or always the same one, then that is 0 too.
`kl` is the loss without the teacher's entropy.

Departures: the centre is that of the global batch, in one collective a step, so that neither accumulation nor
padding changes it; positions of local views are resampled without the authors' tenth of a patch, unless the
model has `resample: dino`; gradients are clipped together (`optim.clip`), a waiting last layer's too, theirs
tensor by tensor; their rate's warm-up ends a step sooner (engine/optim.py).

Letters: B samples, V views, Q = 2 global views, K dimensions of the output, t teacher's, s student's output.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from vitlab.batch import Batch, View, derived
from vitlab.config import Config
from vitlab.dist import summed
from vitlab.methods.base import TINY, Losses, Moment, full
from vitlab.methods.crops import size_problems, small_size
from vitlab.methods.heads import DINOHead, pooled_width
from vitlab.methods.siamese import Siamese
from vitlab.models import Backbone

GLOBAL = 2  # views that the teacher sees
SETTLED = 0.2  # part of a training after which a collapse is called one: at the start all images look alike
ALIKE = 0.01  # nats


class DINOConfig(Config):
    name: Literal["dino"] = "dino"
    local_crops: int = Field(8, ge=0)
    local_size: int | None = Field(None, gt=0)  # null: the size nearest to 96/224 that the model can take
    out_dim: int = Field(65536, gt=1)
    hidden_dim: int = Field(2048, gt=0)
    bottleneck_dim: int = Field(256, gt=0)
    head_layers: int = Field(3, gt=0)
    head_batch_norm: bool = False  # in the head's hidden layers
    norm_last_layer: bool = True  # the rows of the last layer keep length 1
    freeze_last_layer: float = Field(1.0, ge=0)  # epochs
    student_temp: float = Field(0.1, gt=0)
    teacher_temp: float = Field(0.04, gt=0)
    warmup_teacher_temp: float = Field(0.04, gt=0)
    warmup_teacher_temp_epochs: int = Field(0, ge=0)
    momentum: float = Field(0.996, ge=0, le=1)  # at the start; 1 at the end
    centering: bool = True
    center_momentum: float = Field(0.9, ge=0, lt=1)
    export: Literal["teacher", "student"] = "teacher"

    def temperature(self, now: Moment) -> float:
        """The teacher's: it goes by whole epochs."""
        epoch, epochs = now.step // now.epoch_steps, self.warmup_teacher_temp_epochs
        if epoch >= epochs:
            return self.teacher_temp
        done = epoch / max(1, epochs - 1)
        return self.warmup_teacher_temp + (self.teacher_temp - self.warmup_teacher_temp) * done

    def momentum_at(self, now: Moment) -> float:
        return 1 - (1 - self.momentum) * (1 + math.cos(math.pi * now.progress)) / 2


class DINO(Siamese):
    center: Tensor
    spread: Tensor

    def __init__(self, config: DINOConfig, model: Backbone, image_size: int) -> None:
        super().__init__()
        self.config, self.model, self.image_size = config, model, image_size
        self.local_size = config.local_size or small_size(model.config, image_size)
        dims = (pooled_width(model), config.hidden_dim, config.bottleneck_dim, config.out_dim)
        how = {"norm_last_layer": config.norm_last_layer, "batch_norm": config.head_batch_norm}
        self.head = DINOHead(dims, config.head_layers, **how)
        self.add_teacher()
        self.register_buffer("center", torch.zeros(config.out_dim))
        self.register_buffer("spread", torch.zeros(()))
        self.sums: Tensor | None = None  # over a step's micro-batches: Σt (K), Σp (K), Σ entropy, how many
        self.before_step(Moment(0, 1, 1))

    @classmethod
    def problems(cls, name: str, config: DINOConfig, model: Any, side: int) -> Iterator[str]:
        yield from super().problems(name, config, model, side)
        if config.local_crops:
            yield from size_problems(name, "local", config.local_size, model, side)

    @classmethod
    def view_names(cls, config: DINOConfig) -> list[str]:
        return [f"global/{i}" for i in range(GLOBAL)] + [f"local/{i}" for i in range(config.local_crops)]

    def views(self) -> list[View]:
        names = self.view_names(self.config)
        return [View(n, self.image_size if n.startswith("global") else self.local_size) for n in names]

    def before_step(self, now: Moment) -> None:
        self.now = now
        self.temperature, self.momentum = self.config.temperature(now), self.config.momentum_at(now)

    def losses(self, batch: Batch) -> Losses:
        s = self._answers(self.model, self.head, batch, GLOBAL + self.config.local_crops)
        with torch.no_grad():
            t = self._answers(self.teacher, self.teacher_head, batch, GLOBAL)
        with torch.autocast(s.device.type, enabled=False):
            return self._compare(s, t, batch.weight.to(s.dtype))

    def _answers(self, model: nn.Module, head: nn.Module, batch: Batch, count: int) -> Tensor:
        """V B K: what is said of the first `count` views; one call a resolution."""
        pooled = []
        for group in (range(GLOBAL), range(GLOBAL, count)):
            if group:
                images = torch.cat([batch.views[v] for v in group])
                seeds = torch.cat([derived(batch.seeds, self.views()[v].name) for v in group])
                pooled.append(model(images, {"pooled"}, seeds=seeds).pooled)
        return full(head(torch.cat(pooled))).view(count, -1, self.config.out_dim)

    def _compare(self, s: Tensor, t: Tensor, weight: Tensor) -> Losses:
        log_p = F.log_softmax((t - self.center).div_(self.temperature), dim=-1)
        p = log_p.exp()
        entropy = -torch.einsum("qbk,qbk->b", p, log_p) / GLOBAL
        log_s = F.log_softmax(s / self.config.student_temp, dim=-1)
        pairs = -torch.einsum("qbk,vbk->bqv", p, log_s)
        same = pairs.diagonal(dim1=1, dim2=2).sum(1)
        loss = (pairs.sum((1, 2)) - same) / (GLOBAL * (len(s) - 1))
        if self.training:
            self._remember(t, p, entropy, weight)
        found = {"teacher_entropy": entropy, "kl": loss.detach() - entropy, "spread": self.spread}
        return Losses((loss * weight).sum(), {name: (value * weight).sum() for name, value in found.items()})

    @torch.no_grad()
    def _remember(self, t: Tensor, p: Tensor, entropy: Tensor, weight: Tensor) -> None:
        answers, ours = weight.repeat(GLOBAL), weight.sum()[None]
        means = [answers @ t.flatten(0, 1), answers @ p.flatten(0, 1)]
        sums = torch.cat([*means, (entropy @ weight)[None] * GLOBAL, ours * GLOBAL])
        self.sums = sums if self.sums is None else self.sums + sums

    @torch.no_grad()
    def after_step(self) -> None:
        """The centre and the spread, over all workers and micro-batches."""
        assert self.sums is not None, "a step without a batch"
        sums, k = summed(self.sums), self.config.out_dim
        answers = sums[-1]
        mean, usual, entropy = (sums[part] / answers.clamp(min=TINY) for part in (slice(k), slice(k, -2), -2))
        self.spread.copy_((-torch.xlogy(usual, usual).sum() - entropy).clamp(min=0))
        if self.config.centering:
            self.center.lerp_(mean, (1 - self.config.center_momentum) * (answers > 0).to(mean.dtype))
        self.sums = None

    def diagnose(self, values: dict[str, float]) -> str | None:
        """Whether the teacher has collapsed, and which way."""
        spread, entropy = values["train/spread"], values["train/teacher_entropy"]
        if spread >= ALIKE or self.now.progress < SETTLED:
            return None
        dimensions = self.config.out_dim
        if entropy > math.log(dimensions) / 2:
            how = f"evenly over its {dimensions} dimensions; give a lower teacher_temp, a lower optim.lr"
        else:
            how = "in few dimensions; give centering=true, a lower center_momentum"
        same = f"the teacher says the same of every image (spread {spread:.1g})"
        return f"collapse: {same}, {how} or a higher momentum"

    def starts(self) -> dict[str, float]:
        return {"head.last_layer.": self.config.freeze_last_layer}

    def no_decay(self) -> set[str]:
        return set()

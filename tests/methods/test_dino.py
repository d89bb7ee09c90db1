"""DINO against lightly's parts and against the paper's equations, over steps with everything that moves.

lightly 1.6 follows the authors' code; its temperature is a float32 tensor, so those here are powers of 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from lightly.loss import DINOLoss
from lightly.models.modules.heads import DINOProjectionHead
from lightly.models.utils import update_momentum
from parity import EXACT, worst
from steps import ADAM, DECAY, LR, batch, halved, one_step, part, strategy_of
from torch import Tensor, nn
from zoo import SMALL, small

from vitlab.batch import Batch, derived
from vitlab.config import UserError, build
from vitlab.methods import create_method
from vitlab.methods.base import Moment
from vitlab.methods.crops import small_size
from vitlab.methods.dino import DINO, DINOConfig
from vitlab.methods.heads import DINOHead
from vitlab.models import Backbone, create_model
from vitlab.models.parts.norm import BatchNorm2d

SIZES = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
HEAD = {"out_dim": 40, "hidden_dim": 24, "bottleneck_dim": 12, "local_crops": 3}
TEMPERATURES = {"student_temp": 0.125, "teacher_temp": 0.0625, "warmup_teacher_temp": 0.03125}
SCHEDULES = {"warmup_teacher_temp_epochs": 2, "momentum": 0.8, "center_momentum": 0.7}
MOVING: dict[str, Any] = TEMPERATURES | SCHEDULES
STEPS, EPOCH = 6, 2  # of a training, of one epoch

Trajectory = Iterator[dict[str, Tensor]]
Reference = Callable[[DINO, list[Batch], torch.dtype], Trajectory]


def method(model: Backbone | None = None, **more: object) -> DINO:
    torch.manual_seed(0)
    inner = model or create_model("vit_tiny", num_classes=0, image_size=16, **SIZES)
    made = create_method(build(DINOConfig, {**HEAD, **more}), inner)
    assert isinstance(made, DINO)
    return made


def moment(step: int) -> Moment:
    return Moment(step, STEPS, EPOCH)


def redraw(of: DINO) -> None:
    """Student and teacher apart, with biases and lengths that are not their first values."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in of.state_dict().items():
            if not name.endswith("weight_g"):
                tensor.add_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * 0.1)


def parts(*modules: nn.Module) -> dict[str, Tensor]:
    named = dict(zip(("model", "head", "teacher", "teacher_head"), modules, strict=True))
    return {
        f"{kind}.{name}": tensor.detach().clone()
        for kind, module in named.items()
        for name, tensor in module.state_dict().items()
    }


def ours(of: DINO, batches: list[Batch], dtype: torch.dtype) -> Trajectory:
    plain = strategy_of(of, EPOCH, dtype)
    for step, one in enumerate(batches):
        yield {
            "loss": one_step(of, plain, [one], moment(step)).loss,
            "center": of.center.clone(),
            **parts(of.model, of.head, of.teacher, of.teacher_head),
        }


def adamw(modules: list[nn.Module], dtype: torch.dtype) -> torch.optim.AdamW:
    """As in the authors' code: biases and vectors are not decayed, all else is."""
    named = [p for module in modules for p in module.named_parameters() if p[1].requires_grad]
    plain = [p for name, p in named if name.endswith(".bias") or p.ndim == 1]
    decayed = [p for name, p in named if not (name.endswith(".bias") or p.ndim == 1)]
    groups = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=LR, weight_decay=DECAY, eps=ADAM[dtype])


def schedules(config: DINOConfig, step: int) -> tuple[float, float]:
    """The authors' arrays at a step: temperature of the teacher, momentum."""
    epochs, warm = STEPS // EPOCH, config.warmup_teacher_temp_epochs
    ramp = np.linspace(config.warmup_teacher_temp, config.teacher_temp, warm)
    temperatures = np.concatenate([ramp, np.ones(epochs - warm) * config.teacher_temp])
    steps = np.arange(STEPS)
    momenta = 1 + 0.5 * (config.momentum - 1) * (1 + np.cos(np.pi * steps / len(steps)))
    return float(temperatures[step // EPOCH]), float(momenta[step])


def seen_by(of: DINO, model: nn.Module, one: Batch, count: int, *, seeded: bool) -> list[Tensor]:
    names = [view.name for view in of.views()][:count]
    seeds = [derived(one.seeds, name) if seeded else None for name in names]
    return [model(image, {"pooled"}, seeds=s).pooled for image, s in zip(one.views, seeds, strict=False)]


def theirs_of(head: nn.Module) -> dict[str, Tensor]:
    return {name.replace("mlp.", "layers."): value for name, value in head.state_dict().items()}


def lightly(of: DINO, batches: list[Batch], dtype: torch.dtype) -> Trajectory:
    c = of.config
    student, teacher = deepcopy(of.model).train(), deepcopy(of.teacher).eval()
    sizes = (32, c.hidden_dim, c.bottleneck_dim, c.out_dim)
    freeze, fixed = int(c.freeze_last_layer), c.norm_last_layer
    head = DINOProjectionHead(*sizes, freeze_last_layer=freeze, norm_last_layer=fixed).to(dtype)
    teacher_head = DINOProjectionHead(*sizes).to(dtype).requires_grad_(False)
    head.load_state_dict(theirs_of(of.head))
    teacher_head.load_state_dict(theirs_of(of.teacher_head))
    criterion = DINOLoss(c.out_dim, student_temp=c.student_temp, center_momentum=c.center_momentum).to(dtype)
    criterion.center.copy_(of.center)
    optimizer = adamw([student, head], dtype)
    for step, one in enumerate(batches):
        temperature, momentum = schedules(c, step)
        with torch.no_grad():
            t = [teacher_head(x) for x in seen_by(of, teacher, one, 2, seeded=False)]
        s = [head(x) for x in seen_by(of, student, one, len(one.views), seeded=True)]
        loss = criterion(t, s, teacher_temp=temperature)
        loss.backward()
        head.cancel_last_layer_gradients(step // EPOCH)
        optimizer.step()
        optimizer.zero_grad()
        update_momentum(student, teacher, momentum)
        update_momentum(head, teacher_head, momentum)
        found = parts(student, head, teacher, teacher_head)
        yield {
            "loss": loss.detach(),
            "center": criterion.center.view(-1).clone(),
            **{name.replace(".layers.", ".mlp."): value for name, value in found.items()},
        }


def equations(of: DINO, batches: list[Batch], dtype: torch.dtype) -> Trajectory:
    """Algorithm 1 of the paper with several crops, term by term and sample by sample."""
    c, state = of.config, {name: p.detach().clone() for name, p in of.state_dict().items()}
    modules = deepcopy(nn.ModuleList([of.model, of.head, of.teacher, of.teacher_head]))
    student, head, teacher, teacher_head = modules
    center = state["center"]
    modules.train()
    teacher.eval()
    optimizer = adamw([student, head], dtype)

    def project(of_head: Any, x: Tensor) -> Tensor:
        p = dict(of_head.named_parameters())
        for layer in (0, 2, 4):
            x = x @ p[f"mlp.{layer}.weight"].T + p[f"mlp.{layer}.bias"]
            x = x * 0.5 * (1 + torch.erf(x / math.sqrt(2))) if layer < 4 else x
        x = x / x.square().sum(1, keepdim=True).sqrt()
        v, g = p["last_layer.weight_v"], p["last_layer.weight_g"]
        return x @ (g * v / v.square().sum(1, keepdim=True).sqrt()).T

    for step, one in enumerate(batches):
        temperature, momentum = schedules(c, step)
        with torch.no_grad():
            t = [project(teacher_head, x) for x in seen_by(of, teacher, one, 2, seeded=False)]
        s = [project(head, x) for x in seen_by(of, student, one, len(one.views), seeded=True)]
        terms = []
        for b in range(len(one.seeds)):
            for q in range(2):
                for v in range(len(s)):
                    if v != q:
                        p_t = ((t[q][b] - center) / temperature).exp()
                        p_s = (s[v][b] / c.student_temp).exp()
                        terms.append(-(p_t / p_t.sum() * (p_s / p_s.sum()).log()).sum())
        loss = torch.stack(terms).mean()
        loss.backward()
        for name, p in head.named_parameters():
            if "last_layer" in name and step // EPOCH < c.freeze_last_layer:
                p.grad = None
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for old, new in ((teacher, student), (teacher_head, head)):
                for k, q_ in zip(old.parameters(), new.parameters(), strict=True):
                    k.mul_(momentum).add_((1 - momentum) * q_)
        center = c.center_momentum * center + (1 - c.center_momentum) * torch.cat(t).mean(0)
        yield {"loss": loss.detach(), "center": center, **parts(student, head, teacher, teacher_head)}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("norm_last_layer", [True, False])
@pytest.mark.parametrize("reference", [lightly, equations])
def test_steps_are_those_of(reference: Reference, norm_last_layer: bool, dtype: torch.dtype) -> None:
    """Loss, centre, student and teacher after each of six steps, with drop path and all that is scheduled."""
    model = create_model("vit_tiny", num_classes=0, image_size=16, drop_path=0.3, **SIZES)
    of = method(model, norm_last_layer=norm_last_layer, **MOVING)
    redraw(of)
    of = of.to(dtype)
    batches = [batch(of, first=1000 * step, dtype=dtype) for step in range(STEPS)]
    start, last = of.head.last_layer.weight_v.detach().clone(), []
    expected, figures = reference(of, batches, dtype), []
    for found, other in zip(ours(deepcopy(of), batches, dtype), expected, strict=True):
        figures.append(worst(found, other))
        last.append(found["head.last_layer.weight_v"])
    print("DINO", reference.__name__, norm_last_layer, dtype, figures)
    assert all(figure <= EXACT[dtype] for figure in figures), figures
    assert [torch.equal(weight, start) for weight in last] == [True] * EPOCH + [False] * (STEPS - EPOCH)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("dtype", EXACT)
def test_gradients_are_lightlys(dtype: torch.dtype) -> None:
    of = method(norm_last_layer=False, **MOVING)
    redraw(of)
    of = of.to(dtype)
    one, c = batch(of, dtype=dtype), of.config
    head = DINOProjectionHead(32, c.hidden_dim, c.bottleneck_dim, c.out_dim, norm_last_layer=False).to(dtype)
    head.load_state_dict(theirs_of(of.head))
    student = deepcopy(of.model)
    criterion = DINOLoss(c.out_dim, student_temp=c.student_temp).to(dtype)
    criterion.center.copy_(of.center)
    with torch.no_grad():
        t = [of.teacher_head(x) for x in seen_by(of, of.teacher, one, 2, seeded=False)]
    s = [head(x) for x in seen_by(of, student, one, len(one.views), seeded=False)]
    criterion(t, s, teacher_temp=of.temperature).backward()
    expected = {f"model.{n}": p.grad for n, p in student.named_parameters()}
    expected |= {f"head.{n.replace('layers.', 'mlp.')}": p.grad for n, p in head.named_parameters()}
    (of(one).loss / 5).backward()
    found = {name: p.grad for name, p in of.named_parameters() if p.requires_grad}
    figure = worst(found, expected)
    print("DINO gradients", dtype, figure)
    assert figure <= EXACT[dtype]


def test_neither_micro_batches_nor_padding_change_a_step() -> None:
    once, twice = (method(**MOVING, freeze_last_layer=0.0).double() for _ in range(2))
    plain, other = strategy_of(once, EPOCH, torch.float64), strategy_of(twice, EPOCH, torch.float64)
    for step in range(3):
        padded = batch(once, 8, 1000 * step, torch.float64)
        whole = part(padded, slice(0, 6))
        padded.weight[6:] = 0
        halves = [part(padded, rows) for rows in (slice(0, 3), slice(3, 8))]
        a = one_step(once, plain, [whole], moment(step))
        b = one_step(twice, other, halves, moment(step))
        torch.testing.assert_close(a, b)
    assert float(once.spread) != 0
    for name, tensor in once.state_dict().items():
        torch.testing.assert_close(tensor, twice.state_dict()[name], rtol=1e-8, atol=1e-10)


def test_schedules_are_those_of_the_authors() -> None:
    config = build(DINOConfig, MOVING)
    for step in range(STEPS):
        now = moment(step)
        found = (config.temperature(now), config.momentum_at(now))
        assert found == pytest.approx(schedules(config, step), abs=1e-15)
    still = build(DINOConfig, {"teacher_temp": 0.07})
    assert still.temperature(Moment(0, 10, 5)) == 0.07
    assert still.momentum_at(Moment(10, 10, 5)) == 1


def test_the_head_is_the_authors() -> None:
    of = method(head_layers=3)
    shapes = {name: tuple(value.shape) for name, value in of.head.state_dict().items()}
    assert shapes == {
        "mlp.0.weight": (24, 32),
        "mlp.0.bias": (24,),
        "mlp.2.weight": (24, 24),
        "mlp.2.bias": (24,),
        "mlp.4.weight": (12, 24),
        "mlp.4.bias": (12,),
        "last_layer.weight_g": (40, 1),
        "last_layer.weight_v": (40, 12),
    }
    assert set(method(head_layers=1).head.mlp.state_dict()) == {"weight", "bias"}
    assert torch.equal(of.head.last_layer.weight_g, torch.ones(40, 1))
    assert float(of.head.last_layer.weight_v.detach().abs().max()) <= 12**-0.5
    assert float(of.head.mlp[0].weight.detach().std()) == pytest.approx(0.02, rel=0.2)
    trained = {name for name, p in of.named_parameters() if p.requires_grad}
    assert "head.last_layer.weight_g" not in trained
    assert "head.last_layer.weight_v" in trained
    assert not any(name.startswith("teacher") for name in trained)
    out = of.head(torch.randn(7, 32))
    assert float(out.detach().abs().max()) <= 1  # cosines


def test_views_layers_decay_and_export() -> None:
    of = method()
    assert [(v.name, v.size) for v in of.views()] == [
        ("global/0", 16),
        ("global/1", 16),
        *((f"local/{i}", 8) for i in range(3)),
    ]
    assert of.export() is of.teacher
    assert method(export="student").export().training
    assert of.layer_of("model.blocks.0.norm1.weight") == 1
    assert of.layer_of("head.mlp.0.weight") == of.model.num_layers - 1
    assert of.no_decay() == set()
    one = batch(of)
    of.eval()
    torch.testing.assert_close(of(one, "features"), of.teacher(one.views[0], {"pooled"}).pooled)
    of(one)
    assert of.sums is None  # only training moves the centre


@pytest.mark.parametrize("local_crops", [0, 1])
def test_without_local_views(local_crops: int) -> None:
    of = method(local_crops=local_crops)
    losses = of(batch(of))
    losses.loss.backward()
    assert all(p.grad is not None for p in of.parameters() if p.requires_grad)
    found = float(losses.metrics["kl"] + losses.metrics["teacher_entropy"])
    assert float(losses.loss.detach()) == pytest.approx(found, rel=1e-6)


@pytest.mark.parametrize("name", SMALL)
def test_every_family_trains(name: str) -> None:
    of = method(small(name, 0))
    assert 1 <= of.local_size < of.image_size
    of.train()
    before = {name: buffer.clone() for name, buffer in of.teacher.named_buffers()}
    of(batch(of, 3)).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in of.model.parameters())
    live = [n for n, m in of.teacher.named_modules() if isinstance(m, BatchNorm2d)]
    moved = {n.rpartition(".")[0] for n, b in of.teacher.named_buffers() if not torch.equal(b, before[n])}
    assert moved == set(live)  # its batch normalisation sees the batch, all else is still
    assert not of.teacher.training
    of.eval()
    assert not any(module.training for module in of.modules())


def test_the_teacher_draws_nothing() -> None:
    model = create_model("vit_tiny", num_classes=0, image_size=16, drop_path=0.5, dropout=0.5, **SIZES)
    of, one = method(model).train(), batch(method())
    two = [replace(one, seeds=one.seeds + i) for i in range(2)]
    taught = [of._answers(of.teacher, of.teacher_head, drawn, 2) for drawn in two]
    asked = [of._answers(of.model, of.head, drawn, 2) for drawn in two]
    assert torch.equal(*taught)
    assert not torch.equal(*asked)
    again = of._answers(of.model, of.head, one, 2)
    assert torch.equal(asked[0], again)
    alone = of._answers(of.model, of.head, part(one, slice(2)), 2)
    torch.testing.assert_close(alone, again[:, :2])


def test_half_precision_products() -> None:
    of = method().train()
    halved(of, batch(of))


@pytest.mark.parametrize(
    ("name", "side", "sizes", "expected"),
    [
        ("vit_tiny", 224, {"patch_size": 16}, 96),
        ("vit_tiny", 28, {"patch_size": 4}, 12),
        ("vit_tiny", 32, {"patch_size": 8}, 16),
        ("vit_tiny", 8, {"patch_size": 2}, 4),
        ("vit_tiny", 16, {"patch_size": 16}, 16),
        ("vit_huge", 224, {}, 98),
        ("swin_tiny", 224, {}, 96),
        ("cvt_13", 28, {}, 12),
        ("cct_7_3x1", 32, {}, 14),
        ("torchvision", 224, {"arch": "resnet18"}, 96),
    ],
)
def test_local_views_have_the_nearest_size_that_can_be(
    name: str, side: int, sizes: dict[str, Any], expected: int
) -> None:
    with torch.device("meta"):
        config = create_model(name, num_classes=0, image_size=side, **sizes).config
    assert small_size(config, side) == expected


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ({"local_size": 7}, r"local_size: given 7; image_size 7 is not .*; give dino.method.local_size=8"),
        ({"local_size": 64}, r"local_size: given 64; the images have data.image_size=.* give .*local_size="),
        ({"local_crops": -1}, "local_crops: given -1; must be at least 0"),
        ({"teacher_temp": 0.0}, "teacher_temp: given 0.0; must be greater than 0"),
        ({"momentum": 1.5}, "momentum: given 1.5; must be at least 0 and less equal 1|momentum: given 1.5"),
        ({"freeze_last_layer": -1.0}, "freeze_last_layer: given -1.0"),
        ({"export": "both"}, 'export: given "both"; allowed: teacher, student'),
    ],
)
def test_wrong_configs(more: dict[str, object], line: str) -> None:
    with pytest.raises(UserError, match=line):
        method(**more)


def test_models_that_cannot_serve_are_refused() -> None:
    with pytest.raises(UserError, match="given num_classes 3, allowed: 0"):
        method(create_model("vit_tiny", num_classes=3, image_size=16, **SIZES))
    fixed = create_model("timm", num_classes=0, image_size=32, arch="vit_tiny_patch16_224")
    with pytest.raises(UserError, match=r"local_size: given 16; .* made for 32 .* give .*local_size=32"):
        method(fixed, local_size=16)
    assert method(fixed).local_size == 32


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_the_head_with_batch_normalisation_is_lightlys() -> None:
    """Theirs has no biases before the norms, which take them out anyway."""
    torch.manual_seed(0)
    ours = DINOHead((8, 12, 6, 10), 3, norm_last_layer=True, batch_norm=True).double()
    theirs = DINOProjectionHead(8, 12, 6, 10, batch_norm=True, norm_last_layer=True).double()
    state = {name.replace("mlp.", "layers."): value for name, value in ours.state_dict().items()}
    report = theirs.load_state_dict(theirs_of(ours) | state, strict=False)
    assert not report.missing_keys
    spare = ("layers.0.bias", "layers.3.bias", "last_layer.weight_g", "last_layer.weight_v")
    assert set(report.unexpected_keys) <= set(spare)
    x, weight = torch.randn(7, 8, dtype=torch.float64), torch.randn(7, 10, dtype=torch.float64)
    found, expected = ours(x), theirs(x)
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    grads = {name.replace("layers.", "mlp."): p.grad for name, p in theirs.named_parameters()}
    shared = {name: p.grad for name, p in ours.named_parameters() if name in grads and p.grad is not None}
    assert len(shared) >= 7
    assert worst(shared, {name: grads[name] for name in shared}) < EXACT[torch.float64]


def test_a_head_with_batch_normalisation_takes_batches_whole() -> None:
    assert not DINO.whole_batch(DINOConfig())
    assert DINO.whole_batch(DINOConfig(head_batch_norm=True))

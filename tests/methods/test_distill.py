"""Distillation against the formulas of the paper written out, and against timm's task."""

from __future__ import annotations

import math

import pytest
import torch
from parity import images, redraw
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from timm.task import TokenDistillationTask
from torch import Tensor

from vitlab.batch import Batch
from vitlab.config import UserError, build
from vitlab.methods import Distill, DistillConfig, create_method
from vitlab.models import Backbone, create_model

TINY = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
CLASSES = 4


def student(distilled: bool = True, classes: int = CLASSES, seed: int = 1, size: int = 16) -> Backbone:
    model = create_model("vit_tiny", num_classes=classes, image_size=size, distilled=distilled, **TINY)
    redraw(model, seed)
    return model


def method(**more: object) -> Distill:
    config = build(DistillConfig, more)
    made = create_method(config, student(config.token), teacher=student(False, seed=2)).double()
    assert isinstance(made, Distill)
    return made


def batch(n: int = 6) -> Batch:
    weight = torch.ones(n, dtype=torch.float64)
    weight[-1] = 0
    return Batch([images(n, 16, torch.float64)], torch.arange(n) % CLASSES, weight, torch.arange(n), [""] * n)


def log_softmax(row: list[float]) -> list[float]:
    top = max(row)
    total = math.log(sum(math.exp(v - top) for v in row)) + top
    return [v - total for v in row]


def expected(
    by_label: Tensor, by_teacher: Tensor, taught: Tensor, label: int, config: DistillConfig
) -> float:
    """Equations 2 and 3 for one sample, in plain Python."""
    true = -log_softmax(by_label.tolist())[label]
    if config.kind == "hard":
        wise = max(range(CLASSES), key=taught.tolist().__getitem__)
        distance = -log_softmax(by_teacher.tolist())[wise]
    else:
        t = config.temperature
        p = log_softmax([v / t for v in taught.tolist()])
        q = log_softmax([v / t for v in by_teacher.tolist()])
        distance = t * t * sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True)) / CLASSES
    return (1 - config.alpha) * true + config.alpha * distance


@pytest.mark.parametrize("token", [True, False])
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_same_as_the_paper(kind: str, token: bool) -> None:
    ours, of = method(kind=kind, token=token, alpha=0.3, temperature=2.5), batch()
    with torch.no_grad():
        taught = ours.teacher(of.views[0])
        found = ours.model(of.views[0], {"logits", "heads"} if token else {"logits"})
    heads = found.heads if token else (found.logits, found.logits)
    rows = zip(heads[0], heads[1], taught, of.labels.tolist(), strict=True)
    parts = [expected(*row, ours.config) for row in rows]
    losses = ours(of)
    assert float(losses.loss.detach()) == pytest.approx(sum(parts[:-1]), rel=1e-10)  # the last weighs nothing
    right = (found.logits.argmax(-1) == of.labels)[:-1].sum()
    agree = (found.logits.argmax(-1) == taught.argmax(-1))[:-1].sum()
    assert {name: int(value) for name, value in losses.metrics.items()} == {"top1": right, "agreement": agree}
    assert not any(value.requires_grad for value in losses.metrics.values())


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_same_as_timm(kind: str) -> None:
    """timm's soft loss is summed over the classes, the DeiT authors' is their mean: C apart."""
    ours, of = method(kind=kind, alpha=0.25, temperature=3.0), batch()
    of.weight[-1] = 1
    sizes = {"img_size": 16, "num_classes": CLASSES, **TINY}
    pupil, teacher = VisionTransformerDistilled(**sizes).double(), VisionTransformer(**sizes).double()
    pupil.load_state_dict(ours.model.state_dict())
    teacher.load_state_dict(ours.teacher.state_dict())
    pupil.pretrained_cfg = teacher.pretrained_cfg = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    task = TokenDistillationTask(
        pupil,
        teacher,
        torch.nn.CrossEntropyLoss(),
        distill_type=kind,
        task_loss_weight=0.75,
        distill_loss_weight=0.25 / (CLASSES if kind == "soft" else 1),
        temperature=3.0,
        dtype=torch.float64,
        verbose=False,
    ).train()
    theirs = task(of.views[0], of.labels)["loss"]
    mine = ours.train()(of).loss / len(of.labels)
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=0)
    theirs.backward()
    mine.backward()
    for name, value in pupil.named_parameters():
        torch.testing.assert_close(ours.model.get_parameter(name).grad, value.grad, rtol=1e-8, atol=1e-14)


def test_the_teacher_is_frozen() -> None:
    ours = method().train()
    assert ours.model.training
    assert not any(module.training for module in ours.teacher.modules())
    before = {name: value.clone() for name, value in ours.teacher.state_dict().items()}
    ours(batch()).loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in ours.teacher.parameters())
    assert all(p.grad is not None for p in ours.model.parameters())
    assert all(torch.equal(before[name], value) for name, value in ours.teacher.state_dict().items())
    assert ours.export() is ours.model


def test_students_and_teachers_that_do_not_fit() -> None:
    config, teacher = build(DistillConfig, {}), student(False)
    with pytest.raises(UserError, match=r"distill.method.token: given true, but"):
        create_method(config, student(False), teacher=teacher)
    with pytest.raises(UserError, match="the teacher tells 5 classes apart, the student 4"):
        create_method(config, student(), teacher=student(False, classes=5))
    with pytest.raises(UserError, match=r"the teacher takes images of 32×32, the student 16×16"):
        create_method(config, student(), teacher=student(False, size=32))
    with pytest.raises(UserError, match="needs a teacher"):
        create_method(config, student())

"""Hints against their formula written out, place by place, in double precision."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from parity import redraw, worst
from steps import part
from torch import Tensor

from vitlab.batch import Batch
from vitlab.config import UserError, build
from vitlab.engine.optim import OptimConfig
from vitlab.engine.strategy import Plain
from vitlab.methods import Distill, DistillConfig, create_method
from vitlab.methods.hints import Hint, Hints
from vitlab.models import Backbone, create_model

SIDE, CLASSES = 24, 4
TINY = {"patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}
PAIRS = [{"student": 1, "teacher": 2}, {"student": -2, "teacher": 4}, {"student": 3, "teacher": -1}]


def student(distilled: bool = True) -> Backbone:
    model = create_model("vit_tiny", num_classes=CLASSES, image_size=SIDE, distilled=distilled, **TINY)
    redraw(model, 1)
    return model


def cnn() -> Backbone:
    """Maps of 12, 6, 3, 2 and 1 pixels a side beside the student's 3: no side divides all others."""
    torch.manual_seed(2)
    return create_model("torchvision", arch="resnet18", num_classes=CLASSES, image_size=SIDE)


def method(teacher: Backbone | None = None, pairs: list[dict[str, int]] = PAIRS, **more: Any) -> Distill:
    torch.manual_seed(4)
    config = build(DistillConfig, {"hints": pairs, **more})
    made = create_method(config, student(config.token), teacher=teacher or cnn()).double()
    assert isinstance(made, Distill)
    return made


def batch(n: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(n, 3, SIDE, SIDE, generator=generator, dtype=torch.float64)
    weight = torch.ones(n, dtype=torch.float64)
    weight[1] = 0
    return Batch([images], torch.arange(n) % CLASSES, weight, torch.arange(n), [""] * n)


def mean_at(levels: Tensor, row: int, column: int, grid: tuple[int, int]) -> Tensor:
    """D h w → D: the mean over all pixels that a place of the smaller grid touches."""
    (height, width), (rows, columns) = levels.shape[1:], grid
    y = range(row * height // rows, math.ceil((row + 1) * height / rows))
    x = range(column * width // columns, math.ceil((column + 1) * width / columns))
    return sum(levels[:, i, j] for i in y for j in x) / (len(y) * len(x))  # type: ignore[return-value]


def norm(v: Tensor) -> Tensor:
    mean = v.sum() / len(v)
    return (v - mean) / (((v - mean) ** 2).sum() / len(v) + 1e-6) ** 0.5


def expected(s: Tensor, t: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """H of one sample and one pair: D h w of both."""
    grid = min(s.shape[1], t.shape[1]), min(s.shape[2], t.shape[2])
    total = torch.zeros((), dtype=torch.float64)
    for row in range(grid[0]):
        for column in range(grid[1]):
            mine = weight @ mean_at(s, row, column, grid) + bias
            apart = norm(mine) - norm(mean_at(t, row, column, grid))
            total = total + (apart * apart).sum() / len(apart)
    return total / (grid[0] * grid[1])


def counted(layers: list[Tensor], number: int) -> Tensor:
    return layers[number - 1 if number > 0 else number]


@pytest.mark.parametrize("taught_by", ["cnn", "vit"])
def test_same_as_the_formula(taught_by: str) -> None:
    """Values and gradients: the loss without hints, and the weight times the mean over the pairs."""
    pairs = PAIRS if taught_by == "cnn" else [{"student": 1, "teacher": 1}, {"student": 2, "teacher": -1}]
    ours = method(cnn() if taught_by == "cnn" else student(False), pairs, hint_weight=0.7).train()
    plain, of = deepcopy(ours), batch()
    losses = ours(of)
    losses.loss.backward()
    hints, plain.hints = plain.hints, None
    assert hints is not None
    layers = plain.model(of.views[0], {"layers"}).layers
    with torch.no_grad():
        known = plain.teacher(of.views[0], {"layers"}).layers
    found = torch.zeros((), dtype=torch.float64)
    for b in [0, 2, 3]:  # the second sample weighs nothing
        for pair, project in zip(pairs, hints, strict=True):
            mine, taught = counted(layers, pair["student"])[b], counted(known, pair["teacher"])[b]
            found = found + expected(mine, taught, project.weight, project.bias) / len(pairs)
    torch.testing.assert_close(losses.metrics["hint"], found.detach(), rtol=1e-12, atol=0)
    reference = plain(of)
    assert reference.metrics.keys() == losses.metrics.keys() - {"hint"}
    total = reference.loss + 0.7 * found
    torch.testing.assert_close(losses.loss, total, rtol=1e-12, atol=0)
    total.backward()
    for mine, theirs in ((ours.model, plain.model), (ours.hints, hints)):
        figures = [{n: p.grad for n, p in m.named_parameters()} for m in (mine, theirs)]
        assert worst(*figures) < 1e-10
    assert not losses.metrics["hint"].requires_grad
    assert all(p.grad is None for p in ours.teacher.parameters())


def test_a_perfect_student_is_at_no_distance() -> None:
    """And any scale of the teacher's, or of a projection's, is as good: channels are normed."""
    pairs = [Hint(student=1, teacher=1)]
    hints = Hints(pairs, student(), student()).double()
    hints[0].weight.data.copy_(torch.eye(16) * 3)
    hints[0].bias.data.zero_()
    levels = [torch.randn(2, 16, 3, 3, dtype=torch.float64)]
    assert float(hints(levels, [levels[0] * 100]).detach().max()) < 1e-9
    assert hints(levels, [-levels[0]]).tolist() == pytest.approx([4, 4], rel=1e-4)  # the largest there is


def test_without_hints_nothing_is_added() -> None:
    ours = method(pairs=[])
    assert ours.hints is None
    assert {n.partition(".")[0] for n in ours.state_dict()} == {"model", "teacher"}
    assert ours(batch()).metrics.keys() == {"top1", "agreement"}


def test_micro_batches_add_up() -> None:
    """The loss and its gradients of the parts are those of the whole."""
    whole, parts, of = method(), method(), batch()
    whole(of).loss.backward()
    for cut in (slice(0, 1), slice(1, 4)):
        parts(part(of, cut)).loss.backward()
    figures = [{n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (parts, whole)]
    assert any(n.startswith("hints.") for n in figures[0])
    assert worst(*figures) < 1e-10


def test_projections_are_in_checkpoints_and_in_no_model() -> None:
    ours = method()
    names = {piece.name for piece in Plain(ours, OptimConfig(), bf16=False).own() if piece.kind == "weight"}
    projections = {f"hints.{i}.{part}" for i in range(3) for part in ("weight", "bias")}
    assert names == projections | {f"model.{name}" for name in ours.export().state_dict()}
    assert ours.layer_of("hints.0.weight") == ours.model.num_layers - 1


def test_a_hint_is_learned() -> None:
    ours, of = method(alpha=0.0, hint_weight=1.0), batch()
    optimizer = torch.optim.AdamW([p for p in ours.parameters() if p.requires_grad], lr=1e-2)
    curve = []
    for _ in range(12):
        losses = ours.train()(of)
        optimizer.zero_grad()
        losses.loss.backward()
        optimizer.step()
        curve.append(float(losses.metrics["hint"]))
    assert curve[-1] < 0.5 * curve[0]


@pytest.mark.parametrize(
    ("pairs", "line"),
    [
        (
            [{"student": 4, "teacher": 1}],
            "distill.method.hints: given student: 4; the student has 3 layers, allowed: 1 to 3, or -1 to -3",
        ),
        (
            [{"student": 1, "teacher": -6}],
            "distill.method.hints: given teacher: -6; the teacher has 5 layers, allowed: 1 to 5, or -1 to -5",
        ),
    ],
)
def test_layers_that_are_not_there(pairs: list[dict[str, int]], line: str) -> None:
    with pytest.raises(UserError) as error:
        method(pairs=pairs)
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_layers_are_counted_from_one() -> None:
    with pytest.raises(UserError, match=r"hints.*given layer 0; layers are counted from 1, or from the end"):
        build(DistillConfig, {"hints": [{"student": 0, "teacher": 1}]})


def test_the_student_is_known_to_have_too_few_before_anything_starts() -> None:
    config = build(DistillConfig, {"hints": [{"student": 9, "teacher": 9}]})
    (problem,) = Distill.problems("distill", config, student().config, SIDE)
    assert problem.startswith("distill.method.hints: given student: 9; the student has 3 layers")


def test_a_teacher_without_maps() -> None:
    teacher = create_model("torchvision", arch="vit_b_32", num_classes=CLASSES, image_size=32)
    model = create_model("vit_tiny", num_classes=CLASSES, image_size=32, distilled=True, **TINY)
    config = build(DistillConfig, {"hints": [{"student": 1, "teacher": 1}]})
    with pytest.raises(UserError, match="hints: given, but vit_b_32, the teacher, has no maps by depth"):
        create_method(config, model, teacher=teacher)


def test_of_a_mixed_image_both_labels_count_by_their_shares() -> None:
    ours, of = method(pairs=[], alpha=0.25), batch()
    others, share = of.labels.flip(0), torch.tensor([0.3, 1.0, 0.6, 0.0], dtype=torch.float64)
    found = torch.zeros((), dtype=torch.float64)
    for i, alone in enumerate(torch.eye(4, dtype=torch.float64) * of.weight):
        for labels, much in ((of.labels, share[i]), (others, 1 - share[i])):
            found = found + much * ours(replace(of, labels=labels, weight=alone)).loss
    mixed = replace(of, others=others, share=share)
    torch.testing.assert_close(ours(mixed).loss, found, rtol=1e-12, atol=0)

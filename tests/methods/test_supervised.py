"""Cross-entropy with weights, and the contract that every method keeps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from parity import images, redraw
from pydantic import TypeAdapter

from vitlab.batch import Batch, View
from vitlab.config import Config, UserError, build
from vitlab.methods import METHODS, MAEConfig, Method, MethodConfig, SupervisedConfig, create_method
from vitlab.models import Backbone, create_model

TINY = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}


def model(classes: int = 4, size: int | tuple[int, int] = 16, **more: object) -> Backbone:
    made = create_model("vit_tiny", num_classes=classes, image_size=size, **{**TINY, **more})
    redraw(made)
    return made


def method(smoothing: float = 0.0, **more: object) -> Method:
    return create_method(SupervisedConfig(label_smoothing=smoothing), model(**more))


def batch(n: int = 6, dtype: torch.dtype = torch.float32) -> Batch:
    weight = torch.tensor([1.0, 1.0, 0.0, 0.5, 1.0, 1.0])[:n]
    return Batch([images(n, 16, dtype)], torch.arange(n) % 4, weight, torch.arange(n) + 9, [""] * n)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_weighted_sums(smoothing: float) -> None:
    ours, of = method(smoothing).eval(), batch()
    with torch.no_grad():
        losses, logits = ours(of), ours.model(of.views[0])
    target = F.one_hot(of.labels, 4) * (1 - smoothing) + smoothing / 4
    each = -(target * logits.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(losses.loss, (each * of.weight).sum())
    assert float(losses.metrics["top1"]) == float(((logits.argmax(-1) == of.labels) * of.weight).sum())
    assert float(ours.weigh(of)) == 4.5


def test_samples_without_a_label_have_no_part() -> None:
    ours, of = method().eval(), batch()
    with torch.no_grad():
        of.labels[1] = -1
        without = ours(of).loss
        assert float(ours.weigh(of)) == 3.5
        of.labels[1], of.weight[1] = 2, 0
        assert torch.equal(ours(of).loss, without)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixed_images_have_two_labels(smoothing: float) -> None:
    of = batch()
    share = torch.tensor([0.9, 0.2, 0.5, 1.0, 0.0, 0.7])
    mixed = replace(of, others=of.labels.roll(-1), share=share)
    ours = method(smoothing).eval()
    with torch.no_grad():
        losses, logits = ours(mixed), ours.model(of.views[0])
    target = share[:, None] * F.one_hot(of.labels, 4) + (1 - share)[:, None] * F.one_hot(mixed.others, 4)
    target = target * (1 - smoothing) + smoothing / 4
    each = -(target * logits.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(losses.loss, (each * of.weight).sum())
    assert float(ours.weigh(mixed)) == 4.5


def test_a_distilled_model_without_a_teacher_trains_its_class_head() -> None:
    ours, of = method(distilled=True), batch()
    loss = ours(of).loss
    logits = ours.model(of.views[0], {"heads"}).heads[0]
    torch.testing.assert_close(loss, (F.cross_entropy(logits, of.labels, reduction="none") * of.weight).sum())
    loss.backward()
    assert ours.model.head_dist.weight.grad is None
    assert ours.model.dist_token.grad is not None


def test_half_precision_is_lifted_before_the_loss() -> None:
    ours = method().bfloat16()
    assert ours(batch()).loss.dtype == torch.float32


def test_drop_path_follows_the_samples() -> None:
    ours, of = method(drop_path=0.8).train(), batch()
    torch.manual_seed(1)
    first = ours(of).loss
    torch.manual_seed(2)
    assert torch.equal(ours(of).loss, first)


def test_layers_and_decay_of_a_method() -> None:
    ours = method()
    assert ours.layer_of("model.cls_token") == 0
    assert ours.layer_of("model.blocks.0.attn.qkv.bias") == 1
    assert ours.layer_of("model.head.bias") == ours.layer_of("anything.else") == 3
    assert ours.no_decay() == {"model.cls_token", "model.pos_embed"}
    assert ours.views() == [View("image", 16)]
    assert ours.export() is ours.model
    assert ours.averages() == []


def test_methods_by_name() -> None:
    read = TypeAdapter(MethodConfig).validate_python
    assert [read({"name": name}).name for name in METHODS] == list(METHODS)
    assert type(read({"name": "mae"})) is MAEConfig
    assert {name for name, made in METHODS.items() if made.mixes} == {"supervised", "distill"}

    class Section(Config):
        method: MethodConfig

    with pytest.raises(UserError, match=r"method.name: given \"destill\"; .*; did you mean 'distill'\?"):
        build(Section, {"method": {"name": "destill"}})
    with pytest.raises(UserError, match=r"method.label_smooting: unknown key"):
        build(Section, {"method": {"name": "supervised", "label_smooting": 0.1}})


def test_wrong_matches() -> None:
    with pytest.raises(UserError, match="no use for a teacher; methods that have one: distill"):
        create_method(SupervisedConfig(), model(), teacher=model())
    with pytest.raises(UserError, match="the model has no head"):
        create_method(SupervisedConfig(), model(classes=0))
    for name in ("mae", "simmim", "beit", "dino", "msn"):
        with pytest.raises(UserError, match=f"{name}: trains a model without a head; given num_classes 4"):
            create_method(TypeAdapter(MethodConfig).validate_python({"name": name}), model())
    with pytest.raises(UserError, match=r"trains on square images; given image_size 16×32"):
        create_method(SupervisedConfig(), model(size=(16, 32)))

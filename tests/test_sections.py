"""Changes by dotted keys, as variants and searches make them."""

from __future__ import annotations

import pytest

from vitlab.config import UserError, build, resolved
from vitlab.data import ShardsConfig
from vitlab.experiment import Experiment
from vitlab.sections import changed

MODEL = {"name": "vit_tiny", "in_chans": 1, "patch_size": 2}
DATA = {"source": "digits", "image_size": 8, "channels": 1}


def test_another_preset_is_given_whole() -> None:
    """It would keep the width of the one before, under its own name."""
    tree = {"finetune": {"model": MODEL}}
    with pytest.raises(UserError, match=r"given 'vit_small' in place of 'vit_tiny'; give all of it, f"):
        changed(tree, {"finetune.model.name": "vit_small"})
    assert changed(tree, {"finetune.model.name": "vit_tiny"}) == tree
    whole = changed(tree, {"finetune.model": {**MODEL, "name": "vit_small"}})
    assert whole["finetune"]["model"]["name"] == "vit_small"
    assert changed({"name": "a"}, {"name": "b"}) == {"name": "b"}


@pytest.mark.parametrize(
    ("method", "augment", "line"),
    [
        ("msn", {"name": "dino"}, "given 'dino', which is for other views than msn has"),
        ("dino", {"name": "msn"}, "given 'msn', which is for other views than dino has"),
        ("msn", {"name": "msn", "views": {"local": {"flip": False}}}, "views: given 'local'; msn has"),
        ("dino", {"name": "none"}, r"compares random views of an image; allowed: dino, or set"),
    ],
)
def test_views_that_the_method_has_not(method: str, augment: dict[str, object], line: str) -> None:
    with pytest.raises(UserError, match=line):
        pretraining(method, augment)


def test_views_that_the_method_has() -> None:
    for method, count in (("dino", "local_crops"), ("msn", "focal_crops")):
        pretraining(method, {"name": method})
        pretraining(method, {"name": method}, **{count: 0})
        pretraining(method, {"crop_scale": [0.5, 1.0]})


def test_existing_shards_are_read_whole() -> None:
    with pytest.raises(UserError, match="limit: given 5; it is for a source, shards in path are read whole"):
        build(ShardsConfig, {"path": "x", "image_size": 8, "limit": 5})


@pytest.mark.parametrize("adopt", [None, {"model": MODEL, "weights": "fresh"}])
def test_a_vit_is_no_tokenizer(adopt: dict[str, object] | None) -> None:
    model, method = {**MODEL, "mask_token": True}, {"name": "beit"}
    stage = {"model": model, "method": method, "epochs": 1, "batch_size": 8}
    with pytest.raises(UserError, match="given 'beit', which needs a tokenizer"):
        build(Experiment, {"name": "x", "data": DATA, "adopt": adopt, "pretrain": stage})


def test_attention_of_an_encoder_is_tried_before_it_is_trained() -> None:
    model = {"name": "torchvision", "arch": "resnet18", "in_chans": 1}
    stage = {"model": model, "method": {"name": "dino", "local_crops": 0}, "augment": {"name": "dino"}}
    tree = {"name": "x", "data": {**DATA, "image_size": 32}, "evaluate": {"attention": 4}}
    with pytest.raises(UserError, match=r"pretrain.model.name: given .* gives no attention maps"):
        build(Experiment, {**tree, "pretrain": {**stage, "epochs": 1, "batch_size": 8}})


def pretraining(method: str, augment: dict[str, object], **more: object) -> None:
    stage = {"model": MODEL, "method": {"name": method, **more}, "augment": augment}
    made = build(Experiment, {"name": "x", "data": DATA, "pretrain": {**stage, "epochs": 1, "batch_size": 8}})
    assert resolved(made)

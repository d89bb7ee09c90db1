"""What every family does: forward, backward, features, other precisions and sizes, compiled, saved, loaded.

ONNX is in test_export.py; sharding, resume and the engine's own compilation in tests/engine.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from parity import worst
from torch import Tensor
from zoo import SMALL, families_without_one, small

from vitlab.models import Backbone, Borrowed, load_model, save_model

ATTENTIVE = [name for name in SMALL if name != "torchvision"]


def picture(name: str, batch: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    side = SMALL[name].image_size
    generator = torch.Generator().manual_seed(3)
    return torch.randn(batch, 3, side, side, generator=generator, dtype=torch.float64).to(dtype)


def fresh(name: str, **more: object) -> Backbone:
    torch.manual_seed(0)
    return small(name, **more)


def seeds(n: int) -> Tensor:
    return torch.arange(n) * 1_000_003 + 5


def gradients(model: Backbone, images: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    torch.nn.functional.cross_entropy(
        model(images, seeds=seeds(len(images))), torch.arange(len(images))
    ).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_no_family_is_forgotten() -> None:
    assert families_without_one() == set()


@pytest.mark.parametrize("name", SMALL)
def test_every_parameter_learns(name: str) -> None:
    model = fresh(name).train()
    found = gradients(model, picture(name))
    assert found.keys() == {n for n, p in model.named_parameters()}
    assert all(bool(g.isfinite().all()) for g in found.values())
    # CvT's class token passes by the convolution of the last block's queries, and nothing else is read
    unread = {n for n in found if n.startswith("stage2.blocks.1.attn.conv_proj_q") and name == "cvt_13"}
    still = {n for n, g in found.items() if not g.any() and not n.endswith("bias") and "table" not in n}
    assert still == {n for n in unread if n.endswith("weight")}


@pytest.mark.parametrize("name", SMALL)
def test_wanted_features_are_given_and_no_others(name: str) -> None:
    model, images = fresh(name).eval(), picture(name)
    found = model(images, model.gives)
    for field, value in found._asdict().items():
        assert (value is not None) == (field in model.gives), field
    assert torch.allclose(found.logits, model(images), rtol=1e-4, atol=1e-6)
    assert found.logits.shape == (3, 3)
    if isinstance(model, Borrowed):
        return
    tokens, prefix, coarse = found.tokens, found.prefix, found.pyramid[-1]
    assert tokens.shape == (3, coarse.shape[2] * coarse.shape[3], coarse.shape[1])
    assert prefix.shape[0] == 3
    assert prefix.shape[2] == tokens.shape[2]
    sides = [level.shape[2] for level in found.pyramid]
    assert sides == sorted(sides, reverse=True)
    assert all(torch.allclose(a.sum(-1), torch.ones(()), atol=1e-5) for a in found.attentions)


@pytest.mark.parametrize("name", SMALL)
def test_a_headless_model_gives_its_pooled_features(name: str) -> None:
    model, images = fresh(name, num_classes=0).eval(), picture(name)
    found = model(images, {"pooled", "logits"})
    assert torch.equal(found.pooled, found.logits)


@pytest.mark.parametrize("name", SMALL)
def test_layers_are_numbered_without_a_gap(name: str) -> None:
    model = fresh(name)
    numbers = {model.layer_of(n) for n, _ in model.named_parameters()}
    assert numbers <= set(range(model.num_layers))
    assert {0, model.num_layers - 1} <= numbers
    assert model.no_decay() <= {n for n, _ in model.named_parameters()}
    assert all(any(n.startswith(head) for n, _ in model.named_parameters()) for head in model.heads)


@pytest.mark.parametrize("name", SMALL)
def test_half_precision_is_near(name: str) -> None:
    """A borrowed net takes its running statistics: of three samples in a map of 1×1 little is left."""
    model, images = fresh(name).train(name != "torchvision"), picture(name)
    exact = gradients(model, images)
    with torch.autocast("cpu", torch.bfloat16):
        near = gradients(model, images)
    assert all(bool(g.isfinite().all()) for g in near.values())
    a, b = (torch.cat([g[n].flatten() for n in exact]) for g in (exact, near))
    assert float(torch.nn.functional.cosine_similarity(a, b, dim=0)) > 0.98


@pytest.mark.parametrize("name", SMALL)
def test_double_precision_agrees(name: str) -> None:
    model = fresh(name).eval()
    single = model(picture(name)).detach()
    double = model.double()(picture(name, dtype=torch.float64)).detach()
    assert worst({"logits": single.double()}, {"logits": double}) < 1e-4


@pytest.mark.parametrize("name", ATTENTIVE)
def test_recomputed_blocks_give_the_same_gradients(name: str) -> None:
    model, images = fresh(name, drop_path=0.3).train(), picture(name)
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    plain = gradients(model, images)
    after = {n: b.clone() for n, b in model.named_buffers()}
    for n, b in model.named_buffers():
        b.copy_(buffers[n])
    model.recompute = True
    again = gradients(model, images)
    assert all(torch.equal(plain[n], again[n]) for n in plain)
    assert all(torch.equal(after[n], b) for n, b in model.named_buffers())


def kept_bytes(model: Backbone, images: Tensor) -> int:
    """What a forward pass keeps for the gradient, parameters left out."""
    own, kept = {p.data_ptr() for p in model.parameters()}, dict[int, int]()

    def note(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        held = model(images, seeds=seeds(len(images)))
    assert held.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("name", ATTENTIVE)
def test_recomputed_blocks_keep_less(name: str) -> None:
    model, images = fresh(name).train(), picture(name, 8)
    plain = kept_bytes(model, images)
    model.recompute = True
    assert kept_bytes(model, images) < 0.75 * plain  # CCT keeps its convolutions, most of so small a model


@pytest.mark.parametrize("name", ATTENTIVE)
def test_a_sample_is_the_same_in_any_batch(name: str) -> None:
    """Drop path and dropout follow the sample; batch statistics would not, so they are held."""
    model, images = fresh(name, drop_path=0.5).double().train(), picture(name, 4, torch.float64)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    together = model(images, seeds=seeds(4))
    alone = torch.cat([model(images[i : i + 1], seeds=seeds(4)[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)
    assert not torch.equal(together, model(images, seeds=seeds(4) + 1))


@pytest.mark.parametrize("name", ATTENTIVE)
@pytest.mark.parametrize("factor", [(2, 1), (1, 3)])
def test_other_sizes_than_the_model_was_made_for(name: str, factor: tuple[int, int]) -> None:
    model, side = fresh(name).eval(), SMALL[name].image_size
    images = torch.randn(2, 3, side * factor[0], side * factor[1])
    found = model(images, {"logits", "tokens", "pyramid"})
    coarse = found.pyramid[-1]
    assert found.tokens.shape[1] == coarse.shape[2] * coarse.shape[3]
    ratio = coarse.shape[2] / coarse.shape[3]
    assert ratio == factor[0] / factor[1]
    assert bool(found.logits.isfinite().all())


@pytest.mark.parametrize("name", SMALL)
def test_compiled_is_the_same(name: str) -> None:
    """In one graph: nothing in a forward depends on what the numbers are."""
    model, images = fresh(name).train(), picture(name)
    eager = gradients(model, images)
    torch.compiler.reset()
    fast = torch.compile(model, backend="aot_eager", fullgraph=True)
    model.zero_grad()
    torch.nn.functional.cross_entropy(fast(images, seeds=seeds(3)), torch.arange(3)).backward()
    compiled = {n: p.grad for n, p in model.named_parameters()}
    largest = max(float(g.abs().max()) for g in eager.values())
    assert max(float((compiled[n] - eager[n]).abs().max()) for n in eager) < 1e-5 * largest


@pytest.mark.parametrize("name", SMALL)
def test_saved_and_loaded_is_the_same(name: str, tmp_path: Path) -> None:
    model, images = fresh(name).train(), picture(name)
    model(images)  # running statistics have moved
    save_model(model.eval(), tmp_path / "m", preprocess={"mean": [0.5]}, labels=["a", "b", "c"])
    loaded = load_model(tmp_path / "m").model.eval()
    assert type(loaded) is type(model)
    assert loaded.config == model.config
    state = loaded.state_dict()
    assert all(torch.equal(state[n], t) for n, t in model.state_dict().items())
    assert torch.equal(loaded(images), model(images))

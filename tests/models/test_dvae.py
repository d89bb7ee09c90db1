"""The discrete VAE against a transcription of openai/DALL-E, its encoder against transformers' copy too.

transformers' FlavaImageCodebook names the official parts `blocks.group_1.group.block_1.res_path.path.conv_1`.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from parity import EXACT, images, redraw, worst
from safetensors.torch import save_file
from torch import Tensor
from transformers import FlavaImageCodebook, FlavaImageCodebookConfig

from vitlab.config import UserError, build
from vitlab.models import DVAE, DVAEConfig, create_model, load_model, load_weights, save_model
from vitlab.models.parts.dvae import map_pixels, unmap_pixels

SMALL = {"vocab": 24, "n_hid": 32, "n_init": 12}
MEAN, STD = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.25])


def fresh(side: int = 16, **more: object) -> DVAE:
    model = create_model("dvae", num_classes=0, image_size=side, **{**SMALL, **more})
    assert isinstance(model, DVAE)
    return model


def redrawn(side: int = 16, **more: object) -> DVAE:
    """Every weight anew, told of a normalisation of its own."""
    model = fresh(side, **more).double()
    redraw(model)
    model.normalised(MEAN, STD)
    return model


# ---------------------------------------------------------------- the official code, line by line in float64


def official(state: dict[str, Tensor], half: str, x: Tensor, groups: int, blocks: int) -> Tensor:
    """Encoder or decoder of openai/DALL-E on its own names."""

    def conv(name: str, x: Tensor) -> Tensor:
        w = state[f"{half}.blocks.{name}.w"]
        return F.conv2d(x, w, state[f"{half}.blocks.{name}.b"], padding=(w.shape[-1] - 1) // 2)

    x = conv("input", x)
    for g in range(1, groups + 1):
        for b in range(1, blocks + 1):
            name = f"group_{g}.block_{b}"
            path = x
            for i in range(1, 5):
                path = conv(f"{name}.res_path.conv_{i}", F.relu(path))
            if f"{half}.blocks.{name}.id_path.w" in state:
                x = conv(f"{name}.id_path", x)
            x = x + 1 / (groups * blocks) ** 2 * path
        if g < groups:
            x = F.max_pool2d(x, 2) if half == "encoder" else F.interpolate(x, scale_factor=2.0)
    return conv("output.conv", F.relu(x))


@pytest.mark.parametrize(("groups", "blocks"), [(4, 2), (3, 1), (2, 2), (1, 1)])
def test_both_halves_are_the_official_ones(groups: int, blocks: int) -> None:
    model = redrawn(groups=groups, blocks=blocks)
    state = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    x = images(3, 16, torch.float64)
    tokens = model(x, {"tokens"}).tokens
    pixels = x * STD.double().view(-1, 1, 1) + MEAN.double().view(-1, 1, 1)
    logits = official(state, "encoder", 0.8 * pixels + 0.1, groups, blocks)
    side = 16 // 2 ** (groups - 1)
    by_row = torch.stack([logits[:, :, n // side, n % side] for n in range(side * side)], dim=1)
    location, scale = model.decode(tokens.softmax(2), (side, side))
    painted = official(state, "decoder", logits.softmax(1), groups, blocks)
    theirs = {"tokens": by_row, "location": painted[:, :3], "scale": painted[:, 3:]}
    ours = {"tokens": tokens, "location": location, "scale": scale}
    assert worst(ours, theirs) < 1e-10
    sum(t.square().sum() for t in ours.values()).backward()  # type: ignore[union-attr]
    sum(t.square().sum() for t in theirs.values()).backward()  # type: ignore[union-attr]
    found = {n: p.grad for n, p in model.named_parameters()}
    assert worst(found, {n: p.grad for n, p in state.items()}) < 1e-10  # type: ignore[arg-type]


def theirs_of(name: str) -> str:
    """Our name → transformers'."""
    name = name.removeprefix("encoder.").replace(".res_path.", ".res_path.path.")
    name = re.sub(r"(group_\d)\.", r"\1.group.", name)
    return name.removesuffix("w") + "weight" if name.endswith(".w") else name.removesuffix("b") + "bias"


@pytest.mark.parametrize("dtype", EXACT)
def test_encoder_is_that_of_transformers(dtype: torch.dtype) -> None:
    model = redrawn().to(dtype)
    config = FlavaImageCodebookConfig(
        num_groups=4, num_blocks_per_group=2, hidden_size=32, vocab_size=24, freeze=False
    )
    theirs = FlavaImageCodebook(config).to(dtype)
    mine = {n: p for n, p in model.named_parameters() if n.startswith("encoder.")}
    theirs.load_state_dict({theirs_of(n): p for n, p in mine.items()})
    x = images(2, 16, dtype)
    ours, other = model(x, {"pyramid"}).pyramid[0], theirs(map_pixels(model.pixels(x)))
    assert worst({"logits": ours}, {"logits": other}) < EXACT[dtype]
    ours.square().mean().backward()
    other.square().mean().backward()
    named = dict(theirs.named_parameters())
    assert len(named) == len(mine)
    grads = {n: named[theirs_of(n)].grad for n in mine}
    assert worst({n: p.grad for n, p in mine.items()}, grads) < EXACT[dtype]  # type: ignore[arg-type]
    assert torch.equal(
        model(x, {"tokens"}).tokens.argmax(2),
        theirs.get_codebook_indices(map_pixels(model.pixels(x))).flatten(1),
    )


def test_sizes_are_the_official_ones() -> None:
    with torch.device("meta"):
        model = create_model("dvae", num_classes=0, image_size=256)
    names = dict(model.named_parameters())
    assert names["encoder.blocks.input.w"].shape == (256, 3, 7, 7)
    assert names["encoder.blocks.group_4.block_1.id_path.w"].shape == (2048, 1024, 1, 1)
    assert names["encoder.blocks.group_4.block_2.res_path.conv_3.w"].shape == (512, 512, 3, 3)
    assert names["encoder.blocks.output.conv.w"].shape == (8192, 2048, 1, 1)
    assert names["decoder.blocks.input.w"].shape == (128, 8192, 1, 1)
    assert names["decoder.blocks.group_1.block_1.res_path.conv_1.w"].shape == (512, 128, 1, 1)
    assert names["decoder.blocks.group_1.block_1.res_path.conv_4.w"].shape == (2048, 512, 3, 3)
    assert names["decoder.blocks.output.conv.w"].shape == (6, 256, 1, 1)
    assert (model.config.reduce, model.config.grid((256, 128))) == (8, (32, 16))
    assert sum(p.numel() for n, p in names.items() if n.startswith("encoder.")) == 53_786_240
    assert sum(p.numel() for n, p in names.items() if n.startswith("decoder.")) == 43_829_766


def test_start_is_the_official_one() -> None:
    torch.manual_seed(0)
    model = fresh(n_hid=64, vocab=512)
    for name, value in model.named_parameters():
        if name.endswith(".b"):
            assert not value.any(), name
        elif value.numel() > 2000:
            fan = value[0].numel()
            assert float(value.detach().std()) == pytest.approx(fan**-0.5, rel=0.08), name


def test_pixels_there_and_back() -> None:
    x = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    assert float(map_pixels(x).min()) >= 0.1
    torch.testing.assert_close(map_pixels(torch.tensor([0.0, 0.5, 1.0])), torch.tensor([0.1, 0.5, 0.9]))
    torch.testing.assert_close(unmap_pixels(map_pixels(x)), x)
    assert torch.equal(unmap_pixels(torch.tensor([0.0, 1.0])), torch.tensor([0.0, 1.0]))
    model = redrawn()
    torch.testing.assert_close(model.normal(model.pixels(x)), x)


# ---------------------------------------------------------------- a model of this project


def test_features() -> None:
    model, x = redrawn(), images(2, 16, torch.float64)
    found = model(x, {"tokens", "pyramid", "pooled", "logits"})
    assert found.tokens.shape == (2, 4, 24)
    assert torch.equal(found.pyramid[0].flatten(2).transpose(1, 2), found.tokens)
    torch.testing.assert_close(found.pooled, found.tokens.mean(1))
    assert torch.equal(found.logits, model(x))
    assert found.prefix is None
    wide = model(torch.cat([x, x], dim=3), {"pyramid"}).pyramid[0]
    assert wide.shape == (2, 24, 2, 4)


def test_layers_go_from_the_image_to_the_image() -> None:
    model = fresh(groups=3)
    numbers = [model.layer_of(n) for n, _ in model.named_parameters()]
    assert numbers == sorted(numbers)
    assert set(numbers) == set(range(model.num_layers))
    assert model.layer_of("encoder.blocks.group_2.block_1.res_path.conv_1.w") == 3
    assert model.layer_of("encoder.blocks.output.conv.b") == 7
    assert model.layer_of("decoder.blocks.input.w") == 8


def test_recomputed_blocks_give_the_same_gradients() -> None:
    grads = []
    for recompute in (False, True):
        model = redrawn().train()
        model.recompute = recompute
        tokens = model(images(2, 16, torch.float64), {"tokens"}).tokens
        location, _ = model.decode(tokens.softmax(2), (2, 2))
        location.square().sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    assert all(torch.equal(g, grads[1][n]) for n, g in grads[0].items())  # type: ignore[arg-type]


def test_compiled_in_one_graph() -> None:
    model, x = redrawn().float().train(), images(2, 16, torch.float32)
    torch.compiler.reset()
    fast = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(fast(x, {"tokens"}).tokens, model(x, {"tokens"}).tokens)


def test_codes_are_named_in_full_precision() -> None:
    model, x = redrawn().float(), images(2, 16, torch.float32)
    exact = model(x, {"tokens"}).tokens
    with torch.autocast("cpu", torch.bfloat16):
        near = model(x, {"tokens"}).tokens
        location, _ = model.decode(near.softmax(2), (2, 2))
    assert near.dtype == torch.float32
    assert location.dtype == torch.bfloat16
    assert worst({"tokens": near}, {"tokens": exact}) < 0.05


def test_saved_and_loaded_is_the_same_with_its_normalisation(tmp_path: Path) -> None:
    model, x = redrawn().float().eval(), images(2, 16, torch.float32)
    save_model(model, tmp_path / "m", preprocess={}, labels=[])
    loaded = load_model(tmp_path / "m").model
    assert isinstance(loaded, DVAE)
    assert loaded.config == model.config
    assert torch.equal(loaded.mean.flatten(), MEAN)
    assert torch.equal(loaded(x, {"tokens"}).tokens, model(x, {"tokens"}).tokens)


def test_weights_of_openai_load_by_name(tmp_path: Path) -> None:
    source, model = redrawn().float(), fresh()
    model.normalised(MEAN, STD)
    save_file({n: p.detach() for n, p in source.named_parameters()}, tmp_path / "dalle.safetensors")
    report = load_weights(model, tmp_path / "dalle.safetensors")
    assert report.layout == "openai/DALL-E"
    assert not report.ignored
    assert torch.equal(model.mean.flatten(), MEAN)
    x = images(2, 16, torch.float32)
    assert torch.equal(model(x), source(x))
    load_weights(model, source.state_dict())  # ours, with the normalisation of the other


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"image_size": 20}, r"image_size 20 is not divisible by 8, .* groups 4; nearest: 16 or 24"),
        ({"num_classes": 10}, "names codes, not classes; given num_classes 10, allowed: 0"),
        ({"n_hid": 6}, "n_hid"),
        ({"vocab": 1}, "vocab"),
    ],
)
def test_wrong_sizes(given: dict[str, int], line: str) -> None:
    with pytest.raises(UserError, match=line):
        create_model("dvae", **{"num_classes": 0, "image_size": 16, **SMALL, **given})


def test_other_images_and_masks_are_refused() -> None:
    model = fresh()
    with pytest.raises(UserError, match="image_size 12 is not divisible by 8"):
        model(torch.zeros(1, 3, 12, 16), {"tokens"})
    with pytest.raises(UserError, match="no mask token"):
        model(torch.zeros(1, 3, 16, 16), mask=torch.zeros(1, 4, dtype=torch.bool))
    assert build(DVAEConfig, {"name": "dvae"}).reduce == 8

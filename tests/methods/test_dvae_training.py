"""The discrete VAE's objective against the paper's equations in float64, torch's distributions, integrals."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from parity import worst
from sklearn.datasets import load_digits
from steps import halved, one_step, part, strategy_of, unlabelled
from torch import Tensor
from torch.distributions import AffineTransform, Categorical, Laplace, TransformedDistribution, kl_divergence
from torch.distributions.transforms import SigmoidTransform

from vitlab.batch import Batch, uniform
from vitlab.config import UserError, build
from vitlab.experiment import Experiment
from vitlab.methods import DVAETraining, DVAETrainingConfig, Moment, create_method
from vitlab.methods.dvae import between, from_uniform, gumbel, log_density, perplexity, relaxed
from vitlab.models import create_model

SIZES = {"vocab": 16, "n_hid": 32, "n_init": 8, "groups": 3, "blocks": 1}
MEAN, STD = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.25])


def method(**more: object) -> DVAETraining:
    made = create_method(
        build(DVAETrainingConfig, more), create_model("dvae", num_classes=0, image_size=8, **SIZES)
    )
    assert isinstance(made, DVAETraining)
    redraw(made.double())
    return made


def redraw(made: DVAETraining, seed: int = 0) -> None:
    """The official spread of the weights, and biases that are not zero."""
    generator = torch.Generator().manual_seed(seed)
    for value in made.model.parameters():
        std = value[0].numel() ** -0.5 if value.ndim > 1 else 0.3
        value.data = std * torch.randn(value.shape, generator=generator, dtype=torch.float64)
    made.model.normalised(MEAN, STD)


def batch(n: int = 5) -> Batch:
    generator = torch.Generator().manual_seed(2)
    pixels = torch.rand(n, 3, 8, 8, generator=generator, dtype=torch.float64)
    mean, std = (v.double().view(-1, 1, 1) for v in (MEAN, STD))
    return replace(unlabelled((pixels - mean) / std), weight=torch.ones(n), mean=mean, std=std)


def at(progress: float) -> Moment:
    return Moment(int(progress * 10_000), 10_000, 100)


# ---------------------------------------------------------------- the equations


def paper(ours: DVAETraining, of: Batch, tau: float, beta: float) -> Tensor:
    """-ELBO of every sample over its pixels, one pixel and one code at a time: B."""
    model, x = ours.model, 0.8 * of.pixels() + 0.1
    logits = model(of.views[0], {"pyramid"}).pyramid[0]  # B V h w
    b, v, h, w = logits.shape
    u = uniform(of.seeds, "gumbel", h * w * v).double().view(b, h, w, v).permute(0, 3, 1, 2)
    y = ((logits - (-u.log()).log()) / tau).exp()
    stats = model.decoder(y / y.sum(1, keepdim=True), model.run)
    mu, scale = stats[:, :3], stats[:, 3:].exp()
    logit = (x / (1 - x)).log()
    density = (-(logit - mu).abs() / scale).exp() / (2 * scale * x * (1 - x))
    q = logits.exp() / logits.exp().sum(1, keepdim=True)
    kl = (q * (q * v).log()).sum((1, 2, 3))
    return (-density.log().sum((1, 2, 3)) + beta * kl) / (3 * 8 * 8)


@pytest.mark.parametrize("progress", [0.0, 0.3, 1.0])
def test_loss_and_gradients_are_those_of_the_paper(progress: float) -> None:
    ours, of = method(kl_until=0.5, temperature_until=0.8).train(), batch()
    ours.before_step(at(progress))
    tau = 1 / 16 + (1 - 1 / 16) * (1 + math.cos(math.pi * min(1, progress / 0.8))) / 2
    beta = 6.6 * (1 - math.cos(math.pi * min(1, progress / 0.5))) / 2
    found, grads = [], []
    for loss in (ours(of).loss, paper(ours, of, tau, beta).sum()):
        ours.zero_grad()
        loss.backward()
        found.append(loss.detach())
        grads.append({n: p.grad.clone() for n, p in ours.named_parameters() if p.grad is not None})
    assert grads[0].keys() == dict(ours.named_parameters()).keys()
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=0)
    assert worst(*grads) < 1e-10


def test_the_paper_s_own_weight_of_the_divergence() -> None:
    """Over 256×256×3 pixels and 32×32 codes a mean over codes weighs β/192."""
    with torch.device("meta"):
        rows, columns = create_model("dvae", num_classes=0, image_size=256).config.grid((256, 256))
    assert (256 * 256 * 3) / (rows * columns) == 192
    ours, of = method(kl_until=0.0).double().train(), batch(2)
    ours.before_step(at(0.0))
    losses = ours(of)
    expected = losses.metrics["nll"] + 6.6 * 4 / 192 * losses.metrics["kl"]  # 8×8×3 and 2×2: 192/4 a code
    torch.testing.assert_close(losses.loss.detach(), expected)


def test_log_density_is_that_of_torch_s_distributions() -> None:
    generator = torch.Generator().manual_seed(1)
    mu, log_b = torch.randn(2, 50, generator=generator, dtype=torch.float64)
    x = 0.1 + 0.8 * torch.rand(50, generator=generator, dtype=torch.float64)
    theirs = TransformedDistribution(Laplace(mu, log_b.exp()), [AffineTransform(0, 1), SigmoidTransform()])
    torch.testing.assert_close(log_density(x, mu, log_b), theirs.log_prob(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("mu", "log_b"), [(0.0, 0.0), (1.2, -1.0), (-2.0, 0.3)])
def test_density_integrates_to_one(mu: float, log_b: float) -> None:
    """By the midpoint rule in the logit, where the density has tails that end."""
    y = torch.linspace(-35, 35, 700_001, dtype=torch.float64)
    middle = ((y[1:] + y[:-1]) / 2).clamp(-30, 30)
    x = middle.sigmoid()
    density = log_density(x, torch.tensor(mu).double(), torch.tensor(log_b).double()).exp()
    area = (density * x * (1 - x) * (y[1:] - y[:-1])).sum()
    assert float(area) == pytest.approx(1, abs=1e-6)


def test_divergence_is_that_of_torch_s_distributions() -> None:
    logits = torch.randn(3, 4, 16, dtype=torch.float64)
    theirs = kl_divergence(Categorical(logits=logits), Categorical(logits=torch.zeros(3, 4, 16).double()))
    torch.testing.assert_close(from_uniform(logits), theirs)
    assert float(from_uniform(torch.zeros(1, 1, 16)).abs().max()) < 1e-6
    one = torch.full((1, 1, 16), -1e3).index_fill(2, torch.tensor([3]), 1e3)
    assert float(from_uniform(one)) == pytest.approx(math.log(16))


# ---------------------------------------------------------------- noise and schedules


def test_noise_draws_codes_as_often_as_they_are_likely() -> None:
    """The largest of logits with Gumbel's noise is a draw of the categorical."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0]).expand(200, 100, 4)
    noise = gumbel(torch.arange(200) * 99_991, logits)
    assert bool(noise.isfinite().all())
    drawn = relaxed(logits, noise, 0.5).argmax(2).flatten()
    often = torch.bincount(drawn, minlength=4) / drawn.numel()
    torch.testing.assert_close(often, logits[0, 0].softmax(0), rtol=0, atol=0.01)
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.01)
    assert float(noise.std()) == pytest.approx(math.pi / math.sqrt(6), abs=0.01)


def test_a_draw_of_zero_stays_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitlab.methods.dvae.uniform", lambda seeds, purpose, n: torch.zeros(len(seeds), n))
    assert bool(gumbel(torch.arange(2), torch.zeros(2, 3, 4)).isfinite().all())


def test_noise_follows_the_sample() -> None:
    logits = torch.zeros(3, 4, 16)
    seeds = torch.tensor([5, 6, 7])
    assert torch.equal(gumbel(seeds, logits)[1:2], gumbel(seeds[1:2], logits[:1]))
    assert not torch.equal(gumbel(seeds, logits)[0], gumbel(seeds, logits)[1])


def test_codes_become_one_as_it_gets_colder() -> None:
    logits = torch.randn(2, 4, 16)
    noise = gumbel(torch.arange(2), logits)
    largest = [float(relaxed(logits, noise, t).max(2).values.mean()) for t in (4.0, 1.0, 0.25, 0.0625)]
    assert largest == sorted(largest)
    for weights in (relaxed(logits, noise, 0.5), relaxed(logits, None, 0.5)):
        torch.testing.assert_close(weights.sum(2), torch.ones(2, 4))
    hard = relaxed(logits, None, 0.5)
    assert torch.equal(hard.argmax(2), logits.argmax(2))
    assert set(hard.unique().tolist()) == {0.0, 1.0}


def test_annealing() -> None:
    ours = method(temperature_until=0.5, kl_until=0.25)
    seen = []
    for progress in (0.0, 0.125, 0.25, 0.5, 0.75, 1.0):
        ours.before_step(at(progress))
        seen.append((ours.temperature, ours.kl_weight))
    temperatures, weights = zip(*seen, strict=True)
    assert temperatures[0] == 1
    assert temperatures[2] == pytest.approx((1 + 1 / 16) / 2)
    assert temperatures[3:] == pytest.approx([1 / 16] * 3)
    assert weights == pytest.approx([0, 3.3, 6.6, 6.6, 6.6, 6.6])
    assert all(a >= b for a, b in pairwise(temperatures))
    assert between(1.0, 0.25, 0.0, 0.0) == 0.25
    assert DVAETrainingConfig().kl_until == pytest.approx(5_000 / 3_000_000, rel=0.01)
    assert DVAETrainingConfig().temperature_until == 150_000 / 3_000_000


# ---------------------------------------------------------------- what the loop asks


def test_a_sample_does_not_depend_on_its_batch_and_padding_counts_nothing() -> None:
    ours, of = method().train(), batch()
    ours.before_step(at(0.5))
    with torch.no_grad():
        parts = torch.stack([ours(part(of, slice(i, i + 1))).loss for i in range(5)])
        torch.testing.assert_close(ours(of).loss, parts.sum())
        of.weight[3] = 0
        losses = ours(of)
        torch.testing.assert_close(losses.loss, parts.sum() - parts[3])
    assert set(losses.metrics) == {"mse", "nll", "kl", "perplexity"}
    assert float(ours.weigh(of)) == 4


def test_perplexity_counts_codes_of_all_micro_batches() -> None:
    ours, of = method().train(), batch(4)
    of.weight[3] = 0
    codes = ours.model(of.views[0], {"tokens"}).tokens.argmax(2)[:3]
    ours(of)
    ours.after_step()
    share = torch.bincount(codes.flatten(), minlength=16).double() / codes.numel()
    torch.testing.assert_close(ours.usage, share)
    assert not ours.counted.any()
    expected = math.exp(-sum(p * math.log(p) for p in share.tolist() if p))
    assert float(perplexity(ours.usage)) == pytest.approx(expected)
    assert float(ours(part(of, slice(0, 2))).metrics["perplexity"]) == pytest.approx(2 * expected)
    ours(part(of, slice(2, 4)))
    ours.after_step()
    torch.testing.assert_close(ours.usage, share)  # the same codes again
    ours.eval()
    assert "perplexity" not in ours(of).metrics
    assert not ours.counted.any()
    assert float(perplexity(torch.full((8,), 1 / 8))) == pytest.approx(8)


def test_without_training_the_likeliest_codes_are_painted() -> None:
    ours, of = method().eval(), batch()
    tokens = ours.model(of.views[0], {"tokens"}).tokens
    mu, log_b = ours.model.decode(torch.eye(16).double()[tokens.argmax(2)], (2, 2))
    x = 0.8 * of.pixels() + 0.1
    losses, picture = ours(of), ours(of, "picture")
    torch.testing.assert_close(losses.metrics["nll"], -log_density(x, mu, log_b).mean((1, 2, 3)).sum())
    painted = ((mu.sigmoid() - 0.1) / 0.8).clamp(0, 1)
    assert picture.masked is None
    assert torch.equal(picture.original, of.views[0])
    torch.testing.assert_close(picture.reconstruction * of.std + of.mean, painted)
    torch.testing.assert_close(losses.metrics["mse"], (painted - of.pixels()).square().mean((1, 2, 3)).sum())


def test_the_average_is_validated_and_painted_from() -> None:
    ours, of = method().eval(), batch()
    ours.keep_average(0.9)
    before = ours(of).loss
    redraw(ours, seed=1)
    torch.testing.assert_close(ours(of).loss, before)
    assert not torch.allclose(ours.train()(of).loss, before)
    assert ours.exported() is ours.smooth


def test_dead_codes_are_told_of() -> None:
    ours = method(temperature_until=0.5)
    ours.before_step(at(0.2))
    assert ours.diagnose({"train/perplexity": 1.0}) is None  # too early to say
    ours.before_step(at(0.6))
    assert ours.diagnose({"train/perplexity": 5.0}) is None
    line = ours.diagnose({"train/perplexity": 1.04})
    assert line is not None
    assert "1.0: of 16 codes almost all are dead" in line
    assert "method.kl_weight (6.6)" in line


def test_half_precision_products() -> None:
    ours, of = method().float().train(), batch()
    ours.before_step(at(0.1))
    halved(ours, replace(of, views=[of.views[0].float()]))


def test_layers_and_export() -> None:
    ours = method()
    assert ours.layer_of("model.encoder.blocks.input.w") == 0
    assert ours.layer_of("model.decoder.blocks.output.conv.w") == ours.model.num_layers - 1
    assert ours.export() is ours.model
    assert [(v.name, v.size) for v in ours.views()] == [("image", 8)]


# ---------------------------------------------------------------- what may stand in an experiment


DATA = {"source": "digits", "image_size": 8, "channels": 1}
TOKENIZER = {"model": {"name": "dvae", "in_chans": 1, "groups": 2}, "method": {"name": "dvae"}}
STAGE = {"epochs": 1, "batch_size": 64}
VIT = {"name": "vit_tiny", "in_chans": 1, "patch_size": 2}


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        ({"tokenizer": {**TOKENIZER, "model": VIT}}, "tokenizer.model.name: given 'vit_tiny'; dvae cannot"),
        (
            {"finetune": {"model": TOKENIZER["model"], "method": {"name": "supervised"}}},
            "finetune.model.name: given 'dvae'; supervised cannot train it, allowed: vit_tiny",
        ),
        (
            {"distill": {"model": TOKENIZER["model"], "method": {"name": "distill"}}},
            "distill.model.name: given 'dvae'",
        ),
        ({"pretrain": TOKENIZER}, "pretrain.method.name: given 'dvae'; allowed in this stage: "),
        (
            {"tokenizer": {**TOKENIZER, "model": {"name": "dvae", "in_chans": 1, "groups": 5}}},
            "tokenizer.model: data.image_size 8 is not divisible by 16, .* nearest: 16",
        ),
        (
            {"tokenizer": {**TOKENIZER, "model": {**TOKENIZER["model"], "num_classes": 3}}},
            "tokenizer.model.num_classes",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(sections: dict[str, dict[str, object]], line: str) -> None:
    stages = {name: {**STAGE, **section} for name, section in sections.items()}
    with pytest.raises(UserError, match=line):
        build(Experiment, {"name": "x", "data": DATA, **stages})


def test_a_tokenizer_stage_is_an_experiment() -> None:
    made = build(Experiment, {"name": "x", "data": DATA, "tokenizer": {**TOKENIZER, **STAGE}})
    assert made.need("tokenizer").model.grid((8, 8)) == (4, 4)


# ---------------------------------------------------------------- it learns


def test_digits_are_painted_better_and_better() -> None:
    """At the end the error is 0.45 to 0.50 of a blank image's, by the seed."""
    torch.manual_seed(0)
    sizes = {"in_chans": 1, "vocab": 32, "n_hid": 32, "n_init": 16, "groups": 2, "blocks": 1}
    model = create_model("dvae", num_classes=0, image_size=8, **sizes)
    config = DVAETrainingConfig(kl_weight=0.14, kl_until=0.0, temperature_until=0.8)
    ours = create_method(config, model)
    images = torch.from_numpy(load_digits().images[:64]).float()[:, None] / 16
    of, steps, warm = unlabelled(images * 2 - 1), 80, 16
    plain = strategy_of(ours, steps, clip=1.0, eps=1e-8)

    def error() -> float:
        plain.train(False)
        with torch.no_grad():
            found = float(plain.forward(of).metrics["mse"]) / 64
        plain.train(True)
        return found

    errors = [error()]
    for step in range(steps):
        rows = slice(step % 4 * 16, step % 4 * 16 + 16)
        one = part(replace(of, seeds=of.seeds + step), rows)
        lr = 0.015 * min(step / warm, (steps - step) / (steps - warm))
        one_step(ours, plain, [one], Moment(step, steps, steps), lr)
        if step in (24, steps - 1):
            errors.append(error())
    blank = float((images - images.mean((0, 2, 3), keepdim=True)).square().mean())
    print(errors, blank, float(perplexity(ours.usage)))
    assert errors[2] < errors[1] < errors[0]
    assert errors[2] < 0.6 * blank
    assert float(perplexity(ours.usage)) > 4

"""MSN against transformers' encoder, lightly's loss and head, and the authors' algorithm written out again.

lightly's loss has the official order, sharpening before Sinkhorn, and the same + log K; it has no entropy of
single anchors. Its head has no biases below BatchNorm, where the official one has some: BatchNorm takes them
away again, as it does with the shift of the encoder's last norm. Their gradients are rounding.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import pytest
import torch
from parity import EXACT, THEIR_SIZES, redraw, worst
from steps import DECAY, LR, batch, first_half, halved, one_step, part, second_half, strategy_of
from torch import Tensor, nn
from world import serve, spawn

from vitlab.batch import Batch, derived, uniform
from vitlab.config import UserError, build
from vitlab.dist import World
from vitlab.methods import MSN, MSNConfig, create_method
from vitlab.methods.base import Moment
from vitlab.methods.crops import small_size
from vitlab.methods.msn import balanced
from vitlab.models import ViTConfig, create_model

MODEL = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4}
SMALL = {"focal_crops": 2, "focal_size": 8, "prototypes": 12, "hidden_dim": 24, "output_dim": 10}
STEPS, SAMPLES = 6, 8
SETTINGS: dict[str, dict[str, Any]] = {
    "released": {},
    "no Sinkhorn": {"sinkhorn": False, "mean_entropy_weight": 3.0, "mask_ratio": 0.6},
    "no norm": {"head_batch_norm": False, "anchors": 2, "entropy_weight": 0.3, "final_sharpen": 0.2},
    "whole": {"mask_ratio": 0.0, "focal_crops": 0, "anchors": 3},
}
FIRST = 5  # samples of the first of two workers


def method(**more: Any) -> MSN:
    torch.manual_seed(0)
    drop = more.pop("drop_path", 0.0)
    model = create_model("vit_tiny", num_classes=0, image_size=16, drop_path=drop, **MODEL)
    made = create_method(build(MSNConfig, {**SMALL, **more}), model)
    assert isinstance(made, MSN)
    return made


def drawn(dtype: torch.dtype, **more: Any) -> MSN:
    """With weights that hide nothing: student and teacher differ, no bias is zero."""
    made = method(**more).to(dtype)
    for i, net in enumerate((made.model, made.head, made.teacher, made.teacher_head)):
        redraw(net, i)
        for value in net.parameters():
            value.data /= 2
        for norm in net.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.reset_running_stats()
            if isinstance(norm, nn.BatchNorm2d | nn.LayerNorm):
                norm.weight.data += 1
    return made.train()


# ---------------------------------------------------------------- written out again


class Written:
    """The authors' algorithm in their order, around transformers' encoder and torch's BatchNorm."""

    def __init__(self, ours: MSN) -> None:
        from transformers import ViTMSNConfig, ViTMSNModel

        config = ViTMSNConfig(
            **THEIR_SIZES,
            image_size=16,
            patch_size=4,
        )
        dtype = ours.prototypes.weight.dtype
        self.config, self.nets = ours.config, nn.ModuleDict()
        for name, encoder, head in (
            ("student", ours.model, ours.head),
            ("teacher", ours.teacher, ours.teacher_head),
        ):
            self.nets[name] = nn.ModuleList([ViTMSNModel(config), official_head(ours.config)]).to(dtype)
            self.nets[name][0].load_state_dict(official(encoder.state_dict()))
            self.nets[name][1].load_state_dict(head.state_dict())
        self.nets["teacher"].requires_grad_(False)
        self.nets.train()
        self.q = ours.prototypes.weight.detach().clone().requires_grad_()

    def tensors(self, net: str, grad: bool = False) -> dict[str, Tensor]:
        encoder, head = (dict(part.named_parameters()) for part in self.nets[net])
        found = encoder | {f"head.{name}": p for name, p in head.items()}
        found |= {"q": self.q} if net == "student" else {}
        return {name: p.grad if grad else p.detach() for name, p in found.items()}

    def statistics(self, made: MSN, net: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Running ones, ours and those of here."""
        mine = made.head if net == "student" else made.teacher_head
        heads = [{n: b for n, b in m.named_buffers() if "running" in n} for m in (mine, self.nets[net][1])]
        return heads[0], heads[1]

    def optimizer(self, lr: float, decay: float, eps: float) -> torch.optim.Optimizer:
        mine = list(self.nets["student"].named_parameters())
        bare = [p for n, p in mine if "bias" in n or "bn" in n or p.ndim == 1]
        rest = [p for n, p in mine if not ("bias" in n or "bn" in n or p.ndim == 1)]
        plan = [
            {"params": rest, "weight_decay": decay},
            {"params": [*bare, self.q], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(plan, lr=lr, eps=eps)

    def embed(self, net: str, views: list[Tensor], keep: list[Tensor] | None = None) -> Tensor:
        """Views of one size; dropped patches leave before the first block."""
        encoder, head = self.nets[net]
        x = encoder.embeddings(torch.cat(views), interpolate_pos_encoding=True)
        if keep is not None:
            index = torch.cat([nn.functional.pad(k + 1, (1, 0)) for k in keep])
            x = torch.stack([sample[i] for sample, i in zip(x, index, strict=True)])
        for layer in encoder.layers:
            x = layer(x, None)
        return head(encoder.layernorm(x)[:, 0])

    def near(self, z: Tensor) -> Tensor:
        z, q = z / z.norm(dim=1, keepdim=True), self.q / self.q.norm(dim=1, keepdim=True)
        return torch.softmax(z @ q.T / self.config.temperature, dim=1)

    def loss(self, of: Batch, step: int) -> Tensor:
        c, count = self.config, int(16 * (1 - self.config.mask_ratio))
        sharpen = c.start_sharpen + (c.final_sharpen - c.start_sharpen) / (STEPS * 1.25) * step
        with torch.no_grad():
            t = self.near(self.embed("teacher", of.views[:1])) ** (1 / sharpen)
            t = t / t.sum(1, keepdim=True)
            t = sinkhorn(t) if c.sinkhorn else t
        noise = [uniform(derived(of.seeds, f"anchor/{i}"), "mask", 16) for i in range(c.anchors)]
        keep = [n.argsort(1)[:, :count] for n in noise] if c.mask_ratio else None
        z = [self.embed("student", of.views[1 : 1 + c.anchors], keep)]
        if c.focal_crops:
            z.append(self.embed("student", of.views[1 + c.anchors :]))
        p = self.near(torch.cat(z))
        t, mean = t.repeat(c.anchors + c.focal_crops, 1), p.mean(0)
        together = math.log(c.prototypes) + (mean * mean.log()).sum()
        alone = -(p * p.log()).sum(1).mean()
        cross = -(t * p.log()).sum(1).mean()
        return cross + c.mean_entropy_weight * together + c.entropy_weight * alone

    def follow(self, step: int) -> None:
        m = 0.996 + (1 - 0.996) / (STEPS * 1.25) * step
        with torch.no_grad():
            for old, new in zip(*(self.nets[n].parameters() for n in ("teacher", "student")), strict=True):
                old.mul_(m).add_((1 - m) * new)


def sinkhorn(q: Tensor) -> Tensor:
    """With every factor of the authors' code; K B inside."""
    q = q.T / q.sum()
    k, b = q.shape
    for _ in range(3):
        q = q / q.sum(1, keepdim=True) / k
        q = q / q.sum(0, keepdim=True) / b
    return (q * b).T


def official_head(config: MSNConfig) -> nn.Module:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    dims = [32, config.hidden_dim, config.hidden_dim, config.output_dim]
    for i in (1, 2, 3):
        layers[f"fc{i}"] = nn.Linear(dims[i - 1], dims[i])
        if i < 3 and config.head_batch_norm:
            layers[f"bn{i}"] = nn.BatchNorm1d(dims[i])
        if i < 3:
            layers[f"gelu{i}"] = nn.GELU()
    return nn.Sequential(layers)


def official(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """A ViT's tensors under transformers' names; Q, K and V are three tensors there."""
    out = {}
    for name, value in ours.items():
        for mine, theirs in (
            ("blocks.", "layers."),
            ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
            ("cls_token", "embeddings.cls_token"),
            ("pos_embed", "embeddings.position_embeddings"),
            (".norm1.", ".layernorm_before."),
            (".norm2.", ".layernorm_after."),
            (".attn.", ".attention."),
            (".proj.", ".o_proj."),
        ):
            name = name.replace(mine, theirs) if "projection" not in name else name
        name = "layernorm." + name[5:] if name.startswith("norm.") else name
        if ".qkv." in name:
            for letter, third in zip("qkv", value.chunk(3), strict=True):
                out[name.replace(".qkv.", f".{letter}_proj.")] = third
        else:
            out[name] = value
    return out


def ours_by_name(made: MSN, net: str, grad: bool = False) -> dict[str, Tensor]:
    parts = (made.model, made.head) if net == "student" else (made.teacher, made.teacher_head)
    encoder, head = ({n: p.grad if grad else p.detach() for n, p in m.named_parameters()} for m in parts)
    found = official(encoder) | {f"head.{n}": p for n, p in head.items()}
    q = made.prototypes.weight
    return found | ({"q": q.grad if grad else q.detach()} if net == "student" else {})


def apart(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """As `worst`, but what has no gradient in exact arithmetic is judged against the largest number of all.

    In float32 that holds for every tensor, and the temperature is higher: BatchNorm and a loss near its least
    value make gradients of what nearly cancels. At τ = 0.1 float32 alone, ours as theirs, is up to 2e-5
    away from float64.
    """
    assert ours.keys() == theirs.keys()
    largest = max(float(t.detach().abs().max()) for t in theirs.values())
    found = 0.0
    for name, tensor in theirs.items():
        nothing = name.endswith(("k_proj.bias", "head.fc1.bias", "head.fc2.bias", "layernorm.bias"))
        rough = nothing or tensor.dtype == torch.float32
        scale = largest if rough else float(tensor.detach().abs().max())
        assert scale > 0, f"{name} is zero: it proves nothing"
        found = max(found, float((ours[name] - tensor).detach().abs().max()) / scale)
    return found


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("setting", SETTINGS)
def test_steps_are_the_authors(setting: str, dtype: torch.dtype) -> None:
    wide = dtype == torch.float64
    made = drawn(dtype, **SETTINGS[setting], temperature=0.1 if wide else 1.0)
    eps = 1e-5 if wide else 1e-2  # far above a gradient that is rounding alone
    plain, written = strategy_of(made, STEPS, dtype, eps=eps), Written(made)
    optimizer = written.optimizer(LR, DECAY, eps)
    figures: dict[str, float] = {}
    for step in range(STEPS):
        of = batch(made, SAMPLES, 1000 * step, dtype)
        loss = first_half(made, plain, [of], Moment(step, STEPS, STEPS)).loss
        expected = written.loss(of, step)
        expected.backward()
        pairs = {"loss": ({"": loss}, {"": expected})}
        pairs["gradients"] = ours_by_name(made, "student", grad=True), written.tensors("student", grad=True)
        found = {name: apart(*pair) for name, pair in pairs.items()}
        second_half(made, plain)
        optimizer.step()
        optimizer.zero_grad()
        written.follow(step)
        pairs = {net: (ours_by_name(made, net), written.tensors(net)) for net in ("student", "teacher")}
        pairs |= {f"{net}'s statistics": written.statistics(made, net) for net in pairs}
        found |= {name: apart(*pair) for name, pair in pairs.items() if pair[1]}
        figures = {name: max(value, figures.get(name, 0.0)) for name, value in found.items()}
    print("MSN", setting, dtype, figures)
    assert all(figure <= EXACT[dtype] for figure in figures.values()), figures


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("balance", [True, False])
def test_same_as_lightly(balance: bool, dtype: torch.dtype) -> None:
    """Loss and head, on what the encoder gives."""
    from lightly.loss import MSNLoss
    from lightly.models.modules.heads import MSNProjectionHead

    made = drawn(dtype, sinkhorn=balance, mean_entropy_weight=2.0)
    of = batch(made, SAMPLES, dtype=dtype)
    heads = [MSNProjectionHead(32, 24, 10).to(dtype).train() for _ in range(2)]
    for ours, theirs in zip((made.head, made.teacher_head), heads, strict=True):
        for layer in (ours.fc1, ours.fc2):
            nn.init.zeros_(layer.bias)
        mine = [t for n, t in ours.state_dict().items() if n not in ("fc1.bias", "fc2.bias")]
        theirs.load_state_dict(dict(zip(theirs.state_dict(), mine, strict=True)))
    prototypes = made.prototypes.weight.detach().clone().requires_grad_()
    loss = made(of).loss / SAMPLES
    loss.backward()
    with torch.no_grad():
        target = heads[1](made.teacher(of.views[0]))
        keep = uniform(derived(of.seeds, "anchor/0"), "mask", 16).argsort(1)[:, :13]
        pooled = made.model(of.views[1], {"pooled"}, keep=keep).pooled, made.model(torch.cat(of.views[2:]))
    anchors = torch.cat([heads[0](x) for x in pooled])
    theirs = MSNLoss(sinkhorn_iterations=3 if balance else 0, regularization_weight=2.0)
    expected = theirs(anchors, target, prototypes)
    expected.backward()
    grads = [p.grad for n, p in made.head.named_parameters() if n not in ("fc1.bias", "fc2.bias")]
    named = dict(zip((n for n, _ in heads[0].named_parameters()), grads, strict=True))
    other = {n: p.grad for n, p in heads[0].named_parameters()}
    figures = {
        "loss": worst({"": loss}, {"": expected}),
        "gradients": worst(named | {"q": made.prototypes.weight.grad}, other | {"q": prototypes.grad}),
    }
    print("lightly", balance, dtype, figures)
    assert all(figure <= EXACT[dtype] for figure in figures.values()), figures


# ---------------------------------------------------------------- several workers, empty slots


def told(made: MSN, of: Batch) -> dict[str, Tensor]:
    """Everything that a step is made of: sums, so that those of workers add up."""
    made.zero_grad()
    losses = made(of)
    losses.loss.backward()
    out = {f"metric {n}": v for n, v in losses.metrics.items()} | {"loss": losses.loss.detach()}
    return out | {n: p.grad for n, p in made.named_parameters() if p.requires_grad}


def share(job: dict[str, Any], world: World) -> dict[str, Tensor]:
    """One worker's part, summed over the workers; the parts are not of one size."""
    rows = slice(FIRST) if world.first else slice(FIRST, SAMPLES)
    made = drawn(torch.float64, **SETTINGS[job["setting"]])
    found = told(made, part(batch(made, SAMPLES, dtype=torch.float64), rows))
    return {name: world.sum(value) for name, value in found.items()}


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return spawn(__file__, 2, {name: {"setting": name} for name in SETTINGS}, tmp_path_factory.mktemp("msn"))


@pytest.mark.parametrize("setting", SETTINGS)
def test_workers_are_one_process_with_the_whole_batch(sums: dict[str, Any], setting: str) -> None:
    made = drawn(torch.float64, **SETTINGS[setting])
    whole = told(made, batch(made, SAMPLES, dtype=torch.float64))
    largest = max(float(t.abs().max()) for n, t in whole.items() if not n.startswith(("metric", "loss")))
    for name, value in whole.items():
        scale = float(value.abs().max()) if name.startswith(("metric", "loss")) else largest
        assert float((sums[setting][name] - value).abs().max()) <= 1e-12 * scale, name


@pytest.mark.parametrize("balance", [True, False])
def test_empty_slots_count_for_nothing(balance: bool) -> None:
    made = drawn(torch.float64, head_batch_norm=False, sinkhorn=balance, entropy_weight=0.5)
    of = batch(made, SAMPLES, dtype=torch.float64)
    of.weight[5:] = 0
    one, other = told(made, part(of, slice(5))), told(made, of)
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-10, atol=1e-12)
    of.weight[:] = 0
    assert all(float(value.abs().max()) == 0 for value in told(made, of).values())


def test_a_prototype_that_nobody_chose_is_no_trouble() -> None:
    targets = torch.eye(4)[[0, 1, 1, 2]] * 0.9 + torch.tensor([0.1, 0, 0, 0])
    even = balanced(targets, torch.ones(4))
    torch.testing.assert_close(even.sum(1), torch.ones(4))
    assert float(even[:, 3].sum()) == 0


# ---------------------------------------------------------------- what the loop sees


def test_views_and_sizes() -> None:
    names = [(v.name, v.size) for v in method(anchors=2).views()]
    assert names == [("target", 16), ("anchor/0", 16), ("anchor/1", 16), ("focal/0", 8), ("focal/1", 8)]
    sizes = {(224, 16): 96, (224, 14): 98, (28, 4): 12, (28, 7): 14, (32, 4): 12, (16, 16): 16, (64, 8): 24}
    for (side, patch), size in sizes.items():
        assert small_size(ViTConfig(name="vit_tiny", patch_size=patch), side) == size
    assert method(focal_size=None).views()[-1].size == 8


def test_schedules_decay_and_export() -> None:
    made = method(start_sharpen=0.25, final_sharpen=0.15, momentum=0.9)
    made.before_step(Moment(0, 100, 10))
    assert (made.momentum, made.sharpening) == (0.9, 0.25)
    made.before_step(Moment(100, 100, 10))
    assert made.momentum == pytest.approx(0.98)
    assert made.sharpening == pytest.approx(0.17)
    assert [a.momentum for a in made.averages()] == [made.momentum] * 2
    assert not any(a.buffers for a in made.averages())
    assert made.no_decay() == {"prototypes.weight"}
    assert made.export() is made.teacher
    student = method(export="student")
    assert student.export() is student.model
    trained = {n.partition(".")[0] for n, p in made.named_parameters() if p.requires_grad}
    assert trained == {"model", "head", "prototypes"}


def test_start() -> None:
    made = method(output_dim=100, prototypes=400)
    assert float(made.prototypes.weight.detach().abs().max()) == pytest.approx(0.1, abs=1e-4)
    assert float(made.head.fc2.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert float(made.head.fc1.bias.detach().abs().max()) == 0
    for ours, copy in ((made.model, made.teacher), (made.head, made.teacher_head)):
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), copy.parameters(), strict=True))


def test_the_teacher_drops_nothing_and_watches_its_batches() -> None:
    made = method(drop_path=0.5).train()
    of = batch(made)
    one, other = made._targets(of), made._targets(of)
    assert torch.equal(one, other)
    assert int(made.teacher_head.bn1.num_batches_tracked) == 2
    made.eval()
    made._targets(of)
    assert int(made.teacher_head.bn1.num_batches_tracked) == 2


def test_masks_belong_to_samples_and_views() -> None:
    """Anchors are masked, each of its own; a sample's numbers do not depend on who is beside it."""
    made = method(anchors=2, head_batch_norm=False, sinkhorn=False, drop_path=0.3).train()
    of = batch(made)
    with torch.no_grad():
        some = made._anchors(part(of, slice(3, 5)))
        torch.testing.assert_close(some, made._anchors(of)[:, 3:5])
        of.views[2] = of.views[1]
        logs = made._anchors(of)
    assert not torch.allclose(logs[0], logs[1])


def test_half_precision_products() -> None:
    even = {"temperature": 1.0, "start_sharpen": 1.0, "sinkhorn": False}  # nothing makes rounding larger
    made = method(**even).train()
    halved(made, batch(made, SAMPLES))


def test_features_are_the_exported_model() -> None:
    made = drawn(torch.float32).eval()
    of = batch(made)
    assert torch.equal(made(of, "features"), made.teacher(of.views[0]))


# ---------------------------------------------------------------- collapse


def trained(steps: int, lr: float, **more: Any) -> list[str | None]:
    """What is said of each step of a short training."""
    made = method(**more)
    plain, said = strategy_of(made, steps), []
    for step in range(steps):
        micro = [batch(made, SAMPLES, SAMPLES * step, like=0.9)]
        means = one_step(made, plain, micro, Moment(step, steps, steps), lr).metrics
        said.append(made.diagnose({f"train/{name}": float(value) for name, value in means.items()}))
    return said


@pytest.mark.parametrize("more", [{}, {"sinkhorn": False}, {"head_batch_norm": False}])
def test_a_healthy_training_is_not_called_collapsed(more: dict[str, Any]) -> None:
    assert trained(20, 1e-3, **more) == [None] * 20


def test_collapse_is_told() -> None:
    said = trained(20, 1e-2, sinkhorn=False, mean_entropy_weight=0.0, head_batch_norm=False, momentum=0.5)
    assert said[-1] is not None
    assert "same prototypes" in said[-1]
    said = trained(
        20, 1e-2, sinkhorn=False, start_sharpen=1.0, final_sharpen=1.0, head_batch_norm=False, momentum=0.5
    )
    assert said[-1] is not None
    assert "evenly to all" in said[-1]


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (
            {"mask_ratio": 0.95},
            "mask_ratio: given 0.95, which leaves no patch of 16 visible",
        ),
        ({"focal_size": 10}, r"focal_size: given 10; image_size 10 is not .*; give msn.method.focal_size=12"),
        ({"focal_size": 20}, r"focal_size: given 20; the images have data.image_size=16.*focal_size=16, or"),
        ({"temperature": 0.0}, "temperature"),
        ({"start_sharpen": 1.5}, "start_sharpen"),
    ],
)
def test_wrong_configs(more: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        method(**more)


def test_wrong_models() -> None:
    model = create_model("vit_tiny", num_classes=3, image_size=16, **MODEL)
    with pytest.raises(UserError, match="given num_classes 3, allowed: 0"):
        create_method(build(MSNConfig, SMALL), model)
    model = create_model("swin_tiny", num_classes=0, image_size=32, patch_size=2, window_size=2)
    with pytest.raises(UserError, match="msn cannot train it, allowed: vit_tiny"):
        create_method(build(MSNConfig, SMALL), model)


if __name__ == "__main__":
    serve(share)

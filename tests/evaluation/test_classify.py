"""The counts agree with scikit-learn's, every sample once, padding never."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, top_k_accuracy_score
from torch import Tensor, nn

from vitlab.batch import Batch
from vitlab.config import UserError, build
from vitlab.dist import World
from vitlab.evaluation import EvaluateConfig, Tally, classify, confusion_table, validate
from vitlab.methods.base import Losses

CPU = torch.device("cpu")


class Answers(nn.Module):
    """The images are the logits."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


@dataclass(frozen=True)
class Lockstep(World):
    """Ranks that are threads, which is enough for sums."""

    shared: dict[str, Any] = field(default_factory=dict)

    def sum(self, value: Tensor) -> Tensor:
        return torch.stack(self.gather(value)).sum(0)

    def gather(self, thing: Any) -> list[Any]:
        box, barrier = self.shared["box"], self.shared["barrier"]
        box[self.rank] = thing
        barrier.wait(10)
        things = [box[rank] for rank in range(self.size)]
        barrier.wait(10)
        return things


def on_ranks(size: int, work: Any) -> list[Any]:
    shared = {"box": {}, "barrier": threading.Barrier(size)}
    results: dict[int, Any] = {}

    def one(rank: int) -> None:
        results[rank] = work(Lockstep(rank, size, CPU, shared))

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return [results[rank] for rank in range(size)]


def batches(logits: Tensor, labels: Tensor, size: int, world: World) -> Iterator[Batch]:
    """As `eval_batches` cuts a split: the same number of batches a rank, filled up with padding.

    The padding answers class 0 with label -1, which would spoil the counts where it is counted.
    """
    each = size // world.size
    for begin in range(0, len(labels), size):
        mine = slice(begin + world.rank * each, min(begin + (world.rank + 1) * each, len(labels)))
        got = max(0, mine.stop - mine.start)
        view, label, weight = (
            torch.zeros(each, logits.shape[1], 1, 1),
            torch.full((each,), -1),
            torch.zeros(each),
        )
        view[:got, :, 0, 0], label[:got], weight[:got] = logits[mine][:got], labels[mine][:got], 1.0
        yield Batch([view], label, weight, torch.zeros(each, dtype=torch.int64), [""] * each)


def sample(classes: int, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    logits = torch.randn(count, classes, generator=generator)
    logits[torch.arange(count), labels] += 1
    return logits, labels


def counted(logits: Tensor, labels: Tensor, size: int = 16, ranks: int = 1) -> list[Tally]:
    classes = logits.shape[1]
    return on_ranks(
        ranks,
        lambda world: classify(
            Answers(), batches(logits, labels, size, world), classes, world, lambda n: None
        ),
    )


@pytest.mark.parametrize("classes", [2, 4, 5, 10])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("count", [1, 16, 37])
def test_as_scikit_learn_counts(classes: int, ranks: int, count: int) -> None:
    logits, labels = sample(classes, count)
    tallies = counted(logits, labels, 16, ranks)
    for tally in tallies:
        figures = dict(tally.figures())
        assert tally.images == figures["eval/images"] == count
        wanted = confusion_matrix(labels, logits.argmax(1), labels=list(range(classes)))
        assert np.array_equal(tally.confusion.numpy(), wanted)
        assert figures["eval/top1"] == pytest.approx(np.trace(wanted) / count)
        if classes > 5:
            top5 = top_k_accuracy_score(labels, logits, k=5, labels=list(range(classes)))
            assert figures["eval/top5"] == pytest.approx(top5)
        else:
            assert figures["eval/top5"] == 1.0
    assert len({tally.images_per_s for tally in tallies}) == 1, "the ranks agree on the speed"


def test_every_batch_is_told() -> None:
    logits, labels = sample(3, 40)
    seen: list[int] = []
    world = World(device=CPU)
    classify(Answers(), batches(logits, labels, 16, world), 3, world, seen.append)
    assert seen == [1, 2, 3]


def test_a_class_without_images_has_no_accuracy() -> None:
    logits, labels = sample(4, 30)
    labels[labels == 2] = 1
    tally = counted(logits, labels)[0]
    shares = tally.by_class()
    assert shares[2] is None
    wanted = confusion_matrix(labels, logits.argmax(1), labels=range(4))
    assert [s for s in shares if s is not None] == pytest.approx(
        [wanted[i, i] / wanted[i].sum() for i in (0, 1, 3)]
    )


def test_images_without_a_label_are_not_counted() -> None:
    logits, labels = sample(4, 30)
    tally = counted(logits, torch.where(torch.arange(30) % 3 == 0, -1, labels))[0]
    assert tally.images == 20
    world = World(device=CPU)
    with pytest.raises(UserError, match=r"evaluate\.split: it has no image with a label"):
        classify(Answers(), batches(logits, torch.full((30,), -1), 16, world), 4, world, lambda n: None)


def test_the_model_keeps_its_gradients_out_of_it() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 3))
    logits, labels = sample(3, 10)
    world = World(device=CPU)
    classify(model, batches(logits, labels, 16, world), 3, world, lambda n: None)
    assert all(p.grad is None for p in model.parameters())


def test_the_table() -> None:
    tally = Tally(torch.tensor([[3, 1], [0, 0]]), 4, 4, 1.0)
    assert confusion_table(tally, ["a,b", "c"]) == (
        'true \\ predicted,"a,b",c,images,accuracy\n"a,b",3,1,4,0.750000\nc,0,0,0,\n'
    )


def test_the_config() -> None:
    assert build(EvaluateConfig, {}) == EvaluateConfig(split="held_out", batch_size=256)
    with pytest.raises(UserError, match="batch_size: given 0; must be greater than 0"):
        build(EvaluateConfig, {"batch_size": 0})


# ---------------------------------------------------------------- a method's own figures


def losses(batch: Batch) -> Losses:
    """Sums over the batch of a loss and a metric that differ for every sample."""
    value = batch.views[0].flatten(1)[:, 0]
    right = (value > 0).float()
    return Losses((value * batch.weight).sum(), {"right": (right * batch.weight).sum()})


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("count", [3, 16, 37])
def test_validate_is_the_mean_over_all_samples(ranks: int, count: int) -> None:
    logits, labels = sample(3, count)

    def work(world: World) -> dict[str, float]:
        return dict(validate(losses, lambda b: b.weight.sum(), batches(logits, labels, 16, world), world))

    found = on_ranks(ranks, work)
    wanted = {"val/loss": logits[:, 0].mean().item(), "val/right": (logits[:, 0] > 0).float().mean().item()}
    for values in found:
        assert values == pytest.approx(wanted, rel=1e-5)
        assert values == found[0]


def test_validate_weighs_as_the_method_does() -> None:
    """A method may count by something else than images, as by hidden patches."""
    logits, labels = sample(3, 10)
    world = World(device=CPU)
    found = dict(validate(losses, lambda b: 4 * b.weight.sum(), batches(logits, labels, 4, world), world))
    assert found["val/loss"] == pytest.approx(logits[:, 0].mean().item() / 4, rel=1e-5)


def test_validate_adds_in_double_precision() -> None:
    logits = torch.full((4096, 1), 1e-4)
    logits[0] = 1e4
    world = World(device=CPU)
    found = dict(
        validate(
            losses,
            lambda b: b.weight.sum(),
            batches(logits, torch.zeros(4096, dtype=torch.int64), 1, world),
            world,
        )
    )
    assert found["val/loss"] == pytest.approx(logits.double().mean().item(), rel=1e-9)

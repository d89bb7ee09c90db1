"""Mixup and CutMix: pairs inside a stream, λ of Beta, boxes and targets as timm has them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from samples import config, plan, shards
from timm.data.mixup import mixup_target, rand_bbox
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor

from vitlab.batch import Batch, View
from vitlab.data import AugmentConfig, draw_lots, mixed, train_batches
from vitlab.data.images.mixing import _boxes
from vitlab.methods.supervised import label_loss

BOTH = AugmentConfig(mixup=0.8, cutmix=1.0)


def batch(n: int = 32, side: int = 12, seed: int = 0, classes: int = 5) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 3, side, side, generator=rng)
    seeds = torch.arange(n) * 7919 + seed
    return Batch([images], torch.arange(n) % classes, torch.ones(n), seeds, [""] * n)


def mix(of: Batch, augment: AugmentConfig = BOTH, group: int = 8) -> Batch:
    return mixed(of, draw_lots(of, augment, group))


def test_pairs_are_neighbours_of_a_stream() -> None:
    partner = draw_lots(batch(8), BOTH, 4).partner
    assert partner.tolist() == [1, 2, 3, 0, 5, 6, 7, 4]
    of = batch(8)
    assert torch.equal(mix(of, group=4).others, of.labels[partner])


def test_mixup_is_the_weighted_mean() -> None:
    of, out = batch(), mix(batch(), AugmentConfig(mixup=0.8))
    lots = draw_lots(of, AugmentConfig(mixup=0.8), 8)
    assert not lots.cut.any()
    share = lots.share[:, None, None, None]
    torch.testing.assert_close(out.views[0], share * of.views[0] + (1 - share) * of.views[0][lots.partner])
    assert torch.equal(out.share, lots.share)
    assert len(out.share.unique()) == 32  # each image its own
    assert torch.equal(out.labels, of.labels)


def test_cutmix_pastes_a_box_and_counts_it() -> None:
    of, out = batch(), mix(batch(), AugmentConfig(cutmix=1.0))
    lots = draw_lots(of, AugmentConfig(cutmix=1.0), 8)
    assert lots.cut.all()
    for i, (top, bottom, left, right) in enumerate(lots.boxes.tolist()):
        expected = of.views[0][i].clone()
        expected[:, top:bottom, left:right] = of.views[0][lots.partner[i], :, top:bottom, left:right]
        assert torch.equal(out.views[0][i], expected)  # copied, not computed
        assert float(out.share[i]) == pytest.approx(1 - (bottom - top) * (right - left) / 144)


def test_boxes_are_timm_s(monkeypatch: pytest.MonkeyPatch) -> None:
    shares, centre = np.linspace(0, 1, 21), (3, 9)
    numbers = torch.tensor([[(centre[0] + 0.5) / 12, (centre[1] + 0.5) / 14]] * 21)
    ours = _boxes(torch.tensor(shares), numbers, (12, 14))
    for share, box in zip(shares, ours.tolist(), strict=True):
        places = iter(centre)
        monkeypatch.setattr(np.random, "randint", lambda low, high, size=None, p=places: next(p))
        assert box == [int(edge) for edge in rand_bbox((1, 3, 12, 14), share)]


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0, 3.0])
def test_shares_are_of_beta(alpha: float) -> None:
    from scipy.stats import kstest

    of = batch(4000, side=1)
    share = draw_lots(of, AugmentConfig(mixup=alpha), 4000).share
    assert kstest(share.numpy(), "beta", args=(alpha, alpha)).pvalue > 0.01


def test_how_often_and_which() -> None:
    of = batch(4000, side=2)
    lots = draw_lots(of, BOTH.model_copy(update={"mix_prob": 0.7, "mix_switch": 0.3}), 4000)
    mixes = draw_lots(of, AugmentConfig(mixup=1.0, mix_prob=0.7), 4000).share < 1
    assert 0.67 < mixes.float().mean() < 0.73
    assert 0.27 < lots.cut.float().mean() < 0.33
    assert not draw_lots(of, AugmentConfig(mixup=1.0, mix_switch=1.0), 4000).cut.any()


def test_what_has_no_partner_stays_as_it_is() -> None:
    of = batch()
    of.labels[3], of.weight[10] = -1, 0
    out = mix(of)
    alone = [2, 3, 9, 10]  # these and the ones before them
    assert (out.share[alone] == 1).all()
    assert torch.equal(out.views[0][alone], of.views[0][alone])
    assert (out.share < 1).float().mean() > 0.5
    loss = label_loss(torch.randn(32, 5), out)
    assert loss[[2, 9]].isfinite().all()
    assert torch.isfinite(loss).all()


def test_alone_in_its_stream_an_image_is_mixed_with_itself() -> None:
    of = batch()
    torch.testing.assert_close(mix(of, group=1).views[0], of.views[0])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_timm_s_soft_target_cross_entropy(smoothing: float) -> None:
    out = mix(batch())
    logits = torch.randn(32, 5, dtype=torch.float64, requires_grad=True)
    share = out.share.double()
    targets = [  # timm's function pairs from the end, so each pair is given as a batch of its own
        mixup_target(torch.tensor([own, other]), 5, lam, smoothing)[0]
        for own, other, lam in zip(out.labels, out.others, share, strict=True)
    ]
    each = [SoftTargetCrossEntropy()(x[None], t[None]) for x, t in zip(logits, targets, strict=True)]
    ours = label_loss(logits, out, smoothing)
    torch.testing.assert_close(ours, torch.stack(each), rtol=0, atol=1e-6)  # their targets are float32
    torch.testing.assert_close(
        torch.autograd.grad(ours.sum(), logits)[0],
        logits.softmax(-1) - torch.stack(targets).double(),
        rtol=0,
        atol=1e-6,
    )


def test_the_loss_is_that_of_the_mixed_label() -> None:
    out, logits = mix(batch()), torch.randn(32, 5, dtype=torch.float64)
    share = out.share.double()[:, None]
    target = share * F.one_hot(out.labels, 5) + (1 - share) * F.one_hot(out.others, 5)
    target = 0.9 * target + 0.1 / 5
    expected = -(target * logits.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(label_loss(logits, out, 0.1), expected, rtol=0, atol=1e-10)
    plain = replace(out, others=None, share=None)
    torch.testing.assert_close(
        label_loss(logits, plain, 0.1),
        F.cross_entropy(logits, out.labels, reduction="none", label_smoothing=0.1),
    )


def by_key(batches: list[Batch], group: int) -> dict[tuple[int, str], tuple[Tensor, float, int]]:
    """(step, key) → the mixed image, its share and the other label."""
    found = {}
    for step, of in batches:
        out = mix(of.to(torch.device("cpu"), torch.tensor(0.5), torch.tensor(0.5)), group=group)
        for i, key in enumerate(out.keys):
            found[step, key] = (out.views[0][i], float(out.share[i]), int(out.others[i]))
    return found


@pytest.mark.parametrize(("workers", "accumulate"), [(1, 2), (1, 4), (2, 1), (2, 2), (4, 1)])
def test_neither_workers_nor_micro_batches_nor_loaders_change_a_pair(
    workers: int, accumulate: int, tmp_path: Path
) -> None:
    made = shards(tmp_path / "s")
    settings = config(tmp_path / "s")

    def read(loaders: int = 0, **more: int) -> list[tuple[int, Batch]]:
        cut = more.get("accumulate", 1)
        asked = plan(views=[View("image", 8)], epochs=1, loaders=loaders, **more)
        return [(i // cut, of) for i, of in enumerate(train_batches(made, settings, asked))]

    whole = by_key(read(), group=4)
    parts: dict = {}
    for rank in range(workers):
        parts |= by_key(read(workers=workers, rank=rank, accumulate=accumulate, loaders=rank % 2), group=4)
    assert parts.keys() == whole.keys()
    for key, (image, share, other) in whole.items():
        assert torch.equal(parts[key][0], image)
        assert parts[key][1:] == (share, other)


def test_two_loaders_give_the_same_pairs(tmp_path: Path) -> None:
    made, settings = shards(tmp_path / "s"), config(tmp_path / "s")
    runs = [
        by_key(list(enumerate(train_batches(made, settings, plan(views=[View("image", 8)], loaders=n)))), 4)
        for n in (0, 2)
    ]
    assert all(torch.equal(runs[0][key][0], runs[1][key][0]) for key in runs[0].keys() | runs[1].keys())

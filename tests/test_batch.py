"""A batch on its way to the model: normalised exactly, in memory that nobody else holds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vitlab import batch as module
from vitlab.batch import Batch

MEAN, STD = torch.tensor([0.4, 0.5, 0.6]).view(-1, 1, 1), torch.tensor([0.2, 0.3, 0.25]).view(-1, 1, 1)


def made(*views: Tensor) -> Batch:
    n = len(views[0])
    return Batch(list(views), torch.zeros(n).long(), torch.ones(n), torch.arange(n), [""] * n)


def normalised(view: Tensor) -> Tensor:
    return made(view).to(torch.device("cpu"), MEAN, STD).views[0]


@pytest.mark.parametrize("side", [2, 40, 700])
def test_every_value_is_what_the_formula_gives(side: int) -> None:
    for layout in (torch.contiguous_format, torch.channels_last):
        view = torch.randint(0, 256, (3, 3, side, side), dtype=torch.uint8).to(memory_format=layout)
        whole = normalised(view)
        assert torch.equal(whole, view.float().div(255).sub(MEAN).div(STD))
        assert whole.is_contiguous()


def test_memory_is_used_again_once_nobody_holds_it() -> None:
    view = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8)
    first = normalised(view)
    place, kept = first.data_ptr(), first[1, 2]  # a part holds all of it
    copy = kept.clone()
    del first
    others = [normalised(255 - view) for _ in range(6)]
    assert place not in [other.data_ptr() for other in others]
    assert torch.equal(kept, copy)
    del kept
    again = [normalised(view) for _ in range(2)]
    assert len({one.data_ptr() for one in (*again, *others)}) == 8, "no two live ones share memory"
    places = {one.data_ptr() for one in again}
    del again
    assert normalised(view).data_ptr() in places


def test_what_autograd_keeps_is_not_used_again() -> None:
    view = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8)
    weight = torch.ones(3, 1, 1, requires_grad=True)
    images = normalised(view)
    wanted = images.sum((0, 2, 3)).view(3, 1, 1)
    loss = (images * weight).sum()
    del images
    for _ in range(6):
        normalised(255 - view)
    loss.backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    assert torch.allclose(weight.grad, wanted)


def test_only_a_few_are_kept() -> None:
    for n in range(2, 30):
        normalised(torch.zeros((n, 3, 4, 4), dtype=torch.uint8))
    assert len(module._spare) == module.SPARES

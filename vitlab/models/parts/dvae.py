"""Parts of the discrete VAE: a convolution, the block that narrows inside, encoder and decoder.

Names, sizes and the start are those of openai/DALL-E; see `vitlab.models.dvae`.

Letters: B samples, C channels, V codes, h w the grid of codes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 0.1  # pixels are kept so far from 0 and 1, where their logit has no end

Run = Callable[..., Any]
Named = OrderedDict[str, nn.Module]


def map_pixels(pixels: Tensor) -> Tensor:
    """0..1 → ε..1-ε."""
    return (1 - 2 * EPS) * pixels + EPS


def unmap_pixels(mapped: Tensor) -> Tensor:
    """ε..1-ε → 0..1; what lies outside is cut."""
    return ((mapped - EPS) / (1 - 2 * EPS)).clamp(0, 1)


class Conv2d(nn.Module):
    """A convolution that keeps the size. `exact`: in float32 whatever the precision, as the official ones
    at the codes."""

    def __init__(self, n_in: int, n_out: int, kernel: int, exact: bool = False) -> None:
        super().__init__()
        self.kernel, self.exact = kernel, exact
        start = torch.empty(n_out, n_in, kernel, kernel)
        self.w = nn.Parameter(nn.init.normal_(start, std=(n_in * kernel**2) ** -0.5))
        self.b = nn.Parameter(torch.zeros(n_out))

    def forward(self, x: Tensor) -> Tensor:
        if not self.exact or x.is_meta:  # without memory there is no precision
            return F.conv2d(x, self.w, self.b, padding=self.kernel // 2)
        with torch.autocast(x.device.type, enabled=False):
            return F.conv2d(x.to(self.w.dtype), self.w, self.b, padding=self.kernel // 2)


class Block(nn.Module):
    """x + gain · path(x); the path is a quarter as wide. `kernels`: of its four convolutions."""

    def __init__(self, n_in: int, n_out: int, kernels: tuple[int, ...], gain: float) -> None:
        super().__init__()
        self.gain, inside = gain, n_out // 4
        self.id_path = Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        widths = (n_in, inside, inside, inside, n_out)
        path: Named = OrderedDict()
        for i, kernel in enumerate(kernels):
            path[f"relu_{i + 1}"] = nn.ReLU()
            path[f"conv_{i + 1}"] = Conv2d(widths[i], widths[i + 1], kernel)
        self.res_path = nn.Sequential(path)

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.id_path(x) + self.gain * self.res_path(x)
        return added


class Groups(nn.Module):
    """A convolution, groups of blocks with a change of size between them, a ReLU and a convolution."""

    def __init__(
        self,
        first: nn.Module,
        widths: list[int],
        blocks: int,
        kernels: tuple[int, ...],
        between: tuple[str, Callable[[], nn.Module]],
        last: nn.Module,
    ) -> None:
        """`widths`: what the first convolution gives, then one a group. `between`: a name, what makes it."""
        super().__init__()
        gain = 1 / (blocks * (len(widths) - 1)) ** 2
        parts: Named = OrderedDict(input=first)
        for g in range(1, len(widths)):
            inside: Named = OrderedDict()
            for i in range(blocks):
                inside[f"block_{i + 1}"] = Block(widths[g - 1 if i == 0 else g], widths[g], kernels, gain)
            if g < len(widths) - 1:
                inside[between[0]] = between[1]()
            parts[f"group_{g}"] = nn.Sequential(inside)
        parts["output"] = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=last))
        self.blocks = nn.Sequential(parts)

    def forward(self, x: Tensor, run: Run) -> Tensor:
        """`run` runs a block."""
        return _through(self.blocks, x, run)


def _through(parts: nn.Sequential, x: Tensor, run: Run) -> Tensor:
    for part in parts:
        if isinstance(part, nn.Sequential):
            x = _through(part, x, run)
        else:
            x = run(part, x) if isinstance(part, Block) else part(x)
    return x


class Encoder(Groups):
    """B C height width, values in ε..1-ε → B V h w: logits of the codes."""

    def __init__(self, chans: int, n_hid: int, groups: int, blocks: int, vocab: int) -> None:
        widths = [n_hid, *(n_hid * 2**g for g in range(groups))]
        first, last = Conv2d(chans, n_hid, 7), Conv2d(widths[-1], vocab, 1, exact=True)
        super().__init__(first, widths, blocks, (3, 3, 3, 1), ("pool", partial(nn.MaxPool2d, 2)), last)


class Decoder(Groups):
    """B V h w, the codes as weights that sum to 1 → B 2C height width: location and log-scale."""

    def __init__(self, chans: int, n_hid: int, groups: int, blocks: int, vocab: int, n_init: int) -> None:
        widths = [n_init, *(n_hid * 2**g for g in reversed(range(groups)))]
        first, last = Conv2d(vocab, n_init, 1, exact=True), Conv2d(widths[-1], 2 * chans, 1)
        larger = ("upsample", partial(nn.Upsample, scale_factor=2, mode="nearest"))
        super().__init__(first, widths, blocks, (1, 3, 3, 3), larger, last)

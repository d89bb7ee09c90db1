"""Two implementations on the same weights: are outputs, gradients and one optimiser step the same?

Every tensor is judged by max|a - b| / max|b|. The gradient of a key bias is zero in exact arithmetic (the
softmax does not see a number added to all of a query's scores), so what stands there is rounding: it is
judged against the largest gradient of the model.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

EXACT = {torch.float32: 1e-5, torch.float64: 1e-10}
# transformers' small ViTs. Their open attention takes its softmax in float32, so it is not used.
THEIR_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "attn_implementation": "sdpa",
}


def redraw(module: nn.Module, seed: int = 0) -> None:
    """Every tensor anew, so that no zero bias or unit scale hides a difference."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * 0.3)


def images(batch: int, side: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(batch, 3, side, side, generator=generator, dtype=torch.float64).to(dtype)


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def thirds(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """`qkv.bias` apart into the bias of queries, keys and values."""
    out: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if name.endswith("qkv.bias"):
            out |= {f"{name}.{part}": v for part, v in zip("qkv", value.detach().chunk(3), strict=True)}
        else:
            out[name] = value.detach()
    return out


def worst(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest relative difference of any tensor, key biases against the largest number of all."""
    ours, theirs = thirds(ours), thirds(theirs)
    assert ours.keys() == theirs.keys()
    largest = max(float(t.abs().max()) for t in theirs.values())
    found = 0.0
    for name, tensor in theirs.items():
        scale = largest if name.endswith("qkv.bias.k") else float(tensor.abs().max())
        assert scale > 0, f"{name} is zero: it proves nothing"
        found = max(found, float((ours[name] - tensor).abs().max()) / scale)
    return found


def step(module: nn.Module, loss: Tensor) -> None:
    """One step of AdamW: lr · g / (|g| + ε). A g that is rounding alone needs an ε far above it."""
    loss.backward()
    eps = 1e-8 if loss.dtype == torch.float64 else 1e-4
    torch.optim.AdamW(module.parameters(), lr=1e-3, weight_decay=0.1, eps=eps).step()


def compare(ours: nn.Module, theirs: nn.Module, run: Callable[[nn.Module], tuple[Tensor, Tensor]]) -> None:
    """`run` gives (output, loss) of either; both hold the same names."""
    outputs = []
    for module in (ours, theirs):
        output, loss = run(module)
        step(module, loss)
        outputs.append({"output": output.detach()})
    limit = EXACT[outputs[0]["output"].dtype]
    figures = {
        "output": worst(*outputs),
        "gradients": worst(gradients(ours), gradients(theirs)),
        "step": worst(dict(ours.named_parameters()), dict(theirs.named_parameters())),
    }
    print(type(theirs).__name__, limit, figures)
    assert all(figure <= limit for figure in figures.values()), figures

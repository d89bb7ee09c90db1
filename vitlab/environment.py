"""What torch and its threads read from the environment: once, when torch is imported."""

from __future__ import annotations

import os

TORCH = {
    "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads slow shared machines down tenfold
    "THP_MEM_ALLOC_ENABLE": "1",  # large tensors in large pages, on CPUs: a new batch costs half as much
}


def set_for_torch() -> None:
    for name, value in TORCH.items():
        os.environ.setdefault(name, value)

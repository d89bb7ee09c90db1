"""Measurements against a peer in the same run.

The two sides take turns, so that whatever else the machine does falls on both. A row holds the medians and
`ratio`, our cost over theirs: below 1 is better.
"""

from __future__ import annotations

from vitlab.bench.data import DataOptions, bench_data
from vitlab.bench.data_table import print_data
from vitlab.bench.memory import MemoryOptions, bench_memory
from vitlab.bench.report import Row, print_rows, write_json
from vitlab.bench.step import CASES, StepOptions, bench_step

__all__ = [
    "CASES",
    "DataOptions",
    "MemoryOptions",
    "Row",
    "StepOptions",
    "bench_data",
    "bench_memory",
    "bench_step",
    "print_data",
    "print_rows",
    "write_json",
]

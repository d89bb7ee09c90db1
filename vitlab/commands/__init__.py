"""The words of the command `vitlab`, one file a word: what it takes, and what it does with it."""

from vitlab.commands import bench, export, models, run, shards, ui

WORDS = (shards, run, export, models, ui, bench)  # in the order in which the help lists them

__all__ = ["WORDS"]

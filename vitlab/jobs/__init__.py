"""What the workers do: one job, from its inputs to a published artifact.

A job is plain data made by `vitlab.stages`; it runs the same in the driver's process, under Ray Train,
and in a trial of a search. Rank 0 alone writes to MLflow.
"""

from __future__ import annotations

from typing import Any

from vitlab.dist import World
from vitlab.engine.serve import Post
from vitlab.jobs.evaluating import EvaluateJob, run_evaluation
from vitlab.jobs.place import Place
from vitlab.jobs.training import TrainJob, forget, run_training

Job = TrainJob | EvaluateJob


def work(job: Job, world: World, post: Post) -> dict[str, Any]:
    """Called by every worker of a session; the result is rank 0's."""
    if isinstance(job, TrainJob):
        return run_training(job, world, post)
    return run_evaluation(job, world, post)


__all__ = ["EvaluateJob", "Job", "Place", "TrainJob", "forget", "work"]

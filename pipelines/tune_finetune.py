"""Search learning rate, layer decay and drop path of fine-tuning with Ray Tune, evaluate the best."""

from vitlab import Experiment, Run, pipeline
from vitlab.tune import search


def main(exp: Experiment) -> None:
    """Search the fine-tune stage with Ray Tune (ASHA); evaluate the best model on held-out images."""
    with Run(exp, "tune_finetune") as run:
        shards = run.shards(exp.data)
        encoder = run.pretrain(exp.need("pretrain"), data=shards)
        best = search(run, data=shards, init=encoder)
        run.evaluate(exp.evaluate, data=shards, model=best)


if __name__ == "__main__":
    pipeline(main, "experiments/digits_tune.yaml", needs=("pretrain", "finetune", "tune"))

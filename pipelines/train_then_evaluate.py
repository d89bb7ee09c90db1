"""Train a model from scratch with labels, evaluate it on held-out images."""

from vitlab import Experiment, Run, pipeline


def main(exp: Experiment) -> None:
    """Train a model from scratch with labels, evaluate it on held-out images."""
    with Run(exp, "train_then_evaluate") as run:
        shards = run.shards(exp.data)
        model = run.finetune(exp.need("finetune"), data=shards)
        run.evaluate(exp.evaluate, data=shards, model=model)


if __name__ == "__main__":
    pipeline(main, "experiments/digits_vit.yaml", needs=("finetune",))

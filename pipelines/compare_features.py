"""Pretrain by several methods under several seeds, and compare their frozen features in one table."""

from vitlab import Experiment, Run, each, pipeline


def main(exp: Experiment) -> None:
    """Pretrain by several methods under several seeds; a table of what their frozen features are worth."""
    with Run(exp, "compare_features") as run:
        shards = run.shards(exp.data)
        for trial in each(run):
            if trial.pretrain is None:  # the baseline: an encoder that has learned nothing
                encoder = run.adopt(trial.need("adopt"), data=shards)
            else:
                encoder = run.pretrain(trial.pretrain, data=shards)
            run.evaluate(trial.evaluate, data=shards, model=encoder)


if __name__ == "__main__":
    pipeline(main, "experiments/fashion_features.yaml", needs=("pretrain or adopt",), compares=True)

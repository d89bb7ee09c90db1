"""DINO-pretrain a ViT without labels; judge its frozen features by nearest neighbours and a linear probe."""

from vitlab import Experiment, Run, pipeline


def main(exp: Experiment) -> None:
    """DINO-pretrain a ViT; judge its frozen features by nearest neighbours and a linear probe."""
    with Run(exp, "dino_then_knn") as run:
        shards = run.shards(exp.data)
        encoder = run.pretrain(exp.need("pretrain"), data=shards)
        run.evaluate(exp.evaluate, data=shards, model=encoder)


if __name__ == "__main__":
    pipeline(main, "experiments/digits_dino.yaml", needs=("pretrain",))

"""MSN-pretrain a ViT without labels; learn from a few labelled images, beside the same ViT untrained."""

from vitlab import Experiment, Run, pipeline


def main(exp: Experiment) -> None:
    """MSN-pretrain a ViT; learn from a few labelled images, beside the same ViT untrained."""
    with Run(exp, "msn_then_lowshot") as run:
        shards = run.shards(exp.data)
        untrained = run.adopt(exp.need("adopt"), data=shards, label="untrained")
        encoder = run.pretrain(exp.need("pretrain"), data=shards)
        run.evaluate(exp.evaluate, data=shards, model=untrained, label="evaluate untrained")
        run.evaluate(exp.evaluate, data=shards, model=encoder, label="evaluate encoder")


if __name__ == "__main__":
    pipeline(main, "experiments/digits_msn.yaml", needs=("adopt", "pretrain"))

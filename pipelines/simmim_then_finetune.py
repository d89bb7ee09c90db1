"""SimMIM-pretrain a ViT or a Swin, fine-tune it, evaluate it on held-out images."""

from vitlab import Experiment, Run, each, pipeline


def main(exp: Experiment) -> None:
    """SimMIM-pretrain a ViT or a Swin, fine-tune it, evaluate it on held-out images."""
    with Run(exp, "simmim_then_finetune") as run:
        shards = run.shards(exp.data)
        for trial in each(run):
            encoder = run.pretrain(trial.need("pretrain"), data=shards)
            model = run.finetune(trial.need("finetune"), data=shards, init=encoder)
            run.evaluate(trial.evaluate, data=shards, model=model)


if __name__ == "__main__":
    pipeline(main, "experiments/digits_simmim.yaml", needs=("pretrain", "finetune"), compares=True)

"""MAE-pretrain a ViT, fine-tune it, distil it into a smaller student, evaluate both on held-out images."""

from vitlab import Experiment, Run, pipeline


def main(exp: Experiment) -> None:
    """MAE-pretrain a ViT, fine-tune it, distil it into a smaller student, evaluate both."""
    with Run(exp, "mae_then_finetune") as run:
        shards = run.shards(exp.data)
        encoder = run.pretrain(exp.need("pretrain"), data=shards)
        model = run.finetune(exp.need("finetune"), data=shards, init=encoder)
        student = run.distill(exp.need("distill"), data=shards, teacher=model)
        run.evaluate(exp.evaluate, data=shards, model=model, label="evaluate model")
        run.evaluate(exp.evaluate, data=shards, model=student, label="evaluate student")


if __name__ == "__main__":
    pipeline(main, "experiments/digits_mae.yaml", needs=("pretrain", "finetune", "distill"))

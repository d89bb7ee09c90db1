"""Train a tokenizer, BEiT-pretrain a ViT with its codes, fine-tune it, evaluate it on held-out images."""

from vitlab import Experiment, Run, pipeline


def main(exp: Experiment) -> None:
    """Train a tokenizer, BEiT-pretrain a ViT with its codes, fine-tune it, evaluate it."""
    with Run(exp, "beit_then_finetune") as run:
        shards = run.shards(exp.data)
        tokenizer = run.tokenizer(exp.need("tokenizer"), data=shards)
        encoder = run.pretrain(exp.need("pretrain"), data=shards, tokenizer=tokenizer)
        model = run.finetune(exp.need("finetune"), data=shards, init=encoder)
        run.evaluate(exp.evaluate, data=shards, model=model)


if __name__ == "__main__":
    pipeline(main, "experiments/digits_beit.yaml", needs=("tokenizer", "pretrain", "finetune"))

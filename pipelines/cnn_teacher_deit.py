"""Train a CNN, distil it into a DeiT by its token, train the same DeiT without a teacher, evaluate all."""

from vitlab import Experiment, Run, pipeline
from vitlab.methods import DistillConfig, SupervisedConfig
from vitlab.models import ViTConfig
from vitlab.sections import TrainConfig


def alone(distill: TrainConfig) -> TrainConfig:
    """The student's section without a teacher: labels alone, no distillation token, all else as it is."""
    assert isinstance(distill.method, DistillConfig)  # an experiment has no other there
    tokens = {"distilled": False, "combine": "mean"} if isinstance(distill.model, ViTConfig) else {}
    method = SupervisedConfig(label_smoothing=distill.method.label_smoothing)
    return distill.model_copy(update={"model": distill.model.model_copy(update=tokens), "method": method})


def main(exp: Experiment) -> None:
    """Train a CNN, distil it into a DeiT, train the same DeiT without a teacher, evaluate all three."""
    with Run(exp, "cnn_teacher_deit") as run:
        shards = run.shards(exp.data)
        cnn = run.finetune(exp.need("finetune"), data=shards)
        taught = run.distill(exp.need("distill"), data=shards, teacher=cnn)
        untaught = run.finetune(alone(exp.need("distill")), data=shards, label="no teacher")
        run.evaluate(exp.evaluate, data=shards, model=cnn, label="evaluate cnn")
        run.evaluate(exp.evaluate, data=shards, model=taught, label="evaluate taught")
        run.evaluate(exp.evaluate, data=shards, model=untaught, label="evaluate untaught")


if __name__ == "__main__":
    pipeline(main, "experiments/digits_cnn_teacher.yaml", needs=("finetune", "distill"))

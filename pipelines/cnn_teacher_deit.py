"""Train a CNN and let it teach a DeiT, with and without its token, beside the same DeiT without a teacher."""

from vitlab import Experiment, Run, each, pipeline
from vitlab.methods import DistillConfig, SupervisedConfig
from vitlab.models import ViTConfig
from vitlab.sections import TrainConfig


def without_token(distill: TrainConfig) -> TrainConfig:
    """The student's section with the same teacher, who speaks to the class head."""
    assert isinstance(distill.method, DistillConfig)  # an experiment has no other there
    return _changed(distill, distill.method.model_copy(update={"token": False}))


def without_teacher(distill: TrainConfig) -> TrainConfig:
    """The student's section with labels alone."""
    assert isinstance(distill.method, DistillConfig)  # an experiment has no other there
    return _changed(distill, SupervisedConfig(label_smoothing=distill.method.label_smoothing))


def _changed(distill: TrainConfig, method: DistillConfig | SupervisedConfig) -> TrainConfig:
    """Another method, no distillation token, all else as it is."""
    tokens = {"distilled": False, "combine": "mean"} if isinstance(distill.model, ViTConfig) else {}
    return distill.model_copy(update={"model": distill.model.model_copy(update=tokens), "method": method})


def main(exp: Experiment) -> None:
    """Train a CNN, let it teach a DeiT with and without its token, beside the DeiT without a teacher."""
    with Run(exp, "cnn_teacher_deit") as run:
        shards = run.shards(exp.data)
        for trial in each(run):
            student = trial.need("distill")
            cnn = run.finetune(trial.need("finetune"), data=shards, label="cnn")
            token = run.distill(student, data=shards, teacher=cnn, label="token")
            no_token = run.distill(without_token(student), data=shards, teacher=cnn, label="no token")
            alone = run.finetune(without_teacher(student), data=shards, label="no teacher")
            run.evaluate(trial.evaluate, data=shards, model=cnn, label="evaluate cnn")
            run.evaluate(trial.evaluate, data=shards, model=token, label="evaluate token")
            run.evaluate(trial.evaluate, data=shards, model=no_token, label="evaluate no token")
            run.evaluate(trial.evaluate, data=shards, model=alone, label="evaluate no teacher")


if __name__ == "__main__":
    pipeline(main, "experiments/digits_cnn_teacher.yaml", needs=("finetune", "distill"), compares=True)

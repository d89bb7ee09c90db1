"""What cannot be is refused in one line: by the experiment alone, then by the images that it has."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from vitlab.config import UserError, build
from vitlab.data import ShardInfo, Shards, ShardsConfig
from vitlab.experiment import check_shards, from_anywhere, read, trial_stages
from vitlab.sections import TrainConfig, TuneConfig, changed
from vitlab.stages import Run
from vitlab.tune import Space, _settings, most_epochs

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "tests" / "integration" / "tiny.yaml"


def shards(train: int = 1254, val: int = 180, held_out: int = 363, classes: int = 10) -> Shards:
    counts = {"train": train, "val": val, "held_out": held_out}
    splits = {name: [ShardInfo(f"{name}-0.tar", n, n, "0")] if n else [] for name, n in counts.items()}
    return Shards(Path("/nowhere"), [str(i) for i in range(classes)], splits)


def refused(*overrides: str) -> str:
    with pytest.raises(UserError) as error:
        read(TINY, overrides)
    line = str(error.value)
    assert "\n" not in line
    return line


@pytest.mark.parametrize("file", [TINY, *sorted((ROOT / "experiments").glob("*.yaml"))], ids=lambda p: p.name)
def test_the_experiments_can_be(file: Path) -> None:
    images = 1_281_167 if file.name.startswith("imagenet") else 1254
    check_shards(read(file), shards(train=images), evaluates=True)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("evaluate.split=test", 'evaluate.split: given "test"; allowed: held_out, val, train'),
        (
            "pretrain={model: {name: vit_tiny, patch_size: 2, in_chans: 1, mask_token: true}, "
            "method: {name: beit}, epochs: 1, batch_size: 64}",
            "pretrain.method.name: given 'beit', which needs a tokenizer; add the section tokenizer as in",
        ),
        ("finetune.optim.betas=[0.9, 1.0]", "finetune.optim.betas[1]: given 1.0; must be less than 1"),
        ("finetune.optim.betas=[-0.1, 0.9]", "finetune.optim.betas[0]: given -0.1; must be greater than or"),
        ("finetune.method.name=mae", "finetune.method.name: given 'mae'; allowed in this stage: supervised"),
        (
            "pretrain.method={name: distill}",
            "pretrain.method.name: given 'distill'; allowed in this stage: supervised, mae",
        ),
        (
            "distill.method={name: supervised}",
            "distill.method.name: given 'supervised'; allowed in this stage: distill",
        ),
        (
            "distill.model.distilled=false",
            "distill.method.token: given true, but distill.model has no distillation head; "
            "give distill.model.distilled=true or distill.method.token=false",
        ),
        (
            "distill.model={name: swin_tiny, in_chans: 1, patch_size: 4}",
            "distill.method.token: given true, but distill.model has no distillation head; "
            "give distill.model.name=deit_tiny or distill.method.token=false",
        ),
        (
            "pretrain.method.mask_ratio=0.8",
            "pretrain.method.mask_ratio: given 0.8, which leaves no patch of 4 visible; "
            "allowed: above 0, at most 0.75",
        ),
        (
            "pretrain.method.mask_ratio=1.0e-20",
            "pretrain.method.mask_ratio: given 1e-20, which leaves every patch of 4 visible",
        ),
        (
            "finetune={model: {name: cvt_13, in_chans: 1}, method: {name: supervised}, epochs: 1, "
            "batch_size: 64, accumulate: 2}",
            "finetune.accumulate: given 2; cvt_13 normalises over a whole batch, ",
        ),
        (
            "pretrain.model={name: swin_tiny, in_chans: 1, patch_size: 2}",
            "pretrain.model.name: given 'swin_tiny'; mae cannot train it, allowed: vit_tiny",
        ),
        ("pretrain.model.patch_size=8", "allowed: none, give a smaller pretrain.model.patch_size"),
        (
            "pretrain.augment={mixup: 0.8}",
            "pretrain.augment.mixup: given 0.8; mae has no use for mixed labels, allowed: 0, or a method "
            "that has: supervised",
        ),
        (
            "pretrain={model: {name: vit_tiny, in_chans: 1, patch_size: 4}, method: {name: dino, "
            "local_crops: 0}, epochs: 1, batch_size: 64}",
            "pretrain.augment.name: given 'none'; dino compares random views of an image; allowed: dino, or "
            "set pretrain.augment.crop_scale",
        ),
        (
            "finetune={model: {name: vit_tiny, in_chans: 1, patch_size: 4}, method: {name: supervised}, "
            "epochs: 1, batch_size: 4, augment: {cutmix: 1.0}}",
            "finetune.batch_size: given 4; finetune.augment.cutmix mixes images of a stream in one batch, "
            "allowed: multiples of data.streams=4 from 8",
        ),
        (
            "finetune={model: {name: vit_tiny, in_chans: 1, patch_size: 4}, method: {name: supervised}, "
            "epochs: 1, batch_size: 64, accumulate: 4, augment: {name: deit}}",
            "finetune.accumulate: given 4; finetune.augment.mixup mixes images of a stream, which "
            "micro-batches must not cut; with 4 streams on 2 workers allowed: 1, 2",
        ),
        (
            "finetune.augment={views: {image: {blurr: 1.0}}}",
            "finetune.augment: views.image.blurr: unknown key",
        ),
        ("tune.metric=val/top5", 'tune.metric: given "val/top5"; allowed: val/top1, val/loss'),
        ("data.val=0", "tune.metric: given 'val/top1', but data.val=0 leaves no images for it"),
        ("cluster.workers=3", "cluster.workers: given 3; it must divide data.streams=4, allowed: 1, 2, 4"),
        ("tune.workers=3", "tune.workers: given 3; it must divide data.streams=4, allowed: 1, 2, 4"),
        ("tune.space={}", "tune.space: empty"),
        ("tune.space={optim.lr: []}", "tune.space: optim.lr: given []; name at least one value"),
        ("tune.space={epochs.many: [1]}", "tune.space: finetune.epochs.many: unknown key; epochs holds 6"),
        ("tune.space={optim.lr: {low: 0.0, high: 1}}", "tune.space: finetune.optim.lr: given 0.0; must be"),
        ("tune.space={model.drop_path: {low: 0.5, high: 1.5}}", "finetune.model.drop_path: given 1.5; must"),
        (
            "tune.space={batch_size: [64, 50]}",
            "tune.space: finetune.batch_size: given 50; allowed: multiples of data.streams=4: 48",
        ),
        (
            "tune.space={model.patch_size: [4, 3]}",
            "finetune.model.patch_size: given 3; it must divide data.image_size=8, allowed: 1, 2, 4, 8",
        ),
        ("tune.space={method.name: [mae]}", "tune.space: finetune.method"),
        (
            "tune.space={epochs: [3, 9], optim.warmup_epochs: [0, 5]}",
            "tune.space: finetune.optim.warmup_epochs: given 5.0; allowed: at most finetune.epochs=3",
        ),
    ],
)
def test_one_line(override: str, line: str) -> None:
    assert line in refused(override)


@pytest.mark.parametrize(
    "overrides",
    [
        ("distill.model.distilled=false", "distill.method.token=false"),
        ("pretrain.method={name: supervised}",),
        ("cluster.workers=0", "cluster.zero=null", "cluster.loaders=2", "cluster.address=head:6379"),
        ("tune=null", "data.val=0"),
        ("tune.space={epochs: [1], optim.warmup_epochs: [0, 1]}", "finetune.optim.warmup_epochs=3"),
    ],
)
def test_what_can_be(overrides: tuple[str, ...]) -> None:
    assert read(TINY, overrides) != read(TINY)  # accepted, and the change is in it


@pytest.mark.parametrize(
    ("override", "images", "line"),
    [
        ("name=a", shards(held_out=0), "evaluate.split: given 'held_out'; the shards have: train, val"),
        (
            "finetune.batch_size=2048",
            shards(),
            "finetune.batch_size: given 2048; the shards have 1254 train images; "
            "allowed: multiples of data.streams=4 up to 1252",
        ),
        ("name=a", shards(train=3), "allowed: none, lower data.streams"),
        (
            "finetune.model.num_classes=7",
            shards(),
            "finetune.model.num_classes: given 7, but the shards have 10 classes; leave it out",
        ),
        ("name=a", shards(val=0), "tune.metric: given 'val/top1', which needs the split val"),
        ("tune.space={batch_size: [64, 4096]}", shards(), "tune.space: finetune.batch_size: given 4096"),
        ("tune.space={model.num_classes: [7]}", shards(), "tune.space: finetune.model.num_classes: given 7"),
    ],
)
def test_what_the_images_cannot_serve(override: str, images: Shards, line: str) -> None:
    with pytest.raises(UserError) as error:
        check_shards(read(TINY, [override]), images, evaluates=True)
    assert line in str(error.value)


def test_only_who_evaluates_needs_the_split() -> None:
    check_shards(read(TINY), shards(held_out=0), evaluates=False)
    check_shards(read(TINY, ["pretrain.model.num_classes=7"]), shards(), evaluates=True)  # MAE has no head
    with pytest.raises(UserError, match=r"evaluate\.split"):
        check_shards(read(TINY, ["evaluate.split=held_out"]), shards(held_out=0), evaluates=False)


def test_a_search_by_its_longest_trial() -> None:
    exp = read(TINY, ["tune.space={epochs: [6, 20, 9], optim.lr: [1.0e-3]}"])
    assert exp.tune is not None
    space = Space(stage=exp.need("finetune"), search=exp.tune)
    assert most_epochs(space) == 20
    assert _settings(space, 0).scheduler._max_t == 20


def test_every_end_of_a_large_space_is_tried() -> None:
    space: dict[str, Any] = {
        "optim.lr": [i / 1000 for i in range(1, 41)],
        "batch_size": [4 * i for i in range(1, 31)],
    }
    stages = list(trial_stages(build(TuneConfig, {"space": space}), read(TINY).need("finetune")))
    assert {stage.optim.lr for stage in stages} == set(space["optim.lr"])
    assert {stage.batch_size for stage in stages} == set(space["batch_size"])
    assert isinstance(stages[0], TrainConfig)


def test_a_change_leaves_the_tree_alone() -> None:
    tree = {"a": {"b": 1}}
    assert changed(tree, {"a.b": 2, "c.d": 3}) == {"a": {"b": 2}, "c": {"d": 3}}
    assert tree == {"a": {"b": 1}}


# ---------------------------------------------------------------- the same words elsewhere


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("digits", "digits"),
        ("folder:images", "folder:{here}/images"),
        ("images", "{here}/images"),
        ("hf:images", "hf:{here}/images"),
        ("hf:images:test", "hf:{here}/images:test"),
        ("hf:owner/name:test", "hf:owner/name:test"),
        ("folder:/images", "folder:/images"),
    ],
)
def test_a_source_from_anywhere(
    given: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "images").mkdir()
    monkeypatch.chdir(tmp_path)
    config = build(ShardsConfig, {"source": given, "image_size": 8})
    assert from_anywhere(config).source == found.format(here=tmp_path.resolve())


def test_shards_by_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = build(ShardsConfig, {"path": "shards", "image_size": 8})
    assert from_anywhere(config).path == str(tmp_path / "shards")


def test_the_same_words_from_another_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITLAB_HOME", str(tmp_path / "home"))
    made = []
    for shade, place in enumerate(("a", "b")):
        for label in ("cat", "dog"):
            folder = tmp_path / place / "images" / label
            folder.mkdir(parents=True)
            for i in range(8):
                Image.new("L", (8, 8), 16 * i + 2 * shade + len(made)).save(folder / f"{label}{i}.png")
        monkeypatch.chdir(tmp_path / place)
        made.append(_run(["data.source=folder:images", "data.held_out=0"]))
    assert made[0].path != made[1].path
    assert made[0].digest != made[1].digest
    again = _run([f"data.source=folder:{tmp_path}/b/images", "data.held_out=0"])
    assert again.path == made[1].path


def _run(overrides: list[str], pipeline: str = "notebook") -> Shards:
    """The shards of a run that was not entered, so without a store."""
    exp = read(TINY, ["pretrain=null", "distill=null", "tune=null", "finetune=null", *overrides])
    run, nothing = Run(exp, pipeline), lambda *_: None
    run.store, run.run_id = SimpleNamespace(tag=nothing, upload_file=nothing), "none"  # type: ignore[assignment]
    return run.shards(exp.data)


def test_a_run_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITLAB_HOME", str(tmp_path / "home"))
    with pytest.raises(UserError, match=r"evaluate\.split: given 'held_out'; the shards have: train, val"):
        _run(["data.held_out=0"], "mine")
    with pytest.raises(UserError, match=r"data\.num_classes: given 7, but the shards hold 10 classes"):
        _run(["data.held_out=0", "data.num_classes=7"])


@pytest.mark.parametrize(
    ("model", "line"),
    [
        ("{name: cvt_13, in_chans: 1, depths: [1, 1, 1]}", "attention of layer 1 is 1×"),
        ("{name: torchvision, arch: resnet18, in_chans: 1}", "Borrowed gives no attention maps"),
        ("{name: coatnet_0, in_chans: 1, layout: C-C-C-C}", "the model has no layer of attention"),
    ],
)
def test_attention_that_cannot_be_drawn_is_refused_before_the_training(model: str, line: str) -> None:
    found = refused("evaluate.attention=4", f"finetune.model={model}", "tune=null")
    assert found.startswith("finetune.model.name: given ")
    assert line in found


def test_attention_that_can_be_drawn_is_not_refused() -> None:
    sizes = "patch_size: 1, embed_dim: 12, depths: [2, 2], num_heads: [1, 2], window_size: 4"
    swin = f"{{name: swin_tiny, in_chans: 1, {sizes}}}"
    read(TINY, ["evaluate.attention=4", f"finetune.model={swin}", "tune=null"])
    read(TINY, ["evaluate.attention=4"])


VIT = "model: {name: vit_tiny, patch_size: 2, in_chans: 1, embed_dim: 32, depth: 1, num_heads: 2"
LOOP = "epochs: 1, batch_size: 64"


@pytest.mark.parametrize(
    ("method", "model", "augment", "line"),
    [
        (
            "dino",
            "",
            "crop_scale: [0.5, 1.0], views: {glbal: {blur: 1.0}}",
            "pretrain.augment.views: given 'glbal'; dino has the views global/0, global/1, local/0",
        ),
        (
            "mae",
            "",
            "views: {whole: {flip: true}}",
            "pretrain.augment.views: given 'whole'; mae has the views image",
        ),
        (
            "msn",
            ", relative: shared",
            "crop_scale: [0.5, 1.0]",
            "pretrain.model.relative: given 'shared', whose tables are for all patches of an image; msn",
        ),
    ],
)
def test_pretraining_that_cannot_be(method: str, model: str, augment: str, line: str) -> None:
    method = f"method: {{name: {method}}}"
    section = f"{{{method}, {VIT}{model}}}, augment: {{{augment}}}, {LOOP}}}"
    assert refused(f"pretrain={section}").startswith(line)


def test_more_shots_than_a_class_has() -> None:
    line = r"evaluate.shots: given 200 a class; 1254 training images of 10 classes have 125 .* 1 to 125"
    with pytest.raises(UserError, match=line):
        check_shards(read(TINY, ["evaluate.shots=[1, 200]"]), shards(), evaluates=True)
    with pytest.raises(UserError, match=r"5 training images .* allowed: none, leave it out"):
        check_shards(read(TINY, ["evaluate.shots=[1]", "evaluate.bank=5"]), shards(), evaluates=True)
    check_shards(read(TINY, ["evaluate.shots=[1, 125]"]), shards(), evaluates=True)


def test_one_of_two_sections() -> None:
    with pytest.raises(UserError, match=r"^pretrain or adopt: missing; this pipeline needs the section"):
        read(TINY, ["pretrain=null", "adopt=null"]).require("pretrain or adopt")
    read(TINY, ["adopt=null"]).require("pretrain or adopt")

"""Weights from outside: adopted, hit, used as a teacher and as a start, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
import yaml

import vitlab
from vitlab import Experiment, Run
from vitlab.config import UserError
from vitlab.data import Shards
from vitlab.face import Face
from vitlab.jobs import adopting, fetching
from vitlab.models import create_model, load_model, save_model

TINY = Path(__file__).parent / "integration" / "tiny.yaml"
ALONE = ("cluster.workers=0", "cluster.zero=null", "distill.epochs=1")
pytestmark = pytest.mark.usefixtures("shared_home")


def regnet(classes: int = 10) -> torch.nn.Module:
    """torchvision's own; its first convolution sees one channel."""
    torch.manual_seed(0)
    net: torch.nn.Module = torchvision.models.regnet_y_400mf(num_classes=classes)
    net.stem[0] = torch.nn.Conv2d(1, 32, 3, 2, 1, bias=False)
    return net


def saved(path: Path, classes: int = 10) -> Path:
    torch.save(regnet(classes).state_dict(), path)
    return path


def experiment(weights: object, *more: str, arch: str = "regnet_y_400mf") -> Experiment:
    model = f"{{name: torchvision, arch: {arch}, in_chans: 1}}"
    return vitlab.read(TINY, [*ALONE, f"adopt={{model: {model}, weights: '{weights}'}}", *more])


class Heard(Face):
    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def print(self, text: str = "") -> None:
        self.lines.append(text)


def adopt(exp: Experiment, face: Face | None = None) -> tuple[Any, str, Shards]:
    """(artifact, outcome, shards) of one run."""
    face = face or Face(quiet=True)
    with Run(exp, face=face) as run:
        shards = run.shards(exp.data)
        found = run.adopt(exp.need("adopt"), data=shards)
        return found, face.rows[-1].outcome, shards


# ---------------------------------------------------------------- into the chain


def test_a_teacher_from_a_file(tmp_path: Path) -> None:
    file = saved(tmp_path / "teacher.pth")
    exp = experiment(file)
    face = Heard()
    with Run(exp, face=face) as run:
        shards = run.shards(exp.data)
        teacher = run.adopt(exp.need("adopt"), data=shards)
        student = run.distill(exp.need("distill"), data=shards, teacher=teacher)
        tags = run.store.get(student.run_id).tags
        (report,) = (f for f in run.store.client.list_artifacts(teacher.run_id) if f.path == "report.txt")
        run.evaluate(exp.evaluate, data=shards, model=teacher)
    assert report.file_size
    assert teacher.uri in tags["vitlab.inputs"]
    assert any(" tensors loaded (layout: torchvision or timm)" in line for line in face.lines)
    loaded = load_model(teacher.folder)
    assert loaded.labels == shards.classes
    reference = regnet()
    reference.load_state_dict(torch.load(file))
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(loaded.model.eval()(x), reference.eval()(x))


def test_the_digest_of_the_weights_decides(tmp_path: Path) -> None:
    first, outcome, _ = adopt(experiment(saved(tmp_path / "a.pth")))
    again, second, _ = adopt(experiment((tmp_path / "a.pth").rename(tmp_path / "b.pth")))
    assert second == "hit", outcome
    assert again == first
    state = torch.load(tmp_path / "b.pth")
    torch.save({**state, "fc.bias": state["fc.bias"] + 1}, tmp_path / "b.pth")
    other, third, _ = adopt(experiment(tmp_path / "b.pth"))
    assert third == "ran"
    assert other.digest != first.digest


def test_a_start_from_an_earlier_run(tmp_path: Path) -> None:
    """`runs:/ID/model`; a fresh head; then fine-tuning starts from it."""
    first, _, _ = adopt(experiment(saved(tmp_path / "a.pth")))
    model = "{name: torchvision, arch: regnet_y_400mf, in_chans: 1}"
    more = [f"finetune.model={model}", "finetune.epochs=1", "finetune.optim.warmup_epochs=0", "tune=null"]
    exp = experiment(first.uri, "adopt.replace=[head]", *more)
    with Run(exp, face=Face(quiet=True)) as run:
        shards = run.shards(exp.data)
        start = run.adopt(exp.need("adopt"), data=shards)
        assert run.store.get(start.run_id).tags["vitlab.inputs"] == f"weights={first.uri}"
        run.finetune(exp.need("finetune"), data=shards, init=start)
    ours, theirs = (load_model(a.folder).model.state_dict() for a in (start, first))
    same = {name for name in ours if torch.equal(ours[name], theirs[name])}
    assert ours.keys() - same == {"head.weight"}  # either bias is zero


def test_a_run_by_the_first_letters_of_its_id(tmp_path: Path) -> None:
    first, _, _ = adopt(experiment(saved(tmp_path / "a.pth")))
    assert fetching.load(f"runs:/{first.run_id[:8]}/model").model.num_classes == 10
    for name in ("abc", "0123456789", "a'b%"):
        with pytest.raises(
            UserError, match=r"runs:/.*: no such run in this store; the id stands in"
        ) as error:
            fetching.load(f"runs:/{name}/model")
        assert "\n" not in str(error.value)


def test_a_model_folder_with_its_images(tmp_path: Path) -> None:
    model = create_model("torchvision", arch="regnet_y_400mf", in_chans=1, num_classes=10, image_size=8)
    labels = [str(n) for n in range(10)]
    folder = tmp_path / "model"
    save_model(model, folder, preprocess={"mean": [0.2], "std": [0.5]}, labels=labels)
    face = Heard()
    adopt(experiment(folder), face)
    assert any("images of mean [0.2]; give data.mean the same" in line for line in face.lines)
    (folder / "labels.json").write_text(json.dumps(labels[::-1]))
    with pytest.raises(
        UserError, match=r"these know 10 classes \(9, 8, 7 …\), the shards have 10 \(0, 1, 2 …\)"
    ):
        adopt(experiment(folder))


def test_a_head_is_covered_by_the_prefix_of_its_part(tmp_path: Path) -> None:
    """CoAtNet's head is `head.fc`."""
    sizes = "stem_width: 8, dims: [8, 16, 32, 32], depths: [1, 1, 1, 1], in_chans: 1"
    model = create_model("coatnet_0", num_classes=3, image_size=8, **yaml.safe_load(f"{{{sizes}}}"))
    save_model(model, tmp_path / "model", preprocess={}, labels=["a", "b", "c"])
    text = f"adopt={{model: {{name: coatnet_0, {sizes}}}, weights: '{tmp_path / 'model'}', replace: [head]}}"
    adopt(vitlab.read(TINY, [*ALONE, text]))


VIT = "name: vit_tiny, patch_size: 4, in_chans: 1, embed_dim: 32, depth: 1, num_heads: 2"


def encoder(weights: object, *more: str, classes: str = ", num_classes: 0") -> Experiment:
    return vitlab.read(TINY, [*ALONE, f"adopt={{model: {{{VIT}{classes}}}, weights: '{weights}'}}", *more])


def test_fresh_weights_are_those_of_the_seed() -> None:
    """What training starts from, with a head or without."""
    face = Heard()
    found, outcome, _ = adopt(encoder("fresh", classes=""), face)
    torch.manual_seed(3)
    wanted = create_model(**yaml.safe_load(f"{{{VIT}}}"), num_classes=10, image_size=8)
    state = load_model(found.folder).model.state_dict()
    assert outcome == "ran"
    assert all(torch.equal(state[name], tensor) for name, tensor in wanted.state_dict().items())
    assert any("untrained, drawn from seed 3" in line for line in face.lines)
    assert adopt(encoder("fresh", classes=""))[1] == "hit"
    other, ran, _ = adopt(encoder("fresh", "seed=4", classes=""))
    assert (ran, other.digest != found.digest) == ("ran", True)


def test_an_encoder_without_a_head() -> None:
    """Fresh, then adopted again by its address; a head in the weights is left out where that is said."""
    first, _, shards = adopt(encoder("fresh"))
    loaded = load_model(first.folder)
    assert (loaded.model.num_classes, loaded.labels) == (0, shards.classes)
    again, _, _ = adopt(encoder(first.uri))
    ours, theirs = (load_model(a.folder).model.state_dict() for a in (first, again))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    headed, _, _ = adopt(encoder("fresh", classes=""))
    with pytest.raises(UserError, match=r"has a head, which num_classes: 0 .*give adopt\.replace=\[head\]"):
        adopt(encoder(headed.uri))
    left, _, _ = adopt(encoder(headed.uri, "adopt.replace=[head]"))
    assert load_model(left.folder).model.state_dict().keys() == ours.keys()


# ---------------------------------------------------------------- what is refused


def test_another_number_of_classes(tmp_path: Path) -> None:
    file = saved(tmp_path / "thousand.pth", classes=1000)
    with pytest.raises(
        UserError, match=r"not one for the 10 classes of the shards; give adopt.replace=\[head\]"
    ):
        adopt(experiment(file))
    assert adopt(experiment(file, "adopt.replace=[head]"))[1] == "ran"


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"adopt\.weights: .*not the names of a Borrowed|do not fit") as error:
        adopt(experiment(saved(tmp_path / "a.pth"), arch="resnet18"))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"adopt\.weights: given .*/none\.pth; no such file or folder"):
        adopt(experiment(tmp_path / "none.pth"))


def test_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("Network is unreachable\nand more")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", offline)
    line = "but torchvision's weights of regnet_y_400mf cannot be had: Network is unreachable; give a file"
    with pytest.raises(UserError, match=line):
        adopt(experiment("hub"))


def test_the_hub_names_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = torch.load(saved(tmp_path / "a.pth"))
    known = {"mean": [0.485], "std": [0.229]}
    monkeypatch.setattr(adopting, "pretrained", lambda config, size: (state, known))
    exp, face = experiment("hub"), Heard()
    with Run(exp, face=face) as run:
        found = run.adopt(exp.need("adopt"), data=run.shards(exp.data))
        assert "regnet_y_400mf-" in adopting.published(exp.need("adopt").model)
        assert run.store.get(found.run_id).status == "FINISHED"
    assert any("images of std [0.229]" in line for line in face.lines)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("adopt.weights=", "adopt.weights"),
        ("adopt.model.in_chans=3", "adopt.model.in_chans: given 3; the images have data.channels=1"),
        ("adopt.model={name: vit_tiny, in_chans: 1}", "adopt.model.patch_size: given 16; it must divide"),
        ("adopt.more=1", "adopt.more"),
        ("adopt={model: {name: vit_tiny}, weights: fresh, part: a}", "part: given 'a'; fresh weights have"),
    ],
)
def test_refused_at_once(override: str, line: str) -> None:
    with pytest.raises(UserError) as error:
        experiment("weights.pth", override)
    assert line in str(error.value)
    with pytest.raises(UserError, match="given 'hub', which models of torchvision and timm have"):
        experiment("hub", "adopt.model={name: vit_tiny, patch_size: 4, in_chans: 1}")

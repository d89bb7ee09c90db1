"""Weights and models for other tools: timm's names, ONNX, a file of tensors.

What is written is read again and compared before it gets its name: an ONNX file by ONNX Runtime against
torch's own output, tensors bit by bit. onnx, onnxscript and onnxruntime are an extra
(`pip install vitlab[onnx]`) and enter by this file alone.

Letters: B samples, C channels.
"""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vitlab.config import UserError, nearest
from vitlab.models.features import Backbone
from vitlab.models.swin import Swin
from vitlab.models.weights import one_line, size

Format = Literal["onnx", "timm", "safetensors"]
NEEDS = ("onnx", "onnxscript", "onnxruntime")
LIKE_TIMM = ("ViT", "Swin", "CoAtNet")  # families whose names are timm's
SAME: dict[str, dict[str, Any]] = {  # timm computes nothing else under these names
    "CoAtNet": {"relative": "bias", "downsample": "timm"},
    "ViT": {"relative": "none", "key_bias": True},
}
OURS = ("mask_token",)  # of such a family, without a counterpart in timm
TOLERANCE = 1e-4  # of the largest number in the output
ALONE = 2**31 - 2**27  # bytes of weights that fit in one ONNX file, with room for the graph


class Written(NamedTuple):
    """A file that was written, its bytes (with what lies beside it), and the check's figure."""

    path: Path
    bytes: int
    difference: float  # the largest from the model, absolute


def export_model(model: Backbone, dest: Path, kind: Format) -> Written:
    """One file in the format `kind`; there must be none of that name."""
    if kind not in get_args(Format):
        raise UserError(
            f"format: given {kind!r}; allowed: {', '.join(get_args(Format))}{nearest(kind, get_args(Format))}"
        )
    if kind == "onnx":
        return export_onnx(model, dest)
    return _save(export_timm(model) if kind == "timm" else model.state_dict(), dest)


# ---------------------------------------------------------------- tensors


def export_timm(model: Backbone) -> dict[str, Tensor]:
    """The weights under timm's names, for `load_state_dict` of timm's model of the same sizes.

    timm has no mask token and always takes the mean of a distilled model's two heads. Where the tensors would
    fit but timm would compute something else with them, nothing is exported.
    """
    family = type(model).__name__
    if family not in LIKE_TIMM:
        raise UserError(f"no names of timm for a {family}; formats for it: onnx, safetensors")
    combine = getattr(model.config, "combine", "mean")
    if combine != "mean":
        raise UserError(f"timm takes the mean of both heads, the model has combine: {combine}; export onnx")
    for key, same in SAME.get(family, {}).items():
        given = getattr(model.config, key)
        if given != same:
            raise UserError(f"timm computes {key}: {same}, the model has {given}; export onnx")
    if isinstance(model, Swin) and not model.same_in_timm():
        raise UserError(
            "timm pads after the shift, and shifts along a side even if a window spans the other; the model "
            "has padding: official and windows that do not divide a stage's sides or span one; export onnx"
        )
    return {name: value for name, value in model.state_dict().items() if name not in OURS}


def _save(state: dict[str, Tensor], dest: Path) -> Written:
    _refuse(dest, ".safetensors")
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in state.items()}
    with tempfile.TemporaryDirectory(dir=_folder(dest)) as scratch:
        file = Path(scratch) / dest.name
        save_file(tensors, file, {"format": "pt"})  # the mark that other libraries ask for
        found = load_file(file)
        if found.keys() != tensors.keys() or not all(torch.equal(found[n], t) for n, t in tensors.items()):
            raise UserError(f"{dest}: reads otherwise than it was written; nothing is left, try another disk")
        return _publish(file, dest, 0.0)


# ---------------------------------------------------------------- ONNX


def export_onnx(model: Backbone, path: Path, *, batch: int | None = None) -> Written:
    """Images → logits in evaluation mode; any number of images, or always `batch`."""
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"onnx: {', '.join(missing)} not installed; pip install 'vitlab[onnx]'")
    if batch is not None and batch < 1:
        raise UserError(f"batch: given {batch}; allowed: 1 or more, or none for any number")
    _refuse(path, ".onnx")
    training = model.training
    try:
        with tempfile.TemporaryDirectory(dir=_folder(path)) as scratch, torch.no_grad():
            file = Path(scratch) / path.name
            _trace(model.eval(), file, batch)
            difference = max(_difference(model, file, n) for n in ([batch] if batch else [1, 3]))
            return _publish(file, path, difference)
    finally:
        model.train(training)


def _images(model: Backbone, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    images = torch.randn(count, model.config.in_chans, *model.image_size, generator=generator)
    return images.to(next(model.parameters()))


def _trace(model: Backbone, file: Path, batch: int | None) -> None:
    weights = sum(value.nbytes for value in model.state_dict().values())
    images = _images(model, batch or 2)  # 2: torch takes a 1 for a fixed number
    sizes = None if batch else {"images": {0: torch.export.Dim("batch", min=1)}}
    program = torch.export.export(model, (images,), dynamic_shapes=sizes)
    torch.onnx.export(
        program,
        (),
        file,
        dynamo=True,
        verbose=False,
        input_names=["images"],
        output_names=["logits"],
        external_data=weights > ALONE,
    )


def _difference(model: Backbone, file: Path, count: int) -> float:
    """Largest absolute difference between ONNX Runtime's output and torch's, which must be small."""
    images = _images(model, count)
    expected = model(images).cpu()
    found = _run(file, images)
    if found.shape != expected.shape:
        raise UserError(
            f"{file.name}: gives {size(found)}, the model {size(expected)}; nothing is left of it"
        )
    difference = float((found - expected).abs().max())
    limit = TOLERANCE * float(expected.abs().max()) + 1e-6
    if not difference <= limit:  # so that NaN fails
        raise UserError(
            f"{file.name}: ONNX Runtime's output differs from the model's by {difference:.2g}, allowed: "
            f"{limit:.2g}; nothing is left of it"
        )
    return difference


def _run(file: Path, images: Tensor) -> Tensor:
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        return torch.from_numpy(session.run(None, {"images": images.cpu().numpy()})[0])
    except Exception as error:  # onnxruntime has a dozen kinds without a common base
        raise UserError(
            f"{file.name}: ONNX Runtime refuses {len(images)} images: {one_line(error)}; nothing is left"
        ) from None


# ---------------------------------------------------------------- files


def _refuse(dest: Path, suffix: str) -> None:
    if dest.suffix != suffix:
        raise UserError(
            f"{dest}: expected a name that ends with {suffix}, as {dest.with_suffix(suffix).name}"
        )
    if dest.exists():
        raise UserError(f"{dest}: there is one already; remove it, or name another")


def _folder(dest: Path) -> Path:
    dest.parent.mkdir(parents=True, exist_ok=True)
    return dest.parent


def _publish(file: Path, dest: Path, difference: float) -> Written:
    """From the scratch folder to where it belongs, with the weights of a large ONNX model beside it."""
    parts = sorted(file.parent.iterdir(), key=lambda part: part == file)  # itself last
    total = sum(part.stat().st_size for part in parts)
    for part in parts:
        part.replace(dest.parent / part.name)
    return Written(dest, total, difference)

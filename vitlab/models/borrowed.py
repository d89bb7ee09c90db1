"""Any classifier of torchvision or timm as a `Backbone`, by the name that it has there.

`{name: torchvision, arch: regnet_y_400mf}` or `{name: timm, arch: regnety_160}`: a teacher, or a model to
train. timm is an extra (`pip install vitlab[timm]`) and enters by this file alone.

The net is cut in two: `net` ends with what its last dense layer reads, `head` is that layer. So tensors are
named `net.…` and `head.…`; layouts/borrowed.py brings a plain state dict of either library there. A net
whose last layer is not dense is refused.

Departures from the libraries' nets:
- batch normalisation is this project's (norm.py), over the samples of all workers; its tensors keep
  their names. A net with another kind, as BatchNorm1d, is refused.
- dropout and stochastic depth are off in training as well: the libraries draw them from torch's own
  generator, here all randomness of a sample comes from its seed.
- auxiliary classifiers (GoogLeNet, Inception v3) are left out, and so is their change of the colours: their
  published weights want images with `mean` and `std` 0.5.
- with other than 3 channels, torchvision's first convolution is another one, initialised as torch does it.
- activation checkpointing leaves these nets alone; the libraries have no blocks in common to run again.

Layers are numbered by the net's children in their order; one that holds more than half of all numbers is
taken apart into its own. What a net reads across modules (torchvision's attention reads the weights
of its dense layers) is its own affair: the convolutional nets suit ZeRO-3.

Letters: B samples, C channels, D what the head reads.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from vitlab.config import UserError, nearest
from vitlab.models.features import Backbone, BackboneConfig, Features, Size
from vitlab.models.parts.listening import are_maps, listening, stages
from vitlab.models.parts.norm import BatchNorm2d

PRESETS: dict[str, dict[str, Any]] = {"torchvision": {}, "timm": {}}  # the sizes are in `arch`
STRIDE = 32  # pixels of the image for one place of the last map, in nearly all of these nets
RATES = ("p", "drop_prob", "drop_rate", "dropout", "attention_dropout")  # of randomness, in either library
SHOWN = 5  # names in a message


class BorrowedConfig(BackboneConfig):
    presets = PRESETS
    batch_norm = True  # of most of them

    name: Literal["torchvision", "timm"]
    arch: str = Field(min_length=1)  # the library's own name

    @model_validator(mode="after")
    def _known(self) -> BorrowedConfig:
        names = architectures(self.name)
        if self.arch not in names and self.arch.partition(".")[0] not in names:
            hint = nearest(self.arch, names) or f"; for example {', '.join(names[:SHOWN])}"
            raise ValueError(f"arch: given '{self.arch}', no classifier of {self.name}{hint}")
        return self

    def grid(self, image_size: Size) -> Size:
        """Of the last map; whether the net takes the size, only the net can say."""
        height, width = image_size
        if min(height, width) < 1:
            raise UserError(f"image_size: given {height}×{width}; allowed: 1 or more")
        return -(-height // STRIDE), -(-width // STRIDE)


class NormAct(BatchNorm2d):
    """timm's normalisation with an activation behind it."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (the name nn.BatchNorm2d gives it)
        out: Tensor = self.act(self.drop(super().forward(input)))
        return out


class Borrowed(Backbone):
    """Images B C height width → logits, or the `Features` that were wanted.

    `layers` are the last map of each resolution among what the parts of the net give, those that `layer_of`
    counts. A net whose parts give tokens, or maps with their channels at the end, has none.
    """

    gives = frozenset({"logits", "pooled"})
    layered = True
    config: BorrowedConfig

    def __init__(self, config: BorrowedConfig, num_classes: int, image_size: int | Size) -> None:
        super().__init__(config, num_classes, image_size)
        self.net = _build(config, num_classes, self.image_size)
        self.classifier = _classifier(self.net, config.arch)  # where the library has the head
        self.head: nn.Module = self.net.get_submodule(self.classifier)
        self.net.set_submodule(self.classifier, nn.Identity())
        self._layers = _layers(self.net)
        self._try()
        if not num_classes:
            self.head = nn.Identity()

    def _try(self) -> None:
        """One line, at no cost, for a size that the net cannot take or a net that goes on after its head."""
        config, size = self.config, "×".join(str(side) for side in self.image_size)
        named = [*self.net.named_parameters(), *self.net.named_buffers()]
        empty = {name: torch.empty_like(tensor, device="meta") for name, tensor in named}
        images = torch.empty(2, config.in_chans, *self.image_size, device="meta")
        maps: list[Tensor] = []
        try:
            with listening(self.net, self._layers, maps):
                out = functional_call(self.net.eval(), empty, (images,))
        except Exception as error:  # each net fails in its own way
            line = _line(error)
            raise UserError(f"image_size: given {size}, which {config.arch} cannot take: {line}") from None
        assert isinstance(self.head, nn.Linear)
        if not isinstance(out, Tensor) or out.shape != (2, self.head.in_features):
            raise UserError(f"arch: given '{config.arch}', which does more after its last dense layer")
        if are_maps(maps, images):
            self.gives = self.gives | {"layers"}
        self.net.train()

    def compute(
        self,
        images: Tensor,
        want: frozenset[str],
        keep: Tensor | None,
        mask: Tensor | None,
        seeds: Tensor | None,
    ) -> Tensor | Features:
        """`seeds` change nothing: these nets have no randomness left."""
        maps: list[Tensor] = []
        if "layers" in want:
            with listening(self.net, self._layers, maps):
                pooled = self.net(images)
        else:
            pooled = self.net(images)
        found: dict[str, Any] = {"pooled": pooled, "layers": stages(maps)}
        if not want or "logits" in want:
            found["logits"] = self.head(pooled)
        if not want:
            logits: Tensor = found["logits"]
            return logits
        return Features(**{name: found[name] for name in want})

    @property
    def num_layers(self) -> int:
        return len(self._layers) + 1

    def layer_of(self, name: str) -> int:
        """The net's own tensors (a class token) are at the image; children count up; the head is last."""
        first, _, rest = name.partition(".")
        if first == "head":
            return len(self._layers)
        return next((i for i, part in enumerate(self._layers) if rest.startswith(f"{part}.")), 0)

    def no_decay(self) -> set[str]:
        return set()


# ---------------------------------------------------------------- the libraries


def architectures(library: str) -> list[str]:
    """The names of a library's classifiers."""
    if library == "torchvision":
        from torchvision import models

        return list(models.list_models(module=models))
    return list(_timm().list_models())


def _timm() -> Any:
    try:
        import timm
    except ImportError:
        raise UserError(
            "model.name: given 'timm', which is not installed; pip install vitlab[timm]"
        ) from None
    return timm


def _build(config: BorrowedConfig, num_classes: int, image_size: Size) -> nn.Module:
    """The library's net with our normalisation and without randomness."""
    build = _from_torchvision if config.name == "torchvision" else _from_timm
    try:
        with torch.device("cpu"):  # some of them read numbers off tensors while they are built
            net = build(config, num_classes or 1, image_size)
    except UserError:
        raise
    except Exception as error:  # each net fails in its own way
        given = "×".join(str(side) for side in image_size)
        raise UserError(f"arch: {config.arch} cannot be made for images of {given}: {_line(error)}") from None
    _convert(net, config.arch)
    _still(net)
    return net.to(torch.get_default_device())


def _from_torchvision(config: BorrowedConfig, num_classes: int, image_size: Size) -> nn.Module:
    from torchvision import models

    more: dict[str, Any] = {}
    if config.arch.startswith("vit_"):
        if image_size[0] != image_size[1]:
            raise UserError(f"image_size: torchvision's {config.arch} takes square images")
        more["image_size"] = image_size[0]
    if config.arch.startswith("maxvit"):
        more["input_size"] = image_size
    if config.arch in ("googlenet", "inception_v3"):
        more |= {"aux_logits": False, "init_weights": True}
    net: nn.Module = models.get_model(config.arch, weights=None, num_classes=num_classes, **more)
    if config.in_chans != 3:
        _other_channels(net, config.in_chans)
    return net


def _other_channels(net: nn.Module, in_chans: int) -> None:
    name, old = next((n, m) for n, m in net.named_modules() if isinstance(m, nn.Conv2d))
    new = nn.Conv2d(
        in_chans,
        old.out_channels,
        old.kernel_size,  # type: ignore[arg-type]
        old.stride,  # type: ignore[arg-type]
        old.padding,  # type: ignore[arg-type]
        bias=old.bias is not None,
    )
    net.set_submodule(name, new)


def _from_timm(config: BorrowedConfig, num_classes: int, image_size: Size) -> nn.Module:
    net: nn.Module = _timm().create_model(
        config.arch, num_classes=num_classes, **_of_timm(config, image_size)
    )
    return net


def _of_timm(config: BorrowedConfig, image_size: Size) -> dict[str, Any]:
    known = _timm().get_pretrained_cfg(config.arch)
    more = {"img_size": image_size} if known is not None and known.fixed_input_size else {}
    return {"in_chans": config.in_chans, **more}


# ---------------------------------------------------------------- the libraries' own weights


def published(config: BorrowedConfig) -> str:
    """What names the weights that `pretrained` would fetch; nothing is fetched for it."""
    if config.name == "torchvision":
        from torchvision import models

        return str(models.get_model_weights(config.arch).DEFAULT.url)
    known = _timm().get_pretrained_cfg(config.arch)
    if known is None or not known.has_weights:
        raise UserError(f"weights: given 'hub', but timm has no weights of {config.arch}; give a file")
    return f"{known.hf_hub_id or known.url}.{known.tag}"


def pretrained(config: BorrowedConfig, image_size: Size) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The library's own weights, from the network or its cache, and the `mean` and `std` of their images."""
    try:
        if config.name == "torchvision":
            return _torchvision_weights(config.arch)
        net = _timm().create_model(config.arch, pretrained=True, **_of_timm(config, image_size))
        return net.state_dict(), {name: list(net.pretrained_cfg[name]) for name in ("mean", "std")}
    except Exception as error:  # the libraries fail in many ways without a network
        raise UserError(
            f"weights: given 'hub', but {config.name}'s weights of {config.arch} cannot be had: "
            f"{_line(error)}; give a file, or a machine with a network"
        ) from None


def _torchvision_weights(arch: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from torchvision import models

    weights = models.get_model_weights(arch).DEFAULT
    made = weights.transforms()
    state = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    return state, {"mean": list(made.mean), "std": list(made.std)}


# ---------------------------------------------------------------- changes to a net


def _convert(net: nn.Module, arch: str) -> None:
    """Every batch normalisation becomes ours, with the tensors that it has."""
    for name, old in list(net.named_modules()):
        if isinstance(old, _BatchNorm) and not isinstance(old, BatchNorm2d):
            net.set_submodule(name, _ours(old, arch))


def _ours(old: _BatchNorm, arch: str) -> BatchNorm2d:
    plain, acts = type(old) is nn.BatchNorm2d, {"drop", "act"} <= dict(old.named_children()).keys()
    if not (plain or (isinstance(old, nn.BatchNorm2d) and acts)):
        given = type(old).__name__
        raise UserError(
            f"arch: given '{arch}', which normalises by {given}; allowed: nets with BatchNorm2d alone"
        )
    kind = BatchNorm2d if plain else NormAct
    new: BatchNorm2d = kind(old.num_features, old.eps, old.momentum, old.affine, old.track_running_stats)
    for child, module in old.named_children():
        new.add_module(child, module)
    new.weight, new.bias = old.weight, old.bias
    new.running_mean, new.running_var = old.running_mean, old.running_var
    new.num_batches_tracked = old.num_batches_tracked
    return new


def _still(net: nn.Module) -> None:
    """No dropout, no stochastic depth."""
    for module in net.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        for name in RATES:
            known = name != "p" or type(module).__name__ == "StochasticDepth"
            if known and isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def _classifier(net: nn.Module, arch: str) -> str:
    """The name of the last dense layer."""
    said = (getattr(net, "pretrained_cfg", None) or {}).get("classifier")
    last = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)][-1:]
    name = said if isinstance(said, str) else last[0] if last and said is None else None
    if name is None or not isinstance(net.get_submodule(name), nn.Linear):
        raise UserError(f"arch: given '{arch}', whose last layer is not one dense layer; allowed: others")
    return name


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _layers(net: nn.Module) -> list[str]:
    """Names of the net's parts, from the image up."""
    total = sum(p.numel() for p in net.parameters())

    def parts(module: nn.Module, prefix: str) -> list[str]:
        children = [
            (f"{prefix}{n}", m) for n, m in module.named_children() if any(True for _ in m.parameters())
        ]
        found: list[str] = []
        for name, child in children:
            inner = parts(child, f"{name}.") if 2 * sum(p.numel() for p in child.parameters()) > total else []
            found += inner or [name]
        return found

    return parts(net, "")

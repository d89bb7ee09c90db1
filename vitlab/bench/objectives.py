"""Pairs of objectives: the step of a method of ours beside the same step made of a peer's building blocks.

lightly has blocks for MAE, SimMIM, DINO and MSN (siamese.py); they are joined as its own examples join them.
For DeiT's distillation the peer is timm's student and teacher under torch's losses, for BEiT transformers'
model. Both sides draw the same masks from the same numbers, cut the same views out of the images, and move
their teachers: `follow` is what a step does after the optimizer.

What had to be made equal: lightly's encoder resamples positions without antialiasing (its default has it);
BEiT's visual words are given to both sides, so no tokenizer runs.

Letters: B samples, N patches, M hidden ones.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlab.batch import Batch, uniform
from vitlab.bench.peers import CLASSES, Pair, needs
from vitlab.engine.compiling import prepare
from vitlab.engine.strategy import move
from vitlab.methods import (
    BEiT,
    BEiTConfig,
    DistillConfig,
    MAEConfig,
    Method,
    SimMIMConfig,
    create_method,
)
from vitlab.methods.masks import block_mask
from vitlab.models import Backbone, create_model, load_weights

WIDTH = 384  # of a small ViT
VIT = "vit_small_patch16_224"
TEACHER = "regnety_016"  # of the family of DeiT's own


class Ours(nn.Module):
    """A method as the loop has it: its loss over the batch's weight, its averages, its statistics."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = method
        self.sizes = [view.size for view in method.views()]

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        ones, keys = images.new_ones(len(images)), [""] * len(images)
        batch = Batch(cut_views(images, self.sizes), labels, ones, seeds_of(images), keys)
        weight = self.method.weigh(batch)
        loss: Tensor = self.method(batch).loss / weight
        return loss

    def follow(self) -> None:
        for average in self.method.all_averages():
            move(average)
        self.method.after_step()

    def compile(self, *inputs: Any, **options: Any) -> None:
        """What the engine compiles."""
        prepare(self.method.model, recompute=False, compile=True)


def cut_views(images: Tensor, sizes: list[int]) -> list[Tensor]:
    """Views without any augmentation: every second is mirrored, small ones come from different places."""
    views = []
    for i, size in enumerate(sizes):
        first = 8 * i % (images.shape[-1] - size + 1)
        part = images[..., first : first + size, first : first + size]
        views.append(part.flip(-1) if i % 2 else part)
    return views


def seeds_of(images: Tensor) -> Tensor:
    return torch.arange(len(images), device=images.device)


def by_noise(images: Tensor, count: int, purpose: str = "mask") -> Tensor:
    """B N: patches by their noise."""
    return uniform(seeds_of(images), purpose, count).argsort(dim=1, stable=True)


def lightly() -> tuple[Any, Any, Any]:
    """Its modules, its losses, its functions."""
    needs("lightly")
    return tuple(import_module(f"lightly.{name}") for name in ("models.modules", "loss", "models.utils"))  # type: ignore[return-value]


def encoder(image_size: int, positions: str = "skip") -> Any:
    """timm's ViT-S in lightly's wrapping; its mask token is not zero, so that it shows."""
    timm, (modules, _, _) = needs("timm"), lightly()
    vit = timm.create_model(VIT, num_classes=0, img_size=image_size, dynamic_img_size=positions == "skip")
    made = modules.MaskedVisionTransformerTIMM(
        vit, weight_initialization="skip", antialias=False, pos_embed_initialization=positions
    )
    nn.init.normal_(made.mask_token, std=0.02)
    return made


def versions(*packages: str) -> str:
    return ", ".join(f"{name} {needs(name).__version__}" for name in packages)


# ---------------------------------------------------------------- painting what is hidden


class LightlyMAE(nn.Module):
    """A mask token in every hidden place, a decoder over all places, the hidden ones painted."""

    def __init__(self, image_size: int, visible: int) -> None:
        super().__init__()
        modules, _, self.utils = lightly()
        self.backbone, self.visible = encoder(image_size, "sincos"), visible
        patches = self.backbone.vit.patch_embed.num_patches
        self.decoder_embed = nn.Linear(WIDTH, 256)
        self.decoder = modules.MaskedVisionTransformerDecoderTIMM(patches, 256, depth=8, num_heads=8)
        self.prediction = nn.Linear(256, 16 * 16 * 3)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        utils, places = self.utils, self.backbone.sequence_length
        order = F.pad(by_noise(images, places - 1) + 1, (1, 0))  # the class token is visible
        keep, hidden = order[:, : self.visible + 1], order[:, self.visible + 1 :]
        seen = self.decoder_embed(self.backbone.encode(images, idx_keep=keep))
        unseen = utils.repeat_token(self.decoder.mask_token, (len(images), places))
        decoded = self.decoder(utils.set_at_index(unseen, keep, seen.type_as(unseen)))
        painted = self.prediction(utils.get_at_index(decoded, hidden))
        target = utils.get_at_index(utils.patchify(images, 16), hidden - 1)
        return F.mse_loss(painted, utils.normalize_mean_var(target))


def mae_lightly(image_size: int) -> Pair:
    """A decoder of the paper's half width; targets are normalised patch by patch."""
    model = create_model("vit_small", num_classes=0, image_size=image_size, positions="sincos", init="mae")
    config = MAEConfig(decoder_dim=256, decoder_depth=8, decoder_heads=8)
    ours: Any = create_method(config, model)
    theirs = LightlyMAE(image_size, ours.visible)
    load_weights(model, theirs.backbone.vit.state_dict())
    decoder = theirs.decoder.state_dict()
    named = {f"decoder_{n}": t for n, t in decoder.items() if n.startswith(("blocks.", "norm."))}
    named |= {"mask_token": decoder["mask_token"], "decoder_pos_embed": decoder["pos_embed"]}
    named |= {f"decoder_embed.{n}": t for n, t in theirs.decoder_embed.state_dict().items()}
    named |= {f"decoder_pred.{n}": t for n, t in theirs.prediction.state_dict().items()}
    _load(ours, named, "decoder_", "mask_token")
    return Pair(versions("lightly", "timm"), Ours(ours), theirs)


class LightlySimMIM(nn.Module):
    """The encoder sees mask tokens; a dense layer paints the hidden patches."""

    def __init__(self, image_size: int, units: int, hidden: int) -> None:
        super().__init__()
        _, _, self.utils = lightly()
        self.backbone, self.units, self.hidden = encoder(image_size), units, hidden
        self.decoder = nn.Linear(WIDTH, 16 * 16 * 3)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        where = self._hidden(images)
        tokens = self.utils.get_at_index(self.backbone.encode(images, idx_mask=where), where)
        target = self.utils.get_at_index(self.utils.patchify(images, 16), where - 1)
        return F.l1_loss(self.decoder(tokens), target)

    def _hidden(self, images: Tensor) -> Tensor:
        """B M: places of hidden patches, of whole units."""
        side = images.shape[-1] // 16
        units = by_noise(images, self.units**2)[:, : self.hidden]
        mask = torch.zeros(len(images), self.units**2, dtype=torch.bool, device=images.device)
        mask = mask.scatter(1, units, value=True).view(-1, self.units, self.units)
        mask = mask.repeat_interleave(side // self.units, 1).repeat_interleave(side // self.units, 2)
        return mask.flatten(1).nonzero()[:, 1].view(len(images), -1) + 1


def simmim_lightly(image_size: int) -> Pair:
    """The paper's mask: units of about a sixth of the side, six of ten hidden."""
    model = create_model("vit_small", num_classes=0, image_size=image_size, mask_token=True)
    ours: Any = create_method(SimMIMConfig(), model)
    theirs = LightlySimMIM(image_size, ours.units, ours.hidden)
    load_weights(model, theirs.backbone.vit.state_dict() | {"mask_token": theirs.backbone.mask_token.data})
    named = (
        theirs.decoder.state_dict()
    )  # rows of pixels with their channels side by side; ours: channels first
    painted = {n: t.view(256, 3, -1).transpose(0, 1).reshape(768, -1) for n, t in named.items()}
    ours.decoder[0].weight.data.copy_(painted["weight"][..., None, None])
    ours.decoder[0].bias.data.copy_(painted["bias"].flatten())
    return Pair(versions("lightly", "timm"), Ours(ours), theirs)


# ---------------------------------------------------------------- a teacher, a tokenizer


class TimmDistill(nn.Module):
    """DeiT's own loss: half of the labels, half of the teacher."""

    def __init__(self, student: Any, teacher: nn.Module, config: DistillConfig) -> None:
        super().__init__()
        self.student, self.config = student, config
        self.student.set_distilled_training(True)
        self.teacher = teacher.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> TimmDistill:
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            taught = self.teacher(images)
        by_label, by_teacher = self.student(images)
        alpha, t = self.config.alpha, self.config.temperature
        if self.config.kind == "hard":
            distance = F.cross_entropy(by_teacher, taught.argmax(dim=1))
        else:
            logs = [F.log_softmax(logits / t, dim=1) for logits in (by_teacher, taught)]
            apart = F.kl_div(logs[0], logs[1], reduction="sum", log_target=True)
            distance = apart * t * t / by_teacher.numel()
        return (1 - alpha) * F.cross_entropy(by_label, labels) + alpha * distance


def distill_timm(kind: str, image_size: int) -> Pair:
    """DeiT-S with its token under a RegNetY."""
    timm = needs("timm")
    student = timm.create_model("deit_small_distilled_patch16_224", num_classes=CLASSES, img_size=image_size)
    teacher = timm.create_model(TEACHER, num_classes=CLASSES)
    config = DistillConfig.model_validate({"kind": kind})
    model = create_model("deit_small", num_classes=CLASSES, image_size=image_size)
    guide = create_model("timm", num_classes=CLASSES, image_size=image_size, arch=TEACHER)
    load_weights(model, student.state_dict())
    load_weights(guide, teacher.state_dict())
    ours = create_method(config, model, teacher=guide)
    return Pair(versions("timm"), Ours(ours), TimmDistill(student, teacher, config))


class GivenWords(BEiT):
    """BEiT without its tokenizer at work."""

    def _words(self, batch: Batch) -> Tensor:
        return words(batch.views[0], self.tokenizer.config.vocab)


def words(images: Tensor, vocab: int) -> Tensor:
    """B N, from the samples' own numbers."""
    return (uniform(seeds_of(images), "words", (images.shape[-1] // 16) ** 2) * vocab).long()


class TransformersBEiT(nn.Module):
    def __init__(self, model: Any, config: BEiTConfig) -> None:
        super().__init__()
        self.model, self.config = model, config

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        side, config = images.shape[-1] // 16, self.config
        most, least = config.hidden(side**2), config.least(side**2)
        mask = block_mask(seeds_of(images), (side, side), most, least, config.min_aspect)
        named = words(images, self.model.config.vocab_size)[mask]
        loss: Tensor = self.model(images, bool_masked_pos=mask, labels=named).loss
        return loss


def beit_transformers(image_size: int) -> Pair:
    """A small encoder with BEiT's shared table of distances and 8192 words."""
    transformers, config = needs("transformers"), BEiTConfig()
    sizes = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536}
    how = {"use_mask_token": True, "use_shared_relative_position_bias": True, "drop_path_rate": 0.0}
    peer = transformers.BeitForMaskedImageModeling(
        transformers.BeitConfig(**sizes, **how, image_size=image_size, layer_norm_eps=1e-6)
    )
    for name, value in peer.named_parameters():
        if name.endswith(("_token", "_table")):  # they begin at zero and would not show
            nn.init.normal_(value, std=0.02)
    shape = {"relative": "shared", "positions": "none", "init_values": 0.1, "key_bias": False}
    model = create_model("vit_small", num_classes=0, image_size=image_size, mask_token=True, **shape)
    state = peer.state_dict()
    load_weights(model, {n: t for n, t in state.items() if not n.startswith("lm_head.")})
    ours = GivenWords(config, model, image_size, _tokenizer(image_size))  # type: ignore[arg-type]
    _load(ours, {n: t for n, t in state.items() if n.startswith("lm_head.")}, "lm_head.")
    return Pair(versions("transformers"), Ours(ours), TransformersBEiT(peer, config))


def _tokenizer(image_size: int) -> Backbone:
    """The smallest with DALL-E's words: it only tells how many there are."""
    return create_model("dvae", num_classes=0, image_size=image_size // 2, n_hid=4, n_init=1, blocks=1)


def _load(method: nn.Module, named: dict[str, Tensor], *prefixes: str) -> None:
    """Tensors under these prefixes, every one of them."""
    found = method.load_state_dict(named, strict=False)
    missing = [name for name in found.missing_keys if name.startswith(prefixes)]
    assert not missing, f"not in the peer: {missing}"
    assert not found.unexpected_keys, f"not here: {found.unexpected_keys}"

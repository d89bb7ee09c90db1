"""The `augment` section of an experiment: what happens to training images, whole or view by view.

A preset holds what the authors' code does to the images of its method:

  mae     Masked autoencoders (arXiv 2111.06377), main_pretrain.py
  simmim  SimMIM (2111.09886), data/data_simmim.py
  beit    BEiT (2106.08254), datasets.py: no hue; its jitter comes before the crop, here all colours follow it
  deit    DeiT (2012.12877), main.py: timm's rand-m9-mstd0.5-inc1, random erasing, Mixup and CutMix
  dino    DINO (2104.14294), main_dino.py: crops of its command line, (0.4, 1) and (0.05, 0.4)
  msn     Masked Siamese networks (2204.07141), src/data_manager.py: colours at the strength of its
          configs, 0.5

Keys beside the name win over the preset's; `views` of both are merged key by key, and for a view its changes
win over the keys that all views have.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from vitlab.batch import View
from vitlab.config import Config, UserError, build

Range = Annotated[list[float], Field(min_length=2, max_length=2)]
Share = Annotated[float, Field(ge=0, le=1)]  # a probability
Jitter = Annotated[list[Annotated[float, Field(ge=0)]], Field(min_length=4, max_length=4)]
Changes = dict[str, dict[str, Any]]  # view → key → value


class RandAugmentConfig(Config):
    """Some of fifteen operations, drawn anew for every image (Cubuk et al. 2019, 1909.13719), as in timm."""

    magnitude: float = Field(default=9.0, ge=0, le=10)
    ops: int = Field(default=2, ge=1)  # how many of the operations, one after another
    noise: float = Field(default=0.5, ge=0)  # spread of an operation's magnitude
    prob: Share = 0.5  # of each drawn operation


class ViewRecipe(Config):
    """What happens to one view, in this order. Without anything: resize and centre crop."""

    crop_scale: Range | None = None  # area of a random crop, from and to, as fractions of the image
    crop_ratio: Range = Field([3 / 4, 4 / 3])  # its width over its height (Szegedy et al. 2014, 1409.4842)
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"  # of the crop
    pad: int = Field(default=0, ge=0)  # shift by up to so many pixels, zeros move in
    flip: bool = False  # left and right, every second time
    rotate: float = Field(default=0.0, ge=0, le=180)  # by up to so many degrees either way
    zoom: float = Field(default=0.0, ge=0, lt=1)  # larger or smaller by up to this fraction
    rand_augment: RandAugmentConfig | None = None
    jitter: Jitter | None = None  # brightness, contrast, saturation, hue, in a random order
    jitter_prob: Share = 1.0
    grey: Share = 0.0
    blur: Share = 0.0
    blur_sigma: Range = Field([0.1, 2.0])  # in pixels of images of 224
    solarize: Share = 0.0  # values from 128 on are turned over
    erase: Share = 0.0  # a rectangle becomes noise (Zhong et al. 2017, arXiv 1708.04896)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.crop_scale is not None and not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(
                f"crop_scale: given {self.crop_scale}; allowed: [low, high] with 0 < low <= high <= 1"
            )
        for name, (low, high) in (("crop_ratio", self.crop_ratio), ("blur_sigma", self.blur_sigma)):
            if not 0 < low <= high:
                raise ValueError(f"{name}: given {[low, high]}; allowed: [low, high] with 0 < low <= high")
        if self.jitter is not None and self.jitter[3] > 0.5:
            raise ValueError(f"jitter: given {self.jitter}; allowed: a hue, the last, of at most 0.5")
        return self

    @property
    def flips_last(self) -> bool:
        """Whether no pixel moves after the flip: it may then come as late as one likes."""
        return self.flip and not (self.rotate or self.zoom)


PLAIN: dict[str, Any] = {"jitter": None, "grey": 0.0, "blur": 0.0, "solarize": 0.0, "erase": 0.0}  # all off
PRESETS: dict[str, dict[str, Any]] = {
    "none": {},
    "mae": {"crop_scale": [0.2, 1.0], "interpolation": "bicubic", "flip": True},
    "simmim": {"crop_scale": [0.67, 1.0], "flip": True},
    "beit": {
        "crop_scale": [0.08, 1.0],
        "interpolation": "bicubic",
        "flip": True,
        "jitter": [0.4, 0.4, 0.4, 0.0],
    },
    "deit": {
        "crop_scale": [0.08, 1.0],
        "interpolation": "bicubic",
        "flip": True,
        "rand_augment": {},
        "erase": 0.25,
        "mixup": 0.8,
        "cutmix": 1.0,
    },
    "dino": {
        "crop_scale": [0.4, 1.0],
        "interpolation": "bicubic",
        "flip": True,
        "jitter": [0.4, 0.4, 0.2, 0.1],
        "jitter_prob": 0.8,
        "grey": 0.2,
        "blur": 0.5,
        "views": {
            "global/0": {"blur": 1.0},
            "global/1": {"blur": 0.1, "solarize": 0.2},
            "local": {"crop_scale": [0.05, 0.4]},
        },
    },
    "msn": {
        "crop_scale": [0.3, 1.0],
        "flip": True,
        "jitter": [0.4, 0.4, 0.4, 0.1],
        "jitter_prob": 0.8,
        "grey": 0.2,
        "blur": 0.5,
        "views": {"focal": {"crop_scale": [0.05, 0.3]}},
    },
}


class AugmentConfig(ViewRecipe):
    presets: ClassVar[dict[str, dict[str, Any]]] = PRESETS

    name: Literal["none", "mae", "simmim", "beit", "deit", "dino", "msn"] = "none"
    mixup: float = Field(default=0.0, ge=0)  # α of Beta(α, α); 0: never
    cutmix: float = Field(default=0.0, ge=0)
    mix_prob: Share = 1.0  # an image is mixed at all
    mix_switch: Share = 0.5  # CutMix rather than Mixup, where both are on
    on_device: bool = (
        False  # the loaders crop and turn, the device that trains does the rest, but RandAugment
    )
    views: Changes = Field({})  # changes for views by their name, or by what stands before its "/"

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        """The preset's values, so that a resolved config holds every one of them."""
        if not isinstance(data, dict):
            return data
        preset = PRESETS.get(str(data.get("name")), {})
        ours, given = preset.get("views", {}), data.get("views", {})
        if isinstance(given, dict) and all(isinstance(changes, dict) for changes in given.values()):
            given = {**ours, **{view: {**ours.get(view, {}), **new} for view, new in given.items()}}
        return {**preset, **data, "views": given}

    @model_validator(mode="after")
    def _views_fit(self) -> Self:
        for view, changes in self.views.items():
            try:
                self._changed(changes)
            except UserError as error:
                raise ValueError(f"views.{view}.{error}") from None
        return self

    @model_validator(mode="after")
    def _device_can(self) -> Self:
        """Else a view would be left without what it was to have."""
        everywhere = [("rand_augment", self.rand_augment)]
        single = [(f"views.{view}.rand_augment", c.get("rand_augment")) for view, c in self.views.items()]
        where = next((key for key, given in everywhere + single if given is not None), None)
        if self.on_device and where:
            raise ValueError(
                f"on_device: given true beside {where}, which only the loaders do; "
                f"allowed: one of the two; give {where}: null, or leave on_device out"
            )
        return self

    @property
    def mixes(self) -> bool:
        """Whether images are mixed of two."""
        return bool((self.mixup or self.cutmix) and self.mix_prob)

    @property
    def crops(self) -> bool:
        """Whether any view is a random part of the image."""
        return self.crop_scale is not None or any(map(_crops, self.views.values()))

    def for_view(self, view: View) -> ViewRecipe:
        """A view that draws as another has that one's changes too: else it would show something else."""
        changes: dict[str, Any] = {}
        for name in (view.draws, view.name):
            changes |= self.views.get(name.partition("/")[0], {}) | self.views.get(name, {})
        return self._changed(changes)

    def for_loader(self, view: View) -> ViewRecipe:
        """What is done to a view before it is in a batch: all of it, or only where each pixel goes."""
        recipe = self.for_view(view)
        if not self.on_device:
            return recipe
        return recipe.model_copy(update=PLAIN | ({"flip": False} if recipe.flips_last else {}))

    def for_device(self, view: View) -> ViewRecipe:
        """And after: the rest."""
        recipe = self.for_view(view)
        if not self.on_device:
            return ViewRecipe()
        painted = {name: getattr(recipe, name) for name in (*PLAIN, "jitter_prob", "blur_sigma")}
        return ViewRecipe(flip=recipe.flips_last, **painted)

    def unknown_views(self, views: list[str]) -> list[str]:
        """Names under `views` that are none of a method's views, but for what the preset has of itself."""
        known, preset = _names(views), PRESETS[self.name].get("views", {})
        return [n for n, changes in self.views.items() if n not in known and changes != preset.get(n)]

    def serves(self, views: list[str]) -> bool:
        """Whether the preset, if it tells views apart, has one of these."""
        return not (own := PRESETS[self.name].get("views")) or bool(_names(views) & own.keys())

    def _changed(self, changes: dict[str, Any]) -> ViewRecipe:
        return build(ViewRecipe, {name: getattr(self, name) for name in ViewRecipe.model_fields} | changes)


def _names(views: list[str]) -> set[str]:
    """What a view can be called: `global/0`, and with all of its kind `global`."""
    return {*views, *(name.partition("/")[0] for name in views)}


def _crops(changes: dict[str, Any]) -> bool:
    return changes.get("crop_scale") is not None

"""One small model a family, for the tests that every family goes through.

`SMALL`: a preset's name → its image size and the sizes that win over the preset's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from vitlab.models import FAMILIES, MODELS, Backbone, create_model


class Small(NamedTuple):
    image_size: int
    sizes: dict[str, Any]


PLAIN = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
SMALL: dict[str, Small] = {
    "vit_tiny": Small(16, PLAIN),
    "deit_tiny": Small(16, PLAIN),
    "cvt_13": Small(32, {"embed_dims": [8, 16, 16], "num_heads": [1, 2, 2], "depths": [1, 1, 2]}),
    "swin_tiny": Small(
        32, {"patch_size": 2, "embed_dim": 8, "depths": [2, 1, 2], "num_heads": [1, 2, 4], "window_size": 4}
    ),
    "cct_6_3x2": Small(16, {"embed_dim": 24, "depth": 2, "num_heads": 3, "mlp_ratio": 1.5}),
    "vit_lite_6_4": Small(16, {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}),
    "torchvision": Small(32, {"arch": "resnet18"}),
    "coatnet_0": Small(32, {"stem_width": 8, "dims": [8, 16, 32, 32], "depths": [1, 1, 1, 1]}),
}


def small(name: str, num_classes: int = 3, **more: Any) -> Backbone:
    image_size, sizes = SMALL[name]
    return create_model(name, num_classes=num_classes, image_size=image_size, **{**sizes, **more})


def families_without_one() -> set[str]:
    """Names of families that `SMALL` forgot."""
    return {family.__name__ for family in FAMILIES.values()} - {
        FAMILIES[MODELS[name]].__name__ for name in SMALL
    }

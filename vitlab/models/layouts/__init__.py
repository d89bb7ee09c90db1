"""Layouts of weights by the family of model that they are for."""

from __future__ import annotations

from vitlab.models.cvt import CvT
from vitlab.models.features import Backbone
from vitlab.models.layouts import cvt, vit
from vitlab.models.layouts.base import Layout
from vitlab.models.vit import ViT

LAYOUTS: dict[type[Backbone], tuple[Layout, ...]] = {
    ViT: vit.LAYOUTS,
    CvT: cvt.LAYOUTS,
}

__all__ = ["LAYOUTS", "Layout"]

"""Layouts of weights by the family of model that they are for."""

from __future__ import annotations

from vitlab.models.borrowed import Borrowed
from vitlab.models.coatnet import CoAtNet
from vitlab.models.compact import Compact
from vitlab.models.cvt import CvT
from vitlab.models.dvae import DVAE
from vitlab.models.features import Backbone
from vitlab.models.layouts import beit, borrowed, coatnet, compact, cvt, dvae, swin, vit
from vitlab.models.layouts.base import Layout
from vitlab.models.swin import Swin
from vitlab.models.vit import ViT

LAYOUTS: dict[type[Backbone], tuple[Layout, ...]] = {
    ViT: (*vit.LAYOUTS, *beit.LAYOUTS),
    CvT: cvt.LAYOUTS,
    Borrowed: borrowed.LAYOUTS,
    Swin: swin.LAYOUTS,
    Compact: compact.LAYOUTS,
    CoAtNet: coatnet.LAYOUTS,
    DVAE: dvae.LAYOUTS,
}

__all__ = ["LAYOUTS", "Layout"]

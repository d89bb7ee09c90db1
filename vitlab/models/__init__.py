"""Models by name: configs, presets, how one is built, and its weights in and out."""

from vitlab.models.borrowed import Borrowed, BorrowedConfig
from vitlab.models.coatnet import CoAtNet, CoAtNetConfig
from vitlab.models.compact import Compact, CompactConfig
from vitlab.models.cvt import CvT, CvTConfig
from vitlab.models.dvae import DVAE, DVAEConfig
from vitlab.models.export import Written, export_model, export_onnx, export_timm
from vitlab.models.families import FAMILIES, MODELS, TOKENIZERS, ModelConfig, create_model, from_config
from vitlab.models.features import Backbone, BackboneConfig, Features
from vitlab.models.load import load_weights
from vitlab.models.swin import Swin, SwinConfig
from vitlab.models.vit import ViT, ViTConfig
from vitlab.models.weights import Loaded, Report, load_model, load_state, save_model

__all__ = [
    "DVAE",
    "FAMILIES",
    "MODELS",
    "TOKENIZERS",
    "Backbone",
    "BackboneConfig",
    "Borrowed",
    "BorrowedConfig",
    "CoAtNet",
    "CoAtNetConfig",
    "Compact",
    "CompactConfig",
    "CvT",
    "CvTConfig",
    "DVAEConfig",
    "Features",
    "Loaded",
    "ModelConfig",
    "Report",
    "Swin",
    "SwinConfig",
    "ViT",
    "ViTConfig",
    "Written",
    "create_model",
    "export_model",
    "export_onnx",
    "export_timm",
    "from_config",
    "load_model",
    "load_state",
    "load_weights",
    "save_model",
]

"""Labelled images: written as shards of tars, read as batches that do not depend on who reads them."""

from vitlab.data.augment import eval_transform, train_transform
from vitlab.data.bad import check_bound, counts
from vitlab.data.blend import addresses, blend, open_sets, sets_of, training_order
from vitlab.data.decode import decode
from vitlab.data.hugging_face import hugging_face
from vitlab.data.index import ShardInfo, Shards, open_shards
from vitlab.data.indexing import index_existing
from vitlab.data.mixing import draw_lots, mixed
from vitlab.data.opening import absolute, open_source
from vitlab.data.order import Order, chosen, exact
from vitlab.data.pixels import arrays
from vitlab.data.preparing import prepare
from vitlab.data.read import ReadPlan, eval_batches, order_of, train_batches
from vitlab.data.recipes import AugmentConfig, RandAugmentConfig, ViewRecipe
from vitlab.data.remote import is_url, local_path
from vitlab.data.settings import Origin, ShardsConfig, WriteOptions, check_classes, normalisation
from vitlab.data.sources import Raw, Source, digits, folder, limited
from vitlab.data.statistics import examples
from vitlab.data.tars import Sample
from vitlab.data.write import write_shards

__all__ = [
    "AugmentConfig",
    "Order",
    "Origin",
    "RandAugmentConfig",
    "Raw",
    "ReadPlan",
    "Sample",
    "ShardInfo",
    "Shards",
    "ShardsConfig",
    "Source",
    "ViewRecipe",
    "WriteOptions",
    "absolute",
    "addresses",
    "arrays",
    "blend",
    "check_bound",
    "check_classes",
    "chosen",
    "counts",
    "decode",
    "digits",
    "draw_lots",
    "eval_batches",
    "eval_transform",
    "exact",
    "examples",
    "folder",
    "hugging_face",
    "index_existing",
    "is_url",
    "limited",
    "local_path",
    "mixed",
    "normalisation",
    "open_sets",
    "open_shards",
    "open_source",
    "order_of",
    "prepare",
    "sets_of",
    "train_batches",
    "train_transform",
    "training_order",
    "write_shards",
]

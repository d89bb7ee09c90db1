"""Labelled images: written as shards of tars, read as batches that do not depend on who reads them."""

from vitlab.data.bad import check_bound, counts
from vitlab.data.images.augment import eval_transform, train_transform
from vitlab.data.images.decode import decode
from vitlab.data.images.mixing import draw_lots, mixed
from vitlab.data.images.recipes import AugmentConfig, RandAugmentConfig, ViewRecipe
from vitlab.data.making.hugging_face import hugging_face
from vitlab.data.making.opening import absolute, open_source
from vitlab.data.making.pixels import arrays
from vitlab.data.making.preparing import prepare
from vitlab.data.making.sources import Raw, Source, digits, folder, limited
from vitlab.data.making.write import write_shards
from vitlab.data.reading.blend import Named, blend, named, open_named, sets_of, training_order
from vitlab.data.reading.order import Order, chosen, exact
from vitlab.data.reading.read import ReadPlan, eval_batches, order_of, train_batches
from vitlab.data.settings import Origin, ShardsConfig, WriteOptions, check_classes, normalisation
from vitlab.data.shards.index import ShardInfo, Shards, open_shards, write_json
from vitlab.data.shards.indexing import index_existing
from vitlab.data.shards.statistics import examples
from vitlab.data.shards.tars import Sample
from vitlab.data.stores.remote import is_url, local_path

__all__ = [
    "AugmentConfig",
    "Named",
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
    "named",
    "normalisation",
    "open_named",
    "open_shards",
    "open_source",
    "order_of",
    "prepare",
    "sets_of",
    "train_batches",
    "train_transform",
    "training_order",
    "write_json",
    "write_shards",
]

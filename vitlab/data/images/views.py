"""Files of images → the views of a batch. One decoding serves all the views of a sample.

The boxes of all views come first, from the size that the file's header tells and the sample's own random
numbers; then as much of the image is decoded as these boxes need together, at the scale of the one that needs
most. A slot without a file, and one whose file is broken, stays black in all views; nothing that another slot
shows depends on it.

Letters: B samples, C channels, H W image.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from vitlab.data.bad import BadInputError
from vitlab.data.images.augment import Transform
from vitlab.data.images.decode import MAX_PIXELS, open_picture


def make_views(
    files: Iterable[bytes | None],
    seeds: Tensor,
    transforms: Sequence[Transform],
    channels: int,
    max_pixels: int = MAX_PIXELS,
) -> tuple[list[Tensor], list[BadInputError | None]]:
    """B files and their seeds → for each transform uint8 B C H W, and what was wrong with each file.

    The files are taken one by one: one that is read when it is asked for need not lie in memory with others.
    """
    views = [transform.room(len(seeds), channels) for transform in transforms]
    numbers = [transform.numbers(seeds) for transform in transforms]
    bad: list[BadInputError | None] = [None] * len(seeds)
    empty: list[int] = []
    for i, data in enumerate(files):
        if data is None:
            empty.append(i)
            continue
        try:
            picture = open_picture(data, channels, max_pixels)
            boxes = [
                transform.box(picture.height, picture.width, drawn[i])
                for transform, drawn in zip(transforms, numbers, strict=True)
            ]
            region = picture.region(*boxes)
        except BadInputError as error:
            bad[i] = BadInputError(error.kind, error.reason)  # anew: the other holds the file
            empty.append(i)
            continue
        for transform, drawn, box, view in zip(transforms, numbers, boxes, views, strict=True):
            transform.show(region, box, drawn[i], view[i])
    for transform, view in zip(transforms, views, strict=True):
        transform.paint(view, seeds)
        view[empty] = 0  # after the painting, which does not know them
    return views, bad

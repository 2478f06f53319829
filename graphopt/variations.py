"""Images seen otherwise: mirrored, and from nearer.

What is fitted to few samples is fitted to chance, too. A model says itself what it gives for an
image that is mirrored or cut out, so that no label is needed, and one image counts for several.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from graphopt.contract import Sample
from graphopt.samples import Samples

VARIED_MAXIMUM = 256
"""So many samples are enough; with half as many, none is varied."""

COLORS, SIDE_MINIMUM = 3, 24
"""An array of four axes is an image if it has so many channels, and sides of as many pixels.

Of one channel may be letters or a spectrogram, which are others when mirrored.
"""

NEAREST = 0.6
"""The least share of a side that is cut out."""


def mirrored(samples: Samples) -> Samples | None:
    """The samples, then the same mirrored, which are as likely; None as for `varied`."""
    return _varied(samples, _WAYS[:2])


def varied(samples: Samples) -> Samples | None:
    """The samples, then the same mirrored and magnified; None where they are no images, or enough.

    Every image of a sample is varied in the same way, and all its other inputs stay. Pixels are
    only moved and repeated, so that no value is one that the images have not.

    Args:
        samples: each standing alone, so that none carries state to the next.
    """
    return _varied(samples, _WAYS)


def _varied(samples: Samples, of_all: Sequence[Way]) -> Samples | None:
    ways = min(len(of_all), VARIED_MAXIMUM // max(len(samples), 1))
    first = next(iter(samples), {})
    if ways < 2 or not any(_sides(array) for array in first.values()):
        return None
    pairs = list(zip(samples.loaders, samples.digests, strict=True))
    loaders = [partial(_vary, load, digest, way) for way in of_all[:ways] for load, digest in pairs]
    digests = [f"{digest} {number}" for number in range(ways) for _, digest in pairs]
    alone = tuple((number,) for number in range(len(loaders)))
    return Samples(tuple(loaders), tuple(digests), alone, samples.random, samples.keep)


Place = tuple[np.ndarray, np.ndarray]
"""Of which rows and which columns of an image another one is made."""

Way = Callable[[int, int, np.random.Generator], Place]
"""To see an image of a height and a width."""


def _vary(load: Callable[[], Sample], digest: str, way: Way) -> Sample:
    return {name: _moved(array, digest, way) for name, array in load().items()}


def _moved(array: np.ndarray, digest: str, way: Way) -> np.ndarray:
    axes = _sides(array)
    if axes is None:
        return array
    height, width = (array.shape[axis] for axis in axes)
    rows, columns = way(height, width, np.random.default_rng(int(digest[:16], 16)))
    return np.ascontiguousarray(array.take(rows, axes[0]).take(columns, axes[1]))


def _sides(array: np.ndarray) -> tuple[int, int] | None:
    """The axes of the rows and columns of images; None for what is no image."""
    return image_axes(array.shape) if array.dtype.kind in "fu" else None


def image_axes(shape: Sequence[int]) -> tuple[int, int] | None:
    """The axes of rows and columns in an array of colour images; None for any other shape."""
    if len(shape) != 4:
        return None
    for channel, axes in ((1, (2, 3)), (3, (1, 2))):
        large = all(shape[axis] >= SIDE_MINIMUM for axis in axes)
        if shape[channel] == COLORS and large:
            return axes
    return None


def _as_it_is(height: int, width: int, _: np.random.Generator) -> Place:
    return np.arange(height), np.arange(width)


def _mirrored(height: int, width: int, _: np.random.Generator) -> Place:
    return np.arange(height), np.arange(width)[::-1]


def _nearer(height: int, width: int, generator: np.random.Generator) -> Place:
    share = generator.uniform(NEAREST, 1)
    top, left = generator.uniform(0, 1 - share, 2)
    centers = [(np.arange(size) + 0.5) * share for size in (height, width)]
    rows, columns = centers[0] + top * height, centers[1] + left * width
    return rows.astype(np.int64), columns.astype(np.int64)


def _nearer_mirrored(height: int, width: int, generator: np.random.Generator) -> Place:
    # Another part of the image than that of `_nearer`.
    rows, columns = _nearer(height, width, generator.spawn(1)[0])
    return rows, columns[::-1]


_WAYS: tuple[Way, ...] = (
    _as_it_is,
    _mirrored,
    _nearer,
    _nearer_mirrored,
)

"""Weights as 8-bit codes and a scale for each block of them.

Numbers are rounded to the nearest code, and then a few of each block to the one on the other side,
so that what rounding added to all of them is next to nothing. What an output gets from the mean of
its inputs, which after a Relu is most of it, then stays what it was. No data is needed. (Guo et
al. 2022, SQuant, https://arxiv.org/abs/2202.07471, of which this is the step by output channel.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

CODE_MAXIMUM = 127
"""Codes go from -127 to 127: symmetric, so that no zero point is needed."""

SLAB_BYTES = 1 << 22
"""Blocks are rounded so many bytes of float64 at a time, so that memory does not grow by more."""

Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Coded:
    """What stands for a weight: codes * scales, broadcast.

    Attributes:
        codes: int8, of the weight's shape.
        scales: of the weight's rank, of size 1 along the axes that share a scale; float64 for
            weights of that type, float32 for others.
    """

    codes: npt.NDArray[np.int8]
    scales: np.ndarray


def scale_type(weight: np.dtype[np.floating]) -> np.dtype[np.floating]:
    """The type of the scales for weights of a type."""
    return np.dtype(np.float64 if weight == np.float64 else np.float32)


def largest(weight: np.ndarray, shared: tuple[int, ...]) -> np.ndarray:
    """The largest magnitude of each block, of size 1 along the axes that share a scale.

    NaN where a block has one, infinity likewise.
    """
    highest, lowest = (f.reduce(weight, shared, keepdims=True) for f in (np.maximum, np.minimum))
    return np.maximum(highest, -lowest)


def round_to_codes(weight: np.ndarray, shared: tuple[int, ...]) -> Coded:
    """Round to 255 equidistant numbers that reach as far as the largest of each block.

    Args:
        weight: float16, float32 or float64; all numbers finite, not empty.
        shared: the axes along which numbers share a scale; not all.
    """
    kept = tuple(axis for axis in range(weight.ndim) if axis not in shared)
    order = kept + shared
    scales = _scales(largest(weight, shared), scale_type(weight.dtype))
    codes = np.empty(weight.shape, np.int8)
    # Blocks first: of what is transposed, a part is a copy, and writing to it writes the codes.
    numbers, written, units = (a.transpose(order) for a in (weight, codes, scales))
    for part in _slabs(numbers.shape, len(kept)):
        exact = numbers[part].astype(np.float64) / units[part]
        blocks = exact.reshape(len(exact), -1)
        written[part] = _rounded(blocks).reshape(exact.shape)
    return Coded(codes, scales)


def _slabs(shape: tuple[int, ...], kept: int) -> Iterator[tuple[int | slice, ...]]:
    """Parts of an array whose first axes count its blocks: some of the blocks along one axis."""
    block_bytes = 8 * int(np.prod(shape[kept:]))
    step = max(1, SLAB_BYTES // block_bytes)
    for place in np.ndindex(shape[: kept - 1]):
        for start in range(0, shape[kept - 1], step):
            yield (*place, slice(start, start + step))


def _scales(largest: np.ndarray, dtype: np.dtype[np.floating]) -> np.ndarray:
    """One 127th of the largest: never zero, and 127 times it never infinite; 1 for zeros."""
    limits = np.finfo(dtype)
    scales = np.maximum((largest.astype(np.float64) / CODE_MAXIMUM).astype(dtype), limits.tiny)
    scales = np.minimum(scales, np.nextafter(limits.max / dtype.type(CODE_MAXIMUM), dtype.type(0)))
    return np.where(largest == 0, dtype.type(1), scales)


def _rounded(blocks: Numbers) -> Numbers:
    """Each number rounded up or down, so that the roundings of a block add up to at most 1/2.

    Args:
        blocks: [blocks, numbers], from -127 to 127.
    """
    codes = np.rint(blocks)
    added = codes - blocks
    excess = np.rint(added.sum(axis=1, keepdims=True))
    count = np.abs(excess)
    most = int(count.max())
    if most:
        # How far each went the way of the excess: those that went farthest cost least to turn.
        gain = added * np.sign(excess)
        farthest = np.argpartition(-gain, min(most, gain.shape[1]) - 1, axis=1)[:, :most]
        farthest = np.take_along_axis(
            farthest, np.argsort(-np.take_along_axis(gain, farthest, 1), axis=1, kind="stable"), 1
        )
        turned = (np.arange(farthest.shape[1]) < count) * np.sign(excess)
        chosen = np.take_along_axis(codes, farthest, 1) - turned
        np.put_along_axis(codes, farthest, chosen, 1)
    return np.clip(codes, -CODE_MAXIMUM, CODE_MAXIMUM)

"""Weights as 8-bit codes and a scale for each block of them.

Arrays are worked through in slabs, so that memory does not grow by more than the codes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

CODE_MAXIMUM = 127
"""Codes go from -127 to 127: symmetric, so that no zero point is needed."""

SLAB_BYTES = 1 << 20
"""Codes are computed in pieces of this size, in float64."""


@dataclass(frozen=True)
class Coded:
    """What stands for a weight.

    Attributes:
        codes: int8, of the weight's shape.
        scales: of the weight's rank, of size 1 along the axes that share a scale; float64 for
            weights of that type, float32 for others.
    """

    codes: npt.NDArray[np.int8]
    scales: np.ndarray


def largest(weight: np.ndarray, shared: tuple[int, ...]) -> np.ndarray:
    """The largest magnitude of each block, of size 1 along the axes that share a scale.

    NaN where a block has one, infinity likewise.
    """
    highest, lowest = (f.reduce(weight, shared, keepdims=True) for f in (np.maximum, np.minimum))
    return np.maximum(highest, -lowest)


def round_to_codes(weight: np.ndarray, shared: tuple[int, ...]) -> Coded:
    """Round to the nearest of 255 equidistant numbers that reach as far as the block's largest.

    Args:
        weight: float16, float32 or float64; all numbers finite, not empty.
        shared: the axes along which numbers share a scale.
    """
    scales = _scales(largest(weight, shared), scale_type(weight.dtype))
    codes = np.empty(weight.shape, np.int8)
    for rows in _slabs(weight):
        part = weight[rows].astype(np.float64)
        part /= scales[rows if scales.shape[0] > 1 else slice(None)]
        np.rint(part, out=part)
        codes[rows] = np.clip(part, -CODE_MAXIMUM, CODE_MAXIMUM, out=part)
    return Coded(codes, scales)


def scale_type(weight: np.dtype[np.floating]) -> np.dtype[np.floating]:
    """The type of the scales for weights of a type."""
    return np.dtype(np.float64 if weight == np.float64 else np.float32)


def _scales(largest: np.ndarray, dtype: np.dtype[np.floating]) -> np.ndarray:
    """One 127th of the largest: never zero, and 127 times it never infinite; 1 for zeros."""
    limits = np.finfo(dtype)
    scales = np.maximum((largest.astype(np.float64) / CODE_MAXIMUM).astype(dtype), limits.tiny)
    scales = np.minimum(scales, np.nextafter(limits.max / dtype.type(CODE_MAXIMUM), dtype.type(0)))
    return np.where(largest == 0, dtype.type(1), scales)


def _slabs(weight: np.ndarray) -> Iterator[slice]:
    row_bytes = 8 * max(1, weight.size // len(weight))
    step = max(1, SLAB_BYTES // row_bytes)
    for start in range(0, len(weight), step):
        yield slice(start, start + step)

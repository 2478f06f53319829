"""Weights as 8-bit integers with a scale for each column, and what that does to their products."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from graphopt_passes.quantize.affine import affine_of

CODE_MAXIMUM = 127
REDUCED_CODE_MAXIMUM = 64
"""Of codes whose products with two activations of 255 add up within 16 bits: 2 * 255 * 64 < 2^15.

onnxruntime's kernels for AVX2 without VNNI saturate there.
"""

TRIED_ROWS = 256
"""Rows on which the error of a product is looked at."""

OUTLIER_RATIO_MINIMUM = 10.0
"""An input channel that reaches so many times as far as the median one is called an outlier."""


SCALE_MINIMUM = float(np.finfo(np.float32).tiny) * 256
"""Of a weight: smaller, and its products with an activation's scale are no normal numbers."""


@dataclass(frozen=True, eq=False)
class Columns:
    """A weight as integers: weight[..., k, n] = codes[..., k, n] * scales[..., n].

    Attributes:
        codes: int8, of shape [..., inputs, outputs].
        scales: positive, float32 of shape [..., outputs].
    """

    codes: np.ndarray
    scales: np.ndarray

    def numbers(self) -> np.ndarray:
        """The weight that they stand for, float32 of the shape of the codes."""
        return np.asarray(self.codes * self.scales[..., np.newaxis, :], np.float32)


def columns_of(weight: np.ndarray, code_maximum: int = CODE_MAXIMUM) -> Columns:
    """Round a weight to the nearest codes; symmetric, so that no zero point is needed.

    Args:
        weight: finite, float32 of shape [..., inputs, outputs].
        code_maximum: codes go from its negative to it.

    Returns:
        A column of zeros has scale 1.
    """
    largest = np.abs(weight).max(axis=-2, keepdims=True)
    scales = np.where(largest > SCALE_MINIMUM, largest / np.float32(code_maximum), np.float32(1))
    codes = np.clip(np.rint(weight / scales), -code_maximum, code_maximum)
    return Columns(np.ascontiguousarray(codes, np.int8), np.ascontiguousarray(scales[..., 0, :]))


def error_of_product(
    rows: np.ndarray, weight: np.ndarray, code_maximum: int = CODE_MAXIMUM
) -> float:
    """By how much a product changes when both factors are rounded, as a relative L2 norm.

    The activations are rounded as DynamicQuantizeLinear would if the rows were one tensor: to uint8
    over the range from the least to the largest of them.

    Args:
        rows: of activations, float32 of shape [rows, inputs].
        weight: float32 of shape [..., inputs, outputs].
        code_maximum: of the codes of the weight.

    Returns:
        0 where there are no rows.
    """
    if not rows.size:
        return 0.0
    affine = affine_of(float(rows.min()), float(rows.max()))
    few = rows[:TRIED_ROWS]
    exact = np.matmul(few, weight)
    change = np.matmul(affine.rounded(few), columns_of(weight, code_maximum).numbers()) - exact
    signal = float(np.linalg.norm(exact))
    return float(np.linalg.norm(change)) / signal if signal else 0.0


def outlier_of(rows: np.ndarray) -> tuple[int, float] | None:
    """The input channel that reaches farthest, and how many times as far as the median one does.

    Args:
        rows: of activations, float32 of shape [rows, inputs].

    Returns:
        None where it does not stand out.
    """
    reach = np.abs(rows).max(axis=0)
    channel, usual = int(reach.argmax()), float(np.median(reach))
    if reach[channel] <= OUTLIER_RATIO_MINIMUM * usual or not usual:
        return None
    return channel, float(reach[channel]) / usual

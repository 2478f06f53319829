"""A layer's weight and bias as integers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from graphopt.statistics import Rows
from graphopt_passes.quantize.affine import Affine
from graphopt_passes.quantize.layers import Layer, products

CODE_MAXIMUM = 127
"""Codes go from -127 to 127: symmetric, so that no zero point is needed."""

BIAS_CODE_MAXIMUM = float(1 << 30)


@dataclass(frozen=True)
class IntegerLayer:
    """What replaces weight and bias of a layer.

    Attributes:
        codes: int8, in the layout of the weight.
        scales: float32, of shape [outputs].
        bias: int32, of shape [outputs], in units of `bias_scales`.
        bias_scales: input scale times weight scale, float32 of shape [outputs].
    """

    codes: np.ndarray
    scales: np.ndarray
    bias: np.ndarray
    bias_scales: np.ndarray


def integer_layer(layer: Layer, source: Affine, rows: Rows | None) -> IntegerLayer:
    """Round weight and bias of a layer.

    With rows of the layer's input, what rounding changes in the mean of each output is taken back
    by the bias (bias correction: Nagel et al. 2019, Data-free quantization, section 4.2, here with
    measured means).

    Args:
        layer: not modified.
        source: the map of the layer's input.
        rows: of its input; None for rounding to nearest.
    """
    matrix = layer.matrix()
    outputs = matrix.shape[0] * matrix.shape[1]
    bias = layer.bias()
    bias = np.zeros(outputs) if bias is None else bias
    scales = np.abs(matrix).max(axis=2) / CODE_MAXIMUM
    floor = np.abs(bias).reshape(scales.shape) / (float(source.scale) * BIAS_CODE_MAXIMUM)
    scales = np.maximum(np.maximum(scales, floor), np.finfo(np.float32).tiny * 256)
    scales = scales.astype(np.float32)
    codes = np.clip(np.rint(matrix / scales[..., np.newaxis]), -CODE_MAXIMUM, CODE_MAXIMUM)
    if rows is not None and rows.values.size:
        bias = bias + _mean_change(matrix, codes * scales[..., np.newaxis], source, rows)
    flat = scales.reshape(-1)
    bias_scales = np.float32(source.scale) * flat
    rounded = np.clip(np.rint(bias / bias_scales), -(2**31), 2**31 - 1)
    return IntegerLayer(
        codes=layer.stored(codes.astype(np.int8)),
        scales=flat,
        bias=rounded.astype(np.int32),
        bias_scales=bias_scales,
    )


def _mean_change(matrix: np.ndarray, rounded: np.ndarray, source: Affine, rows: Rows) -> np.ndarray:
    """By how much the mean of each output falls through rounding, of shape [outputs]."""
    before = products(rows.values.mean(axis=1, keepdims=True), matrix)
    after = products(source.rounded(rows.values).mean(axis=1, keepdims=True), rounded)
    return np.asarray((before - after).reshape(-1))

"""A layer's weight and bias as integers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from graphopt.statistics import Gram, Rows
from graphopt_passes.quantize.affine import Affine
from graphopt_passes.quantize.balanced_rounding import CODE_MAXIMUM
from graphopt_passes.quantize.folding import Fold
from graphopt_passes.quantize.layers import Layer, products
from graphopt_passes.quantize.rounding import round_to_gram, search_scales
from graphopt_passes.quantize.trained_grids import grid_of

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

    def folded(self, fold: Fold) -> IntegerLayer:
        """The same of a Conv whose columns are folded."""
        parts = (self.scales, self.bias, self.bias_scales)
        return IntegerLayer(fold.weight(self.codes), *(np.tile(p, fold.columns) for p in parts))


def integer_layer(layer: Layer, source: Affine, rows: Rows, gram: Gram) -> IntegerLayer:
    """Round weight and bias of a layer so that its outputs change least.

    What rounding changes in the mean of each output is taken back by the bias (bias correction:
    Nagel et al. 2019, Data-free quantization, section 4.2, here with measured means). So codes are
    chosen for the rest, the variance that they add: against the covariance of the inputs, which is
    the Gram matrix less the product of the means.

    Args:
        layer: not modified.
        source: the map of the layer's input.
        rows: of its input.
        gram: of its input.
    """
    matrix = layer.matrix()
    outputs = matrix.shape[0] * matrix.shape[1]
    bias = layer.bias()
    bias = np.zeros(outputs) if bias is None else bias
    floor = np.abs(bias) / (float(source.scale) * BIAS_CODE_MAXIMUM)
    corrects = layer.can_have_bias
    codes, scales = _rounded(matrix, gram.covariance if corrects else gram.mean, floor)
    if corrects and rows.values.size:
        bias = bias + _mean_change(matrix, codes * scales[..., np.newaxis], source, rows)
    flat = scales.reshape(-1).astype(np.float32)
    bias_scales = np.float32(source.scale) * flat
    rounded = np.clip(np.rint(bias / bias_scales), -(2**31), 2**31 - 1)
    return IntegerLayer(
        codes=layer.stored(codes),
        scales=flat,
        bias=rounded.astype(np.int32),
        bias_scales=bias_scales,
    )


def _rounded(
    matrix: np.ndarray, grams: np.ndarray, floor: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Codes [group, outputs, inputs], int8, and scales [group, outputs], float64."""
    group, outputs, inputs = matrix.shape
    floors = floor.reshape(group, outputs)
    if not grams.size or not np.isfinite(grams).all():
        grams = np.zeros((group, inputs, inputs))
    if outputs == 1 and group > 1:
        # Depthwise: a Gram matrix for each row.
        codes, scales = _rounded_rows(matrix[:, 0], grams, floors[:, 0])
        return codes[:, np.newaxis], scales[:, np.newaxis]
    done = [_rounded_rows(*part) for part in zip(matrix, grams, floors, strict=True)]
    return np.stack([codes for codes, _ in done]), np.stack([scales for _, scales in done])


@dataclass(frozen=True)
class PackedLayer:
    """What replaces the weight of a layer whose inputs stay float.

    Attributes:
        codes: int8, in the layout of the weight.
        scales: float32, of shape [outputs].
        shift: what the bias gets in addition, float64 of shape [outputs].
    """

    codes: np.ndarray
    scales: np.ndarray
    shift: np.ndarray


def packed_layer(layer: Layer, gram: Gram, corrects: bool) -> PackedLayer:
    """Round the weight of a layer so that its outputs change least.

    Args:
        layer: not modified.
        gram: of the layer's input.
        corrects: the bias may take back what rounding changes in the means; see `integer_layer`.
    """
    matrix = layer.matrix()
    outputs = matrix.shape[0] * matrix.shape[1]
    moments = gram.covariance if corrects else gram.mean
    codes, scales = _rounded(matrix, moments, np.zeros(outputs))
    shift = np.zeros(outputs)
    if corrects and np.isfinite(gram.means).all():
        change = matrix - codes * scales[..., np.newaxis]
        shift = np.einsum("gnk,gk->gn", change, gram.means).reshape(-1)
    return PackedLayer(layer.stored(codes), scales.reshape(-1).astype(np.float32), shift)


def _rounded_rows(
    weight: np.ndarray, gram: np.ndarray, floor: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    trained = grid_of(weight, -CODE_MAXIMUM, CODE_MAXIMUM, signed=False)
    if trained is not None and (trained[1][:, 0] >= floor).all():
        return trained[0].astype(np.int8), trained[1][:, 0].astype(np.float64)
    # The model's scales are float32, and so the codes must be for these.
    scales = search_scales(weight, gram, floor=floor).astype(np.float32).astype(np.float64)
    return round_to_gram(weight, scales, gram), scales


def _mean_change(matrix: np.ndarray, rounded: np.ndarray, source: Affine, rows: Rows) -> np.ndarray:
    """By how much the mean of each output falls through rounding, of shape [outputs]."""
    before = products(rows.values.mean(axis=1, keepdims=True), matrix)
    after = products(source.rounded(rows.values).mean(axis=1, keepdims=True), rounded)
    return np.asarray((before - after).reshape(-1))

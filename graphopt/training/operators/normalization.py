"""Normalizations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from graphopt.training.operators.arguments import along
from graphopt.training.operators.element_types import torch_type
from graphopt.training.operators.operator_types import Table

_EPSILON = 1e-5
_SCALED_BY_CHANNEL_OPSET = 21
"""From it on GroupNormalization has a scale for each channel; before, for each group."""


def _batch(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    *,
    output_count: int,
    epsilon: float = _EPSILON,
    momentum: float = 0.9,
    spatial: int = 1,
    training_mode: int = 0,
) -> Tensor | tuple[Tensor, ...]:
    if not training_mode:
        return _normalized(x, scale, bias, mean, variance, epsilon)
    axes = [axis for axis in range(x.ndim) if axis != 1]
    current = x.mean(axes)
    spread = x.var(axes, correction=0)
    y = _normalized(x, scale, bias, current, spread, epsilon)
    kept = mean * momentum + current * (1 - momentum)
    return y, kept, variance * momentum + spread * (1 - momentum)


def _normalized(
    x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, epsilon: float
) -> Tensor:
    # The kernel takes these two for constants.
    are_learnt = mean.requires_grad or variance.requires_grad
    if x.dtype == mean.dtype == scale.dtype and not are_learnt:
        return functional.batch_norm(x, mean, variance, scale, bias, False, 0.0, epsilon)
    factor = scale * torch.rsqrt(variance + epsilon)
    offset = bias - mean * factor
    return (x * along(factor, x.ndim, 1) + along(offset, x.ndim, 1)).to(x.dtype)


def _instance(x: Tensor, scale: Tensor, bias: Tensor, *, epsilon: float = _EPSILON) -> Tensor:
    axes = list(range(2, x.ndim))
    y = _standardized(x, axes, epsilon)[0]
    return y * along(scale, x.ndim, 1) + along(bias, x.ndim, 1)


def _standardized(x: Tensor, axes: Sequence[int], epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """With a mean of 0 and a variance of 1; the mean, and one over the standard deviation."""
    mean = x.mean(list(axes), keepdim=True)
    centered = x - mean
    inverse = torch.rsqrt((centered * centered).mean(list(axes), keepdim=True) + epsilon)
    return centered * inverse, mean, inverse


def layer(
    x: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    output_count: int,
    axis: int = -1,
    epsilon: float = _EPSILON,
    stash_type: int = 1,
) -> Tensor | tuple[Tensor, ...]:
    """The operator LayerNormalization.

    Args:
        x: of any shape.
        scale: broadcasts to the axes that are normalized.
        bias: likewise.
        output_count: with more than one, the mean and one over the deviation are given too.
        axis: normalized are this and all behind it.
        epsilon: added to the variance.
        stash_type: what is computed in, as ONNX numbers types; at least that of `x`.
    """
    shape, dtype = x.shape[axis:], _computed_in(x, stash_type)
    is_plain = dtype == x.dtype == scale.dtype and scale.shape == shape
    if output_count == 1 and is_plain and (bias is None or bias.shape == shape):
        return functional.layer_norm(x, tuple(shape), scale, bias, epsilon)
    axes = list(range(axis % x.ndim, x.ndim))
    y, mean, inverse = _standardized(x.to(dtype), axes, epsilon)
    y = y.to(x.dtype) * scale
    y = y if bias is None else y + bias
    return (y, mean, inverse) if output_count > 1 else y


def _computed_in(x: Tensor, stash_type: int) -> torch.dtype:
    return torch.promote_types(x.dtype, torch_type(stash_type))


def root_mean_square(
    x: Tensor,
    scale: Tensor,
    *,
    axis: int = -1,
    epsilon: float = _EPSILON,
    stash_type: int = 1,
) -> Tensor:
    """The operator RMSNormalization; arguments as of `layer`."""
    axes = list(range(axis % x.ndim, x.ndim))
    wide = x.to(_computed_in(x, stash_type))
    inverse = torch.rsqrt((wide * wide).mean(axes, keepdim=True) + epsilon)
    return (wide * inverse).to(x.dtype) * scale


def _group(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    num_groups: int,
    opset: int,
    epsilon: float = _EPSILON,
    stash_type: int = 1,
) -> Tensor:
    channels = x.shape[1]
    if opset < _SCALED_BY_CHANNEL_OPSET:
        each = channels // num_groups
        scale, bias = (part.repeat_interleave(each) for part in (scale, bias))
    wide = x.to(_computed_in(x, stash_type)).reshape(x.shape[0], num_groups, -1)
    y = _standardized(wide, [2], epsilon)[0].reshape(x.shape).to(x.dtype)
    return y * along(scale, x.ndim, 1) + along(bias, x.ndim, 1)


def _local_response(
    x: Tensor, *, size: int, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0
) -> Tensor:
    before = (size - 1) // 2
    squares = (x * x).movedim(1, -1)
    sums = functional.pad(squares, (before, size - 1 - before)).unfold(-1, size, 1).sum(-1)
    return x / (bias + alpha / size * sums.movedim(-1, 1)) ** beta


def _lp(x: Tensor, *, axis: int = -1, p: int = 2) -> Tensor:
    size = torch.linalg.vector_norm(x, p, dim=axis, keepdim=True)
    # Zeros stay zeros.
    return x / torch.where(size == 0, torch.ones_like(size), size)


def _mean_variance(x: Tensor, *, axes: Sequence[int] = (0, 2, 3)) -> Tensor:
    centered = x - x.mean(list(axes), keepdim=True)
    deviation = (centered * centered).mean(list(axes), keepdim=True).sqrt()
    return centered / (deviation + 1e-9)


OPERATORS: Table = {
    "BatchNormalization": _batch,
    "GroupNormalization": _group,
    "InstanceNormalization": _instance,
    "LRN": _local_response,
    "LayerNormalization": layer,
    "LpNormalization": _lp,
    "MeanVarianceNormalization": _mean_variance,
    "RMSNormalization": root_mean_square,
    # onnxruntime has it among the standard operators, and onnx has not.
    "SimplifiedLayerNormalization": root_mean_square,
}
"""Of the standard domain."""

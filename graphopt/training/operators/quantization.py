"""Quantization: numbers to codes and back, and products of codes.

With `straight_through`, codes stay floating: they are integers in value, and gradients go through
them where they are not saturated (Bengio et al., arXiv 1308.3432; clipped as in PACT, Choi et al.,
arXiv 1805.06085; the gradient of the scale is then that of LSQ, Esser et al., arXiv 1902.08153).
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
import torch
from torch import Tensor

from graphopt.training.operators.arguments import along
from graphopt.training.operators.convolution import convolution
from graphopt.training.operators.element_types import (
    FLOATS_8,
    NARROW_FLOATS,
    TORCH_TYPES,
    cast,
    torch_type,
)
from graphopt.training.operators.operator_types import Table
from graphopt.training.operators.straight_through import through

_UINT8, _INT8 = 2, 3
_UNDEFINED = 0


def code_limits(dtype: int) -> tuple[int, int]:
    """The least and the greatest code of an integer type, as ONNX numbers types."""
    kind = ir.DataType(dtype)
    bits = int(kind.bitwidth)
    return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if kind.is_signed() else (0, (1 << bits) - 1)


def rounded(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    limits: tuple[int, int],
    straight_through: bool,
) -> Tensor:
    """Codes of numbers: integers in value, of the type of the numbers.

    Args:
        x: floating.
        scale: broadcasts to `x`.
        zero_point: likewise; None stands for 0.
        limits: the least and the greatest code.
        straight_through: gradients pass the rounding.
    """
    scaled = x / scale
    codes = through(scaled, scaled.round()) if straight_through else scaled.round()
    if zero_point is not None:
        codes = codes + zero_point
    return codes.clamp(*limits)


def spread(part: Tensor, x: Tensor, axis: int, block_size: int = 0) -> Tensor:
    """Scales or zero points in a shape that broadcasts to what they are of.

    Args:
        part: of one number, of one for each place of the axis, or of one for each block on it.
        x: what they are of.
        axis: of `x`.
        block_size: places on the axis that share a number; 0 where there are no blocks.
    """
    if part.numel() == 1 and part.ndim < 2:
        return part.reshape(())
    if part.ndim == 1 and not block_size:
        return along(part, x.ndim, axis % x.ndim)
    size = x.shape[axis]
    # A last block may be of fewer.
    each = block_size or -(-size // part.shape[axis])
    return _wide(part).repeat_interleave(each, axis).narrow(axis, 0, size)


def _wide(x: Tensor) -> Tensor:
    """In a type that torch computes in, and that has all of its numbers; floating ones stay."""
    if x.dtype in FLOATS_8:
        return x.to(torch.float32)
    return x if x.is_floating_point() else x.to(torch.int32)


def _code_type(like: Tensor | None, stated: Sequence[int], output_dtype: int) -> int:
    """As ONNX numbers types; those of 2 and 4 bits are only known by what is stated."""
    if output_dtype != _UNDEFINED:
        return output_dtype
    if any(stated):
        return stated[0]
    if like is None:
        return _UINT8
    held = (o for o, dtype in TORCH_TYPES.items() if dtype == like.dtype)
    return next(int(dtype) for dtype in held if dtype.bitwidth == 8 * like.itemsize)


def quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    input_types: Sequence[int],
    straight_through: bool,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = _UNDEFINED,
    precision: int = _UNDEFINED,
    saturate: int = 1,
) -> Tensor:
    """The operator QuantizeLinear.

    Args:
        x: floating.
        scale: of one number, of one for each place of the axis, or of one for each block on it.
        zero_point: likewise; its type is that of the codes.
        input_types: of the three, as ONNX numbers types.
        straight_through: codes stay floating, and gradients pass.
        axis: of `x`, for scales that are several.
        block_size: places on the axis that share a scale.
        output_dtype: of the codes, as ONNX numbers types, where there is no zero point.
        precision: what is computed in; at least float32.
        saturate: of codes that are floating: numbers beyond them become the largest.
    """
    dtype = _code_type(zero_point, input_types[2:3], output_dtype)
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    if precision != _UNDEFINED:
        kind = torch.promote_types(torch_type(precision), torch.float32)
    x = x.to(kind)
    scales = spread(scale, x, axis, block_size).to(kind)
    if dtype in NARROW_FLOATS:
        return cast(x / scales, dtype, bool(saturate), straight_through=straight_through)
    offsets = None if zero_point is None else spread(zero_point, x, axis, block_size).to(kind)
    codes = rounded(x, scales, offsets, code_limits(dtype), straight_through)
    return codes if straight_through else cast(codes, dtype)


def dequantize(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = _UNDEFINED,
) -> Tensor:
    """The operator DequantizeLinear; arguments as of `quantize`."""
    scales = spread(scale, codes, axis, block_size)
    kind = scale.dtype if output_dtype == _UNDEFINED else torch_type(output_dtype)
    wide = _wide(codes)
    if zero_point is not None:
        wide = wide - _wide(spread(zero_point, codes, axis, block_size))
    computed = torch.promote_types(torch.float32, scales.dtype)
    if wide.dtype == torch.float64:
        computed = torch.float64
    return (wide.to(computed) * scales.to(computed)).to(kind)


def dynamic_parameters(x: Tensor) -> tuple[Tensor, Tensor]:
    """The scale and the zero point that put all of the numbers, and 0, on codes of uint8.

    Args:
        x: floating.

    Returns:
        Both floating, without a shape.
    """
    high = x.amax().clamp(min=0) if x.numel() else x.new_zeros(())
    low = x.amin().clamp(max=0) if x.numel() else x.new_zeros(())
    scale = (high - low) / 255
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return scale, (-low / scale).clamp(0, 255).round()


def _dynamic_quantize(x: Tensor, *, straight_through: bool) -> tuple[Tensor, Tensor, Tensor]:
    scale, zero_point = dynamic_parameters(x)
    codes = rounded(x, scale, zero_point, (0, 255), straight_through)
    if straight_through:
        return codes, scale, zero_point
    return codes.to(torch.uint8), scale, zero_point.to(torch.uint8)


def dynamically_rounded(x: Tensor, straight_through: bool) -> Tensor:
    """The numbers as 8 bits between their extremes leave them."""
    scale, zero_point = dynamic_parameters(x)
    codes = rounded(x, scale, zero_point, (0, 255), straight_through)
    return (codes - zero_point) * scale


def _exact(codes: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """Codes less their zero point, in float64: sums of products of them are exact."""
    wide = codes.to(torch.float64)
    return wide if zero_point is None else wide - zero_point.to(torch.float64)


def _of_rows(part: Tensor) -> Tensor:
    """A scale or zero point of the left operand of a product, of which rows may have their own."""
    return part[:, None] if part.ndim == 1 and part.numel() > 1 else part


def _sum_of_codes(total: Tensor, *codes: Tensor) -> Tensor:
    """A sum of products of codes in the type of sums: floating where any of the codes are."""
    floating = [part.dtype for part in codes if part.is_floating_point()]
    return total.to(floating[0] if floating else torch.int32)


def matmul_of_codes(
    a: Tensor, b: Tensor, a_zero_point: Tensor | None = None, b_zero_point: Tensor | None = None
) -> Tensor:
    """The operator MatMulInteger.

    Args:
        a: codes, of shape [..., rows, inner].
        b: codes, of shape [..., inner, columns].
        a_zero_point: of one number, or one for each row.
        b_zero_point: of one number, or one for each column.
    """
    left = _exact(a, None if a_zero_point is None else _of_rows(a_zero_point))
    return _sum_of_codes(left @ _exact(b, b_zero_point), a, b)


def _convolution_of_codes(
    x: Tensor,
    weight: Tensor,
    x_zero_point: Tensor | None = None,
    weight_zero_point: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    offset = None if weight_zero_point is None else spread(weight_zero_point, weight, 0)
    total = convolution(
        _exact(x, x_zero_point),
        _exact(weight, offset),
        auto_pad=auto_pad,
        dilations=dilations,
        group=group,
        pads=pads,
        strides=strides,
    )
    return _sum_of_codes(total, x, weight)


def requantized(
    y: Tensor, scale: Tensor, zero_point: Tensor | None, like: Tensor, straight_through: bool
) -> Tensor:
    """Numbers as codes of a known scale.

    Args:
        y: floating.
        scale: of the codes; broadcasts.
        zero_point: likewise, and of their type.
        like: codes, where there is no zero point to say the type.
        straight_through: codes stay floating.
    """
    source = like if zero_point is None else zero_point
    kind = torch.uint8 if source.is_floating_point() else source.dtype
    limits = torch.iinfo(kind)
    offset = None if zero_point is None else zero_point.to(y.dtype)
    codes = rounded(y, scale.to(y.dtype), offset, (limits.min, limits.max), straight_through)
    return codes if straight_through else codes.to(kind)


def _qlinear_convolution(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor,
    y_scale: Tensor,
    y_zero_point: Tensor,
    bias: Tensor | None = None,
    *,
    straight_through: bool,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    total = convolution(
        _exact(x, x_zero_point),
        _exact(weight, spread(weight_zero_point, weight, 0)),
        None if bias is None else bias.to(torch.float64),
        auto_pad=auto_pad,
        dilations=dilations,
        group=group,
        pads=pads,
        strides=strides,
    ).to(torch.float32)
    factor = spread(x_scale * weight_scale / y_scale, total, 1)
    one = torch.ones_like(y_scale, dtype=torch.float32)
    return requantized(total * factor, one, y_zero_point, x, straight_through)


def _qlinear_matmul(
    a: Tensor,
    a_scale: Tensor,
    a_zero_point: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero_point: Tensor,
    y_scale: Tensor,
    y_zero_point: Tensor,
    *,
    straight_through: bool,
) -> Tensor:
    total = _exact(a, _of_rows(a_zero_point)) @ _exact(b, b_zero_point)
    one = torch.ones_like(y_scale, dtype=torch.float32)
    factor = (_of_rows(a_scale) * b_scale / y_scale).to(torch.float32)
    return requantized(total.to(torch.float32) * factor, one, y_zero_point, a, straight_through)


def _cast(
    x: Tensor,
    *,
    to: int,
    straight_through: bool,
    round_mode: str = "up",
    saturate: int = 1,
) -> Tensor:
    return cast(x, to, bool(saturate), round_mode, straight_through)


def _cast_like(
    x: Tensor,
    target: Tensor,
    *,
    input_types: Sequence[int],
    straight_through: bool,
    round_mode: str = "up",
    saturate: int = 1,
) -> Tensor:
    dtype = _code_type(target, input_types[1:2], _UNDEFINED)
    return cast(x, dtype, bool(saturate), round_mode, straight_through)


OPERATORS: Table = {
    "Cast": _cast,
    "CastLike": _cast_like,
    "ConvInteger": _convolution_of_codes,
    "DequantizeLinear": dequantize,
    "DynamicQuantizeLinear": _dynamic_quantize,
    "MatMulInteger": matmul_of_codes,
    "QLinearConv": _qlinear_convolution,
    "QLinearMatMul": _qlinear_matmul,
    "QuantizeLinear": quantize,
}
"""Of the standard domain."""

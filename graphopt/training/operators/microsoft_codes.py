"""Operators of onnxruntime's own that read codes.

By the text of `docs/ContribOperators.md` of onnxruntime.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from graphopt.errors import ModelError
from graphopt.training.operators.elementwise import leaky_relu, softmax
from graphopt.training.operators.movement import gather
from graphopt.training.operators.operator_types import Operator, Table
from graphopt.training.operators.pooling import average_pool
from graphopt.training.operators.quantization import (
    dequantize,
    dynamically_rounded,
    matmul_of_codes,
    quantize,
    requantized,
)
from graphopt.training.operators.recurrent import Weights, recurrence, run

_UINT8 = 2
"""As ONNX numbers types."""


def unpacked(stored: Tensor, bits: int) -> Tensor:
    """Codes that lie several in a byte, the first in the lowest bits; the last axis gets longer.

    What is floating has been unpacked before it was fed, so that gradients reach it.
    """
    if bits == 8 or stored.is_floating_point():
        return stored
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=stored.device)
    mask = (1 << bits) - 1
    return (stored.unsqueeze(-1) >> shifts & mask).flatten(-2)


def _matmul_of_bits(
    x: Tensor,
    stored: Tensor,
    scales: Tensor,
    zero_points: Tensor | None = None,
    groups: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    K: int,  # noqa: N803
    N: int,  # noqa: N803
    block_size: int,
    accuracy_level: int = 0,
    bits: int = 4,
    weight_prepacked: int = 0,
) -> Tensor:
    """X W' + bias with W of shape [N, K] in codes: [N, blocks, bytes of a block].

    How exact the products are is the kernel's own affair: here they are of floating-point numbers.
    """
    if groups is not None or weight_prepacked:
        raise ModelError("MatMulNBits with g_idx or prepacked weights cannot be computed here")
    blocks = -(-K // block_size)
    codes = unpacked(stored.reshape(N, blocks, -1), bits).to(scales.dtype)
    if zero_points is None:
        offsets: Tensor | float = float(1 << (bits - 1))
    elif zero_points.is_floating_point():
        offsets = zero_points.reshape(N, blocks, 1)
    else:
        offsets = unpacked(zero_points.reshape(N, -1), bits)[:, :blocks, None].to(scales.dtype)
    weight = (codes - offsets) * scales.reshape(N, blocks, 1)
    return functional.linear(x, weight.reshape(N, -1)[:, :K].to(x.dtype), bias)


def _gather_of_blocks(
    stored: Tensor,
    index: Tensor,
    scales: Tensor,
    zero_points: Tensor | None = None,
    *,
    input_types: Sequence[int],
    bits: int = 4,
    block_size: int = 128,
    gather_axis: int = 0,
    quantize_axis: int = 1,
) -> Tensor:
    """Rows of a table in codes, of which those in a block share a scale."""
    is_bytes = input_types[0] == _UINT8
    axis = quantize_axis % stored.ndim
    codes = stored
    if is_bytes:
        codes = unpacked(stored.movedim(axis, -1), bits).movedim(-1, axis)
        if zero_points is not None:
            zero_points = unpacked(zero_points.movedim(axis, -1), bits).movedim(-1, axis)
            zero_points = zero_points.narrow(axis, 0, scales.shape[axis])
    # Only what is looked up is widened, where the axes are not the same.
    if gather_axis % stored.ndim != axis:
        codes = gather(codes, index, axis=gather_axis)
        scales = gather(scales, index, axis=gather_axis)
        if zero_points is not None:
            zero_points = gather(zero_points, index, axis=gather_axis)
        axis = axis + index.ndim - 1 if gather_axis % stored.ndim < axis else axis
        return _of_blocks(codes, scales, zero_points, axis, block_size, bits, is_bytes)
    table = _of_blocks(codes, scales, zero_points, axis, block_size, bits, is_bytes)
    return gather(table, index, axis=gather_axis)


def _of_blocks(
    codes: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    axis: int,
    block_size: int,
    bits: int,
    is_centered: bool,
) -> Tensor:
    size = codes.shape[axis]
    wide = codes.to(scales.dtype)
    if zero_points is not None:
        offsets = zero_points.to(scales.dtype).repeat_interleave(block_size, axis)
        wide = wide - offsets.narrow(axis, 0, size)
    elif is_centered:
        wide = wide - float(1 << (bits - 1))
    return wide * scales.repeat_interleave(block_size, axis).narrow(axis, 0, size)


def _dynamic_matmul(
    a: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    straight_through: bool,
) -> Tensor:
    weight = _numbers(b, b_scale, b_zero_point)
    product = dynamically_rounded(a, straight_through) @ weight
    return product if bias is None else product + bias


def _numbers(codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """Of a right operand: one scale, or one for each column."""
    wide = codes.to(scale.dtype)
    if zero_point is not None:
        wide = wide - zero_point.to(scale.dtype)
    return wide * scale


def _matmul_to_float(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    a_zero_point: Tensor | None = None,
    b_zero_point: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    total = matmul_of_codes(a, b, a_zero_point, b_zero_point)
    product = total.to(a_scale.dtype) * (a_scale * b_scale)
    return product if bias is None else product + bias


def _dynamic_lstm(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None,
    lengths: Tensor | None,
    initial_h: Tensor | None,
    initial_c: Tensor | None,
    peepholes: Tensor | None,
    w_scale: Tensor,
    w_zero_point: Tensor,
    r_scale: Tensor,
    r_zero_point: Tensor,
    *,
    straight_through: bool,
    activation_alpha: Sequence[float] | None = None,
    activation_beta: Sequence[float] | None = None,
    activations: Sequence[str] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    input_forget: int = 0,
) -> tuple[Tensor, ...]:
    """An LSTM with weights in codes, [directions, inputs, gates], and 8 bits for what they meet."""
    what = recurrence(
        "LSTM",
        direction,
        activations,
        activation_alpha,
        activation_beta,
        clip,
        0,
        couples=bool(input_forget),
        prepare=partial(dynamically_rounded, straight_through=straight_through),
    )
    inputs, hidden = (
        _numbers(codes, scale.reshape(len(codes), 1, -1), zero.reshape(len(codes), 1, -1))
        for codes, scale, zero in ((w, w_scale, w_zero_point), (r, r_scale, r_zero_point))
    )
    weights = Weights(inputs.transpose(1, 2), hidden.transpose(1, 2), b, peepholes)
    return run(what, x, weights, lengths, (initial_h, initial_c))


def _of_two(compute: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    """An operator of two operands in codes that gives codes."""

    def operator(
        a: Tensor,
        a_scale: Tensor,
        a_zero_point: Tensor | None,
        b: Tensor,
        b_scale: Tensor,
        b_zero_point: Tensor | None,
        y_scale: Tensor,
        y_zero_point: Tensor | None = None,
        *,
        straight_through: bool,
    ) -> Tensor:
        y = compute(dequantize(a, a_scale, a_zero_point), dequantize(b, b_scale, b_zero_point))
        return requantized(y, y_scale, y_zero_point, a, straight_through)

    return operator


def _of_one(
    operands: Sequence[Tensor], compute: Callable[[Tensor], Tensor], straight_through: bool
) -> Tensor:
    """Codes of what is computed of numbers in codes.

    Args:
        operands: codes, their scale and zero point; the scale and, unless it is left out, the zero
            point of the result.
        compute: from numbers to numbers.
        straight_through: codes stay floating.
    """
    x, x_scale, x_zero_point, y_scale, y_zero_point = (*operands, None)[:5]
    assert x is not None and x_scale is not None and y_scale is not None
    y = compute(dequantize(x, x_scale, x_zero_point))
    return requantized(y, y_scale, y_zero_point, x, straight_through)


def _sigmoid(*operands: Tensor, straight_through: bool) -> Tensor:
    return _of_one(operands, torch.sigmoid, straight_through)


def _leaky_relu(*operands: Tensor, straight_through: bool, alpha: float = 0.01) -> Tensor:
    return _of_one(operands, partial(leaky_relu, alpha=alpha), straight_through)


def _softmax(*operands: Tensor, straight_through: bool, opset: int, axis: int = -1) -> Tensor:
    return _of_one(operands, partial(softmax, opset=opset, axis=axis), straight_through)


def _average(
    *operands: Tensor,
    straight_through: bool,
    kernel_shape: Sequence[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    compute = partial(
        average_pool,
        kernel_shape=kernel_shape,
        auto_pad=auto_pad,
        ceil_mode=ceil_mode,
        count_include_pad=count_include_pad,
        pads=pads,
        strides=strides,
    )
    return _of_one(operands, compute, straight_through)


def _global_average(*operands: Tensor, straight_through: bool, channels_last: int = 0) -> Tensor:
    first = 1 if channels_last else 2
    axes = list(range(first, first + operands[0].ndim - 2))
    return _of_one(operands, partial(torch.mean, dim=axes, keepdim=True), straight_through)


def _concat(
    y_scale: Tensor,
    y_zero_point: Tensor,
    *parts: Tensor,
    straight_through: bool,
    axis: int,
) -> Tensor:
    triples = zip(parts[0::3], parts[1::3], parts[2::3], strict=True)
    whole = torch.cat([dequantize(*triple) for triple in triples], axis)
    return requantized(whole, y_scale, y_zero_point, parts[0], straight_through)


def _gemm(
    a: Tensor,
    a_scale: Tensor,
    a_zero_point: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero_point: Tensor,
    c: Tensor | None = None,
    y_scale: Tensor | None = None,
    y_zero_point: Tensor | None = None,
    *,
    straight_through: bool,
    alpha: float = 1.0,
    transA: int = 0,  # noqa: N803
    transB: int = 0,  # noqa: N803
) -> Tensor:
    left, right = a.T if transA else a, b.T if transB else b
    total = matmul_of_codes(left, right, a_zero_point, b_zero_point)
    # The bias is in codes of the products.
    total = total if c is None else total + c
    y = total.to(torch.float32) * (alpha * a_scale * b_scale)
    if y_scale is None:
        return y
    return requantized(y, y_scale, y_zero_point, a, straight_through)


OPERATORS: Table = {
    "DequantizeLinear": dequantize,
    "DynamicQuantizeLSTM": _dynamic_lstm,
    "DynamicQuantizeMatMul": _dynamic_matmul,
    "GatherBlockQuantized": _gather_of_blocks,
    "MatMulIntegerToFloat": _matmul_to_float,
    "MatMulNBits": _matmul_of_bits,
    "QGemm": _gemm,
    "QLinearAdd": _of_two(torch.add),
    "QLinearAveragePool": _average,
    "QLinearConcat": _concat,
    "QLinearGlobalAveragePool": _global_average,
    "QLinearLeakyRelu": _leaky_relu,
    "QLinearMul": _of_two(torch.mul),
    "QLinearSigmoid": _sigmoid,
    "QLinearSoftmax": _softmax,
    "QuantizeLinear": quantize,
}
"""Of the domain com.microsoft."""

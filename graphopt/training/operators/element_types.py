"""Element types of ONNX as torch holds them, and the conversions between them.

torch has no tensors of 2 or 4 bits: their numbers are held in 8. A FLOAT4E2M1 is held as a
float8_e4m3fn, which has all of its numbers.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from graphopt.content import read_array
from graphopt.errors import ModelError
from graphopt.training.operators.straight_through import through

TORCH_TYPES: Mapping[ir.DataType, torch.dtype] = {
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.BOOL: torch.bool,
    ir.DataType.COMPLEX64: torch.complex64,
    ir.DataType.COMPLEX128: torch.complex128,
    ir.DataType.DOUBLE: torch.float64,
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.FLOAT4E2M1: torch.float8_e4m3fn,
    ir.DataType.FLOAT8E4M3FN: torch.float8_e4m3fn,
    ir.DataType.FLOAT8E4M3FNUZ: torch.float8_e4m3fnuz,
    ir.DataType.FLOAT8E5M2: torch.float8_e5m2,
    ir.DataType.FLOAT8E5M2FNUZ: torch.float8_e5m2fnuz,
    ir.DataType.FLOAT8E8M0: torch.float8_e8m0fnu,
    ir.DataType.INT2: torch.int8,
    ir.DataType.INT4: torch.int8,
    ir.DataType.INT8: torch.int8,
    ir.DataType.INT16: torch.int16,
    ir.DataType.INT32: torch.int32,
    ir.DataType.INT64: torch.int64,
    ir.DataType.UINT2: torch.uint8,
    ir.DataType.UINT4: torch.uint8,
    ir.DataType.UINT8: torch.uint8,
    ir.DataType.UINT16: torch.uint16,
    ir.DataType.UINT32: torch.uint32,
    ir.DataType.UINT64: torch.uint64,
}
"""Of each element type that a tensor here can have."""

NARROW_FLOATS = frozenset(
    {
        ir.DataType.FLOAT4E2M1,
        ir.DataType.FLOAT8E4M3FN,
        ir.DataType.FLOAT8E4M3FNUZ,
        ir.DataType.FLOAT8E5M2,
        ir.DataType.FLOAT8E5M2FNUZ,
        ir.DataType.FLOAT8E8M0,
    }
)
"""Floating-point types that nothing is computed in."""

FLOATS_8 = frozenset(
    {torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz}
    | {torch.float8_e8m0fnu}
)

BARE_UNSIGNED = frozenset({torch.uint16, torch.uint32, torch.uint64})
"""Types that torch stores, and has next to no kernels for."""

_FLOAT4_MAXIMUM = 6.0

_FLOAT8_E4M3FN_LIMIT = 464.0
"""Half way from the largest number of the type to the one that would follow it."""

_BITS_VIEWED = {1: np.uint8, 2: np.int16}
"""By bytes of an element: what numpy hands to torch of a type that numpy itself has not."""


def torch_type(dtype: int) -> torch.dtype:
    """The type of tensors for an element type.

    Args:
        dtype: as ONNX numbers them.

    Raises:
        ModelError: nothing is computed here in the type, as in strings.
    """
    known = TORCH_TYPES.get(ir.DataType(dtype))
    if known is None:
        raise ModelError(f"tensors of {ir.DataType(dtype).name} cannot be computed with in torch")
    return known


def from_onnx(tensor: ir.TensorProtocol, device: torch.device) -> Tensor:
    """The numbers of a tensor, copied.

    Raises:
        ModelError: nothing is computed here in the type.
    """
    dtype = torch_type(tensor.dtype)
    array = np.ascontiguousarray(read_array(tensor)).reshape(tuple(tensor.shape.numpy()))
    if tensor.dtype is ir.DataType.FLOAT4E2M1:
        return torch.tensor(array.astype(np.float32), device=device).to(dtype)
    if tensor.dtype.bitwidth < 8:
        return torch.tensor(array.astype(np.int8), device=device).to(dtype)
    if tensor.dtype is not ir.DataType.BFLOAT16 and tensor.dtype not in NARROW_FLOATS:
        return torch.tensor(array, device=device)
    return torch.tensor(array.view(_BITS_VIEWED[array.itemsize]), device=device).view(dtype)


def cast(
    x: Tensor,
    dtype: int,
    saturate: bool = True,
    round_mode: str = "up",
    straight_through: bool = False,
) -> Tensor:
    """Convert to an element type, as the operator Cast of ONNX does.

    Args:
        x: of any shape and type.
        dtype: as ONNX numbers them.
        saturate: numbers beyond those of an 8-bit floating type become its largest.
        round_mode: of powers of two, where the type is FLOAT8E8M0: up, down or nearest.
        straight_through: numbers of a narrow floating type stay in the type that they come in, and
            the gradient passes.
    """
    if straight_through and dtype in NARROW_FLOATS and x.dtype not in FLOATS_8:
        return through(x, _cast(x, ir.DataType(dtype), saturate, round_mode).to(x.dtype))
    return _cast(x, ir.DataType(dtype), saturate, round_mode)


def _cast(x: Tensor, dtype: ir.DataType, saturate: bool, round_mode: str) -> Tensor:
    target = torch_type(dtype)
    if dtype is ir.DataType.BOOL:
        return x != 0
    if dtype in (ir.DataType.INT2, ir.DataType.INT4, ir.DataType.UINT2, ir.DataType.UINT4):
        return wrap(x, dtype.bitwidth, dtype.is_signed()).to(target)
    if dtype not in NARROW_FLOATS:
        return x.to(target)
    wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    if dtype is ir.DataType.FLOAT4E2M1:
        return _to_float4(wide).to(target)
    if dtype is ir.DataType.FLOAT8E8M0:
        return _to_power_of_two(wide, round_mode).to(target)
    if saturate:
        limits = torch.finfo(target)
        wide = wide.clamp(limits.min, limits.max)
    elif target == torch.float8_e4m3fn:
        # torch saturates in this type alone.
        wide = torch.where(wide.abs() > _FLOAT8_E4M3FN_LIMIT, float("nan"), wide)
    return wide.to(target)


def wrap(x: Tensor, bits: int, is_signed: bool) -> Tensor:
    """The lower bits of integers: int64 of the shape of `x`.

    Args:
        x: rounded towards zero where it is floating.
        bits: how many, below 64.
        is_signed: the highest of them counts negative.
    """
    half = 1 << (bits - 1) if is_signed else 0
    return ((x.to(torch.int64) + half) & ((1 << bits) - 1)) - half


def _to_float4(x: Tensor) -> Tensor:
    """The nearest of 0, 0.5, 1, 1.5, 2, 3, 4 and 6, ties to the even mantissa; 0 of no number."""
    x = torch.where(torch.isnan(x), torch.zeros_like(x), x)
    size = x.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0)).to(x.dtype)
    return ((x / step).round() * step).clamp(-_FLOAT4_MAXIMUM, _FLOAT4_MAXIMUM)


def _to_power_of_two(x: Tensor, round_mode: str) -> Tensor:
    # A number is mantissa * 2**exponent with a mantissa of 0.5 to 1.
    mantissa, exponent = torch.frexp(x)
    least = {"up": 0.5, "nearest": 0.75 - 1e-9, "down": 1.0}[round_mode]
    power = torch.where(mantissa > least, exponent, exponent - 1).clamp(-127, 127)
    power = torch.where(x == 0, -127, power)
    return torch.ldexp(torch.ones_like(x), power)

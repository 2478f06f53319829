"""Operators of two and more tensors: arithmetic, comparisons, logic, and products of matrices."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from graphopt.training.operators.arguments import integer
from graphopt.training.operators.operator_types import Table


def _divide(a: Tensor, b: Tensor) -> Tensor:
    if a.is_floating_point() or b.is_floating_point():
        return torch.div(a, b)
    return torch.div(a, b, rounding_mode="trunc")


def _power(base: Tensor, exponent: Tensor) -> Tensor:
    return torch.pow(base, exponent).to(base.dtype)


def _modulo(a: Tensor, b: Tensor, *, fmod: int = 0) -> Tensor:
    return torch.fmod(a, b) if fmod else torch.remainder(a, b)


def _maximum(*tensors: Tensor) -> Tensor:
    return reduce(torch.maximum, tensors)


def _minimum(*tensors: Tensor) -> Tensor:
    return reduce(torch.minimum, tensors)


def _sum(*tensors: Tensor) -> Tensor:
    return reduce(torch.add, tensors)


def _mean(*tensors: Tensor) -> Tensor:
    return _sum(*tensors) / len(tensors)


def _shift(a: Tensor, b: Tensor, *, direction: str) -> Tensor:
    # To shift by as many bits as there are, or more, is undefined in C, and so it is in torch.
    bits = 8 * a.itemsize
    if direction == "RIGHT" and a.dtype.is_signed:
        return a >> b.clamp(max=bits - 1)
    shifted = a << b if direction == "LEFT" else a >> b
    return torch.where(b >= bits, torch.zeros_like(shifted), shifted)


def _where(condition: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return torch.where(condition, x, y)


def _gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,  # noqa: N803
    transB: int = 0,  # noqa: N803
) -> Tensor:
    a = a.T if transA else a
    b = b.T if transB else b
    if not a.is_floating_point():
        alpha, beta = int(alpha), int(beta)
    if c is None:
        product = torch.mm(a, b)
        return product if alpha == 1 else product * alpha
    if c.dtype == a.dtype:
        return torch.addmm(c, a, b, alpha=alpha, beta=beta)
    return alpha * torch.mm(a, b) + beta * c


def _einsum(*tensors: Tensor, equation: str) -> Tensor:
    return torch.einsum(equation.replace(" ", ""), *tensors)


def _determinant(x: Tensor) -> Tensor:
    determinant: Tensor = torch.linalg.det(x)
    return determinant


def _cumulate(x: Tensor, axis: Tensor, *, exclusive: int, reverse: int, kind: str) -> Tensor:
    along = integer(axis) % x.ndim
    x = x.flip(along) if reverse else x
    if exclusive:
        start = torch.full_like(x.narrow(along, 0, 1), 0 if kind == "sum" else 1)
        x = torch.cat((start, x.narrow(along, 0, x.shape[along] - 1)), along)
    done = torch.cumsum(x, along) if kind == "sum" else torch.cumprod(x, along)
    return (done.flip(along) if reverse else done).to(x.dtype)


def _cumulative_sum(x: Tensor, axis: Tensor, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    return _cumulate(x, axis, exclusive=exclusive, reverse=reverse, kind="sum")


def _cumulative_product(x: Tensor, axis: Tensor, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    return _cumulate(x, axis, exclusive=exclusive, reverse=reverse, kind="product")


OPERATORS: Table = {
    "Add": torch.add,
    "And": torch.logical_and,
    "BitShift": _shift,
    "BitwiseAnd": torch.bitwise_and,
    "BitwiseOr": torch.bitwise_or,
    "BitwiseXor": torch.bitwise_xor,
    "CumProd": _cumulative_product,
    "CumSum": _cumulative_sum,
    "Det": _determinant,
    "Div": _divide,
    "Einsum": _einsum,
    "Equal": torch.eq,
    "Gemm": _gemm,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "MatMul": torch.matmul,
    "Max": _maximum,
    "Mean": _mean,
    "Min": _minimum,
    "Mod": _modulo,
    "Mul": torch.mul,
    "Or": torch.logical_or,
    "Pow": _power,
    "Sub": torch.sub,
    "Sum": _sum,
    "Where": _where,
    "Xor": torch.logical_xor,
}
"""Of the standard domain."""

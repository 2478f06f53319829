"""merge-arithmetic: merge sums, and products, with constants that follow one another."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.contract import Change, Context, Effect, Pass
from graphopt.operators import is_onnx
from graphopt.packing import is_constant
from graphopt.rewriting import constant_tensor, only_reader, small_array
from graphopt.skeleton import known_shape
from graphopt_passes.simplify.chains import Rewriter, maker_for, why_refused
from graphopt_passes.simplify.no_change import broadcasts_into

FIRST_OPSET = 7
"""Before it, operators broadcast by attributes."""

NODE_BYTES = 32
"""What a node takes in the file at least; a merged constant may be that much larger."""

LARGEST_CONSTANT = 1 << 20
"""Elements of constants that are looked at."""

REAL = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16)


@dataclass(frozen=True)
class MergeArithmetic(Pass):
    """Merge Add and Sub, or Mul and Div, with constants that follow one another.

    With constants c and d:

    - (±x + c) + d = ±x + (c + d), and d - (±x + c) = ∓x + (d - c)
    - (c * x) * d = x * (c * d), and d / (c / x) = x * (d / c), and so on for every Mul and Div
    - x * (1 / y) = x / y

    Only floating point, and only where rounding stays what it was. Constants of opposite sign in a
    sum cancel, and with them what they rounded away: that may be their purpose. Factors far from 1
    may be there against overflow. The merged constant takes no more bytes than those that go.
    """

    name: ClassVar[str] = "merge-arithmetic"
    effect: ClassVar[Effect] = Effect.ROUNDING

    def refuse(self, model: ir.Model, context: Context) -> str | None:
        """Opsets below 7 broadcast along axes that an attribute names."""
        return why_refused(model, FIRST_OPSET)

    def apply(self, model: ir.Model, context: Context) -> Change:
        """Merge every such node with the one before it, from the inputs onwards."""
        rewriter = Rewriter(model, context)
        rewriter.rewrite(_merge_sums, "Add", "Sub")
        rewriter.rewrite(_merge_products, "Mul", "Div")
        rewriter.rewrite(_divide, "Mul")
        return rewriter.change


@dataclass(frozen=True)
class _Affine:
    """x + constant or constant - x; or x * constant or constant / x.

    Attributes:
        value: x.
        constant: in double precision.
        direct: x itself, not its negative or reciprocal.
        read: the constant as it is in the graph.
    """

    value: ir.Value
    constant: np.ndarray
    direct: bool
    read: ir.Value


def _affine(node: ir.Node, undo: str) -> _Affine | None:
    """The node in this form; `undo` is Sub beside Add, or Div beside Mul."""
    left, right = node.inputs
    for value, other in ((left, right), (right, left)):
        array = _numbers(other)
        if value is None or other is None or array is None or is_constant(value):
            continue
        if not is_onnx(node, undo):
            return _Affine(value, array, True, other)
        if value is right:
            return _Affine(value, array, False, other)
        return _Affine(value, -array if undo == "Sub" else 1 / array, True, other)
    return None


def _numbers(value: ir.Value | None) -> np.ndarray | None:
    array = small_array(value, LARGEST_CONSTANT)
    if value is None or array is None or value.dtype not in REAL or not array.size:
        return None
    wide = array.astype(np.float64)
    return wide if np.isfinite(wide).all() else None


def _pair(node: ir.Node, undo: str, *op_types: str) -> tuple[_Affine, _Affine] | None:
    outer = _affine(node, undo) if node.outputs[0].dtype in REAL else None
    first = maker_for(outer.value, node, *op_types) if outer is not None else None
    inner = _affine(first, undo) if first is not None else None
    return None if outer is None or inner is None else (outer, inner)


# ------------------------------------------------------------------ sums


def _merge_sums(node: ir.Node, rewriter: Rewriter) -> None:
    pair = _pair(node, "Sub", "Add", "Sub")
    if pair is None:
        return
    outer, inner = pair
    moved = inner.constant if outer.direct else -inner.constant
    if (moved * outer.constant < 0).any():
        rewriter.change.skip(node, "its constant and that before it cancel")
        return
    _become(
        node, ("Add", "Sub"), outer.direct == inner.direct, moved + outer.constant, pair, rewriter
    )


# ------------------------------------------------------------------ products


def _merge_products(node: ir.Node, rewriter: Rewriter) -> None:
    with np.errstate(divide="ignore"):
        pair = _pair(node, "Div", "Mul", "Div")
    if pair is None:
        return
    outer, inner = pair
    limit = _largest_factor(node)
    factors = (inner.constant, outer.constant)
    if not all(_is_between(factor, 1 / limit, limit) for factor in factors):
        rewriter.change.skip(node, "a constant is so far from 1 that it may be there for a reason")
        return
    moved = inner.constant if outer.direct else 1 / inner.constant
    _become(
        node, ("Mul", "Div"), outer.direct == inner.direct, moved * outer.constant, pair, rewriter
    )


def _largest_factor(node: ir.Node) -> float:
    """The fourth root of the largest number: a product of two is far from overflow."""
    dtype = node.outputs[0].dtype
    assert dtype is not None
    largest = float(np.finfo(dtype.numpy()).max)
    return math.sqrt(math.sqrt(largest))


def _is_between(factor: np.ndarray, low: float, high: float) -> bool:
    size = np.abs(factor)
    return bool(((low <= size) & (size <= high)).all())


def _become(
    node: ir.Node,
    op_types: tuple[str, str],
    direct: bool,
    merged: np.ndarray,
    pair: tuple[_Affine, _Affine],
    rewriter: Rewriter,
) -> None:
    """Let the node be x + merged or merged - x, or x * merged or merged / x."""
    outer, inner = pair
    dtype = node.outputs[0].dtype
    assert dtype is not None
    with np.errstate(over="ignore"):
        array = np.asarray(merged, dtype.numpy())
    if not np.isfinite(array).all():
        rewriter.change.skip(node, "the merged constant would be infinite")
        return
    gone = {value for value in (outer.read, inner.read) if only_reader(value) is not None}
    if array.nbytes > sum(_bytes(v) for v in gone) + NODE_BYTES:
        rewriter.change.skip(node, "the merged constant would take more bytes than those that go")
        return
    constant = rewriter.constant(node, array, "merged")
    forward, backward = op_types
    inputs = [inner.value, constant] if direct else [constant, inner.value]
    rewriter.become(node, forward if direct else backward, inputs)
    rewriter.change.count("constants merged")


def _bytes(value: ir.Value) -> int:
    tensor = constant_tensor(value)
    return 0 if tensor is None else tensor.nbytes


# ------------------------------------------------------------------ reciprocals


def _divide(node: ir.Node, rewriter: Rewriter) -> None:
    """Let the product with 1 / y be the quotient by y."""
    left, right = node.inputs
    for value, other in ((left, right), (right, left)):
        first = maker_for(other, node, "Div", "Reciprocal")
        if first is None or node.outputs[0].dtype not in REAL:
            continue
        divisor = _inverted(first, value)
        if divisor is not None:
            rewriter.become(node, "Div", [value, divisor])
            rewriter.change.count("product with a reciprocal made Div")
            return


def _inverted(node: ir.Node, value: ir.Value | None) -> ir.Value | None:
    """The y of 1 / y, where the quotient is no slower than the product was.

    Of Div, onnxruntime makes this quotient itself.
    """
    divisor = node.inputs[-1]
    if is_onnx(node, "Reciprocal"):
        shape = known_shape(divisor)
        return divisor if shape is not None and shape == known_shape(value) else None
    one = small_array(node.inputs[0])
    if one is None or not (one == 1).all():
        return None
    return divisor if broadcasts_into(one.shape, known_shape(divisor)) else None

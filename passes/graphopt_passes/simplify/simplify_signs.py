"""simplify-signs: drop Neg, and multiplication by -1, where another operator can do it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphopt.contract import Change, Context, Effect, Pass
from graphopt.rewriting import only_reader, small_array, why_too_old
from graphopt.skeleton import known_shape
from graphopt_passes.simplify.chains import Rewriter, maker_for
from graphopt_passes.simplify.no_change import broadcasts_into

FIRST_OPSET = 7
"""Before it, operators broadcast by attributes."""


@dataclass(frozen=True)
class SimplifySigns(Pass):
    """Drop Neg, and constants that a shorter operator does without.

    - x + (-y) = x - y, (-x) + y = y - x and x - (-y) = x + y
    - (-x) * (-y) = x * y and (-x) / (-y) = x / y
    - Abs(-x) = Abs(x)
    - x * -1 = x / -1 = -x and 1 / x = Reciprocal(x), where the constant then goes

    All hold bit for bit in floating point, with its two zeros. What does not: 0 - x is 0.0 where x
    is, and -x is -0.0; -(a - b) and b - a differ likewise where a = b.
    """

    name: ClassVar[str] = "simplify-signs"
    effect: ClassVar[Effect] = Effect.EXACT

    def refuse(self, model: ir.Model, context: Context) -> str | None:
        """Opsets below 7 broadcast along axes that an attribute names."""
        return why_too_old(model, FIRST_OPSET)

    def apply(self, model: ir.Model, context: Context) -> Change:
        """Apply every rule until none finds anything."""
        rewriter = Rewriter(model, context)
        rewriter.rewrite(_simplify, *_RULES)
        return rewriter.change


def _simplify(node: ir.Node, rewriter: Rewriter) -> bool:
    return any(rule(node, rewriter) for rule in _RULES[node.op_type])


def _negated(node: ir.Node, index: int) -> ir.Value | None:
    """What the operand is the negative of, if that is all that is done with it."""
    first = maker_for(node.inputs[index], node, "Neg")
    return first.inputs[0] if first is not None else None


def _become(node: ir.Node, op_type: str, inputs: list[ir.Value | None], rewriter: Rewriter) -> bool:
    rewriter.become(node, op_type, inputs)
    rewriter.change.count(f"made {op_type}")
    return True


def _adds_negative(node: ir.Node, rewriter: Rewriter) -> bool:
    left, right = node.inputs
    for index, other in ((1, left), (0, right)):
        value = _negated(node, index)
        if value is not None:
            return _become(node, "Sub", [other, value], rewriter)
    return False


def _subtracts_negative(node: ir.Node, rewriter: Rewriter) -> bool:
    value = _negated(node, 1)
    return value is not None and _become(node, "Add", [node.inputs[0], value], rewriter)


def _two_negatives(node: ir.Node, rewriter: Rewriter) -> bool:
    left, right = _negated(node, 0), _negated(node, 1)
    if left is None or right is None:
        return False
    return _become(node, node.op_type, [left, right], rewriter)


def _of_negative(node: ir.Node, rewriter: Rewriter) -> bool:
    value = _negated(node, 0)
    return value is not None and _become(node, "Abs", [value], rewriter)


# ------------------------------------------------------------------ constants


def _times_minus_one(node: ir.Node, rewriter: Rewriter) -> bool:
    left, right = node.inputs
    pairs = ((left, right), (right, left)) if node.op_type == "Mul" else ((left, right),)
    for value, other in pairs:
        if value is not None and _is_all(other, -1, node) and _may_negate(value):
            shape = small_array(other)
            assert shape is not None
            if broadcasts_into(shape.shape, known_shape(value)):
                return _become(node, "Neg", [value], rewriter)
    return False


def _one_over(node: ir.Node, rewriter: Rewriter) -> bool:
    one, value = node.inputs
    if not _is_all(one, 1, node) or value is None or value.dtype not in _REAL:
        return False
    shape, reader = small_array(one), only_reader(node.outputs[0])
    # Not before a Mul: x * (1 / y) is x / y, which onnxruntime looks for too.
    if shape is None or (reader is not None and reader.op_type == "Mul"):
        return False
    if not broadcasts_into(shape.shape, known_shape(value)):
        return False
    return _become(node, "Reciprocal", [value], rewriter)


_REAL = (ir.DataType.FLOAT, ir.DataType.DOUBLE)


def _may_negate(value: ir.Value) -> bool:
    """Neg is there for the type. It is not for unsigned numbers, and for few small integers."""
    return value.dtype in (*_REAL, ir.DataType.INT32, ir.DataType.INT64)


def _is_all(value: ir.Value | None, number: int, node: ir.Node) -> bool:
    """A constant that has this number everywhere, and that nothing but the node reads."""
    array = small_array(value)
    if array is None or value is None or array.dtype.kind not in "fi" or not array.size:
        return False
    return bool((array == number).all()) and only_reader(value) is node


_RULES: dict[str, tuple[Callable[[ir.Node, Rewriter], bool], ...]] = {
    "Abs": (_of_negative,),
    "Add": (_adds_negative,),
    "Div": (_two_negatives, _times_minus_one, _one_over),
    "Mul": (_two_negatives, _times_minus_one),
    "Sub": (_subtracts_negative,),
}

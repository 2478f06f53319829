"""simplify-logic: rewrite Not, Where and If so that fewer nodes decide the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphopt.contract import Change, Context, Effect, Pass
from graphopt.rewriting import can_replace, replace_value, small_array, why_too_old
from graphopt.skeleton import known_shape
from graphopt_passes.simplify.chains import Rewriter, maker_for, remove_if_unread
from graphopt_passes.simplify.no_change import broadcasts_into

FIRST_OPSET = 12
"""From it on, GreaterOrEqual and LessOrEqual are there."""

NEGATED = {
    "Greater": "LessOrEqual",
    "GreaterOrEqual": "Less",
    "Less": "GreaterOrEqual",
    "LessOrEqual": "Greater",
}


@dataclass(frozen=True)
class SimplifyLogic(Pass):
    """Rewrite Not, Where and If so that fewer nodes decide the same.

    - Where(Not(c), a, b) is Where(c, b, a), and If(Not(c)) is If(c) with its branches exchanged.
    - Where(true, a, b) is a and Where(false, a, b) is b, if that has the shape of the result.
    - Where(c, a, a) is a, if c does not enlarge it.
    - Not(Less(a, b)) is GreaterOrEqual(a, b), and so on, for integers: NaN is neither less nor
      greater.

    Of a Where of floating point, onnxruntime gives 0.0 for -0.0 on one side and -0.0 on the other;
    all else is bit-identical.
    """

    name: ClassVar[str] = "simplify-logic"
    effect: ClassVar[Effect] = Effect.ROUNDING

    def refuse(self, model: ir.Model, context: Context) -> str | None:
        """Older opsets lack operators."""
        return why_too_old(model, FIRST_OPSET)

    def apply(self, model: ir.Model, context: Context) -> Change:
        """Apply every rule until none finds anything."""
        rewriter = Rewriter(model, context)
        rewriter.rewrite(_simplify, *_RULES)
        return rewriter.change


def _simplify(node: ir.Node, rewriter: Rewriter) -> bool:
    return any(rule(node, rewriter) for rule in _RULES[node.op_type])


# ------------------------------------------------------------------ Where and If


def _where_not(node: ir.Node, rewriter: Rewriter) -> bool:
    negation = maker_for(node.inputs[0], node, "Not")
    if negation is None:
        return False
    condition, chosen, otherwise = negation.inputs[0], node.inputs[1], node.inputs[2]
    rewriter.become(node, "Where", [condition, otherwise, chosen])
    rewriter.change.count("Not before Where dropped")
    return True


def _where_decided(node: ir.Node, rewriter: Rewriter) -> bool:
    """A condition that is the same everywhere, or two values that are."""
    condition, chosen, otherwise = node.inputs
    decided = small_array(condition)
    if chosen is not otherwise and (decided is None or decided.any() != decided.all()):
        return False
    value, other = (
        (otherwise, chosen) if decided is not None and not decided.any() else (chosen, otherwise)
    )
    if value is None or not all(v is value or _is_no_larger(v, value) for v in (condition, other)):
        rewriter.change.skip(node, "what it does not choose may enlarge the result")
        return False
    if not can_replace(node.outputs[0], value):
        return False
    replace_value(node.outputs[0], value)
    remove_if_unread(node)
    rewriter.change.count("decided Where dropped")
    return True


def _is_no_larger(other: ir.Value | None, value: ir.Value) -> bool:
    """Broadcasting against the other does not change the shape of the value, for certain."""
    shape = known_shape(other)
    if shape is None or not shape.is_static():
        return False
    return broadcasts_into(tuple(int(d) for d in shape.numpy()), known_shape(value))


def _if_not(node: ir.Node, rewriter: Rewriter) -> bool:
    negation = maker_for(node.inputs[0], node, "Not")
    if negation is None:
        return False
    branches = [node.attributes["then_branch"], node.attributes["else_branch"]]
    if any(branch.is_ref() for branch in branches):
        return False
    chosen, otherwise = (branch.as_graph() for branch in branches)
    node.attributes["then_branch"] = ir.AttrGraph("then_branch", otherwise)
    node.attributes["else_branch"] = ir.AttrGraph("else_branch", chosen)
    node.replace_input_with(0, negation.inputs[0])
    remove_if_unread(negation)
    rewriter.change.count("Not before If dropped")
    return True


# ------------------------------------------------------------------ Not


def _not_compared(node: ir.Node, rewriter: Rewriter) -> bool:
    first = maker_for(node.inputs[0], node, *NEGATED)
    if first is None:
        return False
    # Those are the integers for which onnxruntime has all four operators in every opset.
    if any(
        v is None or v.dtype not in (ir.DataType.INT32, ir.DataType.INT64) for v in first.inputs
    ):
        rewriter.change.skip(node, "for NaN, not less is not the same as greater or equal")
        return False
    rewriter.become(node, NEGATED[first.op_type], list(first.inputs))
    rewriter.change.count("Not of a comparison merged")
    return True


_RULES: dict[str, tuple[Callable[[ir.Node, Rewriter], bool], ...]] = {
    "If": (_if_not,),
    "Not": (_not_compared,),
    "Where": (_where_not, _where_decided),
}

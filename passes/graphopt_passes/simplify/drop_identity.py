"""drop-identity: remove nodes that pass their input through unchanged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.contract import Change, Context, Effect, Pass
from graphopt.operators import ONNX_DOMAINS, all_graphs, opset_of
from graphopt.rewriting import (
    can_replace,
    is_read,
    replace_value,
    small_array,
    why_too_old,
)
from graphopt.skeleton import known_shape
from graphopt_passes.simplify.no_change import UNCHANGED, broadcasts_into, same_before

FIRST_OPSET = 7
"""Before it, operators broadcast by attributes, and Dropout trains by default."""


@dataclass(frozen=True)
class DropIdentity(Pass):
    """Remove nodes that pass their input through unchanged, in subgraphs too.

    Identity itself, and all that is one in effect: Cast to the same type, Transpose that moves
    nothing, Reshape to the shape that is there already, Slice of the whole, Concat of one, adding
    -0.0, multiplying by 1, the second of two Neg or Relu, and so on. What changes a single bit
    stays: adding +0.0 turns -0.0 into 0.0, and Clip without bounds makes infinity finite.

    A node stays where a graph would otherwise return its own input, a constant, a value of an
    outer graph, or one value under two names.
    """

    name: ClassVar[str] = "drop-identity"
    effect: ClassVar[Effect] = Effect.EXACT

    def refuse(self, model: ir.Model, context: Context) -> str | None:
        """Opsets below 7 give the same operators other meanings."""
        return why_too_old(model, FIRST_OPSET)

    def apply(self, model: ir.Model, context: Context) -> Change:
        """Remove every such node, from the inputs onwards."""
        change = Change()
        opset = opset_of(model)
        for graph in all_graphs(model):
            for node in graph:
                _drop(node, opset, change)
        return change


def _drop(node: ir.Node, opset: int, change: Change) -> None:
    passed = _passed_on(node, opset)
    if passed is None:
        return
    if isinstance(passed, str):
        change.skip(node, passed)
        return
    if not can_replace(node.outputs[0], passed):
        change.skip(node, _why_kept(node, passed))
        return
    first = same_before(node) if node.op_type in _UNDO_THEMSELVES else None
    replace_value(node.outputs[0], passed)
    _remove(node, change)
    if first is not None and not is_read(first):
        _remove(first, change)


def _remove(node: ir.Node, change: Change) -> None:
    assert isinstance(node.graph, ir.Graph)
    node.graph.remove(node, safe=True)
    change.count(f"{node.op_type} removed")


def _why_kept(node: ir.Node, passed: ir.Value) -> str:
    if passed.is_graph_output():
        return "the graph outputs both its input and its output"
    if passed.graph is not node.graph:
        return "it brings a value of an outer graph to an output of the subgraph"
    what = "an input of the graph" if passed.is_graph_input() else "a constant"
    return f"it brings {what} to an output of the graph"


# ------------------------------------------------------------------ what a node passes on

Verdict = ir.Value | str | None
"""The value that a node passes on; or why it nearly does; or None."""


def _passed_on(node: ir.Node, opset: int) -> Verdict:
    op_type = node.op_type
    if op_type not in _KINDS or node.domain not in ONNX_DOMAINS:
        return None
    if not node.inputs or not node.outputs:
        return None
    if any(o.uses() or o.is_graph_output() for o in node.outputs[1:]):
        return None
    if op_type in _NEUTRAL:
        return _beside_neutral(node, *_NEUTRAL[op_type])
    if op_type in _UNDO_THEMSELVES:
        return _before_its_inverse(node)
    unchanged = UNCHANGED.get(op_type)
    if unchanged is None or node.inputs[0] is None or not unchanged(node, opset):
        return None
    return node.inputs[0]


def _before_its_inverse(node: ir.Node) -> ir.Value | None:
    """f(f(x)) = x."""
    first = same_before(node)
    return None if first is None else first.inputs[0]


_UNDO_THEMSELVES = ("BitwiseNot", "Neg", "Not")


# ------------------------------------------------------------------ neutral constants


def _beside_neutral(
    node: ir.Node, is_neutral: Callable[[np.ndarray], bool], commutes: bool
) -> Verdict:
    """x, where the node computes x + 0, x * 1 and the like, and the constant enlarges nothing."""
    if len(node.inputs) != 2:
        return None
    left, right = node.inputs
    for value, other in ((left, right), (right, left))[: 1 + commutes]:
        constant = small_array(other)
        if value is None or constant is None:
            continue
        if node.op_type == "Add" and _is_positive_zero(constant):
            return "adding +0.0 turns -0.0 into 0.0"
        if not is_neutral(constant):
            continue
        # Powers of integers go through floating point, which rounds.
        if node.op_type == "Pow" and value.dtype not in (ir.DataType.FLOAT, ir.DataType.DOUBLE):
            return f"Pow by 1 is not known to be exact for {value.dtype}"
        if not broadcasts_into(constant.shape, known_shape(value)):
            return "the constant operand may enlarge the result"
        return value
    return None


def _is_real(array: np.ndarray) -> bool:
    return array.dtype.kind in "fiu"


def _is_positive_zero(array: np.ndarray) -> bool:
    if array.dtype.kind != "f" or not array.size:
        return False
    return not array.any() and not np.signbit(array).all()


def _adds_nothing(array: np.ndarray) -> bool:
    """-0.0 is the neutral element of floating-point addition: -0.0 + 0.0 = 0.0."""
    if not _is_real(array) or array.any():
        return False
    return array.dtype.kind != "f" or bool(np.signbit(array).all())


def _subtracts_nothing(array: np.ndarray) -> bool:
    if not _is_real(array) or array.any():
        return False
    return array.dtype.kind != "f" or not np.signbit(array).any()


def _is_one(array: np.ndarray) -> bool:
    return _is_real(array) and bool((array == 1).all())


def _is_true(array: np.ndarray) -> bool:
    return array.dtype.kind == "b" and bool(array.all())


def _is_false(array: np.ndarray) -> bool:
    return array.dtype.kind == "b" and not array.any()


_NEUTRAL: dict[str, tuple[Callable[[np.ndarray], bool], bool]] = {
    "Add": (_adds_nothing, True),
    "And": (_is_true, True),
    "Div": (_is_one, False),
    "Mul": (_is_one, True),
    "Or": (_is_false, True),
    "Pow": (_is_one, False),
    "Sub": (_subtracts_nothing, False),
    "Xor": (_is_false, True),
}
"""For binary operators: which constants are neutral, and whether on the left side as well."""

_KINDS = frozenset({*_NEUTRAL, *_UNDO_THEMSELVES, *UNCHANGED})
"""The operators of which a node may pass its input on."""

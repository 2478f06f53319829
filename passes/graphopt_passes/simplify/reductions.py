"""What reductions say about their axes."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from graphopt.operators import is_onnx
from graphopt.rewriting import stated_integers
from graphopt_passes.simplify.chains import Rewriter, axes_of, rank_of

REDUCTIONS = (
    "ReduceL1",
    "ReduceL2",
    "ReduceLogSum",
    "ReduceLogSumExp",
    "ReduceMax",
    "ReduceMean",
    "ReduceMin",
    "ReduceProd",
    "ReduceSum",
    "ReduceSumSquare",
)

AXES_ARE_INPUTS = 18
"""From this opset on, the axes of every reduction are an input; those of ReduceSum from 13 on."""


def reduced_axes(node: ir.Node) -> tuple[int, ...] | None:
    """The axes of a reduction or of ArgMax and ArgMin, from the front; None if not known."""
    rank = rank_of(node.inputs[0])
    if is_onnx(node, "ArgMax", "ArgMin"):
        return axes_of((node.attributes.get_int("axis", 0),), rank)
    axes = stated_integers(node, "axes", 1)
    if axes != ():
        return axes_of(axes, rank)
    if rank is None or node.attributes.get_int("noop_with_empty_axes", 0) != 0:
        return None
    return tuple(range(rank))


def keeps_dimensions(node: ir.Node) -> bool:
    """What is reduced stays as a dimension of size 1."""
    return node.attributes.get_int("keepdims", 1) != 0


def become_reduction(
    node: ir.Node, first: ir.Node, axes: Sequence[int], keeps: bool, rewriter: Rewriter
) -> None:
    """Let a node do what a reduction does, over these axes, and keep dimensions or not."""
    attributes = [a for name, a in first.attributes.items() if name in ("select_last_index",)]
    inputs = [first.inputs[0]]
    if is_onnx(first, "ArgMax", "ArgMin"):
        attributes.append(ir.AttrInt64("axis", axes[0]))
    elif rewriter.opset >= AXES_ARE_INPUTS or is_onnx(first, "ReduceSum"):
        inputs.append(rewriter.integers(node, axes, "axes"))
    else:
        attributes.append(ir.AttrInt64s("axes", axes))
    if not keeps:
        attributes.append(ir.AttrInt64("keepdims", 0))
    rewriter.become(node, first.op_type, inputs, attributes)

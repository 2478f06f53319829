"""merge-reductions: merge reductions with one another and with a Transpose before them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphopt.contract import Change, Context, Effect, Pass
from graphopt.rewriting import can_replace, replace_value
from graphopt_passes.simplify.chains import (
    Rewriter,
    maker_for,
    rank_of,
    remove_if_unread,
    size_at,
    why_refused,
)
from graphopt_passes.simplify.reductions import become_reduction, keeps_dimensions, reduced_axes

KINDS = ("ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum")
"""Reductions of a single number to itself, and of the results of such reductions to their own."""


@dataclass(frozen=True)
class MergeReductions(Pass):
    """Merge ReduceSum, ReduceMean, ReduceMax, ReduceMin and ReduceProd with what is before them.

    - The sum of sums is the sum over all axes, and so for the others. Only where these axes lie
      side by side: over others onnxruntime is slower.
    - Over axes of size 1 nothing is reduced: a Squeeze, or nothing.
    - Of a Transpose, a reduction takes other axes of what was there before, if what is left is in
      the order it had.
    """

    name: ClassVar[str] = "merge-reductions"
    effect: ClassVar[Effect] = Effect.ROUNDING

    def refuse(self, model: ir.Model, context: Context) -> str | None:
        """Older opsets state axes in an attribute, also for ReduceSum."""
        return why_refused(model)

    def apply(self, model: ir.Model, context: Context) -> Change:
        """Merge every reduction with what is before it, from the inputs onwards."""
        rewriter = Rewriter(model, context)
        rewriter.rewrite(_merge, *KINDS)
        return rewriter.change


def _merge(node: ir.Node, rewriter: Rewriter) -> bool:
    axes = reduced_axes(node)
    if not axes:
        return False
    return any(rule(node, axes, rewriter) for rule in (_drop, _of_reduction, _of_transpose))


def _drop(node: ir.Node, axes: tuple[int, ...], rewriter: Rewriter) -> bool:
    source = node.inputs[0]
    if source is None or any(size_at(source, axis) != 1 for axis in axes):
        return False
    if not keeps_dimensions(node):
        rewriter.become(node, "Squeeze", [source, rewriter.integers(node, axes, "axes")])
    elif can_replace(node.outputs[0], source):
        replace_value(node.outputs[0], source)
        remove_if_unread(node)
    else:
        return False
    rewriter.change.count("reduction of single elements dropped")
    return True


def _of_reduction(node: ir.Node, axes: tuple[int, ...], rewriter: Rewriter) -> bool:
    first = maker_for(node.inputs[0], node, node.op_type)
    inner, rank = (reduced_axes(first), rank_of(first.inputs[0])) if first else (None, None)
    if first is None or inner is None or rank is None or not _may_regroup(node):
        return False
    if not keeps_dimensions(first):
        left = [axis for axis in range(rank) if axis not in inner]
        axes = tuple(left[axis] for axis in axes)
    if keeps_dimensions(first) != keeps_dimensions(node) and not (
        keeps_dimensions(first) and set(inner) <= set(axes)
    ):
        rewriter.change.skip(node, "it and the reduction before it do not keep the same dimensions")
        return False
    merged = sorted({*inner, *axes})
    if not _side_by_side(merged):
        rewriter.change.skip(node, "it and the one before it reduce axes that lie apart")
        return False
    become_reduction(node, first, merged, keeps_dimensions(node), rewriter)
    rewriter.change.count(f"{node.op_type}s merged")
    return True


def _may_regroup(node: ir.Node) -> bool:
    """A mean of integers is rounded down, and another one when taken in two steps."""
    dtype = node.outputs[0].dtype
    return node.op_type != "ReduceMean" or (dtype is not None and dtype.is_floating_point())


def _side_by_side(axes: Collection[int]) -> bool:
    return max(axes) - min(axes) == len(axes) - 1


def _of_transpose(node: ir.Node, axes: tuple[int, ...], rewriter: Rewriter) -> bool:
    first = maker_for(node.inputs[0], node, "Transpose")
    rank = rank_of(node.inputs[0])
    if first is None or rank is None:
        return False
    order = first.attributes.get_ints("perm", tuple(reversed(range(rank))))
    before = tuple(sorted(order[axis] for axis in axes))
    keeps = keeps_dimensions(node)
    # Where the dimensions of the result come from; those that are reduced, from nowhere.
    wanted = [None if i in axes else order[i] for i in range(rank) if keeps or i not in axes]
    found = [None if i in before else i for i in range(rank) if keeps or i not in before]
    if wanted != found or not _side_by_side(before):
        rewriter.change.skip(node, "the Transpose before it also orders what is left")
        return False
    node.replace_input_with(0, first.inputs[0])
    become_reduction(node, node, before, keeps, rewriter)
    remove_if_unread(first)
    rewriter.change.count("Transpose before reduction dropped")
    return True

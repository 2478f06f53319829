"""merge-expands: merge Expand and Tile with one another, and Expand into what broadcasts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.contract import Change, Context, Effect, Pass
from graphopt.operators import BROADCASTING, is_onnx
from graphopt.rewriting import input_of, small_integers
from graphopt_passes.simplify.chains import (
    Rewriter,
    maker_for,
    maker_of,
    remove_if_unread,
    sizes_of,
    why_refused,
)


@dataclass(frozen=True)
class MergeExpands(Pass):
    """Merge Expand and Tile with one another, and Expand into operators that broadcast.

    - f(Expand(x, s), y) is f(x, y) where y alone has the sizes to which x was enlarged: they are
      known, or s is the shape of y.
    - Expand(Expand(x, s), t) is Expand(x, u), where u is s and t broadcast against each other.
    - Tile(Tile(x, r), s) is Tile(x, r * s).
    """

    name: ClassVar[str] = "merge-expands"
    effect: ClassVar[Effect] = Effect.EXACT
    operators: ClassVar[frozenset[str] | None] = frozenset({"Expand", "Tile"})

    def refuse(self, model: ir.Model, context: Context) -> str | None:
        """Older opsets broadcast, tile and expand in other ways."""
        return why_refused(model)

    def apply(self, model: ir.Model, context: Context) -> Change:
        """Merge from the inputs onwards."""
        rewriter = Rewriter(model, context)
        rewriter.rewrite(_merge_into, "Expand", "Tile")
        rewriter.rewrite(_drop_before, *sorted(BROADCASTING))
        return rewriter.change


def _merge_into(node: ir.Node, rewriter: Rewriter) -> None:
    first = maker_for(node.inputs[0], node, node.op_type)
    if first is None:
        return
    outer, inner = small_integers(node.inputs[1]), small_integers(first.inputs[1])
    if outer is None or inner is None:
        rewriter.change.skip(
            node, f"it or the {node.op_type} before it enlarges by what is computed"
        )
        return
    if node.op_type == "Expand":
        merged = list(np.broadcast_shapes(outer, inner)) if _fit(outer, inner) else None
    else:
        merged = [a * b for a, b in zip(outer, inner, strict=True)]
    if merged is None:
        return
    what = "shape" if node.op_type == "Expand" else "repeats"
    rewriter.become(node, node.op_type, [first.inputs[0], rewriter.integers(node, merged, what)])
    rewriter.change.count(f"{node.op_type}s merged")


def _fit(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """The shapes broadcast against each other."""
    pairs = zip(reversed(one), reversed(other), strict=False)
    return all(1 in pair or pair[0] == pair[1] for pair in pairs) and min(*one, *other, 1, 1) >= 0


def _drop_before(node: ir.Node, rewriter: Rewriter) -> None:
    dtype = node.outputs[0].dtype
    if is_onnx(node, "Where") and (dtype is None or dtype.is_floating_point()):
        return
    for index, value in enumerate(node.inputs):
        expand = maker_of(value, node, "Expand")
        if expand is None or value is None:
            continue
        others = [v for i, v in enumerate(node.inputs) if i != index]
        if value in others:
            continue
        if not (_takes_shape_of(expand, others) or _have_sizes(others, expand)):
            rewriter.change.skip(
                node, "its other operands may not have the sizes that Expand gives"
            )
            continue
        node.replace_input_with(index, expand.inputs[0])
        remove_if_unread(expand)
        rewriter.change.count("Expand before a broadcasting operator dropped")


def _takes_shape_of(expand: ir.Node, others: list[ir.Value | None]) -> bool:
    """Enlarged to the shape of an operand, it meets an operand of that shape."""
    shape = maker_of(input_of(expand, 1), expand, "Shape")
    if shape is None or shape.attributes:
        return False
    return any(value is not None and value is shape.inputs[0] for value in others)


def _have_sizes(others: list[ir.Value | None], expand: ir.Node) -> bool:
    """Where the Expand enlarges, or may, the other operands have that size, and it is known."""
    before, after = sizes_of(expand.inputs[0]), sizes_of(expand.outputs[0])
    if before is None or after is None:
        return False
    target = small_integers(input_of(expand, 1))
    for place, size in enumerate(reversed(after), start=1):
        asks_for_one = target is not None and (place > len(target) or target[-place] == 1)
        if place <= len(before) and (asks_for_one or before[-place] not in (None, 1)):
            continue
        if size is None or not any(_has_size(value, place, size) for value in others):
            return False
    return True


def _has_size(value: ir.Value | None, place: int, size: int) -> bool:
    """The value gives this size to a result; 1 it gives by having the dimension at all."""
    sizes = sizes_of(value)
    return sizes is not None and place <= len(sizes) and size in (1, sizes[-place])

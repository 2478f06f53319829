"""absorb-unsqueezes: let Gather and reductions keep or drop the dimension that is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.contract import Change, Context, Effect, Pass
from graphopt.rewriting import only_reader, small_array, stated_integers
from graphopt_passes.simplify.chains import (
    Bounds,
    Rewriter,
    axes_of,
    axis_attribute,
    bounds_of,
    maker_for,
    maker_of,
    part_of,
    rank_of,
    why_refused,
)
from graphopt_passes.simplify.no_change import WHOLE
from graphopt_passes.simplify.reductions import (
    REDUCTIONS,
    become_reduction,
    keeps_dimensions,
    reduced_axes,
)


@dataclass(frozen=True)
class AbsorbUnsqueezes(Pass):
    """Let Gather and reductions keep or drop the dimension that an Unsqueeze or Squeeze is for.

    - Unsqueeze, of the same axes, of a reduction, ArgMax or ArgMin that drops them: it keeps them.
    - Squeeze of those that such a node keeps: it drops them.
    - Unsqueeze of Gather(x, i) on its axis is Gather(x, [i]), and Squeeze of Gather(x, [i]) is
      Gather(x, i).
    - Squeeze of the axis along which a Slice takes one element is Gather of it, and so are the
      Squeezes of all the outputs of a Split.
    """

    name: ClassVar[str] = "absorb-unsqueezes"
    effect: ClassVar[Effect] = Effect.EXACT
    operators: ClassVar[frozenset[str] | None] = frozenset({"Squeeze", "Unsqueeze"})

    def refuse(self, model: ir.Model, context: Context) -> str | None:
        """Older opsets state axes in an attribute."""
        return why_refused(model)

    def apply(self, model: ir.Model, context: Context) -> Change:
        """Look at what is before every Squeeze and Unsqueeze."""
        rewriter = Rewriter(model, context)
        rewriter.rewrite(_absorb, *_RULES)
        return rewriter.change


def _absorb(node: ir.Node, rewriter: Rewriter) -> bool:
    axes = _axes_of(node)
    if not axes:
        return False
    return any(rule(node, axes, rewriter) for rule in _RULES[node.op_type])


def _axes_of(node: ir.Node) -> tuple[int, ...] | None:
    """The axes of an Unsqueeze, in its result, or of a Squeeze, in its input."""
    axes, rank = stated_integers(node, "axes", 1), rank_of(node.inputs[0])
    if axes is None or rank is None:
        return None
    return axes_of(axes, rank + len(axes) if node.op_type == "Unsqueeze" else rank)


# ------------------------------------------------------------------ reductions


def _keep(node: ir.Node, axes: tuple[int, ...], rewriter: Rewriter) -> bool:
    return _toggle(node, axes, False, rewriter)


def _drop(node: ir.Node, axes: tuple[int, ...], rewriter: Rewriter) -> bool:
    return _toggle(node, axes, True, rewriter)


def _toggle(node: ir.Node, axes: tuple[int, ...], keeps: bool, rewriter: Rewriter) -> bool:
    """Let the reduction that keeps dimensions drop them, or the other way round."""
    first = maker_for(node.inputs[0], node, "ArgMax", "ArgMin", *REDUCTIONS)
    if first is None or keeps_dimensions(first) is not keeps:
        return False
    reduced = reduced_axes(first)
    if reduced is None or set(reduced) != set(axes):
        return False
    name = first.op_type
    become_reduction(node, first, reduced, not keeps, rewriter)
    rewriter.change.count(
        f"{name} drops its dimensions" if keeps else f"{name} keeps its dimensions"
    )
    return True


# ------------------------------------------------------------------ Gather


def _gather_keeps(node: ir.Node, axes: tuple[int, ...], rewriter: Rewriter) -> bool:
    return _regather(node, axes, 0, (1,), rewriter)


def _gather_drops(node: ir.Node, axes: tuple[int, ...], rewriter: Rewriter) -> bool:
    return _regather(node, axes, 1, (), rewriter)


def _regather(
    node: ir.Node, axes: tuple[int, ...], rank: int, shape: tuple[int, ...], rewriter: Rewriter
) -> bool:
    first = maker_for(node.inputs[0], node, "Gather")
    index = small_array(first.inputs[1], 1) if first is not None else None
    if first is None or index is None or index.ndim != rank or index.size != 1:
        return False
    if axes != (axis_attribute(first, rank_of(first.inputs[0])),):
        return False
    _become_gather(node, first.inputs[0], axes[0], index.reshape(shape), rewriter)
    rewriter.change.count(f"{'Squeeze' if rank else 'Unsqueeze'} of Gather absorbed")
    return True


def _become_gather(
    node: ir.Node, source: ir.Value | None, axis: int, index: np.ndarray, rewriter: Rewriter
) -> None:
    place = rewriter.constant(node, index, "index")
    rewriter.become(node, "Gather", [source, place], [ir.AttrInt64("axis", axis)])


# ------------------------------------------------------------------ Slice and Split


def _gather_of_slice(node: ir.Node, axes: tuple[int, ...], rewriter: Rewriter) -> bool:
    first = maker_for(node.inputs[0], node, "Slice")
    bounds = bounds_of(first) if first is not None else None
    if first is None or bounds is None or tuple(bounds) != axes:
        return False
    place = _only_place(bounds[axes[0]])
    if place is None:
        return False
    _become_gather(node, first.inputs[0], axes[0], np.array(place, np.int64), rewriter)
    rewriter.change.count("Slice and Squeeze made Gather")
    return True


def _only_place(bounds: Bounds) -> int | None:
    """The one place that a slice takes, where there is one at all; may count from the back."""
    start, end, step = bounds
    if step == 1 and (end == start + 1 != 0 or (start == -1 and end >= WHOLE)):
        return start
    return None


def _gather_of_split(node: ir.Node, axes: tuple[int, ...], rewriter: Rewriter) -> bool:
    first = maker_of(node.inputs[0], node, "Split")
    if first is None:
        return False
    read = [o for o in first.outputs if o.uses() or o.is_graph_output()]
    readers = [only_reader(output) for output in read]
    if any(r is None or r.op_type != "Squeeze" or r.graph is not node.graph for r in readers):
        return False
    parts = [part_of(output, node) for output in read]
    if any(p is None or (p.axis,) != axes or p.end != p.start + 1 for p in parts):
        return False
    if any(r is not None and _axes_of(r) != axes for r in readers):
        return False
    part = part_of(node.inputs[0], node)
    assert part is not None
    _become_gather(node, part.source, part.axis, np.array(part.start, np.int64), rewriter)
    rewriter.change.count("Split and Squeeze made Gather")
    return True


_RULES: dict[str, tuple[Callable[[ir.Node, tuple[int, ...], Rewriter], bool], ...]] = {
    "Squeeze": (_drop, _gather_drops, _gather_of_slice, _gather_of_split),
    "Unsqueeze": (_keep, _gather_keeps),
}

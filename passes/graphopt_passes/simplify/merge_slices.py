"""merge-slices: merge Slice, Split and Gather by constants with one another and with Concat."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.contract import Change, Context, Effect, Pass
from graphopt.rewriting import can_replace, replace_value, small_array
from graphopt_passes.simplify.chains import (
    Bounds,
    Rewriter,
    axis_attribute,
    bounds_of,
    maker_for,
    maker_of,
    part_of,
    rank_of,
    remove_if_unread,
    size_at,
    split_sizes,
    why_refused,
)
from graphopt_passes.simplify.no_change import WHOLE


@dataclass(frozen=True)
class MergeSlices(Pass):
    """Merge nodes that take parts of a value, where all bounds and indices are constant.

    - Slice(Slice(x)) is one Slice: of different axes always; of one axis, x[a:b][c:d] is
      x[a+c : min(b, a+d)] where a, b, c and d count from the front, and any other where the size
      is known.
    - Gather(Gather(x, i), j) is Gather(x, i[j]), and so with a Slice in the place of either.
    - Split(Split(x)[k]) along the same axis is one Split.
    - Slices of one value that, put together, are all of it become one Split.
    - A Slice or Gather that takes from one operand of a Concat takes from that operand; a Slice
      that takes all of it is that operand.
    - A Split of which one output is read is a Slice.

    Slices that run backwards stay.
    """

    name: ClassVar[str] = "merge-slices"
    effect: ClassVar[Effect] = Effect.EXACT
    operators: ClassVar[frozenset[str] | None] = frozenset({"Concat", "Gather", "Slice", "Split"})

    def refuse(self, model: ir.Model, context: Context) -> str | None:
        """Older opsets state sizes and bounds in attributes."""
        return why_refused(model)

    def apply(self, model: ir.Model, context: Context) -> Change:
        """Merge from the inputs onwards; Splits are made of what is left."""
        rewriter = Rewriter(model, context)
        while _merge_all(rewriter):
            pass
        return rewriter.change


def _merge_all(rewriter: Rewriter) -> bool:
    rewriter.rewrite(_merge, *_RULES)
    before = rewriter.change.counts.total()
    _split_what_slices_cover(rewriter)
    return rewriter.change.counts.total() > before


def _merge(node: ir.Node, rewriter: Rewriter) -> bool:
    return any(rule(node, rewriter) for rule in _RULES[node.op_type])


# ------------------------------------------------------------------ Slice


def _slice_of_slice(node: ir.Node, rewriter: Rewriter) -> bool:
    first = maker_for(node.inputs[0], node, "Slice")
    outer, inner = bounds_of(node), bounds_of(first) if first is not None else None
    if first is None or outer is None or inner is None:
        return False
    merged = dict(inner)
    for axis, bounds in outer.items():
        size = size_at(first.inputs[0], axis)
        part = _within(inner[axis], bounds, size) if axis in inner else bounds
        if part is None:
            rewriter.change.skip(node, "what it takes depends on a size that is not known")
            return False
        merged[axis] = part
    _become_slice(node, first.inputs[0], merged, rewriter)
    rewriter.change.count("Slices merged")
    return True


def _within(first: Bounds, second: Bounds, size: int | None) -> Bounds | None:
    """x[first][second] as one slice of x; None when that depends on a size that is not known."""
    if size is not None:
        taken = range(size)[slice(*first)][slice(*second)]
        return taken.start, taken.stop, taken.step
    (start, end, step), (inner_start, inner_end, inner_step) = first, second
    if step != 1 or inner_step != 1 or start < 0 or inner_start < 0:
        return None
    if inner_end < 0:
        # An end that counts from the back does so in x as well when the first slice cuts nothing.
        return (start + inner_start, inner_end, 1) if end >= WHOLE else None
    return (start + inner_start, min(end, start + inner_end), 1) if end >= 0 else None


def _become_slice(
    node: ir.Node, source: ir.Value | None, bounds: dict[int, Bounds], rewriter: Rewriter
) -> None:
    axes = sorted(bounds)
    starts, ends, steps = zip(*(bounds[axis] for axis in axes), strict=True)
    inputs = [source]
    for what, numbers in (("starts", starts), ("ends", ends), ("axes", axes)):
        inputs.append(rewriter.integers(node, numbers, what))
    if any(step != 1 for step in steps):
        inputs.append(rewriter.integers(node, steps, "steps"))
    rewriter.become(node, "Slice", inputs)


def _slice_of_gather(node: ir.Node, rewriter: Rewriter) -> bool:
    """Gather(x, i)[a:b] is Gather(x, i[a:b])."""
    first, bounds = maker_for(node.inputs[0], node, "Gather"), bounds_of(node)
    if first is None or bounds is None or len(bounds) != 1:
        return False
    ((axis, part),) = bounds.items()
    indices = small_array(first.inputs[1])
    if indices is None or indices.ndim != 1 or _axis_of(first) != axis:
        return False
    _become_gather(node, first.inputs[0], axis, indices[slice(*part)], rewriter)
    rewriter.change.count("Slice merged into Gather")
    return True


def _slice_of_concat(node: ir.Node, rewriter: Rewriter) -> bool:
    concat, bounds = maker_of(node.inputs[0], node, "Concat"), bounds_of(node)
    axis = _axis_of(concat) if concat is not None else None
    if concat is None or bounds is None or axis not in bounds:
        return False
    size = size_at(node.inputs[0], axis)
    taken = range(size)[slice(*bounds[axis])] if size is not None else range(0)
    operand = _operand_with(concat, axis, taken)
    if operand is None:
        return False
    value, start = operand
    rest = {other: part for other, part in bounds.items() if other != axis}
    if taken.step != 1 or len(taken) != size_at(value, axis):
        rest[axis] = (taken.start - start, taken.stop - start, taken.step)
    if rest:
        _become_slice(node, value, rest, rewriter)
    elif can_replace(node.outputs[0], value):
        replace_value(node.outputs[0], value)
        remove_if_unread(node)
    else:
        return False
    rewriter.change.count("Slice of Concat takes from one operand")
    return True


def _operand_with(concat: ir.Node, axis: int, taken: Sequence[int]) -> tuple[ir.Value, int] | None:
    """The operand that holds all these places of a Concat, and where it begins."""
    start = 0
    for value in concat.inputs:
        size = size_at(value, axis)
        if value is None or size is None or not taken:
            return None
        if start <= min(taken) and max(taken) < start + size:
            return value, start
        start += size
    return None


# ------------------------------------------------------------------ Gather


def _gather_of_gather(node: ir.Node, rewriter: Rewriter) -> bool:
    first = maker_for(node.inputs[0], node, "Gather")
    indices = small_array(node.inputs[1])
    inner = small_array(first.inputs[1]) if first is not None else None
    axis = _axis_of(node)
    if first is None or indices is None or inner is None or inner.ndim != 1:
        return False
    if axis is None or axis != _axis_of(first) or not _are_in(indices, inner.size):
        return False
    _become_gather(node, first.inputs[0], axis, inner[indices], rewriter)
    rewriter.change.count("Gathers merged")
    return True


def _gather_of_slice(node: ir.Node, rewriter: Rewriter) -> bool:
    """x[a:b:s] at i is x at a + i * s."""
    first, axis = maker_for(node.inputs[0], node, "Slice"), _axis_of(node)
    bounds = bounds_of(first) if first is not None else None
    if first is None or axis is None or bounds is None or set(bounds) != {axis}:
        return False
    size, indices = size_at(first.inputs[0], axis), small_array(node.inputs[1])
    if size is None or indices is None:
        return False
    taken = range(size)[slice(*bounds[axis])]
    if not _are_in(indices, len(taken)):
        return False
    places = np.arange(size)[taken.start : taken.stop : taken.step][indices]
    _become_gather(node, first.inputs[0], axis, places, rewriter)
    rewriter.change.count("Slice merged into Gather")
    return True


def _gather_of_concat(node: ir.Node, rewriter: Rewriter) -> bool:
    concat, axis = maker_of(node.inputs[0], node, "Concat"), _axis_of(node)
    indices = small_array(node.inputs[1])
    if concat is None or axis is None or indices is None or axis != _axis_of(concat):
        return False
    size = size_at(node.inputs[0], axis)
    if size is None or not _are_in(indices, size):
        return False
    places = np.where(indices < 0, indices + size, indices)
    operand = _operand_with(concat, axis, places.reshape(-1).tolist())
    if operand is None:
        return False
    _become_gather(node, operand[0], axis, places - operand[1], rewriter)
    rewriter.change.count("Gather of Concat takes from one operand")
    return True


def _axis_of(node: ir.Node) -> int | None:
    return axis_attribute(node, rank_of(node.inputs[0]))


def _are_in(indices: np.ndarray, size: int) -> bool:
    return bool(((-size <= indices) & (indices < size)).all())


def _become_gather(
    node: ir.Node, source: ir.Value | None, axis: int, indices: np.ndarray, rewriter: Rewriter
) -> None:
    places = rewriter.constant(node, np.asarray(indices, np.int64), "indices")
    rewriter.become(node, "Gather", [source, places], [ir.AttrInt64("axis", axis)])


# ------------------------------------------------------------------ Split


def _split_of_split(node: ir.Node, rewriter: Rewriter) -> bool:
    first, axis = maker_for(node.inputs[0], node, "Split"), _axis_of(node)
    if first is None or axis is None or axis != _axis_of(first):
        return False
    outer, inner = split_sizes(node, axis), split_sizes(first, axis)
    if outer is None or inner is None:
        return False
    place = first.outputs.index(node.inputs[0])
    values = [*first.outputs[:place], *node.outputs, *first.outputs[place + 1 :]]
    sizes = [*inner[:place], *outer, *inner[place + 1 :]]
    _insert_split(first, axis, values, sizes, rewriter)
    rewriter.change.count("Splits merged")
    return True


def _insert_split(
    place: ir.Node,
    axis: int,
    values: Sequence[ir.Value],
    sizes: Sequence[int],
    rewriter: Rewriter,
) -> None:
    """Let the values be the outputs of one Split, of what a node reads and just before it."""
    inputs = [place.inputs[0], rewriter.integers(place, sizes, "sizes")]
    rewriter.insert(place, "Split", inputs, [ir.AttrInt64("axis", axis)], values)


def _split_that_slices(node: ir.Node, rewriter: Rewriter) -> bool:
    """The Split of which one output is read is a Slice."""
    read = [o for o in node.outputs if o.uses() or o.is_graph_output()]
    part = part_of(read[0], node) if len(read) == 1 and len(node.outputs) > 1 else None
    if part is None:
        return False
    numbers = {"starts": part.start, "ends": part.end, "axes": part.axis}
    constants = [rewriter.integers(node, [n], what) for what, n in numbers.items()]
    rewriter.insert(node, "Slice", [part.source, *constants], [], read)
    rewriter.change.count("Split made Slice")
    return True


def _split_what_slices_cover(rewriter: Rewriter) -> None:
    """x[0:a], x[a:b], ... x[z:] are the outputs of one Split."""
    parts: dict[tuple[ir.Value, int, object], dict[int, tuple[int, ir.Node]]] = defaultdict(dict)
    for node in rewriter.nodes("Slice"):
        part = part_of(node.outputs[0], node)
        if part is not None and maker_of(part.source, node, "Shape") is None:
            slices = parts[part.source, part.axis, node.graph]
            slices.setdefault(part.start, (part.end, node))
    for (source, axis, _), slices in parts.items():
        cover = _cover(slices, size_at(source, axis))
        if len(cover) < 2:
            continue
        first = next(node for _, node in slices.values() if node in cover)
        _insert_split(first, axis, [n.outputs[0] for n in cover], list(cover.values()), rewriter)
        rewriter.change.count("Slices made one Split")


def _cover(slices: dict[int, tuple[int, ir.Node]], size: int | None) -> dict[ir.Node, int]:
    """The slices that follow one another from the beginning to the end, and their sizes."""
    cover: dict[ir.Node, int] = {}
    start = 0
    while start in slices:
        end, node = slices[start]
        cover[node] = end - start
        start = end
    return cover if start == size else {}


_RULES: dict[str, tuple[Callable[[ir.Node, Rewriter], bool], ...]] = {
    "Gather": (_gather_of_gather, _gather_of_slice, _gather_of_concat),
    "Slice": (_slice_of_slice, _slice_of_gather, _slice_of_concat),
    "Split": (_split_of_split, _split_that_slices),
}

"""merge-shuffles: let Reshape, Transpose, Reshape that reorder one axis be one Gather or Slice."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.contract import Change, Context, Effect, Pass
from graphopt.operators import is_onnx
from graphopt.rewriting import only_reader, small_array
from graphopt_passes.simplify.chains import (
    Rewriter,
    axis_attribute,
    bounds_of,
    maker_for,
    rank_of,
    sizes_of,
    split_sizes,
    why_refused,
)

RESHAPES = ("Flatten", "Reshape", "Squeeze", "Unsqueeze")

LONGEST_SIDE = 3
"""How many nodes before and after a Transpose are looked at."""

LARGEST_AXIS = 1 << 16
"""A longer axis is not followed through a Reshape that merges or splits it."""

SMALLEST_BLOCK = 4
"""Elements that lie together: Gather copies them at once, and for fewer, Transpose is faster."""


@dataclass(frozen=True)
class MergeShuffles(Pass):
    """Let a Reshape, Transpose and Reshape that reorder one axis be one Gather along it.

    The shuffling of channels in ShuffleNet is this. Where only Split, Slice and Gather read what
    was shuffled, each of them becomes the Gather, or the Slice with a step, that takes its part
    of what was there before, and nothing is shuffled at all.

    The first dimension may be unknown where every node keeps it.
    """

    name: ClassVar[str] = "merge-shuffles"
    effect: ClassVar[Effect] = Effect.EXACT
    operators: ClassVar[frozenset[str] | None] = frozenset({"Transpose"})

    def refuse(self, model: ir.Model, context: Context) -> str | None:
        """Older opsets state bounds in attributes."""
        return why_refused(model)

    def apply(self, model: ir.Model, context: Context) -> Change:
        """Look at what is before and after every Transpose."""
        rewriter = Rewriter(model, context)
        rewriter.rewrite(_merge_around, "Transpose")
        return rewriter.change


def _merge_around(node: ir.Node, rewriter: Rewriter) -> bool:
    for chain in _chains_around(node):
        view = _View.of(chain[0].inputs[0])
        for link in chain:
            view = view.after(link) if view is not None else None
        if view is None:
            continue
        if _merge_ends(chain, view, rewriter) or _merge_chain(chain, view, rewriter):
            return True
    return False


def _chains_around(node: ir.Node) -> Iterator[list[ir.Node]]:
    """The Transpose with the nodes around it that only reshape, long chains first."""
    before: list[ir.Node] = []
    maker = maker_for(node.inputs[0], node, *RESHAPES)
    while maker is not None and len(before) < LONGEST_SIDE:
        before.insert(0, maker)
        maker = maker_for(maker.inputs[0], maker, *RESHAPES)
    after = [node]
    reader = only_reader(node.outputs[0])
    while reader is not None and len(after) <= LONGEST_SIDE:
        if reader.graph is not node.graph or not is_onnx(reader, *RESHAPES):
            break
        if reader.inputs[0] is not after[-1].outputs[0]:
            break
        after.append(reader)
        reader = only_reader(reader.outputs[0])
    for end in range(len(after), 0, -1):
        for start in range(len(before)):
            yield before[start:] + after[:end]


# ------------------------------------------------------------------ rewriting


def _merge_chain(chain: list[ir.Node], view: _View, rewriter: Rewriter) -> bool:
    taken = view.taken()
    if taken is None or taken.block < SMALLEST_BLOCK:
        return False
    _take(chain[-1], chain[0].inputs[0], taken, rewriter)
    rewriter.change.count("shuffle made Gather")
    return True


def _merge_ends(chain: list[ir.Node], view: _View, rewriter: Rewriter) -> bool:
    """Let each reader of what is shuffled take its part of what was there before."""
    shuffled, source = chain[-1].outputs[0], chain[0].inputs[0]
    readers = list(dict.fromkeys(use.node for use in shuffled.uses()))
    if shuffled.is_graph_output() or not readers:
        return False
    if any(r.graph is not chain[-1].graph or r.inputs[0] is not shuffled for r in readers):
        return False
    parts = {o: part for reader in readers for o, part in _parts(reader, view).items()}
    if len(parts) >= len(chain) + len(readers) or {o.producer() for o in parts} != set(readers):
        return False
    if any(part is None or part.block < SMALLEST_BLOCK for part in parts.values()):
        return False
    for output, part in parts.items():
        reader = output.producer()
        assert reader is not None and part is not None
        op_type, inputs, attributes = _form(reader, source, part, rewriter)
        rewriter.insert(reader, op_type, inputs, attributes, [output])
    rewriter.change.count("shuffle merged into what takes parts of it")
    return True


def _parts(reader: ir.Node, view: _View) -> dict[ir.Value, _Taken | None]:
    """What each output of a Split, Slice or Gather is of the value before the shuffle."""
    if is_onnx(reader, "Split"):
        axis = axis_attribute(reader, rank_of(reader.inputs[0]))
        sizes = split_sizes(reader, axis) if axis is not None else None
        if axis is None or sizes is None:
            return {}
        ends = np.cumsum(sizes).tolist()
        pieces = [view.at(axis, np.arange(e - s, e)) for s, e in zip(sizes, ends, strict=True)]
    elif is_onnx(reader, "Gather", "Slice"):
        pieces = [view.after(reader)]
    else:
        return {}
    return {
        output: piece.taken() if piece is not None else None
        for output, piece in zip(reader.outputs, pieces, strict=True)
        if output.uses() or output.is_graph_output()
    }


def _take(node: ir.Node, source: ir.Value | None, taken: _Taken, rewriter: Rewriter) -> None:
    op_type, inputs, attributes = _form(node, source, taken, rewriter)
    rewriter.become(node, op_type, inputs, attributes)


def _form(
    node: ir.Node, source: ir.Value | None, taken: _Taken, rewriter: Rewriter
) -> tuple[str, list[ir.Value | None], list[ir.Attr]]:
    """The Slice where places follow each other at one distance, else the Gather."""
    steps = np.unique(np.diff(taken.places))
    if steps.size > 1 or (steps.size == 1 and steps[0] <= 0):
        # 32 bits are enough for a dimension, and take half the file.
        places = rewriter.constant(node, taken.places.astype(np.int32), "places")
        return "Gather", [source, places], [ir.AttrInt64("axis", taken.axis)]
    step = int(steps[0]) if steps.size else 1
    start, end = int(taken.places[0]), int(taken.places[-1]) + 1
    numbers = {"starts": start, "ends": end, "axes": taken.axis, "steps": step}
    return "Slice", [source, *(rewriter.integers(node, [n], w) for w, n in numbers.items())], []


# ------------------------------------------------------------------ where elements come from


@dataclass(frozen=True)
class _Taken:
    """Some places along one axis of a value, which holds `block` elements at each."""

    axis: int
    places: np.ndarray
    block: int


@dataclass(frozen=True)
class _View:
    """Where in the memory of a source each element of a value made of it comes from.

    That is the sum of `begin` and one number for each axis: for axis a at index i it is
    offsets[a][i], and offsets[a][0] = 0.

    Attributes:
        sizes: of the source; without the first dimension, if that is unknown.
        batch: 1 if the first dimension is left out, as every node keeps it.
    """

    sizes: tuple[int, ...]
    batch: int
    offsets: tuple[np.ndarray, ...]
    begin: int = 0

    @classmethod
    def of(cls, source: ir.Value | None) -> _View | None:
        """The source itself."""
        sizes = sizes_of(source)
        if not sizes:
            return None
        batch = int(sizes[0] is None)
        known = tuple(size for size in sizes[batch:] if size)
        if len(known) + batch < len(sizes):
            return None
        strides = _strides(known)
        offsets = tuple(np.arange(n) * s for n, s in zip(known, strides, strict=True))
        return cls(known, batch, offsets)

    def with_axes(self, offsets: Sequence[np.ndarray], begin: int | None = None) -> _View:
        """Other axes over the same source."""
        start = self.begin if begin is None else begin
        return _View(self.sizes, self.batch, tuple(offsets), start)

    def after(self, node: ir.Node) -> _View | None:
        """What a node makes of the view; None when it cannot be told."""
        if is_onnx(node, "Transpose"):
            return self._transposed(node)
        if is_onnx(node, "Slice"):
            return self._sliced(node)
        if is_onnx(node, "Gather"):
            return self._gathered(node)
        return self._reshaped(sizes_of(node.outputs[0]))

    def _transposed(self, node: ir.Node) -> _View | None:
        rank = len(self.offsets) + self.batch
        order = node.attributes.get_ints("perm", tuple(reversed(range(rank))))
        if sorted(order) != list(range(rank)) or (self.batch and order[0] != 0):
            return None
        return self.with_axes([self.offsets[axis - self.batch] for axis in order[self.batch :]])

    def _sliced(self, node: ir.Node) -> _View | None:
        bounds = bounds_of(node)
        if bounds is None or len(bounds) != 1:
            return None
        ((axis, part),) = bounds.items()
        if axis < self.batch:
            return None
        return self.at(axis, np.arange(len(self.offsets[axis - self.batch]))[slice(*part)])

    def _gathered(self, node: ir.Node) -> _View | None:
        """Only of one place, which is no axis of the result."""
        axis, index = axis_attribute(node, rank_of(node.inputs[0])), small_array(node.inputs[1], 1)
        if axis is None or axis < self.batch or index is None or index.ndim:
            return None
        size = len(self.offsets[axis - self.batch])
        if not -size <= index < size:
            return None
        view = self.at(axis, index.reshape(1) % size)
        if view is None:
            return None
        place = axis - self.batch
        return view.with_axes([*view.offsets[:place], *view.offsets[place + 1 :]])

    def at(self, axis: int, places: np.ndarray) -> _View | None:
        """Some places along an axis."""
        if not places.size:
            return None
        place = axis - self.batch
        taken = self.offsets[place][places]
        offsets = [*self.offsets[:place], taken - taken[0], *self.offsets[place + 1 :]]
        return self.with_axes(offsets, self.begin + int(taken[0]))

    def _reshaped(self, sizes: tuple[int | None, ...] | None) -> _View | None:
        """Each run of axes that becomes a run of others is flattened and split again."""
        if sizes is None or (self.batch and sizes[:1] != (None,)):
            return None
        target = [size for size in sizes[self.batch :] if size]
        count = math.prod(len(axis) for axis in self.offsets)
        if len(target) + self.batch < len(sizes) or math.prod(target) != count:
            return None
        left, offsets = list(self.offsets), list[np.ndarray]()
        while left or target:
            run = [left.pop(0)] if left else [np.zeros(1, np.int64)]
            wanted = [target.pop(0)] if target else [1]
            while math.prod(map(len, run)) != math.prod(wanted):
                if math.prod(map(len, run)) < math.prod(wanted):
                    run.append(left.pop(0))
                else:
                    wanted.append(target.pop(0))
            axes = run if [len(a) for a in run] == wanted else _split(_flat(run), wanted)
            if axes is None:
                return None
            offsets += axes
        return self.with_axes(offsets[: len(sizes) - self.batch])

    def taken(self) -> _Taken | None:
        """The view as places along one axis of the source; None when it is more, or all of it."""
        if len(self.offsets) != len(self.sizes):
            return None
        strides = _strides(self.sizes)
        whole = [
            np.array_equal(axis, np.arange(size) * stride)
            for axis, size, stride in zip(self.offsets, self.sizes, strides, strict=True)
        ]
        if whole.count(False) != 1:
            return None
        axis = whole.index(False)
        places, rest = np.divmod(self.offsets[axis] + self.begin, strides[axis])
        if rest.any() or places.min() < 0 or places.max() >= self.sizes[axis]:
            return None
        return _Taken(axis + self.batch, places, strides[axis])


def _strides(sizes: Sequence[int]) -> list[int]:
    return [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]


def _flat(axes: Sequence[np.ndarray]) -> np.ndarray | None:
    flat = np.zeros(1, np.int64)
    for axis in axes:
        if len(flat) * len(axis) > LARGEST_AXIS:
            return None
        flat = (flat[:, None] + axis).reshape(-1)
    return flat


def _split(flat: np.ndarray | None, sizes: Sequence[int]) -> list[np.ndarray] | None:
    """Axes of these sizes whose sums are the flat axis; None when there are none."""
    axes: list[np.ndarray] = []
    for size in sizes:
        if flat is None:
            return None
        rows = flat.reshape(size, -1)
        if not np.array_equal(rows, rows[:, :1] + rows[0]):
            return None
        axes.append(rows[:, 0])
        flat = rows[0]
    return axes

"""What nodes state of sizes and places, restated for when some indices are gone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import onnx_ir as ir

from graphopt.contract import Context
from graphopt.movement_rules import gathered, padded_axes, sliced_axes, split_sizes
from graphopt.operators import ONNX_DOMAINS
from graphopt.rewriting import Names, constant_tensor, input_of, small_integers, stated_integers
from graphopt.shape_facts import ShapeFacts

AXES_ARE_INPUTS = 13
"""From this opset on, the axes of Squeeze and the sizes of Split are inputs."""

Masks = Mapping[tuple[ir.Value, int], np.ndarray]
"""By value and axis: bool [size], the indices that stay."""


@dataclass(frozen=True)
class Resizing:
    """What stays of each axis, and how nodes are told.

    Attributes:
        masks: of the axes of which something goes.
        facts: about shapes, as they were.
        opset: of the model.
        names: of the model.
        context: keeps new constants.
    """

    masks: Masks
    facts: ShapeFacts
    opset: int
    names: Names
    context: Context

    def sizes(self, value: ir.Value | None) -> tuple[int | None, ...]:
        """The shape of a value as it was; None for what is not known. Its rank must be known."""
        shape = self.facts.shape(value)
        assert shape is not None
        return tuple(size if isinstance(size, int) else None for size in shape)

    def touches(self, node: ir.Node) -> bool:
        """An axis of an input or output of the node becomes smaller."""
        if node.domain not in ONNX_DOMAINS:
            return False
        values = [v for v in (*node.inputs, *node.outputs) if self.facts.shape(v) is not None]
        return any((v, axis) in self.masks for v in values for axis in range(len(self.sizes(v))))

    def mask(self, value: ir.Value | None, axis: int) -> np.ndarray | None:
        """What stays of an axis; None where all does."""
        return None if value is None else self.masks.get((value, axis))

    def size(self, value: ir.Value | None, axis: int) -> int | None:
        """The size that an axis comes to have; None where it is not known."""
        mask = self.mask(value, axis)
        return self.sizes(value)[axis] if mask is None else int(mask.sum())

    def state(self, node: ir.Node, name: str, index: int, numbers: Sequence[int]) -> None:
        """Give the node other integers: by an attribute if it has one of the name, or an input."""
        if name in node.attributes:
            node.attributes[name] = ir.AttrInt64s(name, [int(n) for n in numbers])
            return
        # Bounds of a Slice have one type.
        old = constant_tensor(input_of(node, index)) or constant_tensor(input_of(node, 1))
        dtype = old.dtype.numpy() if old is not None else np.int64
        if len(node.inputs) <= index:
            node.resize_inputs(index + 1)
        node.replace_input_with(index, self._constant(node, np.asarray(numbers, dtype), name))

    def restate(self, node: ir.Node, index: int, sizes: Mapping[int, int]) -> None:
        """Put other sizes at some places of a shape that is an input, also of a computed one."""
        shape = node.inputs[index]
        numbers = small_integers(shape)
        assert shape is not None
        if numbers is not None:
            changed = [sizes.get(place, number) for place, number in enumerate(numbers)]
            if changed != list(numbers):
                self.state(node, "sizes", index, changed)
            return
        if not sizes:
            return
        (length,) = self.sizes(shape)
        assert length is not None
        places = np.arange(length)
        stated = np.isin(places, list(sizes))
        numbers_stated = np.asarray([sizes.get(place, 0) for place in places.tolist()], np.int64)
        chosen = ir.node(
            "Where",
            [
                self._constant(node, stated, "is_stated"),
                self._constant(node, numbers_stated, "stated"),
                shape,
            ],
            name=self.names.new(f"{_name(node)}_sizes"),
        )
        chosen.outputs[0].name = self.names.new(f"{_name(node)}_shape")
        chosen.outputs[0].type = shape.type
        chosen.outputs[0].shape = ir.Shape([length])
        assert isinstance(node.graph, ir.Graph)
        node.graph.insert_before(node, chosen)
        node.replace_input_with(index, chosen.outputs[0])

    def gather(self, node: ir.Node, index: int, axis: int, picked: np.ndarray) -> None:
        """Let an input of a node be picked from along an axis first."""
        source = node.inputs[index]
        gather = ir.node(
            "Gather",
            [source, self._constant(node, picked.astype(np.int64), "indices")],
            {"axis": axis},
            name=self.names.new(f"{_name(node)}_gather"),
        )
        assert source is not None and isinstance(node.graph, ir.Graph)
        gather.outputs[0].name = self.names.new(f"{_name(node)}_gathered")
        gather.outputs[0].type = source.type
        node.graph.insert_before(node, gather)
        node.replace_input_with(index, gather.outputs[0])

    def _constant(self, node: ir.Node, array: np.ndarray, what: str) -> ir.Value:
        assert isinstance(node.graph, ir.Graph)
        name = self.names.new(f"{_name(node)}_{what}")
        return self.context.initializer(node.graph, array, name)


def _name(node: ir.Node) -> str:
    return node.outputs[0].name or node.op_type


def _fix_reshape(resizing: Resizing, node: ir.Node) -> None:
    source, target = node.inputs[0], node.outputs[0]
    numbers = small_integers(node.inputs[1])
    copies = not node.attributes.get_int("allowzero", 0)
    sizes = {}
    for axis in range(len(resizing.sizes(target))):
        size = resizing.size(target, axis)
        number = numbers[axis] if numbers is not None else None
        if size is None or number == -1 or (number == 0 and not copies):
            continue
        if number == 0 and resizing.size(source, axis) in (size, None):
            continue
        if number == 0 or resizing.mask(target, axis) is not None:
            sizes[axis] = size
    resizing.restate(node, 1, sizes)


def _fix_expand(resizing: Resizing, node: ir.Node) -> None:
    target, shape = node.outputs[0], node.inputs[1]
    numbers = small_integers(shape)
    (length,) = resizing.sizes(shape)
    assert length is not None
    rank = len(resizing.sizes(target))
    sizes = {}
    for place, axis in enumerate(range(rank - length, rank)):
        mask = resizing.mask(target, axis)
        if mask is not None and (numbers is None or numbers[place] != 1):
            sizes[place] = int(mask.sum())
    resizing.restate(node, 1, sizes)


def _fix_split(resizing: Resizing, node: ir.Node) -> None:
    source = node.inputs[0]
    axis = node.attributes.get_int("axis", 0) % len(resizing.sizes(source))
    mask = resizing.mask(source, axis)
    if mask is None:
        return
    sizes = split_sizes(node, mask.size)
    assert sizes is not None
    bounds = np.cumsum([0, *sizes])
    kept = [int(mask[a:b].sum()) for a, b in pairwise(bounds.tolist())]
    node.attributes.pop("num_outputs", None)
    if resizing.opset < AXES_ARE_INPUTS:
        node.attributes["split"] = ir.AttrInt64s("split", kept)
        return
    resizing.state(node, "split", 1, kept)


def _fix_slice(resizing: Resizing, node: ir.Node) -> None:
    source = node.inputs[0]
    slices = sliced_axes(node, len(resizing.sizes(source)))
    if source is None or slices is None:
        return
    starts, ends, steps = ([], [], [])
    changed = False
    for axis, bounds in slices.items():
        mask = resizing.mask(source, axis)
        start, end, step = bounds.start, bounds.stop, bounds.step
        if mask is not None:
            changed = True
            picked = _ranks(mask)[np.arange(mask.size)[bounds]]
            picked = picked[picked >= 0]
            gaps = np.diff(picked)
            step = int(gaps[0]) if gaps.size else 1
            start, end = int(picked[0]), int(picked[-1]) + np.sign(step)
            if gaps.size and (gaps != step).any():
                resizing.gather(node, 0, axis, picked)
                start, end, step = 0, picked.size, 1
            elif end < 0:
                end = -int(mask.sum()) - 1
        starts.append(start)
        ends.append(int(end))
        steps.append(step)
    if not changed:
        return
    resizing.state(node, "starts", 1, starts)
    resizing.state(node, "ends", 2, ends)
    if set(steps) != {1} or input_of(node, 4) is not None:
        if input_of(node, 3) is None:
            resizing.state(node, "axes", 3, list(slices))
        resizing.state(node, "steps", 4, steps)


def _ranks(mask: np.ndarray) -> np.ndarray:
    """int64 [size]: where each index comes to lie; -1 for those that go."""
    return np.where(mask, np.cumsum(mask) - 1, -1)


def _fix_gather(resizing: Resizing, node: ir.Node) -> None:
    source = node.inputs[0]
    axis = node.attributes.get_int("axis", 0) % len(resizing.sizes(source))
    mask = resizing.mask(source, axis)
    if mask is None:
        return
    index = gathered(node, mask.size)
    assert index is not None
    places = _ranks(mask)[index]
    if index.ndim:
        places = places[places >= 0]
    resizing.state(node, "indices", 1, places)


def _fix_pad(resizing: Resizing, node: ir.Node) -> None:
    source, target = node.inputs[0], node.outputs[0]
    pads = padded_axes(node, len(resizing.sizes(source)))
    assert pads is not None
    befores, afters = [], []
    for axis, (before, after) in pads.items():
        mask = resizing.mask(target, axis)
        if mask is not None and (before or after):
            before, after = int(mask[:before].sum()), int(mask[mask.size - after :].sum())
        befores.append(before)
        afters.append(after)
    if [*befores, *afters] != [p for side in (0, 1) for p in (pad[side] for pad in pads.values())]:
        resizing.state(node, "pads", 1, [*befores, *afters])


def _fix_conv(resizing: Resizing, node: ir.Node) -> None:
    """A Conv of each channel by itself has as many groups as channels."""
    data, weight = node.inputs[:2]
    group = node.attributes.get_int("group", 1)
    mask = resizing.mask(data, 1)
    outer, inner = resizing.sizes(weight)[:2]
    of_each = inner == 1 if node.op_type == "Conv" else outer == group
    if mask is not None and group > 1 and of_each and mask.size == group:
        node.attributes["group"] = ir.AttrInt64("group", int(mask.sum()))


def _fix_recurrent(resizing: Resizing, node: ir.Node) -> None:
    mask = resizing.mask(node.inputs[2], 2)
    if mask is not None:
        node.attributes["hidden_size"] = ir.AttrInt64("hidden_size", int(mask.sum()))


def _fix_squeeze(resizing: Resizing, node: ir.Node) -> None:
    """Without axes, an axis that comes to size 1 would go as well."""
    if stated_integers(node, "axes", 1) != ():
        return
    axes = [axis for axis, size in enumerate(resizing.sizes(node.inputs[0])) if size == 1]
    if resizing.opset < AXES_ARE_INPUTS:
        node.attributes["axes"] = ir.AttrInt64s("axes", axes)
    else:
        resizing.state(node, "axes", 1, axes)


def _fix_resize(resizing: Resizing, node: ir.Node) -> None:
    target, sizes = node.outputs[0], input_of(node, 3)
    if sizes is None or resizing.sizes(sizes) == (0,):
        return
    masks = {axis: resizing.mask(target, axis) for axis in range(len(resizing.sizes(target)))}
    kept = {axis: int(mask.sum()) for axis, mask in masks.items() if mask is not None}
    resizing.restate(node, 3, kept)


FIXES: dict[str, Callable[[Resizing, ir.Node], None]] = {
    "Conv": _fix_conv,
    "ConvTranspose": _fix_conv,
    "Expand": _fix_expand,
    "GRU": _fix_recurrent,
    "Gather": _fix_gather,
    "LSTM": _fix_recurrent,
    "Pad": _fix_pad,
    "RNN": _fix_recurrent,
    "Reshape": _fix_reshape,
    "Resize": _fix_resize,
    "Slice": _fix_slice,
    "Split": _fix_split,
    "Squeeze": _fix_squeeze,
}
"""By operator of the standard domain; what others state does not change."""

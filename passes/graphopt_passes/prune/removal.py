"""Removes units of groups (see `graphopt.groups`) from a model: weights become smaller, for good.

The law that holds it together: a model without some units computes what it computes with the
weights that take them out at zero, `remove` against `zeroed`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Mapping

import numpy as np
import onnx_ir as ir

from graphopt.content import read_array
from graphopt.contract import Context
from graphopt.couplings import values_of
from graphopt.groups import Group
from graphopt.operators import all_graphs, opset_of
from graphopt.rewriting import Names, constant_tensor, tensor_of
from graphopt.shape_facts import ShapeFacts
from graphopt.skeleton import infer_shapes
from graphopt_passes.prune.resizing import FIXES, Masks, Resizing

Kept = Mapping[Group, np.ndarray]
"""By group: bool [units], the units that stay."""


def remove(model: ir.Model, kept: Kept, context: Context) -> None:
    """Remove the units that do not stay from everything that they lie on, and infer shapes again.

    Groups that were found before are those of the model before; `analyze` it again.

    Args:
        model: of which the groups are; rewritten in place.
        kept: what stays, at least one unit of each group that is named.
        context: keeps the tensors.

    Raises:
        ValueError: a group is frozen, of another model, or nothing of it would stay.
    """
    masks = masks_of(kept)
    _check_own(masks, set(values_of(model)))
    if not masks:
        return
    facts, opset = ShapeFacts(model), opset_of(model)
    resizing = Resizing(masks, facts, opset, Names(model), context)
    for graph in all_graphs(model):
        for node in tuple(graph):
            fix = FIXES.get(node.op_type)
            if fix is not None and resizing.touches(node):
                fix(resizing, node)
    for value, by_axis in _by_value(masks).items():
        tensor = constant_tensor(value)
        if tensor is not None:
            array = read_array(tensor)
            for axis, mask in by_axis.items():
                array = np.compress(mask, array, axis)
            set_constant(value, context.tensor(array, value.name or "", tensor.dtype))
    infer_shapes(model)


def zeroed(model: ir.Model, kept: Kept) -> ir.Model:
    """A copy that computes what the model without the units would, at its old size.

    Args:
        model: of which the groups are; not modified.
        kept: what stays.

    Raises:
        ValueError: a group is frozen, of another model, or nothing of it would stay.
    """
    masks = masks_of(kept)
    copy = model.clone()
    copies = dict(zip(values_of(model), values_of(copy), strict=True))
    _check_own(masks, copies)
    sinks: dict[ir.Value, dict[int, np.ndarray]] = defaultdict(dict)
    for group in kept:
        for consumer in group.consumers:
            mask = masks.get((consumer.weight, consumer.axis))
            if mask is not None:
                sinks[consumer.weight][consumer.axis] = mask
    for value, by_axis in sinks.items():
        tensor = constant_tensor(value)
        assert tensor is not None
        array = np.array(read_array(tensor))
        for axis, mask in by_axis.items():
            np.moveaxis(array, axis, 0)[~mask] = 0
        set_constant(copies[value], tensor_of(array, value.name or "", tensor.dtype))
    return copy


def masks_of(kept: Kept) -> Masks:
    """By value and axis: bool [size], the indices that stay; only where some do not.

    Raises:
        ValueError: a group is frozen, of another model, or nothing of it would stay.
    """
    masks: dict[tuple[ir.Value, int], np.ndarray] = {}
    for group, stays in kept.items():
        if group.frozen is not None:
            raise ValueError(f"group {group.name!r} is frozen: {group.frozen}")
        if stays.shape != (group.units,) or not stays.any():
            raise ValueError(
                f"group {group.name!r} has {group.units} units, and needs as many booleans, one of "
                f"them true; these have shape {stays.shape} and {int(stays.sum())} are"
            )
        if stays.all():
            continue
        for place in group.places:
            key = place.value, place.axis
            if key not in masks:
                masks[key] = np.ones(place.size, bool)
            masks[key][place.indices] = stays[place.units]
    return masks


def _check_own(masks: Masks, values: Container[ir.Value]) -> None:
    if any(value not in values for value, _ in masks):
        raise ValueError("the groups are of another model, or of this one before a change")


def _by_value(masks: Masks) -> dict[ir.Value, dict[int, np.ndarray]]:
    found: dict[ir.Value, dict[int, np.ndarray]] = defaultdict(dict)
    for (value, axis), mask in masks.items():
        found[value][axis] = mask
    return found


def set_constant(value: ir.Value, tensor: ir.TensorProtocol) -> None:
    """Let an initializer, or the output of a Constant node, hold another tensor."""
    node = value.producer()
    if node is None:
        value.const_value = tensor
    else:
        node.attributes.clear()
        node.attributes["value"] = ir.AttrTensor("value", tensor)
    value.shape = ir.Shape(tensor.shape.numpy())

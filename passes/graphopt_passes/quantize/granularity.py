"""What reads a weight, and along which axes its numbers share a scale.

They share it where they belong to one output of the reader. As numbers that are widened when the
model is loaded may have scales of any shape, another one would be right too, only less exact: so
where readers disagree, the first is asked.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from graphopt.operators import is_onnx
from graphopt_passes.fuse.misfit import Misfit

WEIGHTS = {
    "Conv": (1,),
    "ConvTranspose": (1,),
    "GRU": (1, 2),
    "Gather": (0,),
    "Gemm": (0, 1),
    "LSTM": (1, 2),
    "MatMul": (0, 1),
    "RNN": (1, 2),
}
"""The inputs that hold weights, by operator."""

VIEWS = frozenset({"Flatten", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"})
"""What a weight may pass on its way; merge-views writes some of these."""

Axes = tuple[int, ...]


@dataclass(frozen=True)
class Role:
    """What a constant is to one of its readers, or to all.

    Attributes:
        operator: of the reader.
        shared: the axes along which numbers share a scale; None where views hide them.
        channels: the inputs or the outputs, whichever are fewer; infinite where that says nothing.
    """

    operator: str
    shared: Axes | None
    channels: float = math.inf


def role_of(value: ir.Value, shape: tuple[int, ...]) -> Role:
    """What a weight is to all that reads it.

    Args:
        value: an initializer, or what nodes widen.
        shape: of the weight: two dimensions or more.

    Raises:
        Misfit: something reads it as anything but a weight, or nothing does.
    """
    roles = list(_roles(value, shape))
    if not roles:
        raise Misfit("nothing reads it")
    asked = (role.shared for role in roles if role.shared is not None)
    shared = next(asked, _all_but(0, len(shape)))
    return Role(roles[0].operator, shared, min(role.channels for role in roles))


def _roles(value: ir.Value, shape: tuple[int, ...] | None) -> Iterator[Role]:
    if value.is_graph_output():
        raise Misfit("it is an output of its graph")
    for node, index in value.uses():
        if index == 0 and is_onnx(node, *VIEWS):
            yield from _roles_behind(node, shape)
        elif not is_onnx(node, *WEIGHTS) or index not in WEIGHTS[node.op_type]:
            raise Misfit(f"{node.op_type} reads it, and not as a weight")
        elif shape is None:
            yield Role(node.op_type, None)
        else:
            yield Role(node.op_type, _axes(node, index, len(shape)), _channels(node, shape))


def _roles_behind(view: ir.Node, shape: tuple[int, ...] | None) -> Iterator[Role]:
    output = view.outputs[0]
    if shape is None or not is_onnx(view, "Transpose"):
        yield from _roles(output, shape if is_onnx(view, "Identity") else None)
        return
    order = view.attributes.get_ints("perm", tuple(reversed(range(len(shape)))))
    for role in _roles(output, tuple(shape[axis] for axis in order)):
        axes = None if role.shared is None else tuple(sorted(order[a] for a in role.shared))
        yield Role(role.operator, axes, role.channels)


def _axes(node: ir.Node, index: int, rank: int) -> Axes:
    if is_onnx(node, "MatMul"):
        return (rank - 2 if index else rank - 1,)
    if is_onnx(node, "Gemm"):
        transposed = node.attributes.get_int("transB" if index else "transA", 0) != 0
        return (1,) if transposed == bool(index) else (0,)
    if is_onnx(node, "LSTM", "GRU", "RNN"):
        return (rank - 1,)
    if is_onnx(node, "Gather"):
        return _all_but(node.attributes.get_int("axis", 0) % rank, rank)
    # [inputs, outputs of the group, ...]: of several groups, the numbers of an output are no block
    # of the tensor, but those of an input are, and it belongs to one group.
    grouped = node.attributes.get_int("group", 1) != 1
    return _all_but(1 if is_onnx(node, "ConvTranspose") and not grouped else 0, rank)


def _channels(node: ir.Node, shape: tuple[int, ...]) -> float:
    if is_onnx(node, "Gather"):
        return math.inf
    if is_onnx(node, "Conv", "ConvTranspose"):
        return min(shape[0], shape[1] * node.attributes.get_int("group", 1))
    return min(shape[-2:])


def _all_but(kept: int, rank: int) -> Axes:
    return tuple(axis for axis in range(rank) if axis != kept)

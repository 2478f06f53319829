"""Along which axes of a weight the numbers share a scale: those of one output of what reads it.

Numbers that are widened again when the model is loaded may be given scales in any way; which one is
right for a reader is a matter of error alone. So where readers disagree, any of them is right.
"""

from __future__ import annotations

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
"""What a weight may pass before it gets there; merge-views writes some of these."""

Axes = tuple[int, ...]


def shared_axes(value: ir.Value, rank: int) -> Axes:
    """The axes along which numbers share a scale: those of the first reader that says so.

    Args:
        value: with readers, in subgraphs too.
        rank: of its tensor.

    Raises:
        Misfit: something reads it as anything but a weight.
    """
    found = _wishes(value, rank)
    if not found:
        raise Misfit("nothing reads it")
    return next((axes for axes in found if axes is not None), _all_but(0, rank))


def _wishes(value: ir.Value, rank: int | None) -> list[Axes | None]:
    """The axes that each reader asks for; None where views put them out of sight."""
    found: list[Axes | None] = []
    for node, index in value.uses():
        if index == 0 and is_onnx(node, *VIEWS):
            found += _wishes_behind(node, rank)
        elif is_onnx(node, *WEIGHTS) and index in WEIGHTS[node.op_type]:
            found.append(None if rank is None else _axes(node, index, rank))
        else:
            raise Misfit(f"{node.op_type} reads it, and not as a weight")
    if value.is_graph_output():
        raise Misfit("it is an output of its graph")
    return found


def _wishes_behind(view: ir.Node, rank: int | None) -> list[Axes | None]:
    if is_onnx(view, "Transpose") and rank is not None:
        order = view.attributes.get_ints("perm", tuple(reversed(range(rank))))
        behind = _wishes(view.outputs[0], rank)
        return [None if axes is None else tuple(sorted(order[a] for a in axes)) for axes in behind]
    return _wishes(view.outputs[0], rank if is_onnx(view, "Identity", "Slice") else None)


def _axes(node: ir.Node, index: int, rank: int) -> Axes:
    if is_onnx(node, "MatMul"):
        # Of a vector all numbers belong to the same outputs.
        return (0,) if rank == 1 else (rank - 2 if index else rank - 1,)
    if is_onnx(node, "Gemm"):
        transposed = node.attributes.get_int("transB" if index else "transA", 0) != 0
        return (1,) if transposed == bool(index) else (0,)
    if is_onnx(node, "LSTM", "GRU", "RNN"):
        return (rank - 1,)
    if is_onnx(node, "Gather"):
        return _all_but(node.attributes.get_int("axis", 0) % rank, rank)
    # [inputs, outputs of the group, ...]: of several groups, an output's numbers are no block of
    # the tensor, but those of an input are, and no two groups mix in it.
    grouped = node.attributes.get_int("group", 1) != 1
    return _all_but(1 if is_onnx(node, "ConvTranspose") and not grouped else 0, rank)


def _all_but(kept: int, rank: int) -> Axes:
    return tuple(axis for axis in range(rank) if axis != kept)

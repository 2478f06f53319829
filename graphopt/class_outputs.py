"""Which outputs of a model answer by the largest of a row: its classes.

The shape alone does not tell: the last axis of an image is a side of it, that of boxes joins
corners, and each score behind a Sigmoid is an answer of its own. The graph tells the rest.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from graphopt.operators import is_onnx

_MOVES = ("Reshape", "Transpose", "Identity", "Cast", "Squeeze", "Unsqueeze", "Flatten")
"""What gives the same numbers in another place or type."""

_SCORES = ("Sigmoid", "HardSigmoid")
"""What gives probabilities that need not add up to 1: of many answers, each may be right."""

RANK_MAXIMUM = 3
"""Of samples, positions and classes; four axes are a map of places."""


def rows_of(array: np.ndarray) -> np.ndarray:
    """An array as rows of its class axis, [rows, classes]: the last axis that is longer than 1.

    The first axis is never one: it counts samples.
    """
    shape = array.shape
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return array.reshape(-1, shape[-1]) if len(shape) > 1 else array.reshape(-1, 1)


def has_classes(array: np.ndarray) -> bool:
    """By its shape the array may hold classes."""
    rank = array.ndim
    while rank > 2 and array.shape[rank - 1] == 1:
        rank -= 1
    return rank <= RANK_MAXIMUM and rows_of(array).shape[-1] >= 2


def why_no_classes(output: ir.Value) -> str | None:
    """Why the rows of an output are not classes of which one is right, as far as the graph tells.

    Args:
        output: of a graph.
    """
    if is_score(output):
        return "each of its numbers is an answer of its own (Sigmoid)"
    last: int | None = -1
    for value in _moved(output):
        node = value.producer()
        if node is None:
            return None
        if is_onnx(node, "Concat"):
            joins = last is not None and _axis(node, value) == last
            return "its last axis joins several things (Concat)" if joins else None
        last = _before(node, last)
    return None


def is_score(output: ir.Value) -> bool:
    """Each number of an output is a probability, and those of a row need not add up to 1."""
    *_, made = _moved(output)
    node = made.producer()
    return node is not None and is_onnx(node, *_SCORES)


def _moved(value: ir.Value) -> Iterator[ir.Value]:
    """The value, and what it was before it was moved, nearest first; the last is made of others."""
    while True:
        yield value
        node = value.producer()
        if node is None or not is_onnx(node, *_MOVES, "Split", "Slice") or node.inputs[0] is None:
            return
        value = node.inputs[0]


def _axis(node: ir.Node, value: ir.Value) -> int | None:
    """Which axis a Concat joins, counted from the last."""
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
    if axis < 0:
        return axis
    return None if value.shape is None else axis - len(value.shape)


def _before(node: ir.Node, axis: int | None) -> int | None:
    """Where the axis, counted from the last, was before a node that moves; None if it is lost."""
    if axis is None:
        return None
    source, result = node.inputs[0], node.outputs[0]
    if is_onnx(node, "Identity", "Cast", "Split", "Slice"):
        return axis
    if source is None or source.shape is None or result.shape is None:
        return None
    if is_onnx(node, "Transpose"):
        order = node.attributes["perm"].as_ints() if "perm" in node.attributes else None
        order = order or tuple(reversed(range(len(source.shape))))
        return order[axis] - len(order)
    return _same_size(source.shape, result.shape, axis)


def _same_size(before: ir.Shape, after: ir.Shape, axis: int) -> int | None:
    """The axis that a reshape leaves whole: of the same size, with as much behind it."""
    behind = _product(after[axis + 1 :]) if axis < -1 else 1
    for place in range(-1, -len(before) - 1, -1):
        whole = before[place] == after[axis] and isinstance(after[axis], int)
        if whole and (_product(before[place + 1 :]) if place < -1 else 1) == behind:
            return place
    return None


def _product(dims: object) -> int | None:
    sizes = list(dims)  # type: ignore[call-overload]
    return int(np.prod(sizes)) if all(isinstance(d, int) for d in sizes) else None

"""Steps of generated graphs with what can be packed, or is."""

from __future__ import annotations

import numpy as np
from generated import Builder, Step
from onnx import TensorProto, helper

COLUMNS = 24
"""So that the smallest matrix has more codes than arithmetic."""


def made(b: Builder, op: str, inputs: list[str], **attributes: object) -> str:
    """What a node makes of constants; no other step reads it."""
    name = b.name()
    b.nodes.append(helper.make_node(op, inputs, [name], **attributes))
    return name


def packed(b: Builder, rows: int) -> str:
    """A packed matrix of [rows, COLUMNS]."""
    codes = b.random.integers(0, 16, (rows, COLUMNS))
    form = str(b.random.choice(["scaled", "dequantized", "looked up"]))
    if form == "dequantized":
        scale = b.constant(np.float32(0.1))
        return made(b, "DequantizeLinear", [b.constant(codes.astype(np.int8)), scale])
    if form == "scaled":
        wide = made(b, "Cast", [b.constant(codes.astype(np.int8))], to=TensorProto.FLOAT)
        return made(b, "Mul", [wide, b.normal(1, COLUMNS)])
    index = made(b, "Cast", [b.constant(codes.astype(np.uint8).ravel())], to=TensorProto.INT32)
    numbers = made(b, "Gather", [b.normal(16), index])
    return made(b, "Reshape", [numbers, b.constant(np.int64([rows, COLUMNS]))])


def product(b: Builder) -> None:
    """A product with a packed matrix, which others may read too."""
    value = b.any(4)
    if value is None:
        return
    *outer, rows = b.shapes[value]
    weight = packed(b, rows)
    first = b.add("MatMul", [value, weight], (*outer, COLUMNS))
    way = b.random.integers(3)
    if way == 0:
        turned = made(b, "Transpose", [weight], perm=[1, 0])
        b.add("MatMul", [first, turned], (*outer, rows))
    elif way == 1:
        b.add("MatMul", [b.add("Relu", [value], b.shapes[value]), weight], (*outer, COLUMNS))


def masked(b: Builder) -> None:
    """Rows of a large table of few numbers, added to a value."""
    value = b.any(4)
    if value is None:
        return
    *_, width = b.shapes[value]
    numbers = b.random.standard_normal(int(b.random.integers(2, 17))).astype(np.float32)
    table = b.random.choice(numbers, (4096 // width, width))
    row = b.constant(np.int64(b.random.integers(len(table))))
    found = made(b, "Gather", [b.constant(table), row])
    b.add("Add", [value, found], b.shapes[value])


def pruned(b: Builder) -> None:
    """A product with a matrix of zeros and few other numbers, and another behind it."""
    value = b.any(4)
    if value is None or not b.shapes[value][-1]:
        return
    *outer, rows = b.shapes[value]
    columns = 4096 // rows
    zeros = b.random.random((rows, columns)) < b.random.choice([0.6, 0.9, 1.0])
    weight = np.where(zeros, 0, b.random.standard_normal(zeros.shape)).astype(np.float32)
    first = b.add("MatMul", [value, b.constant(weight)], (*outer, columns))
    b.add("MatMul", [first, b.normal(columns, 1)], (*outer, 1))


FOCUS: dict[str, tuple[Step, ...]] = {
    "unpack-weights": (product,),
    "pack-constants": (masked,),
    "pack-zeros": (pruned,),
}

"""Steps of generated graphs: nodes that follow one another and do in two steps what one does."""

from __future__ import annotations

import numpy as np
from generated import Builder, Step
from onnx import TensorProto

OPSET = 13
"""From it on, axes, pads and sizes are inputs; before, the passes leave all alone."""


def integers(b: Builder, *numbers: int) -> str:
    return b.constant(np.array(numbers, np.int64))


def chosen(b: Builder, rank: int | None = None) -> str | None:
    return b.any(rank) if b.opset >= OPSET else None


def hidden(
    b: Builder, op: str, inputs: list[str], shape: tuple[int, ...], **attributes: object
) -> str:
    """A node of which the next one alone is to read.

    For what rounds, always: two ways to one sum, subtracted, leave nothing but the rounding.
    """
    value = b.add(op, inputs, shape, **attributes)
    del b.shapes[value]
    return value


def inner(
    b: Builder, op: str, inputs: list[str], shape: tuple[int, ...], **attributes: object
) -> str:
    """A node that others may read as well, now and then."""
    value = hidden(b, op, inputs, shape, **attributes)
    if b.random.random() < 0.15:
        b.shapes[value] = shape
    return value


def casts(b: Builder) -> None:
    value = chosen(b)
    if value is None:
        return
    shape = b.shapes[value]
    kinds = [TensorProto.DOUBLE, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.INT32]
    middle = b.add("Cast", [value], shape, to=int(b.random.choice(kinds)))
    del b.shapes[middle]
    if b.random.random() < 0.3:
        order = [0, *range(len(shape) - 1, 0, -1)]
        shape = tuple(shape[i] for i in order)
        middle = b.add("Transpose", [middle], shape, perm=order)
        del b.shapes[middle]
    b.add("Cast", [middle], shape, to=TensorProto.FLOAT)


def sliced(b: Builder, value: str, axis: int, start: int, end: int) -> str:
    """Elements from start to end along an axis of known size."""
    shape = list(b.shapes[value])
    size = shape[axis]
    shape[axis] = len(range(size)[start:end])
    end = 2**63 - 1 if end >= size else end
    return b.add("Slice", [value, *(integers(b, n) for n in (start, end, axis))], tuple(shape))


def slices(b: Builder) -> None:
    value = chosen(b, 4)
    if value is None:
        return
    axis = int(b.random.integers(1, 4))
    size = b.shapes[value][axis]
    if size < 3:
        return
    kind = b.random.random()
    cut = int(b.random.integers(1, size - 1))
    if kind < 0.4:
        first = sliced(b, value, axis, 1, size)
        other = int(b.random.choice([axis, axis % 3 + 1]))
        second = sliced(b, first, other, 0, int(b.random.choice([1, -1, 9])))
        if b.shapes[second].count(0):
            b.shapes.pop(second)
            b.nodes.pop()
        else:
            b.shapes.pop(first)
    elif kind < 0.7:
        parts = [sliced(b, value, axis, 0, cut), sliced(b, value, axis, cut, size)]
        for part in parts[: int(b.random.integers(3))]:
            b.add("Neg", [part], b.shapes[part])
    else:
        shape = list(b.shapes[value])
        shape[axis] = 3
        some = integers(b, *(int(i) for i in b.random.integers(-size, size, 3)))
        first = inner(b, "Gather", [value, some], tuple(shape), axis=axis)
        shape[axis] = 2
        b.add("Gather", [first, integers(b, 2, 0)], tuple(shape), axis=axis)


def concats(b: Builder) -> None:
    value = chosen(b, 4)
    if value is None or b.shapes[value][2] < 3 or b.shapes[value][2] > 12:
        return
    batch, c, h, w = b.shapes[value]
    if b.random.random() < 0.5:
        first = inner(b, "Concat", [value, value], (batch, c, 2 * h, w), axis=2)
        b.add("Concat", [value, first], (batch, c, 3 * h, w), axis=-2)
        return
    parts = [sliced(b, value, 2, 0, 1), sliced(b, value, 2, 1, h)]
    if b.random.random() < 0.3:
        parts.reverse()
    b.add("Concat", parts, (batch, c, h, w), axis=2)


def pads(b: Builder) -> None:
    value = chosen(b, 4)
    if value is None or b.shapes[value][3] > 12:
        return
    batch, c, h, w = b.shapes[value]
    first = inner(b, "Pad", [value, integers(b, 0, 0, 1, 0, 0, 0, 0, 0)], (batch, c, h + 1, w))
    inputs = [first, integers(b, 0, 0, 0, 2, 0, 0, 0, 1)]
    if b.random.random() < 0.5:
        inputs.append(b.constant(np.float32(b.random.choice([0.0, 1.0]))))
    b.add("Pad", inputs, (batch, c, h + 1, w + 3))


def expands(b: Builder) -> None:
    value = chosen(b, 4)
    if value is None:
        return
    batch, c, h, w = shape = b.shapes[value]
    small = b.normal(1, c, 1, 1)
    if b.random.random() < 0.5:
        sizes = b.add("Shape", [value], (4,))
    else:
        sizes = integers(b, 1, c, h, w)
        b.shapes[sizes] = (4,)
    del b.shapes[sizes]
    large = inner(b, "Expand", [small, sizes], (1 if batch == 2 else batch, c, h, w))
    b.shapes.pop(large, None)
    b.add(str(b.random.choice(["Add", "Mul", "Sub"])), [large, value], shape)


def unsqueezes(b: Builder) -> None:
    value = chosen(b, 4)
    if value is None:
        return
    batch, c, h, w = b.shapes[value]
    kind = b.random.random()
    if kind < 0.4:
        first = inner(b, "ReduceSum", [value, integers(b, -2)], (batch, c, w), keepdims=0)
    elif kind < 0.7:
        place = b.constant(np.array(int(b.random.integers(-h, h)), np.int64))
        first = inner(b, "Gather", [value, place], (batch, c, w), axis=2)
    else:
        first = inner(b, "ReduceSum", [value, integers(b, 2)], (batch, c, 1, w))
        b.add("Squeeze", [first, integers(b, 2)], (batch, c, w))
        return
    b.add("Unsqueeze", [first, integers(b, 2)], (batch, c, 1, w))


def reductions(b: Builder) -> None:
    value = chosen(b, 4)
    if value is None:
        return
    batch, c, h, w = b.shapes[value]
    # A sum whose terms cancel is its own rounding.
    value = hidden(b, "Abs", [value], (batch, c, h, w))
    if b.random.random() < 0.4:
        first = hidden(b, "Transpose", [value], (batch, h, w, c), perm=[0, 2, 3, 1])
        axes = integers(b, 1, 2)
    else:
        first = hidden(b, "ReduceSum", [value, integers(b, 3)], (batch, c, h), keepdims=0)
        axes = integers(b, -1)
    total = hidden(b, "ReduceSum", [first, axes], (batch, c), keepdims=0)
    # Times a small number, another one each time: no step subtracts a sum from itself, and no
    # Sigmoid makes its rounding larger.
    b.add("Mul", [total, b.constant(np.float32(b.random.uniform(0.01, 0.05)))], (batch, c))


def shuffles(b: Builder) -> None:
    value = chosen(b, 4)
    if value is None:
        return
    batch, c, h, w = shape = b.shapes[value]
    if c % 2:
        return
    several = b.add("Reshape", [value, integers(b, 0, 2, c // 2, h, w)], (batch, 2, c // 2, h, w))
    moved = b.add("Transpose", [several], (batch, c // 2, 2, h, w), perm=[0, 2, 1, 3, 4])
    for name in (several, moved):
        del b.shapes[name]
    shuffled = inner(b, "Reshape", [moved, integers(b, 0, c, h, w)], shape)
    if shuffled in b.shapes:
        return
    b.shapes[shuffled] = shape
    if b.random.random() < 0.7:
        sliced(b, shuffled, 1, 0, c // 2)
        sliced(b, shuffled, 1, c // 2, c)
        del b.shapes[shuffled]


def clips(b: Builder) -> None:
    value = chosen(b)
    if value is None:
        return
    for _ in range(2):
        op = str(b.random.choice(["Clip", "Relu", "Min", "Max"]))
        low, high = sorted(b.random.uniform(-1, 2, 2).astype(np.float32))
        operands = {"Relu": [], "Clip": [low, high]}.get(op, [high])
        shape = b.shapes[value]
        value = b.add(op, [value, *(b.constant(np.array(n)) for n in operands)], shape)


def logic(b: Builder) -> None:
    value = chosen(b)
    if value is None:
        return
    shape = b.shapes[value]
    kind = b.random.random()
    if kind < 0.6:
        positive = b.add("Greater", [value, b.constant(np.float32(0))], shape)
        condition = b.add("Not", [positive], shape)
        for name in (positive, condition):
            del b.shapes[name]
    else:
        condition = b.constant(np.array(kind < 0.8))
    b.add("Where", [condition, value, b.constant(np.float32(0.5))], shape)


def signs(b: Builder) -> None:
    value = chosen(b)
    if value is None:
        return
    shape = b.shapes[value]
    same = [n for n, s in b.shapes.items() if s == shape]
    other = str(b.random.choice(same))
    kind = int(b.random.integers(4))
    if kind == 0:
        b.add("Mul", [value, b.constant(np.float32(-1))], shape)
        return
    negative = inner(b, "Neg", [other], shape)
    if kind == 1:
        b.add("Abs", [negative], shape)
    else:
        b.add("Add" if kind == 2 else "Sub", [value, negative], shape)


def arithmetic(b: Builder) -> None:
    value = chosen(b)
    if value is None:
        return
    shape = b.shapes[value]
    operators = ["Add", "Sub"] if b.random.random() < 0.5 else ["Mul", "Div"]
    for _ in range(2):
        operands = [value, b.constant(np.float32(b.random.uniform(0.5, 2)))]
        op = str(b.random.choice(operators))
        if op != "Div" and b.random.random() < 0.3:
            operands.reverse()
        value = hidden(b, op, operands, shape)
    # What other steps subtract from the sum must not leave nothing but its rounding.
    b.add("Tanh", [value], shape)


FOCUS: dict[str, tuple[Step, ...]] = {
    "absorb-unsqueezes": (unsqueezes,),
    "merge-arithmetic": (arithmetic,),
    "merge-casts": (casts,),
    "merge-clips": (clips,),
    "merge-concats": (concats,),
    "merge-expands": (expands,),
    "merge-pads": (pads,),
    "merge-reductions": (reductions,),
    "merge-shuffles": (shuffles,),
    "merge-slices": (slices,),
    "simplify-logic": (logic,),
    "simplify-signs": (signs,),
}

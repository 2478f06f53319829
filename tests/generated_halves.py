"""Steps of generated graphs for widen-halves: parts in float16.

Nothing is rounded there: what goes in are quarters up to 8, and what is done leaves few digits. A
rounding could turn the sign of something, or be all that is left of a difference.
"""

from __future__ import annotations

import numpy as np
import onnx
from generated import Builder, Step
from generated_chains import hidden
from onnx import TensorProto, helper

HALF = TensorProto.FLOAT16


def half(b: Builder, value: str) -> str:
    """A value as float16, rounded to quarters within 8 before."""
    shape = b.shapes[value]
    limits = [b.constant(np.float32(-8)), b.constant(np.float32(8))]
    value = hidden(b, "Clip", [value, *limits], shape)
    value = hidden(b, "Mul", [value, b.constant(np.float32(4))], shape)
    value = hidden(b, "Floor", [value], shape)
    value = hidden(b, "Mul", [value, b.constant(np.float32(0.25))], shape)
    return b.add("Cast", [value], shape, to=HALF)


def taken(b: Builder, value: str) -> tuple[int, ...]:
    """The shape of a float16 value, which no other step is to see."""
    return b.shapes.pop(value)


def whole(b: Builder, *shape: int) -> str:
    return b.constant(b.random.integers(-1, 2, shape).astype(np.float16))


def step_in_half(b: Builder, value: str) -> str:
    """One node that reads float16 and makes it."""
    shape = taken(b, value)
    op = str(b.random.choice(["Relu", "Neg", "Add", "Mul", "Conv", "Transpose", "there", "ratio"]))
    if op in ("Relu", "Neg"):
        return b.add(op, [value], shape)
    if op in ("Add", "Mul"):
        return b.add(op, [value, whole(b, shape[1], *(1,) * (len(shape) - 2))], shape)
    if op == "Conv" and len(shape) == 4:
        return b.add("Conv", [value, whole(b, shape[1], shape[1], 1, 1)], shape)
    if op == "Transpose":
        perm = [0, *range(len(shape) - 1, 0, -1)]
        return b.add(op, [value], tuple(shape[p] for p in perm), perm=perm)
    if op == "ratio":
        return filled(b, value, shape)
    other = int(b.random.choice([TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.INT32]))
    return b.add("Cast", [hidden(b, "Cast", [value], shape, to=other)], shape, to=HALF)


def filled(b: Builder, value: str, shape: tuple[int, ...]) -> str:
    """Half of the value, by a tensor of its shape that states a type."""
    sizes = hidden(b, "Shape", [value], (len(shape),))
    content = helper.make_tensor("content", HALF, [1], [0.5])
    halves = hidden(b, "ConstantOfShape", [sizes], shape, value=content)
    return b.add("Mul", [value, halves], shape)


def back(b: Builder, value: str) -> None:
    b.add("Cast", [value], taken(b, value), to=TensorProto.FLOAT)


def chain(b: Builder) -> None:
    value = b.any(4)
    if value is None:
        return
    value = half(b, value)
    for _ in range(int(b.random.integers(1, 4))):
        value = step_in_half(b, value)
    back(b, value)


def body_of(b: Builder, value: str, shape: tuple[int, ...]) -> tuple[Builder, str]:
    """Nodes of a body that read a float16 value."""
    inner = Builder(int(b.random.integers(1 << 30)))
    inner.opset, inner.count = b.opset, b.count + 10
    made = inner.add("Neg", [value], shape)
    made = inner.add("Add", [made, whole(inner, *(1,) * len(shape))], shape)
    b.count = inner.count
    return inner, made


def branches(b: Builder) -> None:
    """An If whose bodies read a float16 value of outside, and state no types."""
    value = b.any(4)
    if value is None:
        return
    value = half(b, value)
    shape = taken(b, value)
    bodies = []
    for _ in range(2):
        inner, made = body_of(b, value, shape)
        info = [onnx.ValueInfoProto(name=made)]
        bodies.append(helper.make_graph(inner.nodes, "body", [], info, inner.initializers))
    condition = b.constant(np.array(b.random.random() < 0.5))
    back(b, b.add("If", [condition], shape, then_branch=bodies[0], else_branch=bodies[1]))


def rounds(b: Builder) -> None:
    """A Loop that carries a float16 value."""
    value = b.any(4)
    if value is None:
        return
    value = half(b, value)
    shape = taken(b, value)
    number, go, carried = b.name(), b.name(), b.name()
    inner, made = body_of(b, carried, shape)
    still = inner.add("Identity", [go], ())
    b.count = inner.count
    inputs = [
        helper.make_tensor_value_info(number, TensorProto.INT64, []),
        helper.make_tensor_value_info(go, TensorProto.BOOL, []),
        helper.make_tensor_value_info(carried, HALF, None),
    ]
    outputs = [
        helper.make_tensor_value_info(still, TensorProto.BOOL, []),
        helper.make_tensor_value_info(made, HALF, None),
    ]
    body = helper.make_graph(inner.nodes, "body", inputs, outputs, inner.initializers)
    count, start = b.constant(np.int64(b.random.integers(1, 4))), b.constant(np.array(True))
    back(b, b.add("Loop", [count, start, value], shape, body=body))


FOCUS: dict[str, tuple[Step, ...]] = {"widen-halves": (chain, chain, branches, rounds)}

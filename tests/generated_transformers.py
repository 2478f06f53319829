"""Steps of generated graphs that hold what transformers are made of, in pieces."""

from __future__ import annotations

import numpy as np
from generated import Builder, Step


def _scalar(b: Builder, number: float) -> str:
    return b.constant(np.float32(number))


def gelu(b: Builder) -> None:
    """As exporters wrote Gelu before it was an operator; now and then with another constant."""
    value = b.any()
    assert value is not None
    shape = b.shapes[value]
    root = 2**0.5 if b.random.random() < 0.8 else 1.5
    inner = b.add("Erf", [b.add("Div", [value, _scalar(b, root)], shape)], shape)
    sum_ = b.add("Add", [inner, _scalar(b, 1)], shape)
    product = b.add("Mul", [value, sum_], shape)
    b.add("Mul", [product, _scalar(b, 0.5)], shape)


def gelu_of_sum(b: Builder) -> None:
    """A Gelu after the bias of a layer."""
    value = b.any()
    assert value is not None
    shape = b.shapes[value]
    if not shape or shape[-1] < 1:
        return
    b.add("Add", [value, b.normal(shape[-1])], shape)
    gelu(b)


def layer_normalization(b: Builder) -> None:
    """Over the last axis, in pieces, of a value or of a sum of two."""
    value = b.any()
    assert value is not None
    shape = b.shapes[value]
    if len(shape) < 2 or shape[-1] < 2:
        return
    if b.random.random() < 0.5:
        value = b.add("Add", [value, b.add("Tanh", [value], shape)], shape)
    narrow = (*shape[:-1], 1)
    mean = b.add("ReduceMean", [value], narrow, axes=[-1]) if b.opset < 18 else _mean(b, value)
    difference = b.add("Sub", [value, mean], shape)
    square = b.add("Pow", [difference, _scalar(b, 2)], shape)
    mean = b.add("ReduceMean", [square], narrow, axes=[-1]) if b.opset < 18 else _mean(b, square)
    deviation = b.add("Sqrt", [b.add("Add", [mean, _scalar(b, 1e-5)], narrow)], narrow)
    scaled = b.add(
        "Mul", [b.add("Div", [difference, deviation], shape), b.normal(shape[-1])], shape
    )
    b.add("Add", [scaled, b.normal(shape[-1])], shape)


def _mean(b: Builder, value: str) -> str:
    shape = (*b.shapes[value][:-1], 1)
    return b.add("ReduceMean", [value, b.constant(np.int64([-1]))], shape)


FOCUS: dict[str, tuple[Step, ...]] = {
    "fuse-transformers": (gelu, gelu_of_sum, layer_normalization),
}

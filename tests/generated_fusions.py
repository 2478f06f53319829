"""Steps of generated graphs that write out what one operator computes, in the ways of exporters."""

from __future__ import annotations

import numpy as np
from generated import Builder, Step

REDUCED_BY_INPUT = {"ReduceSum": 13, "ReduceMax": 18, "ReduceMean": 18}
"""The opset from which these take their axes as an input."""


def number(b: Builder, value: float) -> str:
    """A constant of no dimension, or of one."""
    return b.constant(np.float32([value] if b.random.random() < 0.2 else value))


def either(b: Builder, *choices: str) -> str:
    return str(b.random.choice(choices))


def times(b: Builder, *factors: str) -> str:
    """The product, in any order and grouping; of the shape of the first."""
    shape = b.shapes[factors[0]]
    left = [str(f) for f in b.random.permutation(factors)]
    while len(left) > 1:
        at = int(b.random.integers(len(left) - 1))
        left[at : at + 2] = [b.add("Mul", left[at : at + 2], shape)]
    return left[0]


def plus(b: Builder, value: str, other: str) -> str:
    inputs = [value, other] if b.random.random() < 0.5 else [other, value]
    return b.add("Add", inputs, b.shapes[value])


def reduced(b: Builder, op: str, value: str, axes: list[int]) -> str:
    shape = b.shapes[value]
    negative = b.random.random() < 0.5
    stated = [a - len(shape) if negative else a for a in axes]
    small = tuple(1 if i in axes else d for i, d in enumerate(shape))
    if b.opset < REDUCED_BY_INPUT[op]:
        return b.add(op, [value], small, axes=stated)
    return b.add(op, [value, b.constant(np.int64(stated))], small)


def divided(b: Builder, value: str, root: str) -> str:
    """The value over another, in three ways."""
    way = b.random.integers(3)
    if way == 0:
        return b.add("Div", [value, root], b.shapes[value])
    if way == 1:
        inverse = b.add("Reciprocal", [root], b.shapes[root])
    else:
        inverse = b.add("Div", [number(b, 1.0), root], b.shapes[root])
    return times(b, value, inverse)


def modern(b: Builder) -> None:
    """Let the model be of an opset that has all operators, now and then."""
    if b.opset == 21:
        b.opset = 23


def chosen(b: Builder) -> str:
    modern(b)
    value = b.any()
    assert value is not None
    return value


def gelu(b: Builder) -> None:
    x = chosen(b)
    shape = b.shapes[x]
    if b.random.random() < 0.5:
        curve = b.add("Erf", [times(b, x, number(b, 0.5**0.5))], shape)
    elif b.random.random() < 0.5:
        cubic = b.add("Pow", [x, number(b, 3.0)], shape)
        inner = plus(b, x, times(b, cubic, number(b, 0.044715)))
        curve = b.add("Tanh", [times(b, inner, number(b, (2 / np.pi) ** 0.5))], shape)
    else:
        inner = plus(b, x, times(b, x, x, x, number(b, 0.044715)))
        curve = b.add("Tanh", [times(b, inner, number(b, (2 / np.pi) ** 0.5))], shape)
    times(b, x, plus(b, curve, number(b, 1.0)), number(b, 0.5))


def hard_swish(b: Builder) -> None:
    """Of numbers on both sides of where it is flat, and never of the same twice.

    The difference of two that are computed in two ways is nothing but rounding.
    """
    x = chosen(b)
    shape = b.shapes[x]
    x = b.add("Tanh", [times(b, x, number(b, float(b.random.uniform(0.05, 0.15))))], shape)
    x = times(b, x, number(b, 4.0))
    low, high = b.constant(np.float32(0)), b.constant(np.float32(6))
    clipped = b.add("Clip", [plus(b, x, number(b, 3.0)), low, high], shape)
    if b.random.random() < 0.3:
        b.add("Div", [clipped, number(b, 6.0)], shape)
    elif b.random.random() < 0.5:
        b.add("Div", [times(b, x, clipped), number(b, 6.0)], shape)
    else:
        times(b, x, clipped, number(b, 1 / 6))


def relu(b: Builder) -> None:
    x = chosen(b)
    shape = b.shapes[x]
    zero, slope = number(b, 0.0), number(b, 0.125)
    way = b.random.integers(5)
    if way == 0:
        b.add("Max", [x, zero], shape)
    elif way == 1:
        b.add("Max", [times(b, x, slope), x], shape)
    elif way == 2:
        b.add("PRelu", [x, slope], shape)
    elif way == 3:
        positive = b.add("Greater", [x, zero], shape)
        del b.shapes[positive]
        b.add("Where", [positive, x, times(b, x, slope)], shape)
    else:
        below = b.add("Relu", [b.add("Neg", [x], shape)], shape)
        b.add("Sub", [b.add("Relu", [x], shape), times(b, below, slope)], shape)


def softmax(b: Builder) -> None:
    """Of numbers between -1 and 1.

    For large ones the nodes overflow, and only the one operator knows the result.
    """
    x = chosen(b)
    shape = b.shapes[x]
    x = b.add("Tanh", [x], shape)
    axis = [int(b.random.integers(len(shape)))]
    if b.random.random() < 0.3:
        b.add("Log", [b.add("Softmax", [x], shape, axis=axis[0])], shape)
        return
    if b.random.random() < 0.7:
        x = b.add("Sub", [x, reduced(b, "ReduceMax", x, axis)], shape)
    power = b.add("Exp", [x], shape)
    divided(b, power, reduced(b, "ReduceSum", power, axis))


def last_axes(b: Builder, x: str) -> list[int]:
    """The last one or two, now and then the first."""
    rank = len(b.shapes[x])
    if b.random.random() < 0.2:
        return [0]
    return list(range(max(1, rank - int(b.random.integers(1, 3))), rank))


def parameter(b: Builder, x: str, axes: list[int]) -> str:
    """Of the shape of the axes, so far as that is known, and of ones behind them."""
    sizes = [max(1, b.shapes[x][axis]) for axis in axes]
    return b.normal(*sizes, *[1] * (len(b.shapes[x]) - 1 - axes[-1]))


def root_of_squares(b: Builder, value: str, axes: list[int]) -> str:
    """With a large epsilon: values that are all but equal would be noise divided by nearly 0."""
    if b.random.random() < 0.5:
        square = b.add("Pow", [value, number(b, 2.0)], b.shapes[value])
    else:
        square = b.add("Mul", [value, value], b.shapes[value])
    mean = reduced(b, "ReduceMean", square, axes)
    return b.add("Sqrt", [plus(b, mean, number(b, 0.5))], b.shapes[mean])


def with_last_only(step: Step) -> Step:
    """The step, but what it makes within is for it alone.

    Other steps would make noise of it: the mean of what is normalized already is nothing but
    rounding, and HardSwish of numbers above 3, less these numbers, is too.
    """

    def hidden(b: Builder) -> None:
        before = set(b.shapes)
        step(b)
        made = [name for name in b.shapes if name not in before]
        for name in made[:-1]:
            del b.shapes[name]

    return hidden


def layer_normalization(b: Builder) -> None:
    x = chosen(b)
    axes = last_axes(b, x)
    mean = reduced(b, "ReduceMean", x, axes)
    centred = b.add("Sub", [x, mean], b.shapes[x])
    root = root_of_squares(b, centred, axes)
    if b.random.random() < 0.3:
        inverse = b.add("Reciprocal", [root], b.shapes[root])
        factor = b.add("Mul", [inverse, parameter(b, x, axes)], b.shapes[x])
        moved = b.add("Sub", [parameter(b, x, axes), times(b, factor, mean)], b.shapes[x])
        plus(b, times(b, x, factor), moved)
        return
    value = divided(b, centred, root)
    if b.random.random() < 0.8:
        value = times(b, value, parameter(b, x, axes))
    if b.random.random() < 0.8:
        plus(b, value, parameter(b, x, axes))


def rms_normalization(b: Builder) -> None:
    x = chosen(b)
    axes = last_axes(b, x)
    value = divided(b, x, root_of_squares(b, x, axes))
    if b.random.random() < 0.8:
        times(b, value, parameter(b, x, axes))


def attention(b: Builder) -> None:
    """Of queries and keys between -1 and 1, scaled after the product or before it, or not."""
    modern(b)
    x = b.any(4)
    if x is None or len(set(b.shapes[x][2:])) > 1:
        return
    shape = b.shapes[x]
    query = b.add(either(b, "Tanh", "Sin"), [x], shape)
    key, value = b.add("Tanh", [x], shape), b.add("Relu", [x], shape)
    if b.random.random() < 0.3:
        query = times(b, query, number(b, 0.5))
    key = b.add("Transpose", [key], shape, perm=[0, 1, 3, 2])
    if b.random.random() < 0.3:
        key = times(b, key, number(b, 0.5))
    scores = b.add("MatMul", [query, key], shape)
    if b.random.random() < 0.7:
        scores = b.add(either(b, "Div", "Mul"), [scores, number(b, 2.0)], shape)
    if b.random.random() < 0.5:
        size = shape[2:]
        scores = plus(b, scores, b.normal(*[size, (1, *size), (1, 1, *size)][b.random.integers(3)]))
    shares = b.add("Softmax", [scores], shape, axis=int(b.random.choice([-1, 3])))
    b.add("MatMul", [shares, value], shape)


def product(b: Builder) -> None:
    """A MatMul, with a Transpose before it and an Add after it now and then."""
    x = b.any(4)
    if x is None:
        return
    batch, *rest = b.shapes[x]
    width = int(np.prod(rest))
    left = b.add("Flatten", [x], (batch, width))
    if b.random.random() < 0.3:
        turned = b.add("Transpose", [left], (width, batch), perm=[1, 0])
        bent = b.add("Relu", [turned], (width, batch))
        left = b.add("Transpose", [bent], (batch, width), perm=[1, 0])
        # Other steps take it that the batch comes first.
        del b.shapes[turned], b.shapes[bent]
    if b.random.random() < 0.5:
        value = b.add("MatMul", [left, b.normal(width, 6)], (batch, 6))
    else:
        value = b.add("Gemm", [left, b.normal(6, width)], (batch, 6), transB=1, alpha=0.5)
    if b.random.random() < 0.7:
        plus(b, value, b.normal(*[(6,), (1, 6), ()][b.random.integers(3)]))


FOCUS: dict[str, tuple[Step, ...]] = {
    "fuse-attention": (with_last_only(attention),),
    "fuse-gelu": (gelu,),
    "fuse-gemm": (product,),
    "fuse-hard-swish": (with_last_only(hard_swish),),
    "fuse-layer-normalization": (with_last_only(layer_normalization),),
    "fuse-relu": (relu,),
    "fuse-rms-normalization": (with_last_only(rms_normalization),),
    "fuse-softmax": (with_last_only(softmax),),
}

"""Steps of generated graphs with layers that follow one another, for what moves factors."""

from __future__ import annotations

import numpy as np
from generated import Builder, Step
from generated_fusions import with_last_only

REDUCED_BY_INPUT = 18
"""From this opset on, the axes of ReduceMean are an input."""


def uneven(b: Builder, *shape: int) -> str:
    """A weight whose outputs, along the first axis, are of very different sizes below 1.

    Large ones would make much of little roundings, wherever a Tanh follows.
    """
    sizes = 4.0 ** b.random.uniform(-2, 0, (shape[0], *(1,) * (len(shape) - 1)))
    sizes /= np.prod(shape[1:])
    return b.constant((b.random.standard_normal(shape) * sizes).astype(np.float32))


def layer(b: Builder, value: str, made: int) -> str:
    """A Conv of an odd kernel, with or without groups and bias, that keeps the places."""
    batch, channels, height, width = b.shapes[value]
    group = int(b.random.choice([1, 2, channels])) if channels == made and channels % 2 == 0 else 1
    kernel = int(b.random.choice([1, 3]))
    inputs = [value, uneven(b, made, channels // group, kernel, kernel)]
    if b.random.random() < 0.7:
        inputs.append(b.normal(made))
    pads = [kernel // 2] * 4
    return b.add("Conv", inputs, (batch, made, height, width), group=group, pads=pads)


def between(b: Builder, value: str) -> str:
    shape = b.shapes[value]
    way = b.random.integers(7)
    if way == 0:
        return b.add("Relu", [value], shape)
    if way == 1:
        return b.add("LeakyRelu", [value], shape, alpha=0.25)
    if way == 2:
        return b.add("PRelu", [value, b.normal(shape[1], 1, 1)], shape)
    if way == 3:
        return b.add("Clip", [value, b.constant(np.float32(0))], shape)
    if way == 4:
        return b.add("Add", [value, b.normal(shape[1], 1, 1)], shape)
    if way == 5:
        order = b.constant(np.int64(b.random.permutation(shape[1])))
        return b.add("Gather", [value, order], shape, axis=1)
    return value


def layers(b: Builder) -> None:
    """Two or three layers, the last of which is a Gemm now and then."""
    value = b.any(4)
    if value is None:
        return
    width = int(b.random.choice([4, 6]))
    for _ in range(int(b.random.integers(1, 3))):
        value = between(b, layer(b, value, width))
    if b.random.random() < 0.3:
        batch, channels, height, wide = b.shapes[value]
        size = channels * height * wide
        flat = b.add("Flatten", [value], (batch, size))
        b.add("Gemm", [flat, uneven(b, size, 6)], (batch, 6))
        return
    layer(b, value, width)


def scaled(b: Builder) -> None:
    """Products of the same rows, scaled by a constant in which one channel stands out."""
    value = b.any(4)
    if value is None:
        return
    shape = b.shapes[value]
    size = shape[-1]
    factors = np.ones(size, np.float32)
    factors[int(b.random.integers(size))] = 50
    rows = b.add("Tanh", [value], shape)
    normal = b.add("Mul", [rows, b.constant(factors)], shape)
    if b.random.random() < 0.5:
        normal = b.add("Add", [normal, b.normal(size)], shape)
    made = (*shape[:-1], 5)

    def weight() -> np.ndarray:
        numbers: np.ndarray = b.random.standard_normal((size, 5)) / 50
        return numbers.astype(np.float32)

    products = [b.add("MatMul", [normal, b.constant(weight())], made) for _ in range(2)]
    b.add("Add", products, made)


def apart(b: Builder, value: str) -> str:
    """What keeps channels apart, or now and then does not."""
    shape = b.shapes[value]
    way = b.random.integers(8)
    if way < 3:
        return b.add(
            str(b.random.choice(["Relu", "LeakyRelu", "Sigmoid", "Softplus"])), [value], shape
        )
    if way == 3:
        return b.add("MaxPool", [value], shape, kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    if way == 4:
        mean = b.add("GlobalAveragePool", [value], (*shape[:2], 1, 1))
        return b.add("Mul", [value, mean], shape)
    if way == 5:
        return b.add("Add", [value, b.normal(shape[1], 1, 1)], shape)
    if way == 6:
        doubled = b.add("Add", [value, b.constant(np.float32(0.5))], shape)
        return b.add("Mul", [value, doubled], shape)
    return value


def narrow(b: Builder) -> None:
    """A depthwise Conv between two others, of numbers of channels that fill no lanes."""
    value = b.any(4)
    if value is None:
        return
    batch, arriving, height, width = b.shapes[value]
    channels = int(b.random.choice([46, 58, 61]))
    shape = (batch, channels, height, width)
    inside = b.add("Conv", [value, uneven(b, channels, arriving, 1, 1)], shape)
    inside = apart(b, inside)
    inputs = [inside, uneven(b, channels, 1, 3, 3), b.normal(channels)]
    inside = b.add("Conv", inputs, shape, group=channels, pads=[1] * 4)
    inside = apart(b, inside)
    b.add("Conv", [inside, uneven(b, arriving, channels, 1, 1)], (batch, arriving, height, width))


def channels_last(b: Builder) -> None:
    """A Conv that reads an image whose channels lie last."""
    value = b.any(4)
    if value is None:
        return
    batch, *rows, width, channels = b.shapes[value]
    perm = [0, 3, 1, 2] if b.random.random() < 0.8 else [0, 3, 2, 1]
    image = (batch, channels, *(rows[0], width)[:: 1 if perm[2] == 1 else -1])
    turned = b.add("Transpose", [value], image, perm=perm)
    before = int(b.random.integers(2))
    made = (batch, 5, image[2], image[3] - 1 + before)
    b.add("Conv", [turned, uneven(b, 5, channels, 1, 3)], made, pads=[0, before, 0, 1])


def classifier(b: Builder) -> None:
    """A mean over all places and a Conv of it, after which now and then another comes."""
    value = b.any(4)
    if value is None:
        return
    batch, channels = b.shapes[value][:2]
    mean = b.add("GlobalAveragePool", [value], (batch, channels, 1, 1))
    scores = b.add("Conv", [mean, uneven(b, 5, channels, 1, 1), b.normal(5)], (batch, 5, 1, 1))
    if b.random.random() < 0.3:
        scores = b.add("Conv", [scores, uneven(b, 3, 5, 1, 1)], (batch, 3, 1, 1))
    b.add(str(b.random.choice(["Relu", "Sigmoid", "Tanh"])), [scores], b.shapes[scores])


def means(b: Builder) -> None:
    """A mean over all places or some axes of an image, with or without them in the shape."""
    value = b.any(4)
    if value is None:
        return
    batch, channels, height, _ = b.shapes[value]
    # A mean of terms that cancel is its own rounding.
    value = b.add("Abs", [value], b.shapes[value])
    every = b.random.random() < 0.8
    axes = [[2, 3], [-2, -1], [3, 2]][int(b.random.integers(3))] if every else [3]
    keeps = int(b.random.integers(2))
    left = () if every else (height,)
    shape = (batch, channels, *((1, 1) if every else (height, 1))) if keeps else None
    inputs, stated = [value], {"keepdims": keeps}
    if b.opset < REDUCED_BY_INPUT:
        stated["axes"] = axes
    else:
        inputs.append(b.constant(np.int64(axes)))
    b.add("ReduceMean", inputs, shape or (batch, channels, *left), **stated)


FOCUS: dict[str, tuple[Step, ...]] = {
    "equalize-layers": (with_last_only(layers),),
    "flatten-convs": (with_last_only(classifier),),
    "fuse-transpose": (with_last_only(channels_last),),
    "pad-channels": (with_last_only(narrow),),
    "smooth-activations": (with_last_only(scaled),),
}

MEANS: tuple[Step, ...] = (with_last_only(means),)

SCALED: tuple[Step, ...] = (with_last_only(scaled),)

"""Samples drawn at random from the signature of a model, for when there are no real ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.contract import Sample
from graphopt.errors import SampleError
from graphopt.operators import is_onnx
from graphopt.signature import Input, signature

RANDOM_LIMIT_BYTES = 1 << 30

_KEEPS_INDICES = frozenset(
    {"Cast", "Concat", "Expand", "Flatten", "Identity", "Reshape", "Slice", "Squeeze", "Transpose",
     "Unsqueeze"}
)  # fmt: skip
_SIZES = (2, 3, 1, 4, 8, 16, 32, 64, 5, 128, 6, 7)


def random_samples(
    model: ir.Model,
    count: int,
    accepts: Callable[[Sample], bool] = lambda _: True,
    seed: int = 0,
) -> list[Sample]:
    """Samples drawn from the signature of the model.

    Floats are standard normal, 8-bit integers cover their range, wider ones stay below the size of
    the table that they index (Gather, OneHot), or are 0 or 1 where none is found. Dimensions with
    the same name have the same size, which differs between samples.

    Args:
        model: the model.
        count: how many.
        accepts: tells whether the model runs on a sample; other sizes are tried until it does.
        seed: of the generator.

    Raises:
        SampleError: the model accepts none of the sizes that were tried.
    """
    inputs = [i for i in signature(model) if i.required]
    limits = {v.name: _index_limit(v) for v in model.graph.inputs if v.name is not None}
    samples: list[Sample] = []
    _check_size(inputs)
    for index in range(count):
        generator = np.random.default_rng((seed, index))
        for attempt in range(len(_SIZES)):
            size = _SIZES[(index + attempt) % len(_SIZES)]
            sample = {i.name: _draw(i, size, limits[i.name], generator) for i in inputs}
            if accepts(sample):
                samples.append(sample)
                break
        else:
            raise SampleError(
                "the model runs on none of the random samples that were tried; give real ones "
                f"({', '.join(f'{i.name}: {i}' for i in inputs)})"
            )
    return samples


def _check_size(inputs: Sequence[Input]) -> None:
    for expected in inputs:
        dims = [d if isinstance(d, int) else 1 for d in expected.shape or ()]
        size_bytes = math.prod(dims) * expected.dtype.itemsize
        if size_bytes > RANDOM_LIMIT_BYTES:
            raise SampleError(
                f"a random sample of input {expected.name!r} ({expected}) would take "
                f"{size_bytes} bytes; give real samples"
            )


def _draw(
    expected: Input, size: int, limit: int | None, generator: np.random.Generator
) -> np.ndarray:
    shape = tuple(d if isinstance(d, int) else size for d in expected.shape or ())
    dtype = expected.dtype
    if dtype.kind == "O":
        return generator.integers(0, 100, shape).astype(str).astype(object)
    if dtype.kind == "b":
        return generator.integers(0, 2, shape).astype(bool)
    if dtype.kind in "iu":
        narrow = np.iinfo(dtype) if dtype.itemsize == 1 and limit is None else None
        low, high = (narrow.min, narrow.max) if narrow else (0, (limit or 2) - 1)
        return generator.integers(low, high, shape, endpoint=True).astype(dtype)
    if dtype.kind == "c":
        pairs: np.ndarray = generator.standard_normal((*shape, 2)).view(np.complex128)
        return pairs.reshape(shape).astype(dtype)
    return generator.standard_normal(shape).astype(dtype)


def _index_limit(value: ir.Value) -> int | None:
    """The size of the smallest table that the value's elements index, if it can be told."""
    limits = []
    seen = {value}
    waiting = [value]
    while waiting:
        for use in waiting.pop().uses():
            node, place = use.node, use.idx
            if node.op_type in _KEEPS_INDICES:
                waiting += [o for o in node.outputs if o not in seen]
                seen.update(node.outputs)
            elif place == 1 and is_onnx(node, "Gather", "GatherElements", "ScatterElements"):
                limits.append(_dimension(node.inputs[0], node.attributes.get_int("axis", 0)))
            elif place == 1 and is_onnx(node, "GatherND", "ScatterND"):
                limits.append(_dimension(node.inputs[0], 0))
            elif place == 0 and is_onnx(node, "OneHot") and node.inputs[1] is not None:
                depth = node.inputs[1].const_value
                limits.append(int(depth.numpy().reshape(())) if depth is not None else None)
    return min((limit for limit in limits if limit), default=None)


def _dimension(table: ir.Value | None, axis: int) -> int | None:
    shape = table.shape if table is not None else None
    if shape is None or not -len(shape) <= axis < len(shape):
        return None
    size = shape[axis]
    return size if isinstance(size, int) else None

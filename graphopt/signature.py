"""What a model expects of its inputs, and whether a sample is that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.contract import Sample
from graphopt.errors import SampleError, did_you_mean
from graphopt.skeleton import type_text


@dataclass(frozen=True)
class Input:
    """What the model expects of one input.

    Attributes:
        name: of the input.
        dtype: element type of the arrays; object for strings.
        shape: dimensions; a name or None where any size goes; None when the rank is free.
        required: False for an input with a default value.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...] | None
    required: bool = True

    def __str__(self) -> str:
        if self.shape is None:
            return f"{self.dtype}[?]"
        dims = ", ".join("?" if d is None else str(d) for d in self.shape)
        return f"{self.dtype}[{dims}]"


def signature(model: ir.Model) -> tuple[Input, ...]:
    """The inputs of the model, in order.

    Raises:
        SampleError: an input is a sequence, a map or optional: there is no form of sample for it.
    """
    return tuple(_input(value, model.graph) for value in model.graph.inputs)


def _input(value: ir.Value, graph: ir.Graph) -> Input:
    name = value.name or ""
    if not isinstance(value.type, ir.TensorType):
        raise SampleError(
            f"input {name!r} is a {type_text(value)}, and samples can only hold tensors"
        )
    string = value.type.dtype == ir.DataType.STRING
    dtype = np.dtype(object) if string else np.dtype(value.type.dtype.numpy())
    dims = None
    if value.shape is not None:
        dims = tuple(d if isinstance(d, int) else d.value for d in value.shape)
    return Input(name, dtype, dims, name not in graph.initializers)


def check_sample(sample: Sample, inputs: Sequence[Input], where: str, carried: set[str]) -> None:
    """Raise SampleError when a sample does not fit the inputs of the model.

    Args:
        sample: the sample.
        inputs: what the model expects.
        where: what to call the sample in the message.
        carried: inputs that carry state; they may be missing.
    """
    known = {i.name: i for i in inputs}
    for name in sample:
        if name not in known:
            near = did_you_mean(name, known)
            raise SampleError(f"{where}: the model has no input {name!r}{near}")
    sizes: dict[str, tuple[int, str]] = {}
    for expected in inputs:
        array = sample.get(expected.name)
        if array is not None:
            _check_array(array, expected, where, sizes)
        elif expected.required and expected.name not in carried:
            raise SampleError(f"{where}: input {expected.name!r} ({expected}) is missing")


def _check_array(
    array: np.ndarray, expected: Input, where: str, sizes: dict[str, tuple[int, str]]
) -> None:
    given = f"{array.dtype}[{', '.join(map(str, array.shape))}]"
    text = expected.dtype == object and array.dtype.kind in "US"
    if array.dtype != expected.dtype and not text:
        raise SampleError(
            f"{where}: input {expected.name!r} is {given}; the model expects {expected}: "
            f"wrong element type"
        )
    if expected.shape is None:
        return
    if array.ndim != len(expected.shape):
        raise SampleError(
            f"{where}: input {expected.name!r} is {given}; the model expects {expected}: wrong rank"
        )
    for size, dim in zip(array.shape, expected.shape, strict=True):
        if isinstance(dim, int) and dim != size:
            raise SampleError(
                f"{where}: input {expected.name!r} is {given}; the model expects {expected}: "
                f"wrong shape"
            )
        if isinstance(dim, str) and sizes.setdefault(dim, (size, expected.name))[0] != size:
            raise SampleError(
                f"{where}: dimension {dim!r} is {size} in input {expected.name!r} but "
                f"{sizes[dim][0]} in input {sizes[dim][1]!r}"
            )


def complete(sample: Sample, inputs: Sequence[Input]) -> Sample:
    """The sample with zeros for the required inputs that it lacks: state before the first step.

    Raises:
        SampleError: the rank of such an input is free.
    """
    missing = [i for i in inputs if i.required and i.name not in sample]
    if not missing:
        return sample
    sizes = {
        dim: size
        for i in inputs
        if i.name in sample and i.shape is not None
        for dim, size in zip(i.shape, sample[i.name].shape, strict=False)
        if isinstance(dim, str)
    }
    return {**sample, **{i.name: _zeros(i, sizes) for i in missing}}


def _zeros(expected: Input, sizes: Mapping[str, int]) -> np.ndarray:
    if expected.shape is None:
        raise SampleError(
            f"input {expected.name!r} is missing in a sample, and it cannot be zeros: its rank is "
            "free"
        )
    dims = [d if isinstance(d, int) else sizes.get(d or "", 1) for d in expected.shape]
    if expected.dtype.kind == "O":
        return np.full(dims, "", object)
    return np.zeros(dims, expected.dtype)

"""What LayerNormalization and RMSNormalization have in common.

Both divide by the square root of a mean of squares over the last axes, and multiply with a scale
of the shape of these axes.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from graphopt.content import read_array
from graphopt.rewriting import constant_tensor, stated_integers
from graphopt.skeleton import known_shape
from graphopt_passes.fuse.misfit import Misfit
from graphopt_passes.fuse.pattern import Any, Inverse, Match, Op, Pattern, Product

DTYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
"""Both operators compute in float32, so numbers of float64 would lose half of their digits."""

ONES_MAXIMUM = 1 << 14
"""Where there is no scale, one of at most so many ones is stored."""

SCALE = Any("scale")


def mean(value: Pattern, name: str) -> Pattern:
    """The mean of a value over axes that `check_axes` looks at."""
    return Op("ReduceMean", value, name=name, more=True)


def inverse_root(value: Pattern) -> Pattern:
    """One over the root of the mean square of a value."""
    square = mean(Product(1.0, value, value), "square")
    return Inverse(Op("Sqrt", Op("Add", square, Any("epsilon"))))


def cast(value: Pattern, name: str) -> Pattern:
    """The value in another type."""
    return Op("Cast", value, name=name)


# ------------------------------------------------------------------ what a rule checks


def last_axes(match: Match, *names: str) -> tuple[int, ...]:
    """The sizes of the axes over which the named means run, which are the last of `x`.

    Raises:
        Misfit: they are not, or not known.
    """
    shape = known_shape(match["x"])
    if shape is None:
        raise Misfit("the rank of its input is not known")
    axes = {_axes(match.named[name], len(shape)) for name in names}
    if len(axes) > 1:
        raise Misfit("its means run over different axes")
    (one,) = axes
    if one != tuple(range(len(shape) - len(one), len(shape))):
        raise Misfit(f"it runs over axes {list(one)}, which are not the last of {len(shape)}")
    sizes = tuple(size for axis in one if isinstance(size := shape[axis], int))
    if not one or len(sizes) < len(one):
        raise Misfit("the sizes of the axes that it runs over are not known")
    return sizes


def _axes(node: ir.Node, rank: int) -> tuple[int, ...]:
    if not node.attributes.get_int("keepdims", 1):
        raise Misfit(f"{node.op_type} drops its axes")
    axes = stated_integers(node, "axes", 1)
    if axes is None:
        raise Misfit(f"the axes of {node.op_type} are not constant")
    if not axes:
        return () if node.attributes.get_int("noop_with_empty_axes", 0) else tuple(range(rank))
    return tuple(sorted(axis + rank * (axis < 0) for axis in axes))


def epsilon(match: Match) -> float:
    """The number that is added to the mean of squares."""
    found = match.with_number(match["epsilon"])
    if found is None:
        raise Misfit("its epsilon is not one constant number")
    number, with_it = found
    shape = known_shape(match["x"])
    if shape is None or with_it.rank > len(shape):
        raise Misfit("its constants have more dimensions than its input")
    return number


def check_types(match: Match) -> None:
    """Raise Misfit unless the fused node computes in the type of the nodes that it replaces."""
    value = match["x"]
    if value.dtype not in DTYPES:
        kind = "unknown" if value.dtype is None else value.dtype.name
        raise Misfit(f"it computes with numbers of type {kind}")
    if "up" not in match.named:
        return
    up, down = match.named["up"], match.named["down"]
    if up.outputs[0].dtype != ir.DataType.FLOAT or down.outputs[0].dtype != value.dtype:
        raise Misfit("it is cast to other types than float32 and back")


def parameter(
    value: ir.Value | None, match: Match, sizes: tuple[int, ...], what: str
) -> ir.Value | np.ndarray:
    """The scale or bias in the shape of the normalized axes: the value itself, or a new array.

    Raises:
        Misfit: it has another shape, and is not constant; or another type.
    """
    if value is None:
        if math.prod(sizes) > ONES_MAXIMUM:
            raise Misfit(f"it has no {what}, and one of shape {list(sizes)} is large")
        assert match["x"].dtype is not None
        return np.ones(sizes, match["x"].dtype.numpy())
    if value.dtype != match["x"].dtype:
        raise Misfit(f"its {what} is of another type than its input")
    shape = known_shape(value)
    if shape is not None and tuple(shape) == sizes:
        return value
    tensor = constant_tensor(value)
    if tensor is None:
        raise Misfit(f"its {what} is not known to have shape {list(sizes)}")
    dims = tuple(tensor.shape.numpy())
    if not _broadcasts(dims, sizes, len(known_shape(match["x"]) or ())):
        raise Misfit(f"its {what} has shape {list(dims)}, not {list(sizes)}")
    aligned = read_array(tensor).reshape(dims[max(0, len(dims) - len(sizes)) :])
    return np.ascontiguousarray(np.broadcast_to(aligned, sizes))


def _broadcasts(dims: tuple[int, ...], sizes: tuple[int, ...], rank: int) -> bool:
    """The constant differs along the normalized axes only, and enlarges nothing."""
    if len(dims) > rank:
        return False
    padded = (1,) * (rank - len(dims)) + dims
    outer, inner = padded[: rank - len(sizes)], padded[rank - len(sizes) :]
    return set(outer) <= {1} and all(d in (1, s) for d, s in zip(inner, sizes, strict=True))

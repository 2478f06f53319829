"""Folding y = x * scale + shift, per output channel, into the linear node that computes x.

Conv, ConvTranspose, Gemm and MatMul compute x = W·a + b, where every output channel c has weights
W[c] and a bias b[c] of its own. So

    (W[c]·a + b[c]) * scale[c] + shift[c]  =  (W[c] * scale[c])·a + (b[c] * scale[c] + shift[c])

and a node that scales or shifts the channels of such an output needs no node of its own. A pass
says which nodes do that and by how much; everything else is here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.content import read_array
from graphopt.contract import Change, Context
from graphopt.operators import is_onnx, opset_of
from graphopt.packing import is_constant, is_packed
from graphopt.rewriting import (
    Names,
    can_replace,
    constant_tensor,
    input_of,
    only_reader,
    remove_node,
    replace_value,
    static_shape,
)
from graphopt.skeleton import known_shape
from graphopt_passes.fuse.misfit import Misfit

Array = npt.NDArray[np.float64]

FIRST_OPSET = 7
"""Before it, operators broadcast by attributes, and BatchNormalization trains by default."""

PRECISION = {
    ir.DataType.FLOAT16: 2.0**-10,
    ir.DataType.BFLOAT16: 2.0**-7,
    ir.DataType.FLOAT: 2.0**-23,
    ir.DataType.DOUBLE: 2.0**-52,
}
"""The element types of weights, and how far one is from the next number. Rounding costs half."""

DEAD = 2.0**-64
"""A channel that is smaller than the largest by more than that says nothing: training lets the
weights of channels that it does not need decay, down to where numbers end."""

SLAB_BYTES = 1 << 20
"""Weights are scaled in pieces of this size, in float64."""

LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")

WEIGHT, BIAS = 1, 2
"""The inputs that hold weight and bias; the same for all four operators (MatMul has no bias)."""


@dataclass(frozen=True)
class Affine:
    """y = x * scale + shift.

    Attributes:
        scale: float64 of shape [channels], finite; None stands for ones.
        shift: float64 of shape [channels], finite; None stands for zeros.
    """

    scale: Array | None = None
    shift: Array | None = None


@dataclass(frozen=True)
class Linear:
    """A node that computes W·a + b, and where its output channels are.

    Attributes:
        node: a Conv, ConvTranspose, Gemm or MatMul.
        rank: of the output; the least that is possible where it is not known.
        axis: of the channels in the output.
        channels: how many there are.
        split: the shape in which the weight is seen so that `aligned` broadcasts against it.
        aligned: the shape of one number per channel in that view.
    """

    node: ir.Node
    rank: int
    axis: int
    channels: int
    split: tuple[int, ...]
    aligned: tuple[int, ...]


# ------------------------------------------------------------------ what a pass calls


def fold_readers(
    model: ir.Model,
    op_types: Collection[str],
    operand: Callable[[ir.Node], ir.Value | None],
    affine: Callable[[ir.Node, Linear], Affine],
    context: Context,
) -> Change:
    """Fold every node that scales or shifts a linear node's output into that node.

    Args:
        model: rewritten in place, subgraphs too. Nodes are met in order, so that of several in a
            row each finds the ones before it folded already.
        op_types: of the nodes that the pass is about.
        operand: the input of such a node that it scales or shifts; None where there is none.
        affine: what the node does to the channels; may raise `Misfit`.
        context: of the run.

    Returns:
        What was folded, and with its reason what was not.
    """
    change, names, opset = Change(), Names(model), opset_of(model)
    for node in context.index_of(model).of(*op_types):
        value = operand(node)
        if value is None:
            continue
        try:
            linear = _linear_before(node, value, opset)
            what = f"{node.op_type} folded into {linear.node.op_type}"
            _fold(linear, affine(node, linear), names, context)
        except Misfit as reason:
            change.skip(node, str(reason))
            continue
        replace_value(node.outputs[0], value)
        remove_node(node)
        change.count(what)
    return change


def linear_operand(node: ir.Node, *op_types: str) -> ir.Value | None:
    """The operand of a binary node that a linear node made.

    Args:
        node: with two inputs.
        op_types: of the linear nodes that count.

    Returns:
        None unless the other operand is a constant, or an initializer that only looks like one.
    """
    if len(node.inputs) != 2:
        return None
    for value, other in (node.inputs, node.inputs[::-1]):
        producer = value.producer() if value is not None else None
        if producer is None or other is None or not is_onnx(producer, *op_types):
            continue
        if is_constant(other) or other.is_initializer() or is_packed(other):
            return value
    return None


def other_operand(node: ir.Node, linear: Linear) -> tuple[ir.Value | None, bool]:
    """The operand of a binary node that `linear` did not make, and whether it is the second."""
    first, second = node.inputs
    second_is_other = first is linear.node.outputs[0]
    return (second if second_is_other else first), second_is_other


def constant_array(value: ir.Value | None, what: str) -> Array:
    """A constant of floating point, as float64 in its own shape.

    Raises:
        Misfit: it is none, or packed.
    """
    return constant_values(value, what).astype(np.float64)


def constant_values(value: ir.Value | None, what: str) -> np.ndarray:
    """A constant of floating point, as it is stored. Not to be modified.

    Raises:
        Misfit: it is none, or packed.
    """
    if is_packed(value):
        raise Misfit(f"{what} is packed")
    tensor = constant_tensor(value)
    if tensor is None:
        overridable = value is not None and value.is_initializer()
        reason = "an input that a caller can override" if overridable else "not constant"
        raise Misfit(f"{what} is {reason}")
    if tensor.dtype not in PRECISION:
        raise Misfit(f"{what} is of type {tensor.dtype.name}")
    return read_array(tensor)


def per_channel(array: Array, linear: Linear, what: str) -> Array:
    """The numbers by which a broadcast operand meets each channel, as float64 of [channels].

    Args:
        array: an operand that is broadcast against the output of `linear`, in NumPy's way.
        linear: the node.
        what: the operand's name in a reason.

    Raises:
        Misfit: the operand differs along another axis, or makes the result larger.
    """
    if array.ndim > linear.rank:
        raise Misfit(f"{what} has more dimensions than the result is known to have")
    shape = (1,) * (linear.rank - array.ndim) + array.shape
    if any(size != 1 for axis, size in enumerate(shape) if axis != linear.axis):
        raise Misfit(f"{what} of shape {list(array.shape)} is not one number per channel")
    if shape[linear.axis] not in (1, linear.channels):
        raise Misfit(f"{what} of shape {list(array.shape)} meets {linear.channels} channels")
    return np.broadcast_to(array.reshape(-1), (linear.channels,))


def finite(array: Array, what: str) -> Array:
    """The array itself.

    Raises:
        Misfit: one of its numbers is infinite or no number.
    """
    if not np.isfinite(array).all():
        raise Misfit(f"{what} is not finite")
    return array


# ------------------------------------------------------------------ what can be folded into


def _linear_before(node: ir.Node, value: ir.Value, opset: int) -> Linear:
    """The linear node that made `value`, an input of `node`.

    Raises:
        Misfit: it did not, or something else depends on the value.
    """
    producer = value.producer()
    if producer is None or not is_onnx(producer, *LINEAR):
        before = "no node" if producer is None else producer.op_type
        raise Misfit(f"its input is made by {before}, not by one of {', '.join(LINEAR)}")
    if opset < FIRST_OPSET:
        raise Misfit(f"opset {opset} is older than {FIRST_OPSET}; raise it first")
    if value.is_graph_output():
        raise Misfit("the value before it is an output of the graph")
    if value.graph is not node.graph:
        raise Misfit("the value before it is made outside of this subgraph")
    if only_reader(value) is not node:
        raise Misfit("other nodes read the value before it")
    if not can_replace(node.outputs[0], value):
        raise Misfit("its output cannot be made by another node")
    return _linear(producer)


def _linear(node: ir.Node) -> Linear:
    """Where a node has its channels.

    Weights are seen as

        Conv           [C, ...]                    with numbers per channel as [C, 1, ...]
        ConvTranspose  [groups, C_in / groups, C / groups, ...]      as [groups, 1, C / groups, ...]
        Gemm, MatMul   [K, C], for transB [C, K]                     as [1, C], [C, 1]

    Raises:
        Misfit: the shape of the weight is not known, or none that the operator accepts.
    """
    weight = input_of(node, WEIGHT)
    tensor = constant_tensor(weight)
    if is_onnx(node, "MatMul") and tensor is None and not is_packed(weight):
        raise Misfit("the second operand of MatMul is not constant")
    shape = static_shape(weight) if tensor is None else tuple(tensor.shape.numpy())
    if shape is None:
        raise Misfit(f"the shape of the weight of {node.op_type} is not known")
    if is_onnx(node, "MatMul", "Gemm"):
        return _product(node, shape)
    groups = node.attributes.get_int("group", 1)
    if len(shape) < 3 or groups < 1 or shape[0] % groups:
        raise Misfit(f"the weight has shape {list(shape)} with {groups} groups")
    rank, inner = len(shape), (1,) * (len(shape) - 2)
    if is_onnx(node, "Conv"):
        return Linear(node, rank, 1, shape[0], shape, (shape[0], 1, *inner))
    rows, columns = shape[0] // groups, shape[1]
    return Linear(
        node,
        rank,
        axis=1,
        channels=groups * columns,
        split=(groups, rows, columns, *shape[2:]),
        aligned=(groups, 1, columns, *inner),
    )


def _product(node: ir.Node, shape: tuple[int, ...]) -> Linear:
    if len(shape) != 2:
        raise Misfit(f"the weight has {len(shape)} dimensions, not 2")
    if is_onnx(node, "Gemm") and node.attributes.get_int("transB", 0) != 0:
        return Linear(node, 2, 1, shape[0], shape, (shape[0], 1))
    left = known_shape(node.inputs[0])
    rank = 2 if is_onnx(node, "Gemm") else max(1, len(left) if left is not None else 1)
    return Linear(node, rank, rank - 1, shape[1], shape, (1, shape[1]))


# ------------------------------------------------------------------ folding


def _fold(linear: Linear, affine: Affine, names: Names, context: Context) -> None:
    """Let the linear node compute what `affine` makes of its output.

    Raises:
        Misfit: it must not be; nothing was changed then.
    """
    dtype = _element_type(linear.node)
    bias = _new_bias(linear, affine, dtype)
    weight = None
    if affine.scale is not None:
        weight = _scaled_weight(linear, affine.scale, bias, dtype)
    if weight is not None:
        _set_input(linear.node, WEIGHT, weight, names, context)
    if bias is None:
        return
    _set_input(linear.node, BIAS, bias, names, context)
    if is_onnx(linear.node, "MatMul"):
        linear.node.op_type = "Gemm"
    # The new bias holds beta already.
    linear.node.attributes.pop("beta", None)


def _element_type(node: ir.Node) -> ir.DataType:
    weight = input_of(node, WEIGHT)
    dtype = weight.dtype if weight is not None else None
    if dtype not in PRECISION:
        kind = "unknown" if dtype is None else dtype.name
        raise Misfit(f"the weight of {node.op_type} is of type {kind}")
    return dtype


def _scaled_weight(
    linear: Linear, scale: Array, bias: np.ndarray | None, dtype: ir.DataType
) -> np.ndarray:
    """W * scale, in the weight's own shape; the new bias tells what is small beside it."""
    value = input_of(linear.node, WEIGHT)
    weight = constant_values(value, "the weight")
    assert value is not None
    if len(value.uses()) > 1 or value.is_graph_output():
        raise Misfit("the weight is shared, folding would store it twice")
    scaled, loss, size = _product_in_slabs(
        weight.reshape(linear.split), scale.reshape(linear.aligned), dtype
    )
    level = np.maximum(size, DEAD * size.max(initial=0.0)).reshape(-1)
    if bias is not None:
        level = np.maximum(level, np.abs(bias.astype(np.float64)))
    # Only below the smallest normal number does rounding cost more than half of that.
    if np.any(loss.reshape(-1) > PRECISION[dtype] * level):
        raise Misfit(f"the folded weight is too small for {dtype.name}")
    return scaled.reshape(weight.shape)


def _product_in_slabs(
    weight: np.ndarray, scale: Array, dtype: ir.DataType
) -> tuple[np.ndarray, Array, Array]:
    """The rounded product; per number of `scale`, its largest rounding error and magnitude."""
    result = np.empty(weight.shape, dtype.numpy())
    loss, size = np.zeros(scale.shape), np.zeros(scale.shape)
    across = tuple(axis for axis, count in enumerate(scale.shape) if count == 1)
    row_bytes = 8 * max(1, int(np.prod(weight.shape[1:])))
    step = max(1, SLAB_BYTES // row_bytes)
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        part = weight[rows].astype(np.float64)
        channels = rows if scale.shape[0] > 1 else slice(None)
        with np.errstate(over="ignore", invalid="ignore"):
            # Zeros stay 0.0 where the scale is negative: passes that store them look for that.
            exact = part * scale[channels] + 0.0
            rounded = exact.astype(dtype.numpy())
            error = np.abs(rounded.astype(np.float64) - exact)
        _check_finite(rounded, np.isfinite(part), "weight", dtype)
        result[rows] = rounded
        # Weights that are not finite to begin with stay so, and say nothing of the others.
        usual = np.isfinite(exact)
        for total, new in ((loss, error), (size, np.abs(exact))):
            largest = np.where(usual, new, 0.0).max(across, keepdims=True, initial=0.0)
            total[channels] = np.maximum(total[channels], largest)
    return result, loss, size


def _new_bias(linear: Linear, affine: Affine, dtype: ir.DataType) -> np.ndarray | None:
    """The bias b * scale + shift as [channels], Gemm's beta in it; None where there stays none."""
    bias = _bias(linear)
    if bias is None and affine.shift is None:
        return None
    if is_onnx(linear.node, "MatMul") and linear.rank != 2:
        raise Misfit("only a MatMul with two dimensions can become a Gemm, which has a bias")
    total = np.zeros(linear.channels) if bias is None else bias
    expected = np.isfinite(total)
    with np.errstate(over="ignore", invalid="ignore"):
        if affine.scale is not None:
            total = total * affine.scale
        if affine.shift is not None:
            total = total + affine.shift
        rounded: np.ndarray = total.astype(dtype.numpy())
    _check_finite(rounded, expected, "bias", dtype)
    return rounded


def _bias(linear: Linear) -> Array | None:
    """The node's bias with Gemm's beta in it, as float64 of [channels]; None when it has none."""
    node = linear.node
    value = input_of(node, BIAS)
    if value is None:
        return None
    if not is_onnx(node, "Gemm"):
        bias = constant_array(value, "the bias")
        if bias.shape != (linear.channels,):
            raise Misfit(f"the bias of shape {list(bias.shape)} meets {linear.channels} channels")
        return bias
    beta = node.attributes.get_float("beta", 1.0)
    if beta == 0:
        # C is not read then, whatever it holds.
        return None
    return per_channel(constant_array(value, "C"), linear, "C") * beta


def _check_finite(
    rounded: np.ndarray, expected: npt.NDArray[np.bool_], what: str, dtype: ir.DataType
) -> None:
    if np.any(expected & ~np.isfinite(rounded.astype(np.float64))):
        raise Misfit(f"the folded {what} overflows {dtype.name}")


def _set_input(
    node: ir.Node, index: int, array: np.ndarray, names: Names, context: Context
) -> None:
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    old = input_of(node, index)
    hint = old.name if old is not None else f"{node.outputs[0].name or node.op_type}_bias"
    node.resize_inputs(max(len(node.inputs), index + 1))
    name = names.new(hint or "weight")
    node.replace_input_with(index, context.initializer(graph, array, name))

"""What each operator does to the shapes of tensors; see `graphopt.shape_facts`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import onnx_ir as ir

from graphopt.operators import RECURRENT
from graphopt.rewriting import input_of, stated_integers
from graphopt.sizes import (
    Size,
    difference,
    exact_quotient,
    may_not_be_negative,
    sign,
    total,
)

if TYPE_CHECKING:
    from graphopt.shape_facts import ShapeFacts

LARGEST_CONTENT = 64
"""Tensors of more elements are not followed; shapes are far shorter."""

INTEGERS = (ir.DataType.INT64, ir.DataType.INT32)
FOLLOWED = (*INTEGERS, ir.DataType.BOOL)

Shape = tuple[Size, ...]


class Fact(NamedTuple):
    """What is known of a value.

    Attributes:
        shape: None where not even the rank is known.
        content: the elements in order, of integers and booleans (0 and 1) of rank 0 or 1.
    """

    shape: Shape | None = None
    content: Shape | None = None


Rule = Callable[["ShapeFacts", ir.Node], Fact | None]
"""What is known of the first output of a node; None where the operator says nothing."""


# ------------------------------------------------------------------ shapes of tensors


def _same(facts: ShapeFacts, node: ir.Node) -> Fact:
    """The output has the shape of the first input."""
    return Fact(facts.shape(input_of(node, 0)))


def _passed_on(facts: ShapeFacts, node: ir.Node) -> Fact:
    return facts.of(input_of(node, 0))


def broadcast(facts: ShapeFacts, node: ir.Node) -> Fact:
    """All inputs are broadcast against each other."""
    return Fact(_broadcast_shape(facts, [facts.shape(value) for value in node.inputs]))


def _broadcast_shape(facts: ShapeFacts, shapes: Sequence[Shape | None]) -> Shape | None:
    known = [shape for shape in shapes if shape is not None]
    if len(known) < len(shapes):
        return None
    if known.count(known[0]) == len(known):
        return known[0]
    rank = max(map(len, known))
    aligned = [(1,) * (rank - len(shape)) + shape for shape in known]
    return tuple(_broadcast_size(facts, sizes) for sizes in zip(*aligned, strict=True))


def _broadcast_size(facts: ShapeFacts, sizes: Sequence[Size]) -> Size:
    others = list(dict.fromkeys(size for size in sizes if size != 1))
    if not others:
        return 1
    stated = [size for size in others if isinstance(size, int)]
    if stated:
        # What is not known is 1 or the same: a tensor with 0 broadcasts against 1 only.
        return stated[0]
    if all(facts.are_named_alike(others[0], other) for other in others[1:]):
        return others[0]
    return facts.algebra.atom(("broadcast", frozenset(others)), is_dimension=True)


def matmul(facts: ShapeFacts, node: ir.Node) -> Fact | None:
    """A product of matrices, batches broadcast."""
    first, second = (facts.shape(input_of(node, index)) for index in range(2))
    if first is None or second is None or min(len(first), len(second)) < 2:
        return None
    batch = _broadcast_shape(facts, [first[:-2], second[:-2]])
    return None if batch is None else Fact((*batch, first[-2], second[-1]))


def _gemm(facts: ShapeFacts, node: ir.Node) -> Fact | None:
    first, second = (facts.shape(value) for value in node.inputs[:2])
    if first is None or second is None or len(first) != 2 or len(second) != 2:
        return None
    rows = first[1 if node.attributes.get_int("transA", 0) else 0]
    return Fact((rows, second[0 if node.attributes.get_int("transB", 0) else 1]))


def _batch_of_first(facts: ShapeFacts, node: ir.Node) -> Fact | None:
    """Convolution and pooling: the batch stays; the rest is as onnx inferred it."""
    shape = facts.shape(input_of(node, 0))
    inferred = facts.inferred(node.outputs[0])
    if not shape or not inferred:
        return None
    return Fact((shape[0], *inferred[1:]))


def _recurrent(facts: ShapeFacts, node: ir.Node) -> Fact | None:
    """GRU, LSTM and RNN: all states, of shape [steps, directions, batch, hidden]."""
    data, weight = facts.shape(input_of(node, 0)), facts.shape(input_of(node, 2))
    if data is None or weight is None or len(data) != 3 or len(weight) != 3:
        return None
    if node.attributes.get_int("layout", 0) != 0:
        return None
    return Fact((data[0], weight[0], data[1], weight[2]))


def _transpose(facts: ShapeFacts, node: ir.Node) -> Fact | None:
    shape = facts.shape(input_of(node, 0))
    if shape is None:
        return None
    order = node.attributes.get_ints("perm", tuple(reversed(range(len(shape)))))
    return Fact(tuple(shape[axis] for axis in order)) if len(order) == len(shape) else None


def _reshape(facts: ShapeFacts, node: ir.Node) -> Fact | None:
    shape = facts.shape(input_of(node, 0))
    target = facts.content(input_of(node, 1))
    if target is None:
        return None
    copies = node.attributes.get_int("allowzero", 0) == 0
    result = []
    for place, size in enumerate(target):
        if size == 0 and copies:
            if shape is None or place >= len(shape):
                return None
            size = shape[place]
        if not isinstance(size, int) and not may_not_be_negative(size):
            # It may be -1, or 0 for a copy.
            size = facts.unknown(node.outputs[0], place)
        result.append(size)
    if -1 in result:
        place = result.index(-1)
        others = facts.algebra.products(result[:place] + result[place + 1 :])
        whole = facts.algebra.products(shape) if shape is not None else 0
        found = exact_quotient(whole, others) if whole != 0 else None
        result[place] = facts.unknown(node.outputs[0], place) if found is None else found
    content = facts.content(input_of(node, 0)) if len(target) < 2 else None
    return Fact(tuple(result), content)


def _flatten(facts: ShapeFacts, node: ir.Node) -> Fact | None:
    shape = facts.shape(input_of(node, 0))
    axis = node.attributes.get_int("axis", 1)
    if shape is None or not -len(shape) <= axis <= len(shape):
        return None
    axis += len(shape) if axis < 0 else 0
    return Fact((facts.algebra.products(shape[:axis]), facts.algebra.products(shape[axis:])))


def _squeeze(facts: ShapeFacts, node: ir.Node) -> Fact | None:
    fact = facts.of(input_of(node, 0))
    axes = stated_integers(node, "axes", 1)
    if fact.shape is None or axes is None:
        return None
    if not axes:
        if not all(isinstance(size, int) for size in fact.shape):
            return None
        return Fact(tuple(size for size in fact.shape if size != 1), fact.content)
    places = {axis % len(fact.shape) for axis in axes if fact.shape}
    return Fact(tuple(s for i, s in enumerate(fact.shape) if i not in places), fact.content)


def _unsqueeze(facts: ShapeFacts, node: ir.Node) -> Fact | None:
    fact = facts.of(input_of(node, 0))
    axes = stated_integers(node, "axes", 1)
    if fact.shape is None or axes is None:
        return None
    rank = len(fact.shape) + len(axes)
    places = {axis % rank for axis in axes}
    sizes = iter(fact.shape)
    if len(places) != len(axes):
        return None
    return Fact(tuple(1 if i in places else next(sizes) for i in range(rank)),
                fact.content if rank == 1 else None)  # fmt: skip


def _concat(facts: ShapeFacts, node: ir.Node) -> Fact | None:
    parts = [facts.of(value) for value in node.inputs]
    shapes = [part.shape for part in parts if part.shape is not None]
    if len(shapes) < len(parts) or not shapes[0]:
        return None
    rank, axis = len(shapes[0]), node.attributes.get_int("axis", 0)
    if any(len(shape) != rank for shape in shapes) or not -rank <= axis < rank:
        return None
    axis %= rank
    joined: Size = 0
    for shape in shapes:
        joined = total(joined, shape[axis])
    # Off the axis all must agree, and an integer says most.
    common = [_first_integer([shape[i] for shape in shapes]) for i in range(rank)]
    common[axis] = joined
    content = None
    if rank == 1 and all(part.content is not None for part in parts):
        content = tuple(size for part in parts for size in part.content or ())
    return Fact(tuple(common), content)


def _first_integer(sizes: Sequence[Size]) -> Size:
    return next((size for size in sizes if isinstance(size, int)), sizes[0])


def _gather(facts: ShapeFacts, node: ir.Node) -> Fact | None:
    data, indices = (facts.of(value) for value in node.inputs)
    if data.shape is None or indices.shape is None or not data.shape:
        return None
    axis = node.attributes.get_int("axis", 0) % len(data.shape)
    shape = (*data.shape[:axis], *indices.shape, *data.shape[axis + 1 :])
    return Fact(shape, _gathered(data.content, indices.content))


def _gathered(data: Shape | None, indices: Shape | None) -> Shape | None:
    if data is None or indices is None:
        return None
    if not all(isinstance(i, int) and -len(data) <= i < len(data) for i in indices):
        return None
    return tuple(data[i] for i in indices if isinstance(i, int))


def _slice(facts: ShapeFacts, node: ir.Node) -> Fact | None:
    data = facts.of(input_of(node, 0))
    bounds = slice_bounds(facts, node)
    if data.shape is None or bounds is None:
        return None
    shape = list(data.shape)
    for axis, (start, end, step) in bounds.items():
        size = _sliced_size(shape[axis], start, end, step)
        shape[axis] = facts.unknown(node.outputs[0], axis) if size is None else size
    content = None
    if data.content is not None and len(data.shape) == 1 and 0 in bounds:
        start, end, step = bounds[0]
        if isinstance(start, int) and isinstance(end, int):
            places = _cut(len(data.content), start, end, step)
            content = tuple(data.content[i] for i in places) if places is not None else None
    return Fact(tuple(shape), content)


def slice_bounds(facts: ShapeFacts, node: ir.Node) -> dict[int, tuple[Size, Size, int]] | None:
    """Start, end and step for each axis (from the front) that a Slice cuts; None if not known."""
    rank = len(facts.shape(input_of(node, 0)) or ())
    if "starts" in node.attributes:
        starts: Shape | None = tuple(node.attributes["starts"].as_ints())
        ends: Shape | None = tuple(node.attributes["ends"].as_ints())
    else:
        starts, ends = (facts.content(input_of(node, index)) for index in (1, 2))
    axes, steps = stated_integers(node, "axes", 3), stated_integers(node, "steps", 4)
    if starts is None or ends is None or axes is None or steps is None or not rank:
        return None
    axes = axes or tuple(range(len(starts)))
    steps = steps or (1,) * len(starts)
    if not len(starts) == len(ends) == len(axes) == len(steps) or 0 in steps:
        return None
    if not all(-rank <= axis < rank for axis in axes):
        return None
    parts = zip(axes, starts, ends, steps, strict=True)
    return {axis % rank: (start, end, step) for axis, start, end, step in parts}


def _cut(size: int, start: int, end: int, step: int) -> range | None:
    """The places that a Slice takes; None for steps backwards other than over the whole."""
    if step > 0:
        return range(size)[start:end:step]
    whole = (start == -1 or start >= size - 1) and end < -size
    return range(size)[::step] if whole else None


def _sliced_size(size: Size, start: Size, end: Size, step: int) -> Size | None:
    if isinstance(size, int) and isinstance(start, int) and isinstance(end, int):
        places = _cut(size, start, end, step)
        return None if places is None else len(places)
    if step != 1:
        return None
    start = total(size, start) if isinstance(start, int) and start < 0 else start
    end = total(size, end) if isinstance(end, int) and end < 0 else end
    if sign(difference(end, size)) in (0, 1) or (isinstance(end, int) and end >= 2**31 - 1):
        end = size
    inside = may_not_be_negative(start) and may_not_be_negative(difference(end, start))
    return difference(end, start) if inside and may_not_be_negative(difference(size, end)) else None


def part(facts: ShapeFacts, node: ir.Node, index: int) -> Fact | None:
    """What is known of an output of a Split."""
    data = facts.of(input_of(node, 0))
    if data.shape is None or not data.shape:
        return None
    axis = node.attributes.get_int("axis", 0) % len(data.shape)
    sizes = stated_integers(node, "split", 1)
    if not sizes or len(sizes) != len(node.outputs):
        inferred = facts.inferred(node.outputs[index])
        size = inferred[axis] if inferred else facts.unknown(node.outputs[index], axis)
        return Fact((*data.shape[:axis], size, *data.shape[axis + 1 :]))
    start = sum(sizes[:index])
    content = data.content[start : start + sizes[index]] if data.content is not None else None
    return Fact((*data.shape[:axis], sizes[index], *data.shape[axis + 1 :]), content)


def _expand(facts: ShapeFacts, node: ir.Node) -> Fact | None:
    data, target = facts.of(input_of(node, 0)), facts.content(input_of(node, 1))
    if data.shape is None or target is None:
        return None
    sizes = [s if may_not_be_negative(s) else None for s in target]
    if None in sizes:
        return None
    shape = _broadcast_shape(facts, [data.shape, target])
    content = None
    if shape is not None and len(shape) == 1 and isinstance(shape[0], int) and data.content:
        content = data.content * (shape[0] // len(data.content))
    return Fact(shape, content)


def _tile(facts: ShapeFacts, node: ir.Node) -> Fact | None:
    shape, repeats = facts.shape(input_of(node, 0)), facts.content(input_of(node, 1))
    if shape is None or repeats is None or len(shape) != len(repeats):
        return None
    pairs = zip(shape, repeats, strict=True)
    return Fact(tuple(facts.algebra.product(size, repeat) for size, repeat in pairs))


def _pad(facts: ShapeFacts, node: ir.Node) -> Fact | None:
    shape = facts.shape(input_of(node, 0))
    pads, axes = stated_integers(node, "pads", 1), stated_integers(node, "axes", 3)
    if shape is None or not pads or axes is None:
        return None
    axes = axes or tuple(range(len(shape)))
    if len(pads) != 2 * len(axes):
        return None
    added = {a % len(shape): pads[i] + pads[len(axes) + i] for i, a in enumerate(axes)}
    return Fact(tuple(total(size, added.get(axis, 0)) for axis, size in enumerate(shape)))


def _filled(facts: ShapeFacts, node: ir.Node) -> Fact | None:
    shape = facts.content(input_of(node, 0))
    if shape is None or not all(map(may_not_be_negative, shape)):
        return None
    content = None
    if node.outputs[0].dtype in FOLLOWED and (not shape or (len(shape) == 1)):
        count = shape[0] if shape else 1
        value = node.attributes.get_tensor("value")
        if isinstance(count, int) and count <= LARGEST_CONTENT and value is not None:
            content = (int(value.numpy().reshape(-1)[0]),) * count
    return Fact(shape, content)


def _range(facts: ShapeFacts, node: ir.Node) -> Fact | None:
    bounds = [facts.content(value) for value in node.inputs]
    if any(bound is None for bound in bounds):
        return None
    start, limit, step = (bound[0] for bound in bounds if bound)
    if step != 1:
        return None
    size = difference(limit, start)
    return Fact((size,)) if may_not_be_negative(size) else None


def _gather_elements(facts: ShapeFacts, node: ir.Node) -> Fact:
    return Fact(facts.shape(node.inputs[1]))


def _argument(facts: ShapeFacts, node: ir.Node) -> Fact | None:
    """ArgMax and ArgMin."""
    axis = node.attributes.get_int("axis", 0)
    return _without(facts, node, (axis,))


def _reduced(facts: ShapeFacts, node: ir.Node) -> Fact | None:
    axes = stated_integers(node, "axes", 1)
    if axes is None:
        return None
    fact = _without(facts, node, axes)
    data = facts.of(input_of(node, 0))
    if fact is None or data.content is None or not data.shape:
        return fact
    return Fact(fact.shape, _reduced_content(facts, node.op_type, data.content))


def _reduced_content(facts: ShapeFacts, op_type: str, content: Shape) -> Shape | None:
    if op_type == "ReduceProd":
        return (facts.algebra.products(content),)
    if op_type == "ReduceSum":
        whole: Size = 0
        for size in content:
            whole = total(whole, size)
        return (whole,)
    return None


def _without(facts: ShapeFacts, node: ir.Node, axes: Sequence[int]) -> Fact | None:
    shape = facts.shape(input_of(node, 0))
    if shape is None or not all(-len(shape) <= axis < len(shape) for axis in axes):
        return None
    if not axes and node.attributes.get_int("noop_with_empty_axes", 0) != 0:
        return Fact(shape)
    places = {axis % len(shape) for axis in axes} or set(range(len(shape)))
    if node.attributes.get_int("keepdims", 1):
        return Fact(tuple(1 if i in places else s for i, s in enumerate(shape)))
    return Fact(tuple(s for i, s in enumerate(shape) if i not in places))


_SHAPE_OF_FIRST = """
Abs Atan BatchNormalization Bernoulli BitwiseNot CastLike Ceil Celu Clip Cos CumSum
DequantizeLinear Dropout Elu Erf Exp Floor Gelu GroupNormalization HardSigmoid HardSwish Hardmax
InstanceNormalization IsInf IsNaN LRN LayerNormalization LeakyRelu Log LogSoftmax LpNormalization
MeanVarianceNormalization Mish PRelu QuantizeLinear RMSNormalization RandomNormalLike
RandomUniformLike Reciprocal Relu ReverseSequence Round ScatterElements ScatterND Selu Sigmoid Sign
Sin Softmax Softplus Softsign Sqrt Swish Tan Tanh ThresholdedRelu Trilu
"""
_BROADCASTING = "BitwiseAnd BitwiseOr BitwiseXor Mean Pow Sum Xor"
_BATCHED = """
AveragePool Conv ConvInteger ConvTranspose DepthToSpace GlobalAveragePool GlobalLpPool GlobalMaxPool
LpPool MaxPool QLinearConv SpaceToDepth
"""
_REDUCING = """
ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
ReduceSumSquare
"""

RULES: dict[str, Rule] = {
    **dict.fromkeys(_SHAPE_OF_FIRST.split(), _same),
    **dict.fromkeys(_BROADCASTING.split(), broadcast),
    **dict.fromkeys(_BATCHED.split(), _batch_of_first),
    **dict.fromkeys(_REDUCING.split(), _reduced),
    **dict.fromkeys(RECURRENT, _recurrent),
    "ArgMax": _argument,
    "ArgMin": _argument,
    "Concat": _concat,
    "ConstantOfShape": _filled,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "Gemm": _gemm,
    "Identity": _passed_on,
    "MatMul": matmul,
    "MatMulInteger": matmul,
    "Pad": _pad,
    "Range": _range,
    "Reshape": _reshape,
    "Slice": _slice,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
"""By operator; of Split, see `part`, and of shape arithmetic, `graphopt.shape_arithmetic`."""

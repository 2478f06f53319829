"""How many multiply-accumulates a node takes in one run, by the shapes that its values carry.

Counted are the products of matrices, convolutions, recurrent layers and attention, as is usual for
"MACs": one for each product that is added to a sum, those with padding included. Biases, additions,
activations, normalizations, pooling, resampling and Fourier transforms count 0, and so do operators
that compute nothing. A MAC is two floating-point operations (FLOPs).

What depends on data is counted whole: an LSTM runs over all steps whatever `sequence_lens` says,
and attention multiplies all queries with all keys, masked ones too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest

import onnx_ir as ir

from graphopt.operators import ONNX_DOMAINS, STANDARD_DOMAINS, attributes_of
from graphopt.rewriting import input_of, static_shape

Shape = tuple[int, ...]
ShapeOf = Callable[[ir.Value | None], Shape | None]
"""The shape of a value where every dimension is known, else None."""

Rule = Callable[[ir.Node, ShapeOf], int | None]
"""The multiply-accumulates of a node; None where a shape is not known."""


@dataclass(frozen=True)
class _Product:
    """An operator that multiplies and accumulates.

    Attributes:
        rule: counts.
        operands: which of its inputs are multiplied with each other.
        numbers: which of its inputs hold numbers of the model when they are constant: the operands
            and biases, rather than scales and zero points; None for all.
    """

    rule: Rule
    operands: tuple[int, ...] = (0, 1)
    numbers: tuple[int, ...] | None = None


def node_macs(node: ir.Node, shape_of: ShapeOf = static_shape) -> int | None:
    """The multiply-accumulates of a node in one run; 0 for operators that have none.

    The bodies of If, Loop and Scan are nodes of their own.

    Args:
        node: its values carry shapes; see `graphopt.skeleton.infer_shapes`.
        shape_of: where shapes are known from.

    Returns:
        None where a shape that it depends on is not known, and for operators of which it is not
        known what they multiply.
    """
    product = _product(node)
    if product is not None:
        return product.rule(node, shape_of) if states_types(node) else None
    if node.domain in STANDARD_DOMAINS:
        return None if node.op_type in _NOT_COUNTED else 0
    if node.domain != _MICROSOFT:
        return None
    return None if any(part in node.op_type for part in _MICROSOFT_NOT_COUNTED) else 0


def operands_of(node: ir.Node) -> tuple[int, ...]:
    """Which inputs the node multiplies with each other; () for operators that are not counted."""
    product = _product(node)
    return () if product is None else product.operands


def holds_numbers(node: ir.Node, index: int) -> bool:
    """A constant at this input is numbers of the model, rather than a scale, a size or a bound."""
    product = _product(node)
    numbers = _NUMBERS.get(node.op_type) if product is None else product.numbers
    return numbers is None or index in numbers


def states_types(node: ir.Node) -> bool:
    """What sizes depend on is stated in the right types: onnx checks its own operators only."""
    return all(
        attribute.type == _TYPES.get(attribute.name, attribute.type) and not attribute.is_ref()
        for attribute in attributes_of(node)
    )


def _product(node: ir.Node) -> _Product | None:
    if node.domain in ONNX_DOMAINS:
        return _STANDARD.get(node.op_type)
    if node.domain == "ai.onnx.ml":
        return _LEARNING.get(node.op_type)
    return _OF_MICROSOFT.get(node.op_type) if node.domain == _MICROSOFT else None


# ------------------------------------------------------------------ convolutions


def _convolution(node: ir.Node, shape_of: ShapeOf, weight: int = 1) -> int | None:
    """Conv: each output is a sum over the channels of its group and the places of the kernel.

    The weight is [outputs, inputs / groups, *kernel].
    """
    made, kernel = shape_of(node.outputs[0]), shape_of(input_of(node, weight))
    if made is None or not kernel:
        return None
    return math.prod(made) * math.prod(kernel[1:])


def _transposed_convolution(node: ir.Node, shape_of: ShapeOf) -> int | None:
    """ConvTranspose: each input goes to the outputs of its group at the places of the kernel.

    The weight is [inputs, outputs / groups, *kernel].
    """
    data, kernel = shape_of(input_of(node, 0)), shape_of(input_of(node, 1))
    if data is None or not kernel:
        return None
    return math.prod(data) * math.prod(kernel[1:])


# ------------------------------------------------------------------ products of matrices


def _matmul(node: ir.Node, shape_of: ShapeOf, second: int = 1) -> int | None:
    """Products of matrices, batches broadcast; `transA` and `transB` where an operator has them."""
    stated = node.attributes
    if stated.get_int("transBatchA", 0) or stated.get_int("transBatchB", 0):
        return None
    left, right = shape_of(input_of(node, 0)), shape_of(input_of(node, second))
    if not left or not right:
        return None
    left = left if len(left) > 1 else (1, *left)
    right = right if len(right) > 1 else (*right, 1)
    rows, inner = _swapped(left[-2:], stated.get_int("transA", 0))
    _, columns = _swapped(right[-2:], stated.get_int("transB", 0))
    return math.prod(_broadcast(left[:-2], right[:-2])) * rows * inner * columns


def _swapped(pair: Shape, swap: int) -> Shape:
    return pair[::-1] if swap else pair


def _broadcast(first: Shape, second: Shape) -> Shape:
    pairs = zip_longest(reversed(first), reversed(second), fillvalue=1)
    return tuple(b if a == 1 else a for a, b in pairs)[::-1]


def _coded_matmul(node: ir.Node, shape_of: ShapeOf) -> int | None:
    """A matrix that is stored in codes: [K, N] by its attributes."""
    data, columns = shape_of(input_of(node, 0)), node.attributes.get_int("N", 0)
    return None if data is None else math.prod(data) * columns


def _einsum(node: ir.Node, shape_of: ShapeOf) -> int | None:
    """Two operands: the product of the sizes of all labels. More: that for each but the first.

    One operand is summed or moved, not multiplied.
    """
    equation = node.attributes.get_string("equation", "").replace(" ", "")
    terms = equation.partition("->")[0].split(",")
    shapes = [shape_of(value) for value in node.inputs]
    if len(terms) != len(shapes) or None in shapes:
        return None
    sizes: dict[object, int] = {}
    for term, shape in zip(terms, shapes, strict=True):
        labels = _labels(term, len(shape or ()))
        if labels is None:
            return None
        for label, size in zip(labels, shape or (), strict=True):
            sizes[label] = size if sizes.get(label, 1) == 1 else sizes[label]
    return math.prod(sizes.values()) * (len(terms) - 1)


def _labels(term: str, rank: int) -> list[object] | None:
    """A label for each axis; those of an ellipsis are numbers, counted from the last."""
    head, dots, tail = term.partition("...")
    hidden = rank - len(head) - len(tail)
    if hidden < 0 or (hidden and not dots):
        return None
    return [*head, *range(hidden, 0, -1), *tail]


# ------------------------------------------------------------------ recurrent layers


def _recurrent(node: ir.Node, shape_of: ShapeOf) -> int | None:
    """GRU, LSTM and RNN: at each step both weights of all gates and directions.

    Data is [steps, batch, inputs], or with layout 1 [batch, steps, inputs].
    """
    data, *weights = (shape_of(input_of(node, index)) for index in range(3))
    if data is None or len(data) != 3 or None in weights:
        return None
    return math.prod(data[:2]) * sum(math.prod(weight or ()) for weight in weights)


# ------------------------------------------------------------------ attention


def _attention(node: ir.Node, shape_of: ShapeOf) -> int | None:
    """Queries with keys, and weights with values, for each head of the queries.

    Inputs are [batch, heads, steps, size], or [batch, steps, heads * size].
    """
    query, key, value = (shape_of(input_of(node, index)) for index in range(3))
    past = input_of(node, 4)
    before: Shape | None = (0, 0) if past is None else shape_of(past)
    if query is None or key is None or value is None or not before or len(before) < 2:
        return None
    if not len(query) == len(key) == len(value) or len(query) not in (3, 4):
        return None
    heads, size = 1, value[-1]
    if len(query) == 4:
        heads = query[1]
    else:
        heads = node.attributes.get_int("q_num_heads", 0)
        groups = node.attributes.get_int("kv_num_heads", 0)
        if heads < 1 or groups < 1:
            return None
        size //= groups
    weighted = query[0] * heads * query[-2] * size
    return (math.prod(query) + weighted) * (key[-2] + before[-2])


def _multi_head_attention(node: ir.Node, shape_of: ShapeOf) -> int | None:
    """com.microsoft.MultiHeadAttention, of queries, keys and values [batch, steps, heads * size].

    Not counted where they are packed into one input, or where keys come split into heads.
    """
    query, key, value = (shape_of(input_of(node, index)) for index in range(3))
    if query is None or key is None or value is None:
        return None
    past = input_of(node, 6)
    before: Shape | None = (0, 0) if past is None else shape_of(past)
    if not before or len(before) < 2 or not len(query) == len(key) == len(value) == 3:
        return None
    return math.prod(query[:2]) * (query[2] + value[2]) * (key[1] + before[-2])


def _projected_attention(node: ir.Node, shape_of: ShapeOf, past: int) -> int | None:
    """com.microsoft.Attention: the projection to queries, keys and values, and attention.

    Args:
        node: its input is [batch, steps, inputs], its weight [inputs, queries + keys + values].
        shape_of: see `node_macs`.
        past: which input is [2, batch, heads, past steps, size].
    """
    data, weight = shape_of(input_of(node, 0)), shape_of(input_of(node, 1))
    if data is None or weight is None or len(data) != 3 or len(weight) != 2:
        return None
    cache = input_of(node, past)
    before: Shape | None = (0, 0) if cache is None else shape_of(cache)
    if not before or len(before) < 2:
        return None
    hidden = node.attributes.get_ints("qkv_hidden_sizes", (weight[1] // 3,) * 3)
    if len(hidden) != 3:
        return None
    attention = math.prod(data[:2]) * (hidden[0] + hidden[2]) * (data[1] + before[-2])
    return math.prod(data) * weight[1] + attention


# ------------------------------------------------------------------ tables of coefficients


def _linear(node: ir.Node, shape_of: ShapeOf) -> int | None:
    """ai.onnx.ml.LinearClassifier and LinearRegressor: all coefficients for each row."""
    data = shape_of(input_of(node, 0))
    if not data:
        return None
    rows = math.prod(data[:-1])
    return rows * len(node.attributes.get_floats("coefficients", ()))


_GATED = _Product(_recurrent, (1, 2))

_STANDARD: Mapping[str, _Product] = {
    "Attention": _Product(_attention),
    "CausalConvWithState": _Product(_convolution),
    "Conv": _Product(_convolution),
    "ConvInteger": _Product(_convolution, numbers=(0, 1)),
    "ConvTranspose": _Product(_transposed_convolution),
    "DeformConv": _Product(_convolution),
    "Einsum": _Product(_einsum),
    "GRU": _GATED,
    "Gemm": _Product(_matmul),
    "LSTM": _GATED,
    "MatMul": _Product(_matmul),
    "MatMulInteger": _Product(_matmul, numbers=(0, 1)),
    "QLinearConv": _Product(partial(_convolution, weight=3), (0, 3), (0, 3, 8)),
    "QLinearMatMul": _Product(partial(_matmul, second=3), (0, 3), (0, 3)),
    "RNN": _GATED,
}

_LEARNING: Mapping[str, _Product] = {
    "LinearClassifier": _Product(_linear),
    "LinearRegressor": _Product(_linear),
}

_MICROSOFT = "com.microsoft"
_CODED = _Product(_coded_matmul, (0, 1), (0, 5))
_OF_MICROSOFT: Mapping[str, _Product] = {
    "Attention": _Product(partial(_projected_attention, past=4)),
    "DynamicQuantizeLSTM": _Product(_recurrent, (1, 2), tuple(range(8))),
    "DynamicQuantizeMatMul": _Product(_matmul, numbers=(0, 1, 4)),
    "FusedConv": _Product(_convolution),
    "FusedGemm": _Product(_matmul),
    "FusedMatMul": _Product(_matmul),
    "GemmFastGelu": _Product(_matmul),
    "MatMulBnb4": _CODED,
    "MatMulFpQ4": _CODED,
    "MatMulIntegerToFloat": _Product(_matmul, numbers=(0, 1, 6)),
    "MatMulNBits": _CODED,
    "MultiHeadAttention": _Product(_multi_head_attention, (0, 1, 2)),
    "NhwcConv": _Product(_convolution),
    "NhwcFusedConv": _Product(_convolution),
    "QAttention": _Product(partial(_projected_attention, past=8), numbers=(0, 1, 2)),
    "QGemm": _Product(partial(_matmul, second=3), (0, 3), (0, 3, 6)),
    "QLinearConv": _Product(partial(_convolution, weight=3), (0, 3), (0, 3, 8)),
    "TransposeMatMul": _Product(_matmul),
}

_TYPES: Mapping[str, ir.AttributeType] = {
    "N": ir.AttributeType.INT,
    "coefficients": ir.AttributeType.FLOATS,
    "equation": ir.AttributeType.STRING,
    "kv_num_heads": ir.AttributeType.INT,
    "q_num_heads": ir.AttributeType.INT,
    "qkv_hidden_sizes": ir.AttributeType.INTS,
    "transA": ir.AttributeType.INT,
    "transB": ir.AttributeType.INT,
    "transBatchA": ir.AttributeType.INT,
    "transBatchB": ir.AttributeType.INT,
}

_NOT_COUNTED = frozenset({"FlexAttention", "LinearAttention", "SVMClassifier", "SVMRegressor"})
"""Operators of ONNX that multiply, how often is not looked into."""

_MICROSOFT_NOT_COUNTED = (
    "Attention",
    "CDist",
    "Conv",
    "GRU",
    "Gemm",
    "LSTM",
    "MatMul",
    "MoE",
    "Sampling",
    "Search",
)
"""Parts of the names of operators of onnxruntime that multiply, or run a whole model."""

_NUMBERS: Mapping[str, tuple[int, ...]] = {
    "DequantizeLinear": (0,),
    "GatherBlockQuantized": (),
    "OneHot": (),
    "Pad": (0,),
    "QuantizeLinear": (0,),
    "Resize": (0,),
    "Upsample": (0,),
}
"""Of operators that multiply nothing: which inputs are not sizes, scales or bounds."""

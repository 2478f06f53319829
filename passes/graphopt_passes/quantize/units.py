"""Which nodes onnxruntime's CPU provider runs on 8-bit codes, and in which way.

Read off the graphs that onnxruntime 1.32 makes of nodes between QuantizeLinear and
DequantizeLinear. There are three ways:

- A product (Conv, Gemm, MatMul) has a constant weight, which becomes int8; it becomes an integer
  kernel where its input is dequantized and, for Conv, its output quantized.
- Arithmetic (Add, Mul, Sigmoid, ...) becomes an integer kernel where all its inputs are dequantized
  and its output is quantized.
- Movement (Reshape, MaxPool, Concat, ...) works on codes as they are. It commutes with an
  increasing affine map, so that it is written on the codes, and no rule has to recognize it. The
  roundings that training leaves are such: what they move has codes of their own map.

A Relu or Clip after a product or arithmetic costs nothing: the codes saturate where it would.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import onnx_ir as ir

from graphopt.content import read_array
from graphopt.operators import is_onnx
from graphopt.packing import is_packed
from graphopt.rewriting import constant_tensor, input_of, only_reader, small_array, static_shape
from graphopt.roundings import rounding_at
from graphopt_passes.quantize.affine import Affine
from graphopt_passes.quantize.layers import is_scaled

Kind = Literal["product", "arithmetic", "movement"]

PRODUCTS = frozenset({"Conv", "Gemm", "MatMul"})

ARITHMETIC = frozenset({"Add", "Mul", "Sigmoid", "LeakyRelu", "AveragePool", "GlobalAveragePool"})

WEIGHTED = PRODUCTS | {"ConvTranspose", "GRU", "LSTM", "RNN"}

AVERAGES = frozenset({"AveragePool", "GlobalAveragePool"})

MOVEMENT = frozenset(
    {
        "Clip",
        "DepthToSpace",
        "Expand",
        "Flatten",
        "Gather",
        "Identity",
        "MaxPool",
        "Pad",
        "Relu",
        "Reshape",
        "Resize",
        "Slice",
        "SpaceToDepth",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
    }
)
"""Operators whose first input holds the data; beside them there is Concat, whose inputs all do."""

CONSTANT_MAXIMUM = 1 << 16
"""Elements of a constant operand of arithmetic that becomes codes."""

UNBOUNDED = (-math.inf, math.inf)

_FINITE = "graphopt.finite"
"""Key in the `meta` of a tensor, which clones of a model share: all its numbers are finite."""


@dataclass(frozen=True, eq=False)
class Unit:
    """A node that can work on codes.

    Attributes:
        node: of the model.
        kind: the way it does.
        places: which of its inputs become codes.
        sources: the values there.
        saturated: a Relu or Clip that reads the node's output alone and goes; of a rounding, its
            DequantizeLinear.
        limits: between which that keeps the output.
        map: by which a rounding was trained; None of all others.
    """

    node: ir.Node
    kind: Kind
    places: tuple[int, ...]
    sources: tuple[ir.Value, ...]
    saturated: ir.Node | None = None
    limits: tuple[float, float] = UNBOUNDED
    map: Affine | None = None

    @property
    def outputs(self) -> tuple[ir.Value, ...]:
        """The values that become codes."""
        return tuple((self.saturated or self.node).outputs)


def can_make_floats(unit: Unit) -> bool:
    """The unit has an integer kernel that makes floats, where nothing reads its output as codes.

    A Gemm or MatMul has. onnxruntime looks past a Relu or Clip for a QuantizeLinear, though, and
    lets the product work on floats where there is none.
    """
    if not is_onnx(unit.node, "Gemm", "MatMul"):
        return False
    reader = only_reader(unit.node.outputs[0])
    return reader is None or not is_onnx(reader, "Relu", "Clip")


class NotQuantized(Exception):
    """Why a node cannot work on codes."""


def units_of(graph: ir.Graph, skip: Callable[[ir.Node, str], None]) -> dict[ir.Node, Unit]:
    """The nodes of a graph that can work on codes, in order.

    Args:
        graph: with shapes inferred.
        skip: is told of products that cannot, and why.
    """
    found: dict[ir.Node, Unit] = {}
    absorbed: set[ir.Node] = set()
    reaching, before_products = _reaching_bodies(graph), nodes_before_products(graph)
    # Where products are on codes already, roundings are what is between those and floats.
    are_trained = not any(map(_is_on_codes, graph))
    for node in graph:
        if node in absorbed or (is_onnx(node, "QuantizeLinear") and not are_trained):
            continue
        if is_onnx(node, *AVERAGES) and node not in before_products:
            # A mean of codes is finer than a code, and as a score it is to stay so.
            continue
        try:
            unit = _unit(node)
        except NotQuantized as reason:
            skip(node, str(reason))
            continue
        if unit is not None and not reaching.isdisjoint(unit.outputs):
            if unit.kind == "product":
                skip(node, "a body of If, Loop or Scan reads what it makes")
        elif unit is not None:
            found[node] = unit
            absorbed |= {unit.saturated} - {None}  # type: ignore[arg-type]
    return found


def _is_on_codes(node: ir.Node) -> bool:
    """A product reads a weight and an activation that come from codes."""
    if not is_onnx(node, *PRODUCTS):
        return False
    makers = [value.producer() for value in node.inputs[:2] if value is not None]
    reads = all(maker is not None and is_onnx(maker, "DequantizeLinear") for maker in makers)
    return reads and is_packed(node.inputs[1])


def _unit(node: ir.Node) -> Unit | None:
    if is_onnx(node, *PRODUCTS):
        return _saturated(_product(node))
    if is_onnx(node, "ConvTranspose", "LSTM", "GRU", "RNN"):
        raise NotQuantized(f"onnxruntime's CPU provider has no integer kernel for {node.op_type}")
    if is_onnx(node, "QuantizeLinear"):
        return _rounding(node)
    if not node.outputs or node.outputs[0].dtype != ir.DataType.FLOAT:
        return None
    if is_onnx(node, *ARITHMETIC):
        places = [n for n, v in enumerate(node.inputs) if constant_tensor(v) is None]
        return _saturated(_of(node, "arithmetic", places)) if _has_sources(node, places) else None
    if is_onnx(node, "Concat"):
        varies = all(constant_tensor(v) is None for v in node.inputs)
        return _of(node, "movement", range(len(node.inputs))) if varies else None
    if is_onnx(node, *MOVEMENT) and _moves(node):
        return _of(node, "movement", [0])
    return None


def _rounding(node: ir.Node) -> Unit | None:
    """A QuantizeLinear and the DequantizeLinear behind it, if units have codes of their type."""
    found = rounding_at(node)
    if found is None or found.map.dtype != ir.DataType.UINT8 or found.output.is_graph_output():
        return None
    if found.source.dtype != ir.DataType.FLOAT:
        return None
    affine = Affine(np.float32(found.map.scale), found.map.zero_point)
    unit = _of(node, "movement", [0])
    return replace(unit, saturated=found.dequantize, map=affine)


def nodes_before_products(graph: ir.Graph) -> set[ir.Node]:
    """The nodes whose outputs lead to a product, or into a body."""
    found: set[ir.Node] = set()
    for node in reversed(graph):
        readers = [use.node for value in node.outputs for use in value.uses()]
        if any(r in found or r.graph is not graph or is_onnx(r, *WEIGHTED) for r in readers):
            found.add(node)
    return found


def _reaching_bodies(graph: ir.Graph) -> set[ir.Value]:
    """Values that a node in a body reads, or of which it reads what movement makes of them.

    Seen of onnxruntime 1.32: it moves a DequantizeLinear on behind movement, and aborts the process
    where it comes to a body.
    """
    found: set[ir.Value] = set()
    for node in reversed(graph):
        for value in node.outputs:
            if any(_passes_on(use.node, graph, found) for use in value.uses()):
                found.add(value)
    return found


def _passes_on(reader: ir.Node, graph: ir.Graph, reaching: set[ir.Value]) -> bool:
    if reader.graph is not graph:
        return True
    return is_onnx(reader, "Concat", *MOVEMENT) and not reaching.isdisjoint(reader.outputs)


def _of(node: ir.Node, kind: Kind, places: Iterable[int]) -> Unit:
    values = {place: node.inputs[place] for place in places}
    present = {place: value for place, value in values.items() if value is not None}
    return Unit(node, kind, tuple(present), tuple(present.values()))


def _has_sources(node: ir.Node, places: Sequence[int]) -> bool:
    """An operand varies, and one that does not is a number or a number for each channel."""
    constants = [v for n, v in enumerate(node.inputs) if n not in places]
    small = all(small_array(v, CONSTANT_MAXIMUM) is not None for v in constants)
    return bool(places) and small and all(map(_is_finite, constants))


def _is_finite(constant: ir.Value | None) -> bool:
    tensor = constant_tensor(constant)
    if tensor is None:
        return True
    if _FINITE not in tensor.meta:
        tensor.meta[_FINITE] = bool(np.isfinite(read_array(tensor)).all())
    return bool(tensor.meta[_FINITE])


def _value(value: ir.Value | None) -> ir.Value:
    assert value is not None
    return value


def _product(node: ir.Node) -> Unit:
    data, weight = _value(node.inputs[0]), _value(node.inputs[1])
    if data.dtype != ir.DataType.FLOAT:
        raise NotQuantized(f"it computes in {data.dtype or 'an unknown type'}, not in float32")
    tensor = constant_tensor(weight)
    if tensor is None:
        raise NotQuantized("its weight is computed at run time")
    if constant_tensor(data) is not None:
        raise NotQuantized("its input is constant")
    bias = input_of(node, 2)
    if bias is not None and constant_tensor(bias) is None:
        raise NotQuantized("its bias is computed at run time")
    if not (_is_finite(weight) and _is_finite(bias)):
        raise NotQuantized("its weight or bias is not finite")
    if is_onnx(node, "Gemm"):
        _check_gemm(node, tensor, bias)
    if is_onnx(node, "MatMul") and len(tensor.shape) != 2:
        raise NotQuantized("its weight is not a matrix")
    return _of(node, "product", [0])


def _check_gemm(node: ir.Node, weight: ir.TensorProtocol, bias: ir.Value | None) -> None:
    stated = node.attributes
    if stated.get_int("transA", 0) or is_scaled(node):
        raise NotQuantized("it has transA, alpha or beta")
    outputs = weight.shape.numpy()[0 if stated.get_int("transB", 0) else 1]
    if bias is not None and static_shape(bias) not in ((outputs,), (1, outputs)):
        raise NotQuantized("its bias is not one number for each output")


def _moves(node: ir.Node) -> bool:
    """The node has a form that has a kernel for codes."""
    if input_of(node, 0) is None or constant_tensor(node.inputs[0]) is not None:
        return False
    if is_onnx(node, "MaxPool"):
        return len(node.outputs) == 1
    if is_onnx(node, "Resize"):
        mode = node.attributes.get("mode")
        return mode is None or mode.as_string() == "nearest"
    if is_onnx(node, "Pad"):
        return _pads_with_constant(node)
    if is_onnx(node, "Clip"):
        return clip_limits(node) is not None
    return True


def _pads_with_constant(node: ir.Node) -> bool:
    mode = node.attributes.get("mode")
    if mode is not None and mode.as_string() != "constant":
        return True
    value = input_of(node, 2)
    return value is None or small_array(value) is not None


def clip_limits(node: ir.Node) -> tuple[float, float] | None:
    """Between what a Relu or Clip keeps its output; None where that is not constant."""
    if is_onnx(node, "Relu"):
        return 0.0, math.inf
    limits = []
    for index, free in ((1, -math.inf), (2, math.inf)):
        value = input_of(node, index)
        array = small_array(value, 1)
        if value is not None and array is None:
            return None
        limits.append(free if array is None else float(np.asarray(array).reshape(-1)[0]))
    low, high = limits
    return (low, high) if low <= 0 <= high and low < high else None


def _saturated(unit: Unit) -> Unit:
    reader = only_reader(unit.node.outputs[0])
    if reader is None or not is_onnx(reader, "Relu", "Clip"):
        return unit
    if reader.graph is not unit.node.graph or reader.inputs[0] is not unit.node.outputs[0]:
        return unit
    limits = clip_limits(reader)
    if limits is None:
        return unit
    return replace(unit, saturated=reader, limits=limits)

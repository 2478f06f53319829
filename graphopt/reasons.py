"""Reasons, and what they are read from: the quantization around a node of the optimized graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.packing import nodes_behind
from graphopt.profiling import Timing
from graphopt.rewriting import constant_tensor, input_of

INTEGER = frozenset(
    {
        "Add",
        "AveragePool",
        "Concat",
        "Conv",
        "Gemm",
        "GlobalAveragePool",
        "LeakyRelu",
        "MatMul",
        "Mul",
        "Sigmoid",
        "Softmax",
        "Where",
    }
)
"""Operators of which onnxruntime has a kernel that computes on 8-bit integers."""


MOVEMENT = frozenset(
    {
        "DepthToSpace",
        "Expand",
        "Flatten",
        "Gather",
        "GatherElements",
        "MaxPool",
        "ReduceMax",
        "ReduceMin",
        "Reshape",
        "Resize",
        "Slice",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
    }
)
"""Operators that run on integers as they are, where nothing but their values moves."""


_FUSED = {"FusedConv": "Conv", "FusedGemm": "Gemm", "FusedMatMul": "MatMul"}


CLIPS = ("Clip", "Relu")

REORDERS = ("ReorderInput", "ReorderOutput")
"""They change the layout; onnxruntime alone inserts them."""


@dataclass(frozen=True)
class Reason:
    """Why time is lost in a node.

    Attributes:
        code: a name that does not change, for example "no-output-quantize".
        why: what keeps onnxruntime from doing better.
        change: what would change it.
    """

    code: str
    why: str
    change: str


UNKNOWN = Reason("unknown", "no rule known", "nothing is known that would change it")


Operators = Mapping[ir.Node, tuple[str, ...]]
"""Of each node of the optimized graph, the operators of the model that it computes."""


Timings = Mapping[ir.Node, Timing]


@dataclass(frozen=True)
class Around:
    """A node that computes in float, and the quantization beside it.

    Attributes:
        node: the node of the optimized graph.
        operator: what it computes, without onnxruntime's word for what was fused into it.
        operators: of the model.
        weights: the DequantizeLinear of a constant, by index of the input.
        activations: the DequantizeLinear of any other value, by index of the input.
        plain: indices of the inputs that are neither.
        quantizers: QuantizeLinear that read its outputs.
        is_read: something else reads them, or one is an output of the model.
        inside: between DequantizeLinear and QuantizeLinear, if not beside them.
        types: element types of what is quantized: of activations and outputs.
    """

    node: ir.Node
    operator: str
    operators: tuple[str, ...]
    weights: Mapping[int, ir.Node]
    activations: Mapping[int, ir.Node]
    plain: tuple[int, ...]
    quantizers: tuple[ir.Node, ...]
    is_read: bool
    inside: bool
    types: tuple[str, ...]

    @property
    def is_weight_only(self) -> bool:
        """Nothing but weights is quantized here, and it could not be otherwise."""
        in_integers = self.quantizers and self.operator in INTEGER
        return bool(self.weights) and not (self.activations or self.inside or in_integers)


def around_of(node: ir.Node, operators: tuple[str, ...], inside: bool, timings: Timings) -> Around:
    """What is around a node of the optimized graph.

    Args:
        node: neither QuantizeLinear nor DequantizeLinear.
        operators: of the model, that it computes.
        inside: between DequantizeLinear and QuantizeLinear, if not beside them.
        timings: of the nodes that were run; they know the element types.
    """
    dequantizers = {i: _dequantizer(value) for i, value in enumerate(node.inputs)}
    found = {index: d for index, d in dequantizers.items() if d is not None}
    weights = {index: d for index, d in found.items() if dequantizes_constant(d)}
    activations = {index: d for index, d in found.items() if index not in weights}
    readers = [reader for value in node.outputs for reader in readers_of(value)]
    quantizers = tuple(r for r in readers if r.op_type == "QuantizeLinear")
    return Around(
        node=node,
        operator=operator_name(node),
        operators=operators,
        weights=weights,
        activations=activations,
        plain=tuple(i for i, v in enumerate(node.inputs) if v is not None and i not in found),
        quantizers=quantizers,
        is_read=len(quantizers) < len(readers) or any(v.is_graph_output() for v in node.outputs),
        inside=inside,
        types=tuple(
            [_stored_type(d, timings) for d in activations.values()]
            + [_stored_type(q, timings) for q in quantizers]
        ),
    )


def operator_name(node: ir.Node) -> str:
    """The operator, without onnxruntime's word for what was fused into it."""
    return _FUSED.get(node.op_type, node.op_type)


def _stored_type(node: ir.Node, timings: Timings) -> str:
    """The element type on the integer side of a QuantizeLinear or DequantizeLinear."""
    timing = timings.get(node)
    if timing is not None:
        types = timing.inputs if node.op_type == "DequantizeLinear" else timing.outputs
        if types:
            return types[0]
    zero_point = constant_tensor(input_of(node, 2))
    return zero_point.dtype.name.lower() if zero_point is not None else "uint8"


def is_quantization(node: ir.Node | None) -> bool:
    """The node is a QuantizeLinear or a DequantizeLinear."""
    return node is not None and node.op_type in ("DequantizeLinear", "QuantizeLinear")


def maker_of(value: ir.Value | None) -> ir.Node | None:
    """The node that makes a value; changes of its layout are looked through."""
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in REORDERS:
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    return node


def readers_of(value: ir.Value) -> list[ir.Node]:
    """The nodes that read a value; changes of its layout are looked through."""
    readers: list[ir.Node] = []
    for reader in value.consumers():
        readers += readers_of(reader.outputs[0]) if reader.op_type in REORDERS else [reader]
    return readers


def _dequantizer(value: ir.Value | None) -> ir.Node | None:
    node = maker_of(value)
    return node if node is not None and node.op_type == "DequantizeLinear" else None


def dequantizes_constant(node: ir.Node) -> bool:
    """What a DequantizeLinear reads never changes, or only where a caller replaces it."""
    value = node.inputs[0]
    if value is None:
        return False
    if value.producer() is not None:
        return nodes_behind(value) is not None
    return value.const_value is not None


def is_open(value: ir.Value | None) -> bool:
    """An input of the model with a default, which a caller may replace."""
    return value is not None and value.is_graph_input() and value.const_value is not None


def joined(around: Around) -> str:
    """The operators of the model that the node computes."""
    return "+".join(around.operators) if 0 < len(around.operators) <= 3 else around.operator


def weight_of(around: Around) -> ir.Value | None:
    """The integers of the weight before its DequantizeLinear, where the second input is one."""
    weight = around.weights.get(1)
    return weight.inputs[0] if weight is not None else None


def block_of(around: Around) -> int:
    """How many numbers of the weight share a scale in blocks; 0 without blocks."""
    weight = around.weights.get(1)
    return number_of(weight, "block_size") if weight is not None else 0


def scale_of(node: ir.Node | None) -> np.ndarray | None:
    """The scales of a DequantizeLinear or QuantizeLinear, where they are constant."""
    tensor = constant_tensor(input_of(node, 1)) if node is not None else None
    return tensor.numpy().reshape(-1) if tensor is not None else None


def number_of(node: ir.Node, name: str, default: int = 0) -> int:
    """A number in an attribute; -1 for one that is not whole."""
    attribute = node.attributes.get(name)
    value = attribute.value if attribute is not None else default
    # Of alpha and beta it only matters whether they are 1.
    return int(value) if float(value).is_integer() else -1


def text_of(node: ir.Node, name: str, default: str = "") -> str:
    """A text in an attribute."""
    attribute = node.attributes.get(name)
    return attribute.as_string() if attribute is not None else default


def parameters_of(node: ir.Node) -> tuple[object, ...] | None:
    """What can be compared of scale and zero point; None where they are not constant."""
    found: list[object] = []
    for index in (1, 2):
        value = input_of(node, index)
        tensor = constant_tensor(value)
        if value is not None and tensor is None:
            return None
        if tensor is not None:
            array = tensor.numpy()
            # A zero point of 0 may be left out.
            found += [str(array.dtype), tuple(np.ravel(array).tolist())]
    return tuple(found)

"""Why onnxruntime runs a node in a float kernel, or converts before or behind it.

The rules explain what the optimized graph shows and never predict it: each is asked only about a
node that stayed float beside quantized ones, or about a conversion that is left. They were checked
on onnxruntime 1.32's CPU provider, and hold for that one alone.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.operators import all_graphs
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
_LINEAR = ("Conv", "Gemm", "MatMul")
_CLIPS = ("Clip", "Relu")
_DATA_INPUTS = {"Conv": (0, 1), "Gemm": (0, 1), "MatMul": (0, 1), "Where": (1, 2)}

_WEIGHT_OF = {
    "ConvInteger": 1,
    "DynamicQuantizeMatMul": 1,
    "MatMulInteger": 1,
    "MatMulIntegerToFloat": 1,
    "QGemm": 3,
    "QLinearConv": 3,
    "QLinearMatMul": 3,
}

_EIGHT_BITS = ("int8", "uint8")
_NARROW_WEIGHTS = ("INT2", "UINT2", "INT4", "UINT4", "INT8", "UINT8")
_FLOATS = ("bfloat16", "double", "float", "float16")
_SMALLEST_BLOCK = 16


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
class _Around:
    """A node that computes in float, and the quantization beside it.

    Attributes:
        node: the node of the optimized graph.
        operator: what it computes, without onnxruntime's word for what was fused into it.
        operators: of the model.
        weights: the DequantizeLinear of a constant, by index of the input.
        activations: the DequantizeLinear of any other value, by index of the input.
        plain: indices of the inputs that are neither.
        quantizers: QuantizeLinear that read its first output.
        is_read: something else reads it, or it is an output of the model.
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
        return bool(self.weights) and not (self.activations or self.quantizers or self.inside)


def find_reasons(
    optimized: ir.Model, operators: Operators, timings: Timings, provider: str
) -> dict[ir.Node, Reason]:
    """The reasons of the nodes that have one.

    Args:
        optimized: the graph that onnxruntime runs.
        operators: of the model, that each of its nodes computes; nodes that were inserted have
            none.
        timings: of the nodes that were run; they know the element types.
        provider: "cpu" or "cuda".
    """
    inside = {node for graph in all_graphs(optimized) for node in _islands(graph, timings)}
    reasons: dict[ir.Node, Reason] = {}
    for graph in all_graphs(optimized):
        for node in graph:
            if _is_quantization(node):
                continue
            around = _around(node, operators.get(node, ()), node in inside, timings)
            reason = _why_float(around, provider) or _why_slow(node, provider)
            if reason is not None:
                reasons[node] = reason
    for graph in all_graphs(optimized):
        for node in graph:
            reason = _why_converted(node, operators, reasons, timings, provider)
            if reason is not None:
                reasons[node] = reason
    return reasons


# ------------------------------------------------------------------ what is around a node


def _is_quantization(node: ir.Node | None) -> bool:
    return node is not None and node.op_type in ("DequantizeLinear", "QuantizeLinear")


def _dequantizer(value: ir.Value | None) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == "DequantizeLinear" else None


def _dequantizes_constant(node: ir.Node) -> bool:
    value = node.inputs[0]
    return value is not None and value.producer() is None and value.const_value is not None


def _is_open(value: ir.Value | None) -> bool:
    """An input of the model with a default, which a caller may replace."""
    return value is not None and value.is_graph_input() and value.const_value is not None


def _operator(node: ir.Node) -> str:
    return _FUSED.get(node.op_type, node.op_type)


def _around(node: ir.Node, operators: tuple[str, ...], inside: bool, timings: Timings) -> _Around:
    dequantizers = {i: _dequantizer(value) for i, value in enumerate(node.inputs)}
    found = {index: d for index, d in dequantizers.items() if d is not None}
    weights = {index: d for index, d in found.items() if _dequantizes_constant(d)}
    activations = {index: d for index, d in found.items() if index not in weights}
    readers = list(node.outputs[0].consumers()) if node.outputs else []
    quantizers = tuple(r for r in readers if r.op_type == "QuantizeLinear")
    return _Around(
        node=node,
        operator=_operator(node),
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


def _stored_type(node: ir.Node, timings: Timings) -> str:
    """The element type on the integer side of a QuantizeLinear or DequantizeLinear."""
    timing = timings.get(node)
    if timing is not None:
        types = timing.inputs if node.op_type == "DequantizeLinear" else timing.outputs
        if types:
            return types[0]
    zero_point = constant_tensor(input_of(node, 2))
    return zero_point.dtype.name.lower() if zero_point is not None else "uint8"


def _islands(graph: ir.Graph, timings: Timings) -> set[ir.Node]:
    """Float nodes with a DequantizeLinear of an activation before and a QuantizeLinear behind."""
    behind: set[ir.Node] = set()
    for node in graph:
        makers = [value.producer() for value in node.inputs if value is not None]
        if _is_float(node, timings) and any(_gives_float(m, behind) for m in makers):
            behind.add(node)
    before: set[ir.Node] = set()
    for node in reversed(graph):
        readers = [reader for value in node.outputs for reader in value.consumers()]
        is_before = any(r.op_type == "QuantizeLinear" or r in before for r in readers)
        if is_before and _is_float(node, timings):
            before.add(node)
    return behind & before


def _gives_float(maker: ir.Node | None, behind: set[ir.Node]) -> bool:
    if maker is None:
        return False
    if maker.op_type == "DequantizeLinear":
        return not _dequantizes_constant(maker)
    return maker in behind


def _is_float(node: ir.Node, timings: Timings) -> bool:
    if _is_quantization(node) or node.op_type in ("Shape", "Size"):
        return False
    timing = timings.get(node)
    return timing is None or not timing.outputs or timing.outputs[0] in _FLOATS


# ------------------------------------------------------------------ why a node is float


def _why_float(around: _Around, provider: str) -> Reason | None:
    if not (around.weights or around.activations or around.quantizers or around.inside):
        return None
    rules = _WEIGHT_ONLY if around.is_weight_only else _QUANTIZED
    if not around.is_weight_only and not around.inside and not _is_wanted_in_integers(around):
        return None
    if provider != "cpu":
        return Reason(
            "other-provider",
            f"the rules known here are of the CPU provider, not of {provider}",
            UNKNOWN.change,
        )
    found = (rule(around) for rule in rules)
    return next((reason for reason in found if reason is not None), UNKNOWN)


def _is_wanted_in_integers(around: _Around) -> bool:
    """At the border of what is quantized, only what has an integer kernel could be part of it."""
    return around.operator in INTEGER or bool(around.activations and around.quantizers)


def _not_constant(around: _Around) -> Reason | None:
    sides = (*around.weights.values(), *around.activations.values())
    if not any(_is_open(value) for side in sides for value in side.inputs):
        return None
    return Reason(
        "not-constant",
        "the quantized weight is also an input of the model, so it is no constant",
        "take it from the inputs of the graph (graphopt optimize does)",
    )


def _weight_only_operator(around: _Around) -> Reason | None:
    if around.operator in ("Gemm", "MatMul"):
        return None
    name = around.operators[0] if around.operators else around.operator
    what = {
        "Conv": "quantize its input and output too, or keep its weight in float",
        "Gather": "keep the table in float or float16",
        "LSTM": "keep its weights in float, or use com.microsoft.DynamicQuantizeLSTM",
    }
    return Reason(
        "weight-only-operator",
        f"{name} takes no quantized weight: it is dequantized in every run",
        what.get(around.operator, "keep its weight in float"),
    )


def _weight_first(around: _Around) -> Reason | None:
    if 0 not in around.weights:
        return None
    return Reason(
        "weight-first",
        f"the quantized weight is the first input of {around.operator}; only the second may be one",
        "transpose the product, so that the weight comes second",
    )


def _quantized_bias(around: _Around) -> Reason | None:
    bias = around.weights.get(2) if around.operator in ("Conv", "Gemm") else None
    tensor = constant_tensor(bias.inputs[0]) if bias is not None else None
    if tensor is None or (tensor.dtype == ir.DataType.INT32 and not around.is_weight_only):
        return None
    instead = "or as int32 with the scale of the input times that of the weight"
    return Reason(
        "quantized-bias",
        f"the bias of {_joined(around)} is quantized to {tensor.dtype.name.lower()}",
        "keep the bias in float" + ("" if around.is_weight_only else f", {instead}"),
    )


def _transposed_weight(around: _Around) -> Reason | None:
    if not _number(around.node, "transB"):
        return None
    if around.node.op_type == "FusedMatMul":
        why = "Transpose stands between the dequantized weight and MatMul"
    else:
        why = "Gemm has transB=1 and a weight-only quantized weight"
    return Reason(
        "transposed-weight",
        f"{why}: it is dequantized in every run",
        "store the weight as [K, N] with blocks or channels along N, without transB or Transpose",
    )


def _scaled_gemm(around: _Around) -> Reason | None:
    if around.operator != "Gemm":
        return None
    scaled = ["alpha"] if around.is_weight_only and _number(around.node, "alpha", 1) != 1 else []
    if input_of(around.node, 2) is not None and _number(around.node, "beta", 1) != 1:
        scaled.append("beta")
    if around.is_weight_only and _number(around.node, "transA"):
        scaled.append("transA")
    if not scaled:
        return None
    return Reason(
        "scaled-gemm",
        f"Gemm has {' and '.join(scaled)}, which the integer kernel does not take",
        "multiply the factors into weight and bias, and transpose in a node of its own",
    )


def _weight_type(around: _Around) -> Reason | None:
    tensor = _weight(around)
    allowed = _NARROW_WEIGHTS if around.is_weight_only else ("INT8", "UINT8")
    if tensor is None or tensor.dtype.name in allowed:
        return None
    with_activations = "" if around.is_weight_only else " beside a quantized input"
    return Reason(
        "weight-type",
        f"no kernel takes {tensor.dtype.name.lower()} weights{with_activations}",
        "store the weight in int8" + (" or int4" if around.is_weight_only else ""),
    )


def _weight_rank(around: _Around) -> Reason | None:
    tensor = _weight(around)
    if not around.is_weight_only or tensor is None or len(tensor.shape) == 2:
        return None
    return Reason(
        "weight-rank",
        f"the weight has {len(tensor.shape)} dimensions; MatMulNBits takes matrices only",
        "split it into a MatMul for each matrix, or keep the weight in float",
    )


def _shared_weight(around: _Around) -> Reason | None:
    weight = around.weights.get(1)
    if weight is None:
        return None
    stored = weight.inputs[0]
    readers = len(weight.outputs[0].consumers()) + weight.outputs[0].is_graph_output()
    if readers == 1 and (stored is None or len(stored.consumers()) == 1):
        return None
    return Reason(
        "shared-weight",
        "more than one node reads the quantized weight, which MatMulNBits would pack anew",
        "give each node a copy of the weight, with a DequantizeLinear of its own",
    )


def _shared_scale(around: _Around) -> Reason | None:
    weight = around.weights.get(1)
    scale = input_of(weight, 1) if weight is not None else None
    if scale is None or len(scale.consumers()) == 1:
        return None
    return Reason(
        "shared-scale",
        "more than one node reads the scale of the quantized weight",
        "give each weight a scale of its own, one for each column: onnxruntime itself shares equal "
        "numbers",
    )


def _block_size(around: _Around) -> Reason | None:
    block = _block(around)
    if block == 0 or (block >= _SMALLEST_BLOCK and block & (block - 1) == 0):
        return None
    return Reason(
        "block-size",
        f"the weight has blocks of {block}; the kernel takes powers of two from 16",
        "quantize in blocks of 32, 64 or 128",
    )


def _weight_axis(around: _Around) -> Reason | None:
    weight, tensor = around.weights.get(1), _weight(around)
    if weight is None or tensor is None or around.operator not in ("Gemm", "MatMul"):
        return None
    scale = constant_tensor(input_of(weight, 1))
    if scale is None or scale.size == 1:
        return None
    rank = len(tensor.shape)
    axis = _number(weight, "axis", 1) % max(1, rank)
    inner = rank - 1 if _number(around.node, "transB") else rank - 2
    if (axis == inner) == bool(_block(around)):
        return None
    return Reason(
        "weight-axis",
        "the scales of the weight lie along the wrong axis",
        "one scale for each column of [K, N], or blocks along K",
    )


def _activation_type(around: _Around) -> Reason | None:
    other = next((t for t in around.types if t not in _EIGHT_BITS), None)
    if other is None:
        return None
    return Reason(
        "activation-type",
        f"activations are {other}; integer kernels take 8 bits",
        "quantize activations to uint8 or int8, or leave them in float",
    )


def _differing_quantization(around: _Around) -> Reason | None:
    if around.operator not in MOVEMENT or not around.activations or not around.quantizers:
        return None
    if around.operator == "Resize" and _text(around.node, "mode", "nearest") != "nearest":
        return None
    sides = [_parameters(n) for n in (*around.activations.values(), *around.quantizers)]
    if None in sides or len(set(sides)) == 1:
        return None
    return Reason(
        "differing-quantization",
        f"scale, zero point or type before {around.operator} and behind it differ",
        f"use those of its input behind {around.operator} too",
    )


def _no_integer_kernel(around: _Around) -> Reason | None:
    # An operator without a float kernel either is computed by several nodes, such as Mul.
    names = (around.operator, *around.operators)
    if all(_may_be_integer(name) for name in names):
        return None
    if len(around.operators) > 1 and INTEGER.issuperset(around.operators):
        return Reason(
            "fused-in-float",
            f"{_joined(around)} became {around.operator}, which has no integer kernel",
            "put QuantizeLinear and DequantizeLinear between them",
        )
    change = "leave all of the float part unquantized, or use operators that have one"
    if "BatchNormalization" in around.operators:
        change = "fold it into the Conv before it (graphopt optimize does), then quantize"
    return Reason("no-integer-kernel", f"{_joined(around)} has no integer kernel", change)


def _may_be_integer(operator: str) -> bool:
    return operator in INTEGER or operator in _CLIPS or operator in MOVEMENT - {"Resize"}


def _input_in_float(around: _Around) -> Reason | None:
    wanted = _DATA_INPUTS.get(around.operator, range(len(around.node.inputs)))
    missing = [index for index in wanted if index in around.plain]
    if around.operator not in INTEGER or not missing:
        return None
    if len(missing) == len(wanted):
        why = f"{around.operator} has inputs in float"
    elif constant_tensor(around.node.inputs[missing[0]]) is not None:
        why = f"a constant input of {around.operator} is in float"
    else:
        why = f"only one input of {around.operator} is quantized"
    return Reason(
        "input-in-float", why, "quantize all of its inputs, or leave all and the output in float"
    )


def _no_weight_zero_point(around: _Around) -> Reason | None:
    weight = around.weights.get(1)
    if around.operator != "Gemm" or weight is None or input_of(weight, 2) is not None:
        return None
    return Reason(
        "no-weight-zero-point",
        "the DequantizeLinear of the weight of Gemm states no zero point",
        "give it a zero point of 0",
    )


def _blocks_and_activations(around: _Around) -> Reason | None:
    if not _block(around):
        return None
    return Reason(
        "blocks-and-activations",
        f"the weight of {around.operator} has blocks, and its input is quantized too",
        "one scale for each column, or leave the input and output in float",
    )


def _clip_behind(around: _Around) -> Reason | None:
    """Relu and Clip are gone only where the QuantizeLinear behind them clips as they do."""
    if around.operator in _CLIPS:
        clip, quantizers = around.operator, around.quantizers
    elif _text(around.node, "activation") in _CLIPS:
        clip, quantizers = _text(around.node, "activation"), around.quantizers
    else:
        clips = [r for r in around.node.outputs[0].consumers() if r.op_type in _CLIPS]
        readers = [r for c in clips for r in c.outputs[0].consumers()]
        clip = clips[0].op_type if clips else ""
        quantizers = tuple(r for r in readers if r.op_type == "QuantizeLinear")
    if not clip or not quantizers:
        return None
    tensor = constant_tensor(input_of(quantizers[0], 2))
    zero_point = int(tensor.numpy().reshape(-1)[0]) if tensor is not None else 0
    if clip == "Relu":
        return Reason(
            "clip-zero-point",
            f"the zero point behind Relu is {zero_point}, not the minimum of its type",
            "calibrate the output of Relu from 0, so that the zero point is the minimum",
        )
    return Reason(
        "clip-zero-point",
        f"scale and zero point behind Clip reach beyond its limits (zero point {zero_point})",
        "choose them so that the integers hold what Clip lets through, and no more",
    )


def _no_output_quantize(around: _Around) -> Reason | None:
    if around.operator not in INTEGER:
        return None
    activation = _text(around.node, "activation")
    if activation:
        return Reason(
            "no-output-quantize",
            f"there is no QuantizeLinear between {around.operator} and {activation}",
            f"put QuantizeLinear and DequantizeLinear between {around.operator} and {activation}",
        )
    if around.quantizers:
        return None
    if around.operator == "Gemm" and input_of(around.node, 2) is not None:
        return Reason(
            "no-output-quantize",
            f"{_joined(around)} has a float bias, and no QuantizeLinear behind it",
            "put QuantizeLinear and DequantizeLinear behind it, or make the bias int32",
        )
    return Reason(
        "no-output-quantize",
        f"there is no QuantizeLinear behind {around.operator}",
        f"put QuantizeLinear and DequantizeLinear behind {around.operator}",
    )


def _output_read_in_float(around: _Around) -> Reason | None:
    if around.is_read and around.quantizers:
        return Reason(
            "output-read-in-float",
            f"the output of {around.operator} is read in float too, beside its QuantizeLinear",
            "let all readers, and the outputs of the model, take what DequantizeLinear gives back",
        )
    if len({_parameters(q) for q in around.quantizers}) > 1:
        return Reason(
            "output-read-in-float",
            f"the output of {around.operator} is quantized in two ways",
            "use one scale and zero point for all readers",
        )
    return None


_WEIGHT_ONLY: tuple[Callable[[_Around], Reason | None], ...] = (
    _not_constant,
    _weight_only_operator,
    _weight_first,
    _quantized_bias,
    _transposed_weight,
    _scaled_gemm,
    _weight_type,
    _weight_rank,
    _shared_weight,
    _shared_scale,
    _block_size,
    _weight_axis,
)
_QUANTIZED: tuple[Callable[[_Around], Reason | None], ...] = (
    _not_constant,
    _activation_type,
    _differing_quantization,
    _no_integer_kernel,
    _input_in_float,
    _quantized_bias,
    _scaled_gemm,
    _weight_type,
    _blocks_and_activations,
    _weight_axis,
    _no_weight_zero_point,
    _clip_behind,
    _output_read_in_float,
    _no_output_quantize,
)
"""The first rule that fits gives the reason."""


def _joined(around: _Around) -> str:
    """The operators of the model that the node computes."""
    names = [o for o in around.operators if o not in ("DequantizeLinear", "QuantizeLinear")]
    return "+".join(names) if 0 < len(names) <= 3 else around.operator


def _weight(around: _Around) -> ir.TensorProtocol | None:
    weight = around.weights.get(1)
    return constant_tensor(weight.inputs[0]) if weight is not None else None


def _block(around: _Around) -> int:
    weight = around.weights.get(1)
    return _number(weight, "block_size") if weight is not None else 0


def _number(node: ir.Node, name: str, default: int = 0) -> int:
    attribute = node.attributes.get(name)
    value = attribute.value if attribute is not None else default
    # Only whether alpha and beta are 1 matters.
    return int(value) if float(value).is_integer() else -1


def _text(node: ir.Node, name: str, default: str = "") -> str:
    attribute = node.attributes.get(name)
    return attribute.as_string() if attribute is not None else default


def _parameters(node: ir.Node) -> tuple[object, ...] | None:
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


# ------------------------------------------------------------------ other reasons


def _why_slow(node: ir.Node, provider: str) -> Reason | None:
    """An integer kernel that is slower than the float one."""
    tensor = constant_tensor(input_of(node, _WEIGHT_OF.get(node.op_type, len(node.inputs))))
    on_x86 = platform.machine().lower() in ("amd64", "x86_64")
    if tensor is None or tensor.dtype != ir.DataType.UINT8 or provider != "cpu" or not on_x86:
        return None
    return Reason(
        "uint8-weights",
        "weights are uint8; on x86 this is several times as slow as int8",
        "quantize weights to int8, symmetric (zero point 0)",
    )


def _why_converted(
    node: ir.Node,
    operators: Operators,
    reasons: Mapping[ir.Node, Reason],
    timings: Timings,
    provider: str,
) -> Reason | None:
    if _is_quantization(node):
        return _why_quantization_stayed(node, reasons)
    if operators.get(node):
        return None
    if node.op_type == "Cast":
        return _why_cast(node, operators, timings, provider)
    if node.op_type in ("ReorderInput", "ReorderOutput"):
        return _why_reordered(node)
    if node.op_type == "Transpose":
        return _why_transposed(node)
    if node.op_type.startswith("Memcpy"):
        return Reason(
            "other-device",
            f"{_named(_computing(node))} has no kernel on {provider} and runs on the CPU",
            "replace it, or move it to the beginning or end of the model",
        )
    return None


def _why_quantization_stayed(node: ir.Node, reasons: Mapping[ir.Node, Reason]) -> Reason | None:
    """That of the float node that needs it. At the border of what is quantized there is none."""
    before = node.inputs[0].producer() if node.inputs[0] is not None else None
    if node.op_type == "QuantizeLinear":
        if _is_open(node.inputs[0]):
            return Reason(
                "not-constant",
                "the weight is also an input of the model, so it is quantized in every run",
                "take it from the inputs of the graph (graphopt optimize does)",
            )
        if before is not None and before.op_type == "DequantizeLinear":
            return _requantized(before, node)
        return reasons.get(before) if before is not None else None
    readers = node.outputs[0].consumers()
    for reader in readers:
        if reader.op_type == "QuantizeLinear":
            return _requantized(node, reader)
    return next((reasons[r] for r in readers if r in reasons), None)


def _requantized(first: ir.Node, second: ir.Node) -> Reason:
    if _parameters(first) == _parameters(second):
        return UNKNOWN
    return Reason(
        "requantized",
        "DequantizeLinear and QuantizeLinear of differing scale, zero point or type meet",
        "use one scale and zero point for both",
    )


def _why_cast(
    node: ir.Node, operators: Operators, timings: Timings, provider: str
) -> Reason | None:
    timing = timings.get(node)
    types = {*timing.inputs, *timing.outputs} if timing is not None else set()
    target = node.outputs[0].consumers()
    narrows = timing is not None and "float16" in timing.outputs
    beside = node.inputs[0].producer() if narrows and node.inputs[0] is not None else None
    if not narrows:
        beside = target[0] if target else None
    names = operators.get(beside, ()) if beside is not None else ()
    name = names[-1 if narrows else 0] if names else _named(beside)
    if "float16" in types:
        return Reason(
            "no-half-kernel",
            f"{name} has no float16 kernel on the {provider} provider",
            f"run the model in float32 on the {provider} provider",
        )
    return Reason(
        "inserted-cast",
        f"{name} takes another element type",
        "give it the type that it takes, where that is an input of the model",
    )


def _why_reordered(node: ir.Node) -> Reason:
    if node.op_type == "ReorderInput":
        made = node.inputs[0].producer() if node.inputs[0] is not None else None
        what = f"{_named(made)} gives" if made is not None else "the input of the model has"
    else:
        readers = node.outputs[0].consumers()
        what = f"{_named(readers[0])} takes" if readers else "the output of the model has"
    return Reason(
        "blocked-layout",
        f"Conv runs in a blocked layout, and {what} the plain one",
        "fewer of these operators between Conv nodes",
    )


def _why_transposed(node: ir.Node) -> Reason:
    beside = [*node.outputs[0].consumers(), *_makers([node])]
    if any(_number(n, "channels_last") or n.op_type.startswith("Nhwc") for n in beside):
        return Reason(
            "channels-last",
            "the integer kernel of Conv runs channels-last",
            "quantize its neighbours too, so that fewer borders remain",
        )
    return Reason(
        "moved-transpose",
        "onnxruntime moved a Transpose of the model here, or split it",
        "fewer Transpose nodes in the model",
    )


def _makers(nodes: Iterable[ir.Node]) -> list[ir.Node]:
    found = (v.producer() for node in nodes for v in node.inputs if v is not None)
    return [node for node in found if node is not None]


def _computing(node: ir.Node) -> ir.Node | None:
    """On which side of a copy between devices the node is that has no kernel there."""
    if node.op_type == "MemcpyToHost":
        return next(iter(node.outputs[0].consumers()), None)
    return next(iter(_makers([node])), None)


def _named(node: ir.Node | None) -> str:
    return _operator(node) if node is not None else "the model"

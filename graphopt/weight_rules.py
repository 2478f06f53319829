"""Rules about quantized weights: what keeps MatMulNBits and the integer kernels from taking them.

Checked on the CPU provider of onnxruntime 1.32. The first rule that fits gives the reason.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from graphopt.reasons import (
    MOVEMENT,
    Around,
    Reason,
    block_of,
    is_open,
    joined,
    number_of,
    weight_of,
)
from graphopt.rewriting import constant_tensor, input_of
from graphopt.skeleton import known_shape

_NARROW_WEIGHTS = ("INT2", "UINT2", "INT4", "UINT4", "INT8", "UINT8")


_SMALLEST_BLOCK = 16


def not_constant(around: Around) -> Reason | None:
    """A quantized constant that callers may replace."""
    sides = (*around.weights.values(), *around.activations.values())
    if not any(is_open(value) for side in sides for value in side.inputs):
        return None
    return Reason(
        "not-constant",
        "the quantized weight is also an input of the model, so it is no constant",
        "take it from the inputs of the graph (graphopt optimize does)",
    )


def _weight_only_operator(around: Around) -> Reason | None:
    if around.operator in ("Gemm", "MatMul"):
        return None
    name = around.operators[0] if around.operators else around.operator
    what = {
        "Conv": "quantize its input and output too, or keep its weight in float",
        "Gather": "keep the table in float or float16",
        "LSTM": "keep its weights in float, or use com.microsoft.DynamicQuantizeLSTM",
    }
    otherwise = "keep its weight in float"
    if around.operator in MOVEMENT:
        otherwise = "quantize the weight as it comes out of it"
    return Reason(
        "weight-only-operator",
        f"{name} takes no quantized weight: it is dequantized in every run",
        what.get(around.operator, otherwise),
    )


def _weight_first(around: Around) -> Reason | None:
    if 0 not in around.weights:
        return None
    return Reason(
        "weight-first",
        f"the quantized weight is the first input of {around.operator}; only the second may be one",
        "transpose the product, so that the weight comes second",
    )


def quantized_bias(around: Around) -> Reason | None:
    """A bias in integers that the kernel does not take."""
    bias = around.weights.get(2) if around.operator in ("Conv", "Gemm") else None
    tensor = constant_tensor(bias.inputs[0]) if bias is not None else None
    if tensor is None or (tensor.dtype == ir.DataType.INT32 and not around.is_weight_only):
        return None
    instead = "or as int32 with the scale of the input times that of the weight"
    return Reason(
        "quantized-bias",
        f"the bias of {joined(around)} is quantized to {tensor.dtype.name.lower()}",
        "keep the bias in float" + ("" if around.is_weight_only else f", {instead}"),
    )


def _transposed_weight(around: Around) -> Reason | None:
    if not number_of(around.node, "transB"):
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


def scaled_gemm(around: Around) -> Reason | None:
    """A Gemm with factors, or with a transposed first input."""
    if around.operator != "Gemm":
        return None
    scaled = ["alpha"] if around.is_weight_only and number_of(around.node, "alpha", 1) != 1 else []
    if input_of(around.node, 2) is not None and number_of(around.node, "beta", 1) != 1:
        scaled.append("beta")
    if around.is_weight_only and number_of(around.node, "transA"):
        scaled.append("transA")
    if not scaled:
        return None
    return Reason(
        "scaled-gemm",
        f"Gemm has {' and '.join(scaled)}, which the integer kernel does not take",
        "multiply the factors into weight and bias, and transpose in a node of its own",
    )


def weight_type(around: Around) -> Reason | None:
    """A weight of an element type that the kernel does not take."""
    weight = weight_of(around)
    allowed = _NARROW_WEIGHTS if around.is_weight_only else ("INT8", "UINT8")
    if weight is None or weight.dtype is None or weight.dtype.name in allowed:
        return None
    with_activations = "" if around.is_weight_only else " beside a quantized input"
    return Reason(
        "weight-type",
        f"no kernel takes {weight.dtype.name.lower()} weights{with_activations}",
        "store the weight in int8" + (" or int4" if around.is_weight_only else ""),
    )


def _weight_rank(around: Around) -> Reason | None:
    shape = known_shape(weight_of(around))
    if not around.is_weight_only or shape is None or len(shape) == 2:
        return None
    return Reason(
        "weight-rank",
        f"the weight has {len(shape)} dimensions; MatMulNBits takes matrices only",
        "split it into a MatMul for each matrix, or keep the weight in float",
    )


def vector_scale(around: Around) -> Reason | None:
    """Most operators take a vector of one element for a number; these do not."""
    if around.operator not in (("Gemm", "MatMul") if around.is_weight_only else ("Add", "Mul")):
        return None
    sides = (*around.weights.values(), *around.activations.values(), *around.quantizers)
    tensors = [constant_tensor(value) for side in sides for value in side.inputs[1:]]
    if not any(t is not None and t.size == 1 and len(t.shape) for t in tensors):
        return None
    return Reason(
        "vector-scale",
        f"a scale or zero point beside {around.operator} is a vector of one element",
        "store scales and zero points as scalars, of shape []",
    )


def _shared_weight(around: Around) -> Reason | None:
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


def _shared_scale(around: Around) -> Reason | None:
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


def _block_size(around: Around) -> Reason | None:
    block = block_of(around)
    if block == 0 or (block >= _SMALLEST_BLOCK and block & (block - 1) == 0):
        return None
    return Reason(
        "block-size",
        f"the weight has blocks of {block}; the kernel takes powers of two from 16",
        "quantize in blocks of 32, 64 or 128",
    )


def weight_axis(around: Around) -> Reason | None:
    """Scales, or blocks, along the axis that the kernel does not take."""
    weight, shape = around.weights.get(1), known_shape(weight_of(around))
    if weight is None or shape is None or around.operator not in ("Gemm", "MatMul"):
        return None
    scale = constant_tensor(input_of(weight, 1))
    if scale is None or scale.size == 1:
        return None
    rank = len(shape)
    axis = number_of(weight, "axis", 1) % max(1, rank)
    inner = rank - 1 if number_of(around.node, "transB") else rank - 2
    if (axis == inner) == bool(block_of(around)):
        return None
    return Reason(
        "weight-axis",
        "the scales of the weight lie along the wrong axis",
        "one scale for each column of [K, N], or blocks along K",
    )


WEIGHT_ONLY: tuple[Callable[[Around], Reason | None], ...] = (
    not_constant,
    _weight_only_operator,
    _weight_first,
    quantized_bias,
    _transposed_weight,
    scaled_gemm,
    weight_type,
    _weight_rank,
    vector_scale,
    _shared_weight,
    _shared_scale,
    _block_size,
    weight_axis,
)

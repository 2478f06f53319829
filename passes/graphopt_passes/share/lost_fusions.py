"""Where sharing a constant would stop onnxruntime from fusing at load.

Nearly everywhere it does not: pairs of models with and without sharing gave the same optimized
graph in onnxruntime 1.32 for Conv with BatchNormalization, Mul, Add, Pad and activations, for
MatMul and Gemm with a bias, layer normalization, the forms of Gelu, attention, and quantization in
integer kernels. The two exceptions are here.
"""

from __future__ import annotations

import onnx_ir as ir

from graphopt.contract import Context
from graphopt.operators import is_onnx
from graphopt.packing import is_constant
from graphopt.rewriting import input_of, only_reader

WEIGHT_ONLY = (
    "onnxruntime makes MatMulNBits of the DequantizeLinear and the product that it is for only as "
    "long as nothing else reads it"
)
BODY_CONV = (
    "a Conv in a subgraph reads it, and onnxruntime uses its blocked kernels only for weights of "
    "the same graph"
)

_FUSED_TYPES = (
    ir.DataType.INT2,
    ir.DataType.UINT2,
    ir.DataType.INT4,
    ir.DataType.UINT4,
    ir.DataType.INT8,
    ir.DataType.UINT8,
)
"""Of weights that MatMulNBits takes over."""

_INTEGER_KERNELS = (ir.DataType.INT8, ir.DataType.UINT8)
"""Of activations: with them the product is one of integers, and shared weights stop nothing."""


def unshared_values(model: ir.Model, context: Context) -> set[ir.Value]:
    """The values that must get no further reader, because of `WEIGHT_ONLY`.

    They are the weight that a DequantizeLinear gives to a product, and all that its data and its
    scale are made of: onnxruntime merges equal nodes itself, and so would share what those make of
    shared constants. Its zero point may be shared. Where one is shared already, nothing is lost.
    """
    unshared: set[ir.Value] = set()
    for node in context.index_of(model).of("MatMul", "Gemm"):
        weight = _fused_weight(node)
        if weight is not None:
            unshared.add(weight)
            _add_sources(weight, unshared)
    return unshared


def feeds_conv_of_body(value: ir.Value, model: ir.Model) -> bool:
    """Moving the initializer out of its graph would cost time; see `BODY_CONV`."""
    return value.graph is not model.graph and any(
        is_onnx(use.node, "Conv") and use.idx > 0 for use in value.uses()
    )


def _fused_weight(node: ir.Node) -> ir.Value | None:
    """The weight of a product that becomes MatMulNBits, as DequantizeLinear makes it."""
    if node.attributes.get_int("transB", 0) != 0:
        return None
    weight, activation = input_of(node, 1), _dequantized(node.inputs[0])
    data = _dequantized(weight)
    if weight is None or data is None or only_reader(weight) is None:
        return None
    if activation is not None and activation.dtype in _INTEGER_KERNELS:
        return None
    if data.dtype not in (None, *_FUSED_TYPES) or not _is_made_of_constants(data):
        return None
    dequantize = weight.producer()
    assert dequantize is not None
    return weight if all(v and only_reader(v) for v in dequantize.inputs[:2]) else None


def _dequantized(value: ir.Value | None) -> ir.Value | None:
    """What the value is widened from; None where no DequantizeLinear made it."""
    node = value.producer() if value is not None else None
    return node.inputs[0] if node is not None and is_onnx(node, "DequantizeLinear") else None


def _is_made_of_constants(value: ir.Value) -> bool:
    waiting, seen = [value], set[ir.Value]()
    while waiting:
        value = waiting.pop()
        if value in seen or is_constant(value):
            continue
        seen.add(value)
        node = value.producer()
        if node is None or not node.inputs:
            return False
        waiting += [v for v in node.inputs if v is not None]
    return True


def _add_sources(weight: ir.Value, sources: set[ir.Value]) -> None:
    """Add what the data and the scale of the DequantizeLinear are made of."""
    dequantize = weight.producer()
    assert dequantize is not None
    waiting = list(dequantize.inputs[:2])
    while waiting:
        value = waiting.pop()
        if value is None or value in sources:
            continue
        sources.add(value)
        node = value.producer()
        waiting += node.inputs if node is not None else ()

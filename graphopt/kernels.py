"""Why onnxruntime runs a node in a float kernel, or converts before or behind it.

The rules explain what the optimized graph shows and never predict it: each is asked only about a
node that stayed float beside quantized ones, or about a conversion that is left. They were checked
on onnxruntime 1.32's CPU provider, and hold for that one alone.
"""

from __future__ import annotations

import platform

import onnx_ir as ir

from graphopt.conversion_rules import why_converted
from graphopt.integer_rules import QUANTIZED
from graphopt.operators import all_graphs
from graphopt.packing import is_packed
from graphopt.reasons import (
    INTEGER,
    REORDERS,
    UNKNOWN,
    Around,
    Operators,
    Reason,
    Timings,
    around_of,
    dequantizes_constant,
    is_quantization,
    maker_of,
    readers_of,
)
from graphopt.rewriting import constant_tensor, input_of
from graphopt.weight_rules import WEIGHT_ONLY

_WEIGHT_OF = {
    "ConvInteger": 1,
    "DynamicQuantizeMatMul": 1,
    "MatMulInteger": 1,
    "MatMulIntegerToFloat": 1,
    "MatMulNBits": 1,
    "QGemm": 3,
    "QLinearConv": 3,
    "QLinearMatMul": 3,
}
"""Kernels that take weights in integers, and the index of the weight."""


_FLOATS = ("bfloat16", "double", "float", "float16")


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
            if is_quantization(node) or node.op_type in REORDERS:
                continue
            around = around_of(node, operators.get(node, ()), node in inside, timings)
            reason = _why_float(around, provider) or _why_slow(node, provider)
            reason = reason or _why_widened(node)
            if reason is not None:
                reasons[node] = reason
    for graph in all_graphs(optimized):
        for node in graph:
            reason = why_converted(node, operators, reasons, timings, provider)
            if reason is not None:
                reasons[node] = reason
    return reasons


def _islands(graph: ir.Graph, timings: Timings) -> set[ir.Node]:
    """Float nodes with a DequantizeLinear of an activation before and a QuantizeLinear behind."""
    behind: set[ir.Node] = set()
    for node in graph:
        makers = [maker_of(value) for value in node.inputs]
        if _is_float(node, timings) and any(_gives_float(m, behind) for m in makers):
            behind.add(node)
    before: set[ir.Node] = set()
    for node in reversed(graph):
        readers = [reader for value in node.outputs for reader in readers_of(value)]
        is_before = any(r.op_type == "QuantizeLinear" or r in before for r in readers)
        if is_before and _is_float(node, timings):
            before.add(node)
    return behind & before


def _gives_float(maker: ir.Node | None, behind: set[ir.Node]) -> bool:
    if maker is None:
        return False
    if maker.op_type == "DequantizeLinear":
        return not dequantizes_constant(maker)
    return maker in behind


def _is_float(node: ir.Node, timings: Timings) -> bool:
    if is_quantization(node) or node.op_type in ("Shape", "Size"):
        return False
    timing = timings.get(node)
    return timing is None or not timing.outputs or timing.outputs[0] in _FLOATS


def _why_float(around: Around, provider: str) -> Reason | None:
    if around.node.op_type in _WEIGHT_OF or around.node.op_type.startswith("QLinear"):
        return None
    if not (around.weights or around.activations or around.quantizers or around.inside):
        return None
    rules = WEIGHT_ONLY if around.is_weight_only else QUANTIZED
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


def _is_wanted_in_integers(around: Around) -> bool:
    """At the border of what is quantized, only what has an integer kernel could be part of it."""
    beside = around.quantizers or around.weights
    return around.operator in INTEGER or bool(around.activations and beside)


def _why_widened(node: ir.Node) -> Reason | None:
    """A step from the codes of a weight to its numbers that is not done at load."""
    if not any(map(is_packed, node.outputs)):
        return None
    return Reason(
        "widened-in-every-run",
        "a packed weight is widened in every run: onnxruntime computes nothing over 1 GiB at load, "
        "nor what it has no CPU kernel for",
        "store it in parts that are smaller, or as it is when it is widened",
    )


def _why_slow(node: ir.Node, provider: str) -> Reason | None:
    """An integer kernel that is slower than the float one."""
    if node.op_type not in _WEIGHT_OF or node.op_type == "MatMulNBits":
        # The weights of the latter are packed, of whichever type.
        return None
    tensor = constant_tensor(input_of(node, _WEIGHT_OF[node.op_type]))
    on_x86 = platform.machine().lower() in ("amd64", "x86_64")
    if tensor is None or tensor.dtype != ir.DataType.UINT8 or provider != "cpu" or not on_x86:
        return None
    return Reason(
        "uint8-weights",
        "weights are uint8; on x86 this is several times as slow as int8",
        "quantize weights to int8, symmetric (zero point 0)",
    )

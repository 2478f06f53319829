"""Rules about conversions: why onnxruntime inserted one, or left one of the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import onnx_ir as ir

from graphopt.reasons import (
    REORDERS,
    UNKNOWN,
    Operators,
    Reason,
    Timings,
    is_open,
    is_quantization,
    maker_of,
    number_of,
    operator_name,
    parameters_of,
    readers_of,
)


def why_converted(
    node: ir.Node,
    operators: Operators,
    reasons: Mapping[ir.Node, Reason],
    timings: Timings,
    provider: str,
) -> Reason | None:
    """Why the node converts, if it is one that does and there is a reason.

    Args:
        node: of the optimized graph.
        operators: of the model, that the nodes of the graph compute.
        reasons: of the nodes that compute.
        timings: of the nodes that were run; they know the element types.
        provider: "cpu" or "cuda".
    """
    if is_quantization(node):
        return _why_quantization_stayed(node, reasons)
    if operators.get(node):
        return None
    if node.op_type == "Cast":
        return _why_cast(node, operators, timings, provider)
    if node.op_type in REORDERS:
        return _why_reordered(node)
    if node.op_type == "Transpose":
        return _why_transposed(node)
    if node.op_type.startswith("Memcpy"):
        return Reason(
            "other-device",
            f"{_named(_computing(node))} has no kernel on {provider.upper()} and runs on the CPU",
            "replace it, or move it to the beginning or end of the model",
        )
    return None


def _why_quantization_stayed(node: ir.Node, reasons: Mapping[ir.Node, Reason]) -> Reason | None:
    """That of the float node that needs it. At the border of what is quantized there is none."""
    before = maker_of(node.inputs[0])
    if node.op_type == "QuantizeLinear":
        if is_open(node.inputs[0]):
            return Reason(
                "not-constant",
                "the weight is also an input of the model, so it is quantized in every run",
                "take it from the inputs of the graph (graphopt optimize does)",
            )
        if before is not None and before.op_type == "DequantizeLinear":
            return _requantized(before, node)
        return reasons.get(before) if before is not None else None
    readers = readers_of(node.outputs[0])
    for reader in readers:
        if reader.op_type == "QuantizeLinear":
            return _requantized(node, reader)
    return next((reasons[r] for r in readers if r in reasons), None)


def _requantized(first: ir.Node, second: ir.Node) -> Reason:
    if parameters_of(first) == parameters_of(second):
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
            f"{name} has no float16 kernel on the {provider.upper()} provider",
            f"run the model in float32 on the {provider.upper()} provider",
        )
    return Reason(
        "inserted-cast",
        f"{_named(beside)} takes another element type",
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
    if any(number_of(n, "channels_last") or n.op_type.startswith("Nhwc") for n in beside):
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
    return operator_name(node) if node is not None else "the model"

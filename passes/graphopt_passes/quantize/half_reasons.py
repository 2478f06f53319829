"""Which nodes of a model stay in float32 when it is to compute in 16 bits, and why.

Some must: where float16 has no form of the operator, where samples show numbers that it does not
hold, where a constant would be lost in it, where integers are counted in floating point.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.operators import ONNX_DOMAINS, is_onnx, is_random, subgraphs
from graphopt.packing import is_constant, is_packed
from graphopt.rewriting import SMALL_ELEMENTS, constant_tensor
from graphopt_passes.quantize.half_places import Floats, is_control, ties_of
from graphopt_passes.quantize.halves import Half, Role

T = ir.DataType

PRODUCTS = ("Conv", "ConvTranspose", "Einsum", "GRU", "Gemm", "LSTM", "MatMul", "RNN")

KEPT_WIDE = {
    **dict.fromkeys(("AffineGrid", "GridSample", "MaxRoiPool", "RoiAlign"), "has coordinates"),
    **dict.fromkeys(("CumProd", "CumSum", "DFT", "STFT"), "sums up over a whole axis"),
    **dict.fromkeys(("BlackmanWindow", "HammingWindow", "HannWindow", "Range"), "counts"),
    **dict.fromkeys(("NegativeLogLikelihoodLoss", "SoftmaxCrossEntropyLoss"), "is a loss"),
    **dict.fromkeys(("EyeLike", "MeanVarianceNormalization"), "has no kernel that would load"),
    "MelWeightMatrix": "has frequencies",
}
"""Standard operators that stay in float32 wherever they are, and why.

All others have, on onnxruntime's CPU provider, a kernel for float16, or one for float32 before and
behind which onnxruntime puts Casts. That was found by the kernels that onnxruntime 1.32 registers
for every version of every operator, and by converting every case with which ONNX tests its
backends: tests/test_convert_numbers.py does that again.
"""

CODERS = ("DequantizeLinear", "DynamicQuantizeLinear", "QuantizeLinear")
"""Operators between numbers and codes, of ONNX and of onnxruntime's own domain."""

SENSITIVE = (
    "Exp",
    "GroupNormalization",
    "InstanceNormalization",
    "LayerNormalization",
    "Log",
    "LogSoftmax",
    "LpNormalization",
    "MeanVarianceNormalization",
    "Pow",
    "RMSNormalization",
    "ReduceL1",
    "ReduceL2",
    "ReduceLogSum",
    "ReduceLogSumExp",
    "ReduceMean",
    "ReduceProd",
    "ReduceSum",
    "ReduceSumSquare",
    "Reciprocal",
    "Softmax",
    "Softplus",
    "Sqrt",
)
"""Operators to which a rounding before or in them matters most."""

_BIASES = {
    ("BatchNormalization", 2),
    ("BatchNormalization", 3),
    ("BatchNormalization", 4),
    ("Conv", 2),
    ("ConvTranspose", 2),
    ("GRU", 3),
    ("Gemm", 2),
    ("GroupNormalization", 2),
    ("InstanceNormalization", 2),
    ("LSTM", 3),
    ("LayerNormalization", 2),
    ("RNN", 3),
}
"""Inputs that are added to what the operator computes, as are mean and variance to others."""

_TERMS = (
    "Add",
    "Clip",
    "Equal",
    "Greater",
    "GreaterOrEqual",
    "Less",
    "LessOrEqual",
    "Max",
    "Min",
    "Pad",
    "Sub",
    "Where",
)
"""Operators that put constants beside other numbers, not as factors of them."""

_TO_FLOORS = (
    "Abs",
    "Mul",
    "Pow",
    "ReduceL1",
    "ReduceL2",
    "ReduceMean",
    "ReduceSum",
    "ReduceSumSquare",
    "Sqrt",
)

_FROM_FLOORS = ("Clip", "Expand", "Log", "Max", "Pow", "Reciprocal", "Sqrt")
"""What norms do before and behind the Add, Max or Clip that keeps them from 0."""

_INTEGERS = (T.INT16, T.INT32, T.INT64, T.UINT16, T.UINT32, T.UINT64)
"""Of these, float16 holds but few: all whole numbers up to 2048."""

_CODES = (T.INT2, T.INT4, T.INT8, T.UINT2, T.UINT4, T.UINT8)


def why_wide(
    floats: Floats, block: Sequence[str], ranges: Mapping[ir.Value, str]
) -> dict[ir.Node, str]:
    """The nodes that must stay in float32, each with the first reason that was found.

    Args:
        floats: the model.
        block: operators that are to stay.
        ranges: what is wrong with the range of a value, of those that do not fit.
    """
    reasons: dict[ir.Node, str] = {}
    floors: list[ir.Node] = []
    for node in floats.nodes:
        reason = _why_alone(node, floats, block) or _why_range(node, floats, ranges)
        if reason is None:
            lost = _lost_constant(node, floats)
            if lost is not None:
                reason, role = lost
                floors += [node] if role == "floor" else []
        if reason is not None:
            reasons[node] = reason
    for found in (_near_floors(floors), _counting(floats), _accumulating(floats)):
        reasons = {**found, **reasons}
    return reasons


def _why_alone(node: ir.Node, floats: Floats, block: Sequence[str]) -> str | None:
    """Why a node stays float32 whatever its values are."""
    values = [*node.inputs, *(o for o in node.outputs if o.name and _is_used(o))]
    kinds = [floats.types.get(value) for value in values if value is not None]
    if not any(kind is None or kind.dtype == T.FLOAT for kind in kinds) or floats.widens(node):
        return None
    if any(kind is None for kind in kinds):
        return "the type of a value is not known"
    if not all(isinstance(kind, ir.TensorType) for kind in kinds if kind is not None):
        return "a sequence or optional stays as it is"
    if floats.other_body(node) is not None:
        return f"the body of a {floats.other_body(node)} stays as it is"
    if floats.places(node) is None:
        return (
            f"nobody says whether {node.domain or 'onnx'}.{node.op_type} knows {floats.half.name}"
        )
    if node.op_type in block:
        return f"{node.op_type} is to stay float32"
    return _why_operator(node, floats) or _why_packed(node)


def _why_operator(node: ir.Node, floats: Floats) -> str | None:
    """Why the operator stays float32, or this form of it."""
    if node.op_type in CODERS:
        return f"{node.op_type} makes codes"
    if node.op_type in KEPT_WIDE and node.domain in ONNX_DOMAINS:
        return f"{node.op_type} {KEPT_WIDE[node.op_type]}"
    if not floats.takes(node) and not floats.makes(node):
        return f"{node.op_type} has no {floats.half.name} form at opset {floats.opset}"
    if is_random(node):
        return f"{node.op_type} draws other numbers in another type"
    if is_onnx(node, "ScatterElements", "ScatterND") and "reduction" in node.attributes:
        return f"{node.op_type} with a reduction has no kernel that would run"
    if is_onnx(node, "BatchNormalization") and sum(map(_is_used, node.outputs)) > 1:
        return "it trains"
    if _crashes(node):
        return "onnxruntime 1.32 crashes where such a Transpose is float16 before a MatMul"
    return None


def _crashes(node: ir.Node) -> bool:
    """The Transpose moves the first axis to one of the last two, and a MatMul reads it.

    onnxruntime makes a FusedMatMul of them, with a Cast whose output has no type. Seen of 1.32 on
    the CPU with a weight of two axes, for every such permutation of three or four axes that keeps
    the order of the others, and not where the Transpose is of float32.
    """
    if not is_onnx(node, "Transpose") or "perm" not in node.attributes:
        return False
    perm = node.attributes["perm"].as_ints()
    if len(perm) < 3 or 0 not in perm[-2:]:
        return False
    readers = [use.node for use in node.outputs[0].uses()]
    readers += [u.node for r in readers if is_onnx(r, "Cast") for u in r.outputs[0].uses()]
    return any(is_onnx(reader, "MatMul") for reader in readers)


def _is_used(value: ir.Value) -> bool:
    return value.is_graph_output() or bool(value.uses())


def _why_packed(node: ir.Node) -> str | None:
    """Integers of 8 bits and fewer are codes, and kernels for them know float32."""
    makers = [v.producer() for v in node.inputs if v is not None]
    readers = [use.node for output in node.outputs for use in output.uses()]
    coders = [node for node in (*makers, *readers) if node is not None]
    if any(node.op_type in CODERS for node in coders):
        return "it is beside codes"
    if node.domain not in ONNX_DOMAINS and any(
        v is not None and v.dtype in _CODES for v in node.inputs
    ):
        return "it works on codes"
    if any(map(is_packed, node.outputs)):
        return "packed weights stay packed"
    return None


def _why_range(node: ir.Node, floats: Floats, ranges: Mapping[ir.Value, str]) -> str | None:
    taken = (node.inputs[index] for index in floats.takes(node))
    values = filter(None, (*taken, *floats.makes(node)))
    return next((ranges[value] for value in values if value in ranges), None)


def _lost_constant(node: ir.Node, floats: Floats) -> tuple[str, Role] | None:
    """Why a constant of the node would be lost, and what it is for."""
    for index in floats.takes(node):
        role = _role(node, index)
        reason = floats.why_lost(node.inputs[index], role)
        if reason is not None:
            return f"a constant of {reason}", role
    filling = node.attributes.get("value") if is_onnx(node, "ConstantOfShape") else None
    if filling is None or node.outputs[0] not in floats:
        return None
    reason = floats.half.why_lost(filling.as_tensor(), "floor")
    return None if reason is None else (f"a constant of {reason}", "floor")


def _role(node: ir.Node, index: int) -> Role:
    """What the node does with a constant."""
    if (node.op_type, index) in _BIASES:
        return "term"
    if is_onnx(node, *_TERMS):
        tensor = constant_tensor(node.inputs[index])
        return "floor" if tensor is not None and tensor.size == 1 else "term"
    return "divisor" if is_onnx(node, "Div") and index == 1 else "factor"


def _near_floors(floors: Iterable[ir.Node]) -> dict[ir.Node, str]:
    """What makes a number that is kept from 0, as a variance, and what is made of it.

    Where the floor needs float32, so do the numbers near it.
    """
    found: dict[ir.Node, str] = {}
    waiting = list(floors)
    while waiting:
        for value in waiting.pop().inputs:
            maker = value.producer() if value is not None else None
            if maker is None or maker in found or not is_onnx(maker, *_TO_FLOORS):
                continue
            # A Mul is part of a norm only where it squares.
            if maker.op_type != "Mul" or maker.inputs[0] is maker.inputs[1]:
                found[maker] = "what it makes may be too small"
                waiting.append(maker)
    waiting = list(floors)
    while waiting:
        for output in waiting.pop().outputs:
            for use in output.uses():
                if use.node not in found:
                    found[use.node] = "what it reads may be too small"
                    waiting += [use.node] if is_onnx(use.node, *_FROM_FLOORS) else []
    return found


def _counting(floats: Floats) -> dict[ir.Node, str]:
    """What is computed from integers and small constants alone: positions, sizes, angles."""
    counts: set[ir.Value] = set()
    found: dict[ir.Node, str] = {}
    for node in floats.nodes:
        if _counts(node, floats, counts):
            counts.update(o for o in node.outputs if o in floats)
            found[node] = "it computes with integers"
    return found


def _counts(node: ir.Node, floats: Floats, counts: set[ir.Value]) -> bool:
    if is_onnx(node, "Cast", "CastLike") and node.outputs[0] in floats:
        source = node.inputs[0]
        kind = floats.types.get(source) if source is not None else None
        if kind is not None and kind.dtype in _INTEGERS:
            return not is_constant(source)
    if is_onnx(node, "Range"):
        return node.outputs[0] in floats
    coming = floats.comes(node)
    if not coming or any(v not in counts for v in coming) or is_onnx(node, "Conv", "Gemm"):
        return False
    constants = filter(None, (constant_tensor(v) for v in node.inputs if v in floats))
    return all(_is_small(tensor, floats.half) for tensor in constants)


def _is_small(tensor: ir.TensorProtocol, half: Half) -> bool:
    """Few numbers, and no mask, which is to be limited before Casts make infinity of it."""
    return tensor.size <= SMALL_ELEMENTS and not np.any(np.abs(tensor.numpy()) > half.largest)


def _accumulating(floats: Floats) -> dict[ir.Node, str]:
    """What adds to a value from round to round of a Loop or Scan, without a product in between."""
    found: dict[ir.Node, str] = {}
    for graph in floats.graphs:
        for node in graph:
            if is_onnx(node, "Loop", "Scan") and is_control(node, floats.opset):
                ties = [tie for tie in ties_of(node) if tie.is_carried and tie.inner in floats]
                first = {tie.inner for tie in ties}
                last = {output for tie in ties for output in tie.last}
                for inner in _between(subgraphs(node)[0], first, last):
                    found[inner] = f"it adds up from round to round of a {node.op_type}"
    return found


def _between(body: ir.Graph, first: set[ir.Value | None], last: set[ir.Value]) -> Iterator[ir.Node]:
    """The nodes of a body on the ways between values, but those behind or before a product."""
    nodes = [n for n in body if not is_onnx(n, *PRODUCTS) and not subgraphs(n)]
    reached, needed = set(first), set(last)
    behind = set()
    for node in nodes:
        if any(v in reached for v in node.inputs):
            reached.update(node.outputs)
            behind.add(node)
    for node in reversed(nodes):
        if any(o in needed for o in node.outputs):
            needed.update(v for v in node.inputs if v is not None)
            if node in behind:
                yield node

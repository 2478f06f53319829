"""drop-zero-bias: remove a bias of zeros."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphopt.contract import Change, Context, Effect, Pass
from graphopt.operators import all_graphs, is_onnx, opset_of
from graphopt.rewriting import constant_tensor

BIAS = 2
GEMM_WITHOUT_BIAS_OPSET = 11
LARGEST_BIAS_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class DropZeroBias(Pass):
    """Remove the bias of a Conv, ConvTranspose or Gemm where it is zero, also a computed one.

    PyTorch's exporter writes `Expand(0.0, [channels])` for a convolution without bias, and that
    keeps a BatchNormalization after it from being folded. x + 0 = x, but for the sign of a zero:
    -0.0 + 0.0 = 0.0.
    """

    name: ClassVar[str] = "drop-zero-bias"
    effect: ClassVar[Effect] = Effect.ROUNDING

    def apply(self, model: ir.Model, context: Context) -> Change:
        """Disconnect every bias that is zero for certain."""
        change = Change()
        opset = opset_of(model)
        optional = ["Conv", "ConvTranspose"]
        if opset >= GEMM_WITHOUT_BIAS_OPSET:
            optional.append("Gemm")
        for graph in all_graphs(model):
            for node in graph:
                if (
                    is_onnx(node, *optional)
                    and len(node.inputs) > BIAS
                    and _is_zero(node.inputs[BIAS])
                ):
                    node.resize_inputs(BIAS)
                    change.count(f"zero bias of {node.op_type} dropped")
        return change


def _is_zero(value: ir.Value | None) -> bool:
    if value is None:
        return False
    node = value.producer()
    if node is not None and is_onnx(node, "Expand"):
        return _is_zero(node.inputs[0])
    if node is not None and is_onnx(node, "ConstantOfShape"):
        filler = node.attributes.get("value")
        return filler is None or not filler.as_tensor().numpy().any()
    tensor = constant_tensor(value)
    if tensor is None or tensor.size > LARGEST_BIAS_ELEMENTS:
        return False
    return not tensor.numpy().any()

"""drop-zero-bias: remove a bias, and an initial state, of zeros."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphopt.contract import Change, Context, Effect, Pass
from graphopt.operators import is_onnx, opset_of
from graphopt.rewriting import constant_tensor

GEMM_WITHOUT_BIAS_OPSET = 11
LARGEST_BIAS_ELEMENTS = 1 << 20

OPTIONAL = {
    "Conv": {2: "bias"},
    "ConvTranspose": {2: "bias"},
    "GRU": {3: "bias", 5: "initial state"},
    "Gemm": {2: "bias"},
    "LSTM": {3: "bias", 5: "initial state", 6: "initial state"},
    "RNN": {3: "bias", 5: "initial state"},
}
"""Inputs that stand for zeros where they are left out, by operator."""


@dataclass(frozen=True)
class DropZeroBias(Pass):
    """Remove a bias or initial state that is zero, also a computed one.

    That is the bias of Conv, ConvTranspose, Gemm, LSTM, GRU and RNN, and the initial state of the
    last three, which PyTorch's exporter computes from the batch. It also writes
    `Expand(0.0, [channels])` for a convolution without bias, and that keeps a BatchNormalization
    after it from being folded. x + 0 = x, but for the sign of a zero: -0.0 + 0.0 = 0.0.
    """

    name: ClassVar[str] = "drop-zero-bias"
    effect: ClassVar[Effect] = Effect.ROUNDING
    operators: ClassVar[frozenset[str] | None] = frozenset(OPTIONAL)

    def apply(self, model: ir.Model, context: Context) -> Change:
        """Disconnect every such input that is zero for certain."""
        change = Change()
        opset = opset_of(model)
        for node in context.index_of(model).of(*OPTIONAL):
            if node.op_type != "Gemm" or opset >= GEMM_WITHOUT_BIAS_OPSET:
                _drop(node, change)
        return change


def _drop(node: ir.Node, change: Change) -> None:
    for index, what in OPTIONAL[node.op_type].items():
        if index < len(node.inputs) and _is_zero(node.inputs[index]):
            node.replace_input_with(index, None)
            change.count(f"zero {what} of {node.op_type} dropped")
    count = len(node.inputs)
    while count and node.inputs[count - 1] is None:
        count -= 1
    node.resize_inputs(count)


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

"""fuse-bias: fold the addition of a constant per channel into the bias before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphopt.contract import Change, Context, Effect, Pass
from graphopt.operators import is_onnx
from graphopt_passes.fuse.affine import (
    Affine,
    Linear,
    constant_array,
    finite,
    fold_readers,
    linear_operand,
    other_operand,
    per_channel,
)
from graphopt_passes.fuse.misfit import Misfit


@dataclass(frozen=True)
class FuseBias(Pass):
    """Fold x + c, c + x and x - c into the bias of the Conv, ConvTranspose or Gemm that made x.

    The constant must be one number, or one per output channel: (W·a + b) + c = W·a + (b + c). The
    weight is not read, so it may be packed, shared or computed.
    """

    name: ClassVar[str] = "fuse-bias"
    effect: ClassVar[Effect] = Effect.ROUNDING
    operators: ClassVar[frozenset[str] | None] = frozenset({"Add", "Sub"})

    def apply(self, model: ir.Model, context: Context) -> Change:
        """Fold in float64 and round once to the weight's type."""
        return fold_readers(model, ("Add", "Sub"), _operand, _affine, context)


def _operand(node: ir.Node) -> ir.Value | None:
    return linear_operand(node, "Conv", "ConvTranspose", "Gemm")


def _affine(node: ir.Node, linear: Linear) -> Affine:
    value, is_second = other_operand(node, linear)
    if is_onnx(node, "Sub") and not is_second:
        raise Misfit("it subtracts from the constant")
    array = finite(constant_array(value, "the constant"), "the constant")
    shift = per_channel(array, linear, "the constant")
    return Affine(shift=-shift if is_onnx(node, "Sub") else shift)

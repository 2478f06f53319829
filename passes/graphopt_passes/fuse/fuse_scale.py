"""fuse-scale: fold the multiplication with a constant per channel into the weight before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.contract import Change, Context, Effect, Pass
from graphopt.operators import is_onnx
from graphopt_passes.fuse.affine import (
    LINEAR,
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
class FuseScale(Pass):
    """Fold x * c, c * x and x / c into the Conv, ConvTranspose, Gemm or MatMul that made x.

    The constant must be one number, or one per output channel:
    (W·a + b) * c = (W * c)·a + b * c. Where it is zero or not finite, the product may be NaN with
    one side of that and not with the other, so those stay.
    """

    name: ClassVar[str] = "fuse-scale"
    effect: ClassVar[Effect] = Effect.ROUNDING
    operators: ClassVar[frozenset[str] | None] = frozenset({"Div", "Mul"})

    def apply(self, model: ir.Model, context: Context) -> Change:
        """Fold in float64 and round once to the weight's type."""
        return fold_readers(model, ("Mul", "Div"), _operand, _affine, context)


def _operand(node: ir.Node) -> ir.Value | None:
    return linear_operand(node, *LINEAR)


def _affine(node: ir.Node, linear: Linear) -> Affine:
    value, is_second = other_operand(node, linear)
    if is_onnx(node, "Div") and not is_second:
        raise Misfit("it divides the constant")
    array = finite(constant_array(value, "the constant"), "the constant")
    if not array.all():
        raise Misfit("the constant has a zero")
    scale = per_channel(array, linear, "the constant")
    if not is_onnx(node, "Div"):
        return Affine(scale=scale)
    with np.errstate(over="ignore"):
        return Affine(scale=finite(1 / scale, "one over the constant"))

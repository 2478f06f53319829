"""fuse-batchnorm: fold BatchNormalization into the linear node before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.contract import Change, Context, Effect, Pass
from graphopt_passes.fuse.affine import (
    Affine,
    Array,
    Linear,
    constant_array,
    finite,
    fold_readers,
)
from graphopt_passes.fuse.misfit import Misfit


@dataclass(frozen=True)
class FuseBatchnorm(Pass):
    """Fold BatchNormalization into the Conv, ConvTranspose, Gemm or MatMul before it.

    In inference the node computes, per channel,

        y = (x - mean) / sqrt(variance + epsilon) * gamma + beta
          = x * scale + (beta - mean * scale)      with scale = gamma / sqrt(variance + epsilon)

    which the weight and the bias of the node before it take over. A MatMul becomes a Gemm, for
    the bias.
    """

    name: ClassVar[str] = "fuse-batchnorm"
    effect: ClassVar[Effect] = Effect.ROUNDING
    operators: ClassVar[frozenset[str] | None] = frozenset({"BatchNormalization"})

    def apply(self, model: ir.Model, context: Context) -> Change:
        """Fold in float64 and round once to the weight's type."""
        return fold_readers(model, ("BatchNormalization",), _operand, _affine, context)


def _operand(node: ir.Node) -> ir.Value | None:
    return node.inputs[0]


def _affine(node: ir.Node, linear: Linear) -> Affine:
    if node.attributes.get_int("training_mode", 0):
        raise Misfit("it is in training mode")
    if len(node.outputs) > 1:
        # Up to opset 13 that alone means training mode; afterwards it is not valid without it.
        raise Misfit("it has more than one output, as in training mode")
    if linear.axis != 1:
        raise Misfit("its channels are not known to be those of the MatMul before it")
    gamma, beta, mean, variance = (
        _parameter(node, index, what, linear.channels)
        for index, what in enumerate(("scale", "bias", "mean", "variance"), start=1)
    )
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        scale = gamma / np.sqrt(variance + node.attributes.get_float("epsilon", 1e-5))
        shift = beta - mean * scale
    return Affine(finite(scale, "its scale"), finite(shift, "its shift"))


def _parameter(node: ir.Node, index: int, what: str, channels: int) -> Array:
    array = constant_array(node.inputs[index], f"its {what}")
    if array.shape != (channels,):
        raise Misfit(f"its {what} has shape {list(array.shape)} for {channels} channels")
    return array

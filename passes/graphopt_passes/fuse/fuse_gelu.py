"""fuse-gelu: one Gelu for what computes it with Erf or Tanh."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphopt.contract import Change, Context, Effect, Pass
from graphopt_passes.fuse.fusing import Fused, Rule, fuse_all
from graphopt_passes.fuse.misfit import Misfit
from graphopt_passes.fuse.pattern import Any, Either, Match, Number, Op, Pattern, Product

FIRST_OPSET = 20
"""Gelu is a standard operator from here on."""

CUBIC = 0.044715
SLOPE = math.sqrt(2 / math.pi)

X = Any("x")


def _gate(curve: Pattern) -> Pattern:
    """Half of x times one more than a curve."""
    return Either(
        Product(0.5, X, Op("Add", curve, Number(1.0))),
        Product(1.0, X, Op("Add", Product(0.5, curve), Number(0.5))),
    )


ERF = _gate(Op("Erf", Product(math.sqrt(0.5), X)))

TANH = _gate(
    Op(
        "Tanh",
        Either(
            Product(SLOPE, Op("Add", X, Product(CUBIC, X, X, X))),
            Product(SLOPE, X, Op("Add", Product(CUBIC, X, X), Number(1.0))),
            Product(1.0, X, Op("Add", Product(SLOPE * CUBIC, X, X), Number(SLOPE))),
        ),
    )
)


@dataclass(frozen=True)
class FuseGelu(Pass):
    """Compute Gelu by one node, where Erf or Tanh and their company compute it.

    In whatever order and grouping an exporter writes

        x * (1 + erf(x / sqrt(2))) / 2
        x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x³))) / 2

    onnxruntime does the first itself when it loads a model. The second becomes three times as
    fast; but in float16 onnxruntime takes Gelu apart again, so that there the second stays.
    """

    name: ClassVar[str] = "fuse-gelu"
    effect: ClassVar[Effect] = Effect.ROUNDING
    operators: ClassVar[frozenset[str] | None] = frozenset({"Erf", "Tanh"})

    def apply(self, model: ir.Model, context: Context) -> Change:
        """Fuse wherever the values in between are read by nothing else."""
        return fuse_all(
            model, context, FIRST_OPSET, Rule(ERF, "Erf", _by_erf), Rule(TANH, "Tanh", _by_tanh)
        )


def _by_erf(match: Match) -> Fused:
    match.check_elementwise(ir.DataType.FLOAT, ir.DataType.FLOAT16)
    return Fused("Gelu", [match["x"]])


def _by_tanh(match: Match) -> Fused:
    if match["x"].dtype == ir.DataType.FLOAT16:
        raise Misfit("onnxruntime takes Gelu of float16 apart")
    match.check_elementwise(ir.DataType.FLOAT, ir.DataType.DOUBLE)
    return Fused("Gelu", [match["x"]], {"approximate": "tanh"})

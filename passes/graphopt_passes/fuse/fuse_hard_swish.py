"""fuse-hard-swish: one HardSwish or HardSigmoid for what computes it with Clip."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import onnx_ir as ir

from graphopt.contract import Change, Context, Effect, Pass
from graphopt_passes.fuse.affine import PRECISION
from graphopt_passes.fuse.fusing import Fused, Rule, fuse_all
from graphopt_passes.fuse.misfit import Misfit
from graphopt_passes.fuse.pattern import Any, Either, Match, Number, Op, Pattern, Product

FIRST_OPSET = 14
"""HardSwish is a standard operator from here on; and Clip takes its bounds as inputs."""

ALPHA, BETA = 1 / 6, 0.5
"""HardSwish is x * HardSigmoid(x) with these."""

X = Any("x")


def _clipped(value: Pattern) -> Pattern:
    """The value between 0 and a number."""
    return Either(
        Op("Clip", value, Number(0.0), Number("high")),
        Op("Min", Op("Max", value, Number(0.0)), Number("high")),
        Op("Min", Op("Relu", value), Number("high")),
    )


SWISH = Product("scale", X, _clipped(Op("Add", X, Number(3.0))))
SWISH_BY_SIGMOID = Product(1.0, X, Op("HardSigmoid", X, name="sigmoid"))
SIGMOID = Product("scale", _clipped(Op("Add", Op("Mul", X, Number("slope")), Number("shift"))))
SIGMOID_BY_DIVISION = Product(
    "scale", _clipped(Op("Add", Op("Div", X, Number("divisor")), Number("shift")))
)
SIGMOID_OF_SUM = Product("scale", _clipped(Op("Add", X, Number("shift"))))


@dataclass(frozen=True)
class FuseHardSwish(Pass):
    """Compute HardSwish and HardSigmoid by one node, where Clip and its company compute them.

    In whatever order and grouping an exporter writes

        HardSwish(x) = x * clip(x + 3, 0, 6) / 6
        HardSigmoid(x) = clip(alpha * x + beta, 0, 1) = s * clip(a * x + b, 0, 1 / s)

    onnxruntime runs HardSwish as HardSigmoid and Mul, in half the time of four nodes.
    """

    name: ClassVar[str] = "fuse-hard-swish"
    effect: ClassVar[Effect] = Effect.ROUNDING
    operators: ClassVar[frozenset[str] | None] = frozenset({"Clip", "HardSigmoid", "Min"})

    def apply(self, model: ir.Model, context: Context) -> Change:
        """Fuse wherever the values in between are read by nothing else."""
        return fuse_all(
            model,
            context,
            FIRST_OPSET,
            Rule(SWISH, "Clip|Min", _swish),
            Rule(SWISH_BY_SIGMOID, "HardSigmoid", _swish_by_sigmoid),
            Rule(SIGMOID, "Clip|Min", _sigmoid),
            Rule(SIGMOID_BY_DIVISION, "Clip|Min", _sigmoid),
            Rule(SIGMOID_OF_SUM, "Clip|Min", _sigmoid),
        )


def _swish(match: Match) -> Fused:
    _check_kernel(match)
    scale, high = match.numbers["scale"], match.numbers["high"]
    if high != 6 or not match.is_close(scale, ALPHA):
        raise Misfit(f"x * clip(x + 3, 0, {high:g}) * {scale:g} is not HardSwish")
    return Fused("HardSwish", [match["x"]])


def _swish_by_sigmoid(match: Match) -> Fused:
    _check_kernel(match)
    attributes = match.named["sigmoid"].attributes
    alpha, beta = attributes.get_float("alpha", 0.2), attributes.get_float("beta", 0.5)
    dtype = match["x"].dtype
    assert dtype is not None
    stated = replace(match, precision=PRECISION[dtype])
    if not stated.is_close(alpha, ALPHA) or not stated.is_close(beta, BETA):
        raise Misfit(f"its HardSigmoid has alpha {alpha:g} and beta {beta:g}")
    return Fused("HardSwish", [match["x"]])


def _sigmoid(match: Match) -> Fused:
    _check_kernel(match)
    scale, high, shift = (match.numbers[name] for name in ("scale", "high", "shift"))
    if not match.is_close(scale * high, 1.0):
        raise Misfit(f"it is clipped to {scale * high:g}, not to 1")
    slope = match.numbers.get("slope", 1.0) / match.numbers.get("divisor", 1.0)
    return Fused("HardSigmoid", [match["x"]], {"alpha": scale * slope, "beta": scale * shift})


def _check_kernel(match: Match) -> None:
    # onnxruntime has no HardSigmoid of float64.
    match.check_elementwise(ir.DataType.FLOAT, ir.DataType.FLOAT16)

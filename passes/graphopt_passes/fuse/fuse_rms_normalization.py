"""fuse-rms-normalization: one RMSNormalization for mean square, division and scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphopt.contract import Change, Context, Effect, Pass
from graphopt_passes.fuse.fusing import Fused, Rule, fuse_all
from graphopt_passes.fuse.normalization import (
    SCALE,
    cast,
    check_types,
    epsilon,
    inverse_root,
    last_axes,
    parameter,
)
from graphopt_passes.fuse.pattern import Any, Match, Op, Product

FIRST_OPSET = 23
"""RMSNormalization is a standard operator from here on."""

X = Any("x")
WIDE = cast(X, "up")

NORMAL = Product(1.0, X, inverse_root(X))
SCALED = Product(1.0, X, inverse_root(X), SCALE)
HALF = cast(Product(1.0, WIDE, inverse_root(WIDE)), "down")

PATTERNS = (SCALED, Op("Mul", HALF, SCALE), NORMAL, HALF)


@dataclass(frozen=True)
class FuseRmsNormalization(Pass):
    """Compute RMSNormalization by one node, where ReduceMean and its company compute it.

    Over the last axes, also in float32 between two Cast of a float16 model:

        x / sqrt(mean(x²) + epsilon) * scale

    Without a scale, one of ones is stored. Up to five times as fast where the nodes multiply with
    a reciprocal, as they do for Llama; a division onnxruntime fuses itself when it loads a model.
    """

    name: ClassVar[str] = "fuse-rms-normalization"
    effect: ClassVar[Effect] = Effect.ROUNDING
    operators: ClassVar[frozenset[str] | None] = frozenset({"Sqrt"})

    def apply(self, model: ir.Model, context: Context) -> Change:
        """Fuse wherever the values in between are read by nothing else."""
        return fuse_all(
            model, context, FIRST_OPSET, *(Rule(pattern, "Sqrt", _fused) for pattern in PATTERNS)
        )


def _fused(match: Match) -> Fused:
    check_types(match)
    sizes = last_axes(match, "square")
    scale = parameter(match.values.get("scale"), match, sizes, "scale")
    attributes = {"axis": -len(sizes), "epsilon": epsilon(match)}
    return Fused("RMSNormalization", [match["x"], scale], attributes)

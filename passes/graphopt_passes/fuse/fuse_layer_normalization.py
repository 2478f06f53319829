"""fuse-layer-normalization: one LayerNormalization for mean, variance, division, scale and bias."""

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
    mean,
    parameter,
)
from graphopt_passes.fuse.pattern import Any, Match, Op, Pattern, Product

FIRST_OPSET = 17
"""LayerNormalization is a standard operator from here on."""

X, BIAS = Any("x"), Any("bias")


def _patterns(x: Pattern) -> tuple[Pattern, Pattern, Pattern, Pattern]:
    """What is normalized; and scaled; and both again as TensorFlow writes them.

    It folds the mean into the bias: x * (r * scale) + (bias - mean * (r * scale)), where r is one
    over the root.
    """
    average = mean(x, "mean")
    centred = Op("Sub", x, average)
    r = inverse_root(centred)
    folded = Op("Add", Product(1.0, x, r, SCALE), Op("Sub", BIAS, Product(1.0, average, r, SCALE)))
    unscaled = Op("Add", Product(1.0, x, r), Op("Sub", BIAS, Product(1.0, average, r)))
    return Product(1.0, centred, r), Product(1.0, centred, r, SCALE), folded, unscaled


NORMAL, SCALED, FOLDED, FOLDED_UNSCALED = _patterns(X)
HALF = cast(_patterns(cast(X, "up"))[0], "down")
HALF_SCALED = Op("Mul", HALF, SCALE)

PATTERNS = (
    FOLDED,
    FOLDED_UNSCALED,
    Op("Add", SCALED, BIAS),
    Op("Add", HALF_SCALED, BIAS),
    Op("Add", NORMAL, BIAS),
    SCALED,
    HALF_SCALED,
    NORMAL,
    HALF,
)


@dataclass(frozen=True)
class FuseLayerNormalization(Pass):
    """Compute LayerNormalization by one node, where ReduceMean and its company compute it.

    Over the last axes, in the ways of PyTorch, TensorFlow and Keras, also in float32 between two
    Cast of a float16 model:

        (x - mean(x)) / sqrt(mean((x - mean(x))²) + epsilon) * scale + bias

    Without a scale, one of ones is stored. It is up to three times as fast where onnxruntime does
    not do the same when it loads a model: for TensorFlow's order, and without a scale.
    """

    name: ClassVar[str] = "fuse-layer-normalization"
    effect: ClassVar[Effect] = Effect.ROUNDING
    operators: ClassVar[frozenset[str] | None] = frozenset({"Sqrt"})

    def apply(self, model: ir.Model, context: Context) -> Change:
        """Fuse wherever the values in between are read by nothing else."""
        return fuse_all(
            model, context, FIRST_OPSET, *(Rule(pattern, "Sqrt", _fused) for pattern in PATTERNS)
        )


def _fused(match: Match) -> Fused:
    check_types(match)
    sizes = last_axes(match, "mean", "square")
    inputs = [match["x"], parameter(match.values.get("scale"), match, sizes, "scale")]
    if "bias" in match.values:
        inputs.append(parameter(match["bias"], match, sizes, "bias"))
    attributes = {"axis": -len(sizes), "epsilon": epsilon(match)}
    return Fused("LayerNormalization", inputs, attributes)

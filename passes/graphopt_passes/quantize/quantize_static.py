"""quantize-static: let Conv, Gemm, MatMul and what lies between them work on 8-bit integers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import onnx_ir as ir

from graphopt.contract import Bounds, Change, Context, Effect, Pass
from graphopt.operators import opset_of
from graphopt_passes.quantize.choice import Choice
from graphopt_passes.quantize.units import units_of
from graphopt_passes.share.zeros import unpacked_zeros

FIRST_OPSET = 13
"""DequantizeLinear has one scale for each channel from here on."""


ERROR_MINIMUM = 0.001


@dataclass(frozen=True)
class QuantizeStatic(Pass):
    """Write QuantizeLinear and DequantizeLinear where onnxruntime makes integer kernels of them.

    Weights become int8 with a scale for each output channel, activations uint8 with a range from
    samples, biases int32. Activations stay in codes from one product to the next. Layers stay float
    where integers would be slower, and where they would cost more accuracy than `error` allows.
    Where the graph rounds activations to uint8 already, as training leaves it, they keep the scales
    and zero points that they have, and the layers that read them work on integers.

    Attributes:
        error: relative L2 error of the worst output, on the calibration samples, to keep within.
    """

    error: Annotated[float, Bounds(ERROR_MINIMUM, 1.0)] = 0.1

    name: ClassVar[str] = "quantize-static"
    effect: ClassVar[Effect] = Effect.LOSSY
    operators: ClassVar[frozenset[str] | None] = frozenset({"Conv", "Gemm", "MatMul"})
    needs_samples: ClassVar[bool] = True
    max_error: ClassVar[float] = 0.15
    max_latency: ClassVar[float | None] = 0.95

    def refuse(self, model: ir.Model, context: Context) -> str | None:
        """An old opset has no scales by channel."""
        opset = opset_of(model)
        if opset < FIRST_OPSET:
            return f"opset {opset} has no scales by channel; raise it to {FIRST_OPSET} or more"
        return None

    def narrow(self) -> QuantizeStatic | None:
        """Aim at half the error, so that more layers stay float."""
        halved = self.error / 2
        return QuantizeStatic(halved) if halved >= ERROR_MINIMUM else None

    def apply(self, model: ir.Model, context: Context) -> Change:
        """Choose layers, ranges and roundings, then rewrite the main graph."""
        with unpacked_zeros(model, context):
            return self._applied(model, context)

    def _applied(self, model: ir.Model, context: Context) -> Change:
        change = Change()
        units = list(units_of(model.graph, change.skip).values())
        if not any(unit.kind == "product" for unit in units):
            return change
        choice = Choice(model, context, units)
        chosen, reasons = choice.within(self.error)
        for unit, reason in reasons.items():
            change.skip(unit.node, reason)
        for unit in chosen:
            what = unit.node.op_type if unit.map is None else "trained rounding"
            change.count(f"{what} on 8-bit integers")
        choice.write(model, chosen)
        return change

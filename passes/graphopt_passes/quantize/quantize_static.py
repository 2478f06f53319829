"""quantize-static: let Conv, Gemm, MatMul and what lies between them work on 8-bit integers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import onnx_ir as ir

from graphopt.contract import Bounds, Change, Context, Effect, Pass
from graphopt.operators import opset_of
from graphopt.rewriting import input_of
from graphopt_passes.quantize.choice import PRICE, Choice
from graphopt_passes.quantize.each import skip_others
from graphopt_passes.quantize.units import Unit, units_of
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
        price: what all squared error together is worth, in times of the whole model: what costs
            more error than it saves time stays float. 0 is the fastest within `error`.
        keep: names of weights whose products stay float.
        only: names of weights whose products alone work on codes, whatever they cost in time or in
            error.
    """

    error: Annotated[float, Bounds(ERROR_MINIMUM, 1.0)] = 0.1
    price: Annotated[float, Bounds(0.0, 100.0)] = PRICE
    keep: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

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
        return replace(self, error=halved) if halved >= ERROR_MINIMUM else None

    def apply(self, model: ir.Model, context: Context) -> Change:
        """Choose layers, ranges and roundings, then rewrite the main graph."""
        with unpacked_zeros(model, context):
            return self._applied(model, context)

    def _applied(self, model: ir.Model, context: Context) -> Change:
        change = Change()
        units = list(units_of(model.graph, change.skip).values())
        weights = {name: unit for unit in units if (name := weight_name(unit)) is not None}
        if not weights:
            return change
        skip_others(dict.fromkeys((*self.keep, *self.only)), list(weights), change)
        if self.only:
            alone = [unit for name, unit in weights.items() if name in self.only]
            return self._on_codes(alone, Choice(model, context, alone), change)
        units = [unit for unit in units if weight_name(unit) not in self.keep]
        choice = Choice(model, context, units)
        chosen, reasons = choice.within(self.error, self.price)
        for unit, reason in reasons.items():
            change.skip(unit.node, reason)
        return self._on_codes(chosen, choice, change)

    def _on_codes(self, chosen: Sequence[Unit], choice: Choice, change: Change) -> Change:
        for unit in chosen:
            what = unit.node.op_type if unit.map is None else "trained rounding"
            change.count(f"{what} on 8-bit integers")
        choice.write(choice.model, chosen)
        return change


def weight_name(unit: Unit) -> str | None:
    """The name of the weight of a product; None for other units."""
    weight = input_of(unit.node, 1)
    return None if unit.kind != "product" or weight is None else weight.name

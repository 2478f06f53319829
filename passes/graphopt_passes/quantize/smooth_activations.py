"""smooth-activations: move large channels of normalized activations into the weights after them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphopt.contract import Change, Context, Effect, Pass
from graphopt_passes.quantize.balancing import balance
from graphopt_passes.quantize.flows import Order
from graphopt_passes.quantize.sources import products_of, scales_of
from graphopt_passes.quantize.stretches import stretches_of, why_no_factors


@dataclass(frozen=True)
class SmoothActivations(Pass):
    """Divide the channels of a normalization by factors, and multiply the weights that read them.

    SmoothQuant (Xiao et al. 2022): a few channels of a transformer's activations are far larger
    than the rest and take the codes from them, while weights are even. The factors are folded into
    scale and shift of LayerNormalization or RMSNormalization, into a constant that is
    multiplied, or, where the product of two branches is read, into the layer that makes one of
    them. The exponent is chosen by what rounding costs on the samples, over all layers that read
    the channels together, and they stay where less than a tenth of that would go.
    """

    name: ClassVar[str] = "smooth-activations"
    effect: ClassVar[Effect] = Effect.ROUNDING
    needs_samples: ClassVar[bool] = True

    def refuse(self, model: ir.Model, context: Context) -> str | None:
        """Without samples there is nothing to choose by."""
        return why_no_factors(model, context)

    def apply(self, model: ir.Model, context: Context) -> Change:
        """In the main graph, which can be observed."""
        change = Change()
        order = Order(model.graph)
        stretches = stretches_of(scales_of(order), order, change)
        branches = stretches_of(products_of(order), order, Change())
        stretches += [s for s in branches if s.flow.multiplied]
        balance(model, stretches, "smoothed", context, change)
        return change

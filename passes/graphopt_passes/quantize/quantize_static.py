"""quantize-static: let Conv, Gemm, MatMul and what lies between them work on 8-bit integers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphopt.contract import Change, Context, Effect, Pass
from graphopt.observe import Answers
from graphopt.operators import is_onnx, opset_of
from graphopt.rewriting import Names
from graphopt.statistics import Rows
from graphopt_passes.quantize.coding import Coding, drop_unread
from graphopt_passes.quantize.layers import Layer, layer_of
from graphopt_passes.quantize.parameters import choose_parameters, questions_on
from graphopt_passes.quantize.regions import chosen_units
from graphopt_passes.quantize.units import Unit, units_of
from graphopt_passes.quantize.weights import integer_layer

FIRST_OPSET = 13
"""DequantizeLinear has one scale for each channel from here on."""


@dataclass(frozen=True)
class QuantizeStatic(Pass):
    """Write QuantizeLinear and DequantizeLinear where onnxruntime makes integer kernels of them.

    Weights become int8 with a scale for each output channel, activations uint8 with a range from
    samples, biases int32. Activations stay in codes from one product to the next.
    """

    name: ClassVar[str] = "quantize-static"
    effect: ClassVar[Effect] = Effect.LOSSY
    operators: ClassVar[frozenset[str] | None] = frozenset({"Conv", "Gemm", "MatMul"})
    needs_samples: ClassVar[bool] = True
    max_error: ClassVar[float] = 0.15

    def refuse(self, model: ir.Model, context: Context) -> str | None:
        """An old opset has no scales by channel."""
        opset = opset_of(model)
        if opset < FIRST_OPSET:
            return f"opset {opset} has no scales by channel; raise it to {FIRST_OPSET} or more"
        return None

    def apply(self, model: ir.Model, context: Context) -> Change:
        """Choose regions and parameters, then rewrite the main graph."""
        change = Change()
        graph = model.graph
        units = chosen_units(graph, units_of(graph, change.skip))
        if not units:
            return change
        answers = context.observe(model, questions_on(units))
        parameters = choose_parameters(units, answers)
        integers = {
            layer.node: integer_layer(layer, parameters.of(layer.source), _rows(answers, layer))
            for layer in (layer_of(u.node) for u in units if u.kind == "product")
        }
        coding = Coding(graph, Names(model), parameters, context.tensor, _float_outputs(units))
        for unit in units:
            if unit.kind == "product":
                coding.product(unit, layer_of(unit.node), integers[unit.node])
            elif unit.kind == "arithmetic" or unit.node in parameters.mixed:
                coding.arithmetic(unit)
            else:
                coding.movement(unit)
            change.count(f"{unit.node.op_type} on 8-bit integers")
        drop_unread(graph)
        return change


def _rows(answers: Answers, layer: Layer) -> Rows:
    found = answers[layer.ask("rows")]
    assert isinstance(found, Rows)
    return found


def _float_outputs(units: list[Unit]) -> frozenset[ir.Node]:
    """Gemm and MatMul whose outputs nothing reads as codes; onnxruntime fuses them as they are."""
    read = {s for unit in units for s in unit.sources}
    return frozenset(
        unit.node
        for unit in units
        if unit.kind == "product" and not is_onnx(unit.node, "Conv") and unit.outputs[0] not in read
    )

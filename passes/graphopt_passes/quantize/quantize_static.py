"""quantize-static: let Conv, Gemm, MatMul and what lies between them work on 8-bit integers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphopt.contract import Change, Context, Effect, Pass
from graphopt.observe import Answers, Question
from graphopt.operators import is_onnx, opset_of
from graphopt.rewriting import Names
from graphopt.statistics import Rows, Spread
from graphopt_passes.quantize.coding import Coding, drop_unread
from graphopt_passes.quantize.latency import Cost, other_cost, product_cost
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
        candidates = list(units_of(graph, change.skip).values())
        if not candidates:
            return change
        answers = context.observe(model, questions_on(candidates))
        sizes = Sizes(answers, len(list(context.samples)))
        units = chosen_units(candidates, sizes.costs(candidates), sizes.elements)
        _tell_of_floats(candidates, units, change)
        if not any(unit.kind == "product" for unit in units):
            return change
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


@dataclass(frozen=True)
class Sizes:
    """How large values are in a sample, on average.

    Attributes:
        answers: spreads of the values.
        samples: how many samples they are of.
    """

    answers: Answers
    samples: int

    def elements(self, value: ir.Value) -> float:
        """Elements of a value."""
        spread = self.answers[Question(value.name or "")]
        assert isinstance(spread, Spread)
        return (spread.count + spread.left_out) / max(self.samples, 1)

    def costs(self, units: Sequence[Unit]) -> dict[Unit, Cost]:
        """Costs of units."""
        return {unit: self._cost(unit) for unit in units}

    def _cost(self, unit: Unit) -> Cost:
        elements = sum(self.elements(o) for o in unit.outputs)
        if unit.kind == "product":
            return product_cost(layer_of(unit.node), elements)
        return other_cost(unit, elements)


def _tell_of_floats(candidates: Sequence[Unit], chosen: Sequence[Unit], change: Change) -> None:
    taken = {unit.node for unit in chosen}
    for unit in candidates:
        if unit.kind == "product" and unit.node not in taken:
            change.skip(unit.node, "integers would be slower: its kernel, or what lies around it")


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

"""Which units work on codes: as many as are faster so, as long as the outputs stay close.

What a layer adds to the error of the outputs is measured with that layer alone on codes. Where all
of them together are over the error allowed, a price is put on squared error, in nanoseconds, and
the minimum cut is taken again with it: the higher the price, the more layers stay float, and next
to each other where a float island would cost more than it saves. The lowest price that serves is
looked for. Errors of layers add up well enough for that, and the result is measured as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import onnx_ir as ir

from graphopt.contract import Context
from graphopt.observe import Answers, Question
from graphopt.statistics import Gram, Rows, Spread
from graphopt.validation import worst
from graphopt_passes.quantize.coding import write_codes
from graphopt_passes.quantize.latency import Cost, unit_cost
from graphopt_passes.quantize.layers import layer_of
from graphopt_passes.quantize.parameters import Parameters, choose_parameters, questions_on
from graphopt_passes.quantize.regions import chosen_units
from graphopt_passes.quantize.units import Unit, units_of
from graphopt_passes.quantize.weights import IntegerLayer, integer_layer

ALONE_SAMPLES, TOGETHER_SAMPLES = 4, 16
"""Samples on which the error of one layer, and of all together, is measured at most."""

PRICES = 7
"""How often the price of error is halved or doubled in search of the lowest that serves."""

SLOWER = "integers would be slower: its kernel, or the changes of form around it"
UNSEEN = "no sample has numbers where it reads or writes"
TOO_COARSE = "on integers it changes the outputs by {:.3g} alone; float to stay within the error"


@dataclass
class Choice:
    """The candidates of one model, and what is known of them.

    Attributes:
        model: not modified.
        context: of the run; it has samples.
        units: the candidates, in order.
    """

    model: ir.Model
    context: Context
    units: Sequence[Unit]
    _integers: dict[str, IntegerLayer] = field(default_factory=dict)

    @cached_property
    def answers(self) -> Answers:
        """What the values of the units are like."""
        return self.context.observe(self.model, questions_on(self.units))

    @cached_property
    def parameters(self) -> Parameters:
        """The maps of the values."""
        return choose_parameters(self.units, self.answers)

    @cached_property
    def costs(self) -> dict[Unit, Cost]:
        """What each unit costs."""
        never = Cost(0.0, math.inf)
        return {
            unit: unit_cost(unit, self.elements) if self._is_seen(unit) else never
            for unit in self.units
        }

    def elements(self, value: ir.Value) -> float:
        """How many elements a value has, in a sample on average."""
        spread = self.answers[Question(value.name or "")]
        assert isinstance(spread, Spread)
        return spread.elements / max(spread.arrays, 1)

    def _is_seen(self, unit: Unit) -> bool:
        spreads = [self.answers[Question(v.name or "")] for v in (*unit.sources, *unit.outputs)]
        return all(isinstance(spread, Spread) and spread.count for spread in spreads)

    # -------------------------------------------------------------- choosing

    def within(self, error: float) -> tuple[list[Unit], dict[Unit, str]]:
        """The units to work on codes, and why the products among the others do not.

        Args:
            error: relative L2 error of the worst output that is allowed.
        """
        fastest = self._cut({})
        others = [u for u in self.units if u.kind == "product" and u not in fastest]
        slower = {u: SLOWER if self._is_seen(u) else UNSEEN for u in others}
        if not any(unit.kind == "product" for unit in fastest):
            return [], slower
        if self._error(fastest, TOGETHER_SAMPLES) <= error:
            return fastest, slower
        alone = self._errors_alone(fastest)
        chosen = self._cheapest_within(error, {u: e * e for u, e in alone.items()})
        coarse = {u: TOO_COARSE.format(alone[u]) for u in alone if u not in chosen}
        return chosen, {**slower, **coarse}

    def _cut(self, prices_ns: Mapping[Unit, float]) -> list[Unit]:
        costs = {
            unit: Cost(cost.floats_ns, cost.codes_ns + prices_ns.get(unit, 0.0))
            for unit, cost in self.costs.items()
        }
        return chosen_units(self.units, costs, self.elements)

    def _cheapest_within(self, error: float, squares: Mapping[Unit, float]) -> list[Unit]:
        """The choice at the lowest price of squared error that keeps the outputs close."""
        total_ns = sum(cost.floats_ns for cost in self.costs.values())
        # At this price the allowed error costs as much as the whole model.
        middle = total_ns / max(error * error, 1e-12)
        low, high, best = middle / 2**PRICES, middle * 2**PRICES, list[Unit]()
        for _ in range(PRICES):
            price = (low * high) ** 0.5
            chosen = self._cut({unit: price * square for unit, square in squares.items()})
            has_product = any(unit.kind == "product" for unit in chosen)
            if not has_product or self._error(chosen, TOGETHER_SAMPLES) <= error:
                best, high = chosen if has_product else best, price
            else:
                low = price
        return best

    # -------------------------------------------------------------- measuring

    def _errors_alone(self, units: Iterable[Unit]) -> dict[Unit, float]:
        """The error of the worst output with one product on codes, for each."""
        products = [unit for unit in units if unit.kind == "product"]
        found = {}
        for number, unit in enumerate(products):
            self.context.progress(f"measuring layer {number + 1} of {len(products)}")
            found[unit] = self._error([unit], ALONE_SAMPLES)
        return found

    def _error(self, units: Sequence[Unit], samples: int) -> float:
        candidate = self.model.clone()
        # What is only tried goes to no file.
        self.write(candidate, units, replace(self.context, scratch=None))
        return worst(self.context.compare(self.model, candidate, samples))

    def write(self, model: ir.Model, units: Sequence[Unit], context: Context | None = None) -> None:
        """Let these units work on codes.

        Args:
            model: the model itself or a clone of it; rewritten in place.
            units: of the model itself.
            context: that makes the tensors; by default that of the run.
        """
        names = {unit.node.outputs[0].name for unit in units}
        there = units if model is self.model else units_of(model.graph, lambda *_: None).values()
        chosen = [unit for unit in there if unit.node.outputs[0].name in names]
        integers = {
            u.node.outputs[0].name or "": self._integer_layer(u)
            for u in units
            if u.kind == "product"
        }
        tensor = (context or self.context).tensor
        write_codes(model, chosen, self.parameters, integers, tensor)

    def _integer_layer(self, unit: Unit) -> IntegerLayer:
        name = unit.node.outputs[0].name or ""
        if name not in self._integers:
            layer = layer_of(unit.node)
            rows = self.answers[layer.ask("rows")]
            gram = self.answers[layer.ask("gram")] if layer.has_gram else Gram()
            assert isinstance(rows, Rows) and isinstance(gram, Gram)
            source = self.parameters.of(layer.source)
            self._integers[name] = integer_layer(layer, source, rows, gram)
        return self._integers[name]

"""Which units work on codes: as many as are faster so, as long as the outputs stay close.

What rounding a value to codes adds to the error of the outputs is measured with that value alone
rounded. A price is put on squared error, in nanoseconds, and the minimum cut is taken with it: the
higher the price, the more layers stay float, and next to each other where a float island would cost
more than it saves. The price is never zero: what is more exact as floats, and hardly slower, stays
so. It is low where the model decides between classes and few of its decisions are expected to
change. Where all together are over the error allowed, the lowest price that serves is looked for.
Errors of values add up well enough for that, and the result is measured as a whole.

What was trained on codes, as a rounding before it tells, works on codes in any case: that is what
its weights have learnt, and onnxruntime would otherwise round them in its own way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import onnx_ir as ir

from graphopt.contract import Context
from graphopt.observe import Answers, Question
from graphopt.statistics import Gram, Rows, Spread
from graphopt.validation import OutputError, worst
from graphopt_passes.quantize.coding import write_codes, write_rounding
from graphopt_passes.quantize.decisions import expected_changes, scores_asked
from graphopt_passes.quantize.latency import Cost, unit_cost
from graphopt_passes.quantize.layers import layer_of
from graphopt_passes.quantize.parameters import Parameters, choose_parameters, questions_on
from graphopt_passes.quantize.regions import chosen_units
from graphopt_passes.quantize.units import Unit, can_make_floats, units_of
from graphopt_passes.quantize.weights import IntegerLayer, integer_layer

ALONE_SAMPLES, TOGETHER_SAMPLES = 4, 16
"""Samples on which the error of one value, and of all together, is measured at most."""

PRICES = 7
"""How many prices of error are tried, and how often the lowest of them is doubled at most."""

PRICE = 0.2
"""Of all squared error, in times of the whole model: what it is worth even within the error.

At this price a tenth of the squared error of the fastest choice is worth a fiftieth of the time.
Without one, two classifiers of images and a detector left the limits of their metrics.
"""

PRICE_MINIMUM = 1e-4
"""At which hardly a nanosecond is given for exactness."""

LOW_PRICES = (0.03, 0.065, 0.14)
"""What it is worth where the model decides between classes, and few decisions change."""

CHANGES_MAXIMUM = 0.0225
"""Few: the share that is expected to change."""

Compare = Callable[[ir.Model], tuple[OutputError, ...]]

SLOWER = "integers would be slower: its kernel, or the changes of form around it"
UNSEEN = "no sample has numbers where it reads or writes"
TOO_COARSE = "rounding what it reads or makes changes the outputs by {:.3g}, for little time saved"


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
        return {unit: self._cost(unit) for unit in self.units}

    def _cost(self, unit: Unit) -> Cost:
        if not self._is_seen(unit):
            return Cost(0.0, math.inf)
        cost = unit_cost(unit, self.elements)
        trained = unit.kind == "product" and self.parameters.are_trained(unit.sources[0])
        return replace(cost, floats_ns=math.inf) if trained else cost

    def elements(self, value: ir.Value) -> float:
        """How many elements a value has, in a sample on average."""
        spread = self.answers[Question(value.name or "")]
        assert isinstance(spread, Spread)
        return spread.elements / max(spread.arrays, 1)

    def _is_seen(self, unit: Unit) -> bool:
        spreads = [self.answers[Question(v.name or "")] for v in (*unit.sources, *unit.outputs)]
        return all(isinstance(spread, Spread) and spread.count for spread in spreads)

    # -------------------------------------------------------------- choosing

    def within(
        self, error: float, least_price: float = PRICE
    ) -> tuple[list[Unit], dict[Unit, str]]:
        """The units to work on codes, and why the products among the others do not.

        Args:
            error: relative L2 error of the worst output that is allowed.
            least_price: what all squared error is worth even within it, in times of the model.
        """
        fastest = self._cut({})
        others = [u for u in self.units if u.kind == "product" and u not in fastest]
        slower = {u: SLOWER if self._is_seen(u) else UNSEEN for u in others}
        if not any(unit.kind == "product" for unit in fastest):
            return [], slower
        squares = self._squares(fastest)
        chosen = self._with_few_changes(error, squares) if least_price else []
        chosen = chosen or self._cheapest_within(error, squares, least_price)
        coarse = {
            unit: TOO_COARSE.format(max(squares.get(v, 0.0) for v in _values(unit)) ** 0.5)
            for unit in fastest
            if unit.kind == "product" and unit not in chosen
        }
        return chosen, {**slower, **coarse}

    def _cut(self, rounding_ns: Mapping[ir.Value, float]) -> list[Unit]:
        return chosen_units(self.units, self.costs, self.elements, rounding_ns)

    def _priced_cut(self, price: float, squares: Mapping[ir.Value, float]) -> list[Unit]:
        """The cheapest choice, if all squared error together costs so many times of the model."""
        seen = filter(self._is_seen, self.units)
        total_ns = sum(unit_cost(unit, self.elements).floats_ns for unit in seen)
        moved = {value for unit in self.units if unit.kind == "movement" for value in unit.outputs}
        whole = sum(s for value, s in squares.items() if value not in moved and math.isfinite(s))
        price_ns = price * total_ns / max(whole, 1e-12)
        return self._cut({value: price_ns * square for value, square in squares.items()})

    def _with_few_changes(self, error: float, squares: Mapping[ir.Value, float]) -> list[Unit]:
        """The choice at a low price where few decisions between classes change; none elsewhere."""
        scores = scores_asked(self.model)
        tried = list[Unit]()
        for price in LOW_PRICES if scores else ():
            chosen = self._priced_cut(price, squares)
            if chosen == tried:
                continue
            tried, candidate = chosen, self._tried(chosen)
            if worst(self._compare_together(candidate)) > error:
                continue
            changes = expected_changes(self.model, candidate, scores, self.context)
            if changes <= CHANGES_MAXIMUM:
                return chosen
        return []

    def _cheapest_within(
        self, error: float, squares: Mapping[ir.Value, float], least_price: float
    ) -> list[Unit]:
        """The choice at the lowest price, from the least on, that keeps the outputs close."""
        least = max(least_price, PRICE_MINIMUM)
        price, low, high, best = least, least, PRICE * 2**PRICES, list[Unit]()
        for _ in range(PRICES):
            chosen = self._priced_cut(price, squares)
            has_product = any(unit.kind == "product" for unit in chosen)
            if not has_product or worst(self._compare_together(self._tried(chosen))) <= error:
                best, high = chosen if has_product else best, price
                if high == low:
                    break
            else:
                low = price
            price = (low * high) ** 0.5
        return best

    # -------------------------------------------------------------- measuring

    @cached_property
    def _compare_alone(self) -> Compare:
        return self.context.against(self.model, ALONE_SAMPLES)

    @cached_property
    def _compare_together(self) -> Compare:
        return self.context.against(self.model, TOGETHER_SAMPLES)

    def _squares(self, units: Sequence[Unit]) -> dict[ir.Value, float]:
        """By how much rounding a value alone changes the worst output, squared.

        What movement makes has the error of what it moves, if it is rounded only then.
        """
        moves = [unit for unit in units if unit.kind == "movement"]
        makers = {output: unit for unit in moves for output in unit.outputs}
        rounded = [value for value in _rounded(units) if value not in makers]
        found = {}
        for number, value in enumerate(rounded):
            self.context.progress(f"measuring value {number + 1} of {len(rounded)}")
            found[value] = self._error_of_rounding(value) ** 2
        for value, unit in makers.items():
            found[value] = sum(found[source] for source in unit.sources)
        return found

    def _error_of_rounding(self, value: ir.Value) -> float:
        candidate = self.model.clone()
        tensor = replace(self.context, scratch=None).tensor
        write_rounding(candidate, value.name or "", self.parameters, tensor)
        return worst(self._compare_alone(candidate))

    def _tried(self, units: Sequence[Unit]) -> ir.Model:
        """A clone in which these work on codes; what is only tried goes to no file."""
        candidate = self.model.clone()
        self.write(candidate, units, replace(self.context, scratch=None))
        return candidate

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


def _rounded(units: Sequence[Unit]) -> list[ir.Value]:
    """The values that become codes where these units work on codes, each once."""
    read = [value for unit in units for value in unit.sources]
    made = [v for unit in units if not can_make_floats(unit) for v in unit.outputs]
    return list(dict.fromkeys((*read, *made)))


def _values(unit: Unit) -> tuple[ir.Value, ...]:
    """What a unit reads and makes as codes."""
    return (*unit.sources, *unit.outputs)

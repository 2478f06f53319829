"""Scale and zero point for every value that becomes codes, by what they do to the layers' outputs.

A value gets the range that clips nothing. Where layers read it, ranges that clip are tried on rows
of their inputs, sampled from the user's data, and the best is taken where it is far better, there
and over all numbers that were seen: the largest are in few rows, maybe in none of those. What a
rounding in the graph reads was trained with its map, and gets that one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.observe import Answers, Question
from graphopt.operators import is_onnx
from graphopt.statistics import Rows, Spread
from graphopt_passes.quantize.affine import Affine, affine_of
from graphopt_passes.quantize.layers import layer_of, products
from graphopt_passes.quantize.ranges import (
    PERCENTILES,
    Histogram,
    entropy,
    least_squares,
    min_max,
    percentile,
    quantization_error,
)
from graphopt_passes.quantize.regions import SameScale
from graphopt_passes.quantize.units import Unit

TRIED_ROWS = 256
"""Rows on which a candidate range is tried."""

CLIPPING_GAIN = 0.1
"""A range that clips must bring the squared error down to this share of that of one that does not,
both of the outputs of layers on a few rows and of all numbers that were seen.

The largest values are few, so that they count for little in a mean, but a model that looks for
something says by them that it found it: a face detector lost 4 points of F1 at a share of 0.5, and
none where nothing was clipped. What is left are true outliers.
"""

SHARED_WIDTH_MAXIMUM = 2.0
"""A value that others read too joins a Concat's range only where that is at most so much wider."""


@dataclass(frozen=True)
class Parameters:
    """The affine map of every value that becomes codes.

    Attributes:
        maps: by the name of the value.
        mixed: names of values that a Concat makes of inputs which keep maps of their own, or a
            rounding of what has another map.
        trained: names of values whose maps were trained.
    """

    maps: Mapping[str, Affine]
    mixed: frozenset[str]
    trained: frozenset[str]

    def of(self, value: ir.Value) -> Affine:
        """The map of a value."""
        return self.maps[value.name or ""]

    def are_trained(self, value: ir.Value) -> bool:
        """The codes of a value are those that it had in training."""
        return value.name in self.trained

    def passes_codes(self, unit: Unit) -> bool:
        """The unit takes codes and gives codes of the same map."""
        return unit.kind == "movement" and unit.outputs[0].name not in self.mixed


def questions_on(units: Sequence[Unit]) -> list[Question]:
    """What must be known of the model to choose parameters."""
    asked = [Question(v.name or "") for v in coded_values(units)]
    layers = [layer_of(u.node) for u in units if u.kind == "product"]
    asked += [layer.ask("rows") for layer in layers]
    return asked + [layer.ask("gram") for layer in layers if layer.has_gram]


def coded_values(units: Sequence[Unit]) -> list[ir.Value]:
    """The values that become codes, each once."""
    values: dict[ir.Value, None] = {}
    for unit in units:
        values.update(dict.fromkeys(unit.sources))
        values.update(dict.fromkeys(unit.outputs))
    return list(values)


def choose_parameters(units: Sequence[Unit], answers: Answers) -> Parameters:
    """Choose them.

    Args:
        units: what works on codes.
        answers: to `questions_on`.
    """
    limits = {o: u.limits for u in units for o in u.outputs}
    spreads = {v: _spread(answers, v) for v in coded_values(units)}
    same, mixed, trained = _shared(units, spreads)
    moves = [u for u in units if u.kind == "movement" and u.outputs[0].name not in mixed]
    moved = {o for u in moves for o in u.outputs}
    made: dict[ir.Value, list[ir.Value]] = defaultdict(list)
    readers: dict[ir.Value, list[Unit]] = defaultdict(list)
    for value in spreads:
        made[same.of(value)] += [] if value in moved else [value]
    for unit in units:
        if unit.kind == "product":
            readers[same.of(unit.sources[0])].append(unit)
    maps = {
        root: trained.get(root)
        or _best(_candidates(values, spreads, limits, bool(readers[root])), readers[root], answers)
        for root, values in made.items()
    }
    return Parameters(
        maps={v.name or "": maps[same.of(v)] for v in spreads},
        mixed=mixed,
        trained=frozenset(v.name or "" for v in spreads if same.of(v) in trained),
    )


def _spread(answers: Answers, value: ir.Value) -> Spread:
    found = answers[Question(value.name or "")]
    assert isinstance(found, Spread)
    return found


def _shared(
    units: Sequence[Unit], spreads: Mapping[ir.Value, Spread]
) -> tuple[SameScale, frozenset[str], dict[ir.Value, Affine]]:
    """Which values share a map, which movement does not pass codes on, and maps that were trained.

    The latter are those of sets, by the values that stand for them.
    """
    same = SameScale()
    mixed: set[str] = set()
    trained: dict[ir.Value, Affine] = {}
    for unit in units:
        if unit.kind != "movement":
            continue
        joined = (*unit.sources, *unit.outputs)
        own = set() if unit.map is None else {unit.map}
        maps = own | {trained[same.of(v)] for v in joined if same.of(v) in trained}
        shares = not is_onnx(unit.node, "Concat") or _can_share(unit, spreads)
        if len(maps) <= 1 and shares:
            same.join(unit.outputs[0], joined)
        else:
            mixed.add(unit.outputs[0].name or "")
            maps = own
        trained.update((same.of(unit.outputs[0]), one) for one in maps)
    return same, frozenset(mixed), trained


def _can_share(concat: Unit, spreads: Mapping[ir.Value, Spread]) -> bool:
    """No input loses much by taking the range of the output."""
    whole = _width(spreads[concat.outputs[0]])
    return all(
        len(value.uses()) == 1 or whole <= SHARED_WIDTH_MAXIMUM * _width(spreads[value])
        for value in concat.sources
    )


def _width(spread: Spread) -> float:
    return max(spread.high, 0.0) - min(spread.low, 0.0)


def _candidates(
    values: Sequence[ir.Value],
    spreads: Mapping[ir.Value, Spread],
    limits: Mapping[ir.Value, tuple[float, float]],
    are_read: bool,
) -> list[Affine]:
    """Maps for a set of values: for each method, one that covers its range for every value.

    The first clips nothing; others are far better than it over all that was seen. Where no layer
    reads the values, by which to choose, there are no others.
    """
    ranges: dict[str, tuple[float, float]] = {}
    for value in values:
        lowest, highest = limits.get(value, (-np.inf, np.inf))
        for method, (low, high) in _ranges(spreads[value], are_read).items():
            low, high = max(low, lowest), min(high, highest)
            old_low, old_high = ranges.get(method, (low, high))
            ranges[method] = min(low, old_low), max(high, old_high)
    whole, *clipping = dict.fromkeys(affine_of(low, high) for low, high in ranges.values())
    seen = [_histogram(spreads[value]) for value in values if spreads[value].count]
    most = CLIPPING_GAIN * _squared_error(whole, seen)
    return [whole, *(one for one in clipping if _squared_error(one, seen) <= most)]


def _squared_error(of: Affine, seen: Sequence[Histogram]) -> float:
    """The sum over all numbers that were seen."""
    return sum(
        float(histogram.counts.sum())
        * float(
            quantization_error(histogram.counts, histogram.edges, of.scale, of.zero_point, np.uint8)
        )
        for histogram in seen
    )


def _histogram(spread: Spread) -> Histogram:
    bins = spread.histogram
    return Histogram(bins.counts, bins.edges(), spread.low, spread.high)


def _ranges(spread: Spread, are_read: bool) -> dict[str, tuple[float, float]]:
    """Lowest and highest number to hold, by method; first the range that clips nothing."""
    if not spread.count:
        return {"min-max": (0.0, 0.0)}
    histogram = _histogram(spread)
    if not are_read:
        return {"min-max": min_max(histogram)}
    return {
        "min-max": min_max(histogram),
        "least squares": least_squares(histogram, np.uint8),
        **{f"percentile {p}": percentile(histogram, p) for p in PERCENTILES},
        "entropy": entropy(histogram),
    }


def _best(maps: Sequence[Affine], readers: Sequence[Unit], answers: Answers) -> Affine:
    """The map that changes the outputs of the layers least; the first where none reads it.

    Args:
        maps: candidates; the first clips nothing.
        readers: the layers that read the value.
        answers: with rows of their inputs.
    """
    layers = [layer_of(unit.node) for unit in readers]
    trials = []
    for layer in layers:
        rows = answers[layer.ask("rows")]
        assert isinstance(rows, Rows)
        if rows.values.size:
            few = rows.values[:, :TRIED_ROWS]
            matrix = layer.matrix().astype(np.float32)
            signal = float(np.square(products(few, matrix)).sum())
            trials.append((few, matrix, signal))
    if not trials or len(maps) == 1:
        return maps[0]

    def error(one: Affine) -> float:
        return sum(
            float(np.square(products(one.rounded(rows) - rows, matrix)).sum()) / max(signal, 1e-30)
            for rows, matrix, signal in trials
        )

    whole, *clipping = maps
    best = min(clipping, key=error)
    return best if error(best) < CLIPPING_GAIN * error(whole) else whole

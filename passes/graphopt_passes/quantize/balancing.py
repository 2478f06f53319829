"""Factors for channels that lose little when values and weights are rounded to 8 bits.

The codes of a value have one scale, those of a weight one for each output. A channel that is small
beside others has few codes for what it holds; divided by a small factor, it has more, and the
columns that read it are multiplied with the factor and get smaller in their rows. SmoothQuant
(Xiao et al. 2022) weighs one against the other by an exponent a,

    s[j] = max|X[j]|^a / max|W[:, j]|^(1-a)

which for a = 1/2 makes both maxima equal, as does Nagel et al. 2019 (Data-free quantization) with
the weights before a value in the place of the value. What the rounding costs is measured here, on
rows of the user's data, for each exponent and for leaving everything as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.contract import Change, Context
from graphopt.observe import Answers, Question
from graphopt.statistics import Rows, Spread
from graphopt_passes.quantize.affine import affine_of
from graphopt_passes.quantize.flows import Flow, Sink, Stop
from graphopt_passes.quantize.layers import products
from graphopt_passes.quantize.rescaling import Rescaling, by_input, column_maxima
from graphopt_passes.quantize.rounding import HIGH as CODE_MAXIMUM
from graphopt_passes.quantize.stretches import (
    FACTOR_MAXIMUM,
    FACTOR_MINIMUM,
    Stretch,
    rescale,
    why_too_few,
)

EXPONENTS = (0.3, 0.5, 0.7, 0.85, 1.0)

WORTHWHILE = 0.9
"""Factors are taken where they leave at most so much of the error."""

ROWS_TRIED = 256

LEAST = 1e-9
"""A squared error relative to the squared outputs: far below that of 8 bits."""


def balance(
    model: ir.Model, stretches: Sequence[Stretch], what: str, context: Context, change: Change
) -> None:
    """Divide the channels of each stretch by the factors that cost least, where that is worth it.

    Args:
        model: rewritten in place; the stretches are in its main graph.
        stretches: in order.
        what: was done, in the past tense, for the record.
        context: with samples.
        change: the record.
    """
    if not stretches:
        return
    answers = context.observe(model, [q for s in stretches for q in _questions(s)])
    rescale(
        model, stretches, lambda s, done: _best_factors(s, answers, done), what, context, change
    )


# ------------------------------------------------------------------ what is known of the values


def _questions(stretch: Stretch) -> list[Question]:
    asked = [_spread_of(stop) for stop in stretch.flow.stops]
    for sink in stretch.flow.sinks:
        asked += [sink.layer.ask("rows"), _spread_of(_input_of(sink))]
    return asked


def _input_of(sink: Sink) -> Stop:
    return Stop(sink.layer.source, sink.channels)


def _spread_of(stop: Stop) -> Question:
    return Question(stop.value.name or "", "spread", stop.channels.axis)


@dataclass(frozen=True, eq=False)
class Extent:
    """What channels are like at a place, as they are divided so far.

    Attributes:
        low: the smallest of each, float64.
        high: the largest of each.
        square: the mean of squares of each.
        origin: the channel of the source that each is, or `ELSEWHERE`.
    """

    low: np.ndarray
    high: np.ndarray
    square: np.ndarray
    origin: np.ndarray

    @property
    def size(self) -> np.ndarray:
        """The largest magnitude of each."""
        return np.asarray(np.maximum(np.abs(self.low), np.abs(self.high)))

    def range(self, factors: np.ndarray) -> tuple[float, float]:
        """From the smallest to the largest of all, when each is divided by a factor."""
        return float((self.low / factors).min()), float((self.high / factors).max())


def _extent(stop: Stop, answers: Answers, divided: np.ndarray) -> Extent | None:
    """The extent at a place; None where it was not observed, or masks lie there."""
    spread = answers[_spread_of(stop)]
    assert isinstance(spread, Spread)
    if spread.channel_low.shape != stop.channels.origin.shape:
        return None
    square = spread.channel_square / max(spread.channel_count, 1) / divided**2
    low, high = spread.channel_low / divided, spread.channel_high / divided
    return Extent(low, high, square, stop.channels.origin)


# ------------------------------------------------------------------ what rounding costs


class Trial:
    """A product on rows of its input, with and without rounding.

    Attributes:
        extent: of its input.
        columns: the largest weight that each input channel meets.
        least: an error that is nothing.
    """

    def __init__(self, sink: Sink, extent: Extent, rows: Rows, done: Rescaling) -> None:
        self._sink = sink
        self.extent = extent
        self._matrix = done.matrix(sink.layer)
        self.columns = column_maxima(sink.layer, self._matrix)
        divided = by_input(sink.layer, done.of_inputs(sink.layer), self._matrix)
        self._rows = np.asarray(rows.values[:, :ROWS_TRIED] / divided, np.float32)
        self._whole = products(self._rows, self._matrix.astype(np.float32))
        self.least = LEAST * float(np.square(self._whole, dtype=np.float64).sum())
        # Of each input, over the outputs: what reads one channel in several places adds up.
        energy = np.square(self._matrix).sum(axis=1)
        self._energy = energy.reshape(extent.low.size, -1).sum(axis=1) * self._rows.shape[1]

    @property
    def is_finite(self) -> bool:
        """The weights and what they make of the rows are numbers."""
        return bool(np.isfinite(self._matrix).all() and np.isfinite(self._whole).all())

    def error(self, factors: np.ndarray, stops: Sequence[Extent]) -> float:
        """The sum of squared errors of the outputs; that of their means is corrected by the bias.

        Args:
            factors: for each channel of the source.
            stops: where the channels are rounded on the way.
        """
        spread = self._sink.channels.spread(factors)
        wide = by_input(self._sink.layer, spread, self._matrix)
        affine = affine_of(*self.extent.range(spread))
        rounded = affine.rounded((self._rows / wide).astype(np.float32))
        changed = products(rounded, _rounded_rows(self._matrix * wide)) - self._whole
        changed -= changed.mean(axis=1, keepdims=True)
        total = float(np.square(changed, dtype=np.float64).sum())
        return total + self._noise(factors, stops) + self.least

    def _noise(self, factors: np.ndarray, stops: Sequence[Extent]) -> float:
        """Of rounding on the way: a twelfth of a squared step, as much larger as the channel is.

        Divided by its factor on the way and multiplied here, a channel has the noise of the step
        times its factor.
        """
        own = self._sink.channels.own
        origin, total = self._sink.channels.origin[own], 0.0
        for stop in stops:
            seen = stop.origin >= 0
            low, high = stop.low[seen], stop.high[seen]
            there = factors[stop.origin[seen]]
            step = (max(0.0, (high / there).max()) - min(0.0, (low / there).min())) / 255
            squares = np.zeros(factors.size)
            squares[stop.origin[seen]] = stop.square[seen]
            growth = _ratio(self.extent.square[own], squares[origin])
            total += step**2 / 12 * float((self._energy[own] * growth * factors[origin] ** 2).sum())
        return total


def _rounded_rows(matrix: np.ndarray) -> np.ndarray:
    """A matrix as it comes back from codes with one scale for each output, float32."""
    scales = np.abs(matrix).max(axis=2, keepdims=True) / CODE_MAXIMUM
    scales[scales == 0] = 1
    return np.asarray(np.rint(matrix / scales) * scales, np.float32)


def _ratio(upper: np.ndarray, lower: np.ndarray) -> np.ndarray:
    return np.asarray(np.divide(upper, lower, out=np.zeros_like(upper), where=lower > 0))


# ------------------------------------------------------------------ the choice


def _best_factors(stretch: Stretch, answers: Answers, done: Rescaling) -> np.ndarray | str:
    """The factors that cost least; in words, why none are worth it."""
    source, flow = stretch.source, stretch.flow
    seen = _what_is_seen(flow, answers, done)
    if isinstance(seen, str):
        return seen
    trials, stops = seen
    if not all(trial.is_finite for trial in trials):
        return "its weights are not finite"
    errors = [trial.error(np.ones(source.count), stops) for trial in trials]

    def left(factors: np.ndarray) -> float:
        """What the factors leave of the error, on average over the products."""
        now = [trial.error(factors, stops) for trial in trials]
        return float(np.mean([n / e if e > 0 else 1.0 for n, e in zip(now, errors, strict=True)]))

    tried = {left(f): f for f in _candidates(source.count, trials, stops)}
    if not tried:
        return "its channels are all zero, or nothing weighs them"
    best = min(tried)
    if best > WORTHWHILE:
        return f"at best {max(0.0, 1 - best):.0%} of the error would go"
    return tried[best]


def _what_is_seen(
    flow: Flow, answers: Answers, done: Rescaling
) -> tuple[list[Trial], list[Extent]] | str:
    """The products on their rows, and where channels are rounded on the way; or what is missing."""
    trials, stops = [], []
    for stop in flow.stops:
        stops.append(_extent(stop, answers, done.of_value(stop.value, stop.channels.origin.size)))
    for sink in flow.sinks:
        rows = answers[sink.layer.ask("rows")]
        assert isinstance(rows, Rows)
        too_few = why_too_few(rows.values.shape[1])
        if too_few is not None:
            return too_few
        extent = _extent(_input_of(sink), answers, done.of_inputs(sink.layer))
        if extent is not None:
            trials.append(Trial(sink, extent, rows, done))
    known = [stop for stop in stops if stop is not None]
    if len(known) < len(stops) or len(trials) < len(flow.sinks):
        return "what goes through it is masked, or not of known shape"
    return trials, known


def _candidates(
    count: int, trials: Sequence[Trial], stops: Sequence[Extent]
) -> Iterator[np.ndarray]:
    """Factors for each exponent; dead channels get 1.

    Only their ratios matter, but where other channels share the scale: there they are tried at the
    level of those as well.
    """
    columns, sizes = np.zeros(count), np.zeros(count)
    level = 0.0
    for trial in trials:
        _raise_to(columns, trial.extent.origin, trial.columns)
        _raise_to(sizes, trial.extent.origin, trial.extent.size)
        foreign = trial.extent.size[trial.extent.origin < 0]
        level = max(level, float(foreign.max(initial=0.0)))
    widest = sizes.copy()
    for stop in stops:
        _raise_to(widest, stop.origin, stop.size)
    levels = [None] if level == 0 else [None, level]
    for largest in [sizes, widest] if stops else [sizes]:
        live = (largest > 0) & (columns > 0)
        for exponent in EXPONENTS if live.any() else ():
            weighed = np.ones(count)
            weighed[live] = largest[live] ** exponent / columns[live] ** (1 - exponent)
            top = float((largest[live] / weighed[live]).max())
            for one in levels:
                factors = weighed * (top / (largest.max() if one is None else one))
                factors[~live] = 1
                yield np.clip(factors, FACTOR_MINIMUM, FACTOR_MAXIMUM)


def _raise_to(maxima: np.ndarray, origin: np.ndarray, numbers: np.ndarray) -> None:
    own = origin >= 0
    np.maximum.at(maxima, origin[own], numbers[own])

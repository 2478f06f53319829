"""What is known of the activations that layers multiply: from samples where there are any."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.contract import Context
from graphopt.observe import Answers, Question
from graphopt.skeleton import known_shape
from graphopt.statistics import Rows, Spread


@dataclass(frozen=True)
class Activations:
    """Answers on values of the main graph.

    Attributes:
        answers: None where there are no samples.
    """

    answers: Answers | None

    def rows(self, value: ir.Value) -> np.ndarray:
        """A sample of the rows along the last axis, float32 of shape [rows, inputs]."""
        if self.answers is None:
            return np.zeros((0, 0), np.float32)
        found = self.answers[Question(value.name or "", "rows")]
        assert isinstance(found, Rows)
        return found.values[0] if found.values.size else np.zeros((0, 0), np.float32)

    def has_extremes(self, value: ir.Value) -> bool:
        """Some elements were infinite, no numbers, or far beyond all others, as masks are."""
        return self.answers is not None and self._spread(value).left_out > 0

    def row_count(self, value: ir.Value, width: int) -> float | None:
        """How many rows of a width the value has: where its shape does not say, in the mean.

        None where nothing says it.
        """
        shape = known_shape(value)
        if shape is not None and len(shape) and all(isinstance(d, int) for d in shape[:-1]):
            return float(math.prod(d for d in shape[:-1] if isinstance(d, int)))
        if self.answers is None:
            return None
        spread = self._spread(value)
        return (spread.count + spread.left_out) / max(spread.arrays, 1) / width

    def _spread(self, value: ir.Value) -> Spread:
        assert self.answers is not None
        found = self.answers[Question(value.name or "")]
        assert isinstance(found, Spread)
        return found


def least_rows(value: ir.Value) -> float:
    """How many rows the value has if the dimensions that are not known are 1."""
    shape = known_shape(value)
    sizes = [] if shape is None else [d for d in shape[:-1] if isinstance(d, int)]
    return float(math.prod(sizes))


def observe_activations(
    model: ir.Model, values: Iterable[ir.Value], context: Context
) -> Activations:
    """Look at values of the main graph on the samples, if there are any."""
    if context.observer is None:
        return Activations(None)
    names = dict.fromkeys(value.name or "" for value in values)
    questions = [Question(name, about) for name in names for about in ("spread", "rows")]
    return Activations(context.observe(model, questions))

"""What a metric gives for a model: a score for each item, and their mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnx_ir as ir

from graphopt.errors import SampleError
from graphopt.recording import Feed
from graphopt.runtime import Session


@dataclass(frozen=True)
class Scores:
    """How good a model is on some items; higher is better.

    Attributes:
        value: the mean of `per_item`, or what the user's function gave.
        per_item: [items], float64; None where the metric has one number for all items.
        low: no score can be lower, whatever the model; minus infinity where that is not known.
        high: no score can be higher; infinite where that is not known.
        unit: of the scores, "%" or empty for a unit of the user's own.
        below_original: scores say how near a model comes to the original, which itself has `high`.
        disagreement: share of rows of which the arg-max is another than the original's, in the
            output where that is most; None where the metric does not count them.
        divergences: [steps], how far outputs are from the original's, where small changes count too
            that leave every answer as it is (`graphopt.output_distance`); None where they are not
            measured.
    """

    value: float
    per_item: np.ndarray | None
    low: float
    high: float
    unit: str
    below_original: bool = False
    disagreement: float | None = None
    divergences: np.ndarray | None = None

    @property
    def divergence(self) -> float | None:
        """The mean of the divergences."""
        return None if self.divergences is None else float(self.divergences.mean())


Judge = Callable[[Session], Scores]
"""Gives the scores of a model on the items that it was made for."""


class Metric(Protocol):
    """What a model is judged by."""

    @property
    def name(self) -> str:
        """As the user writes it."""
        ...

    def judges(
        self, original: ir.Model, session: Session, feed: Feed, parts: Sequence[Feed]
    ) -> tuple[Judge, ...]:
        """What gives the scores of models, on one part of the samples each.

        What a definition takes from data (a temperature, a norm) is taken from the original on the
        first part, so that what is proven by another part is about scores that are independent.

        Args:
            original: the model that others are compared with.
            session: of the original.
            feed: all samples.
            parts: of `feed`; an item is a sequence of it, which is one sample where no state is
                carried.

        Raises:
            GraphoptError: the metric does not fit the model or the samples.
        """
        ...


@dataclass(frozen=True)
class Drops:
    """How much a model is worse than another, item by item.

    Attributes:
        values: [items], in the unit of the scores; negative where it is better.
        lower: no drop can be less.
        upper: no drop can be more.
    """

    values: np.ndarray
    lower: float
    upper: float


def drops(original: Scores, other: Scores) -> Drops:
    """The drops from the scores of the original to those of another model on the same items.

    Raises:
        SampleError: there is no score for each item, or the scores have no bounds.
    """
    if original.per_item is None or other.per_item is None:
        raise SampleError(
            "the metric gives one number for all items, which proves nothing of others; let the "
            "function return a score for each item"
        )
    upper = original.high - original.low
    if not np.isfinite(upper):
        raise SampleError(
            "nothing is proven by scores without bounds; give the function an attribute, as in "
            "score.bounds = (0, 1)"
        )
    values = original.per_item - other.per_item
    lower = 0.0 if original.below_original else -upper
    # What is at most `upper` by what it is may be above it by a rounding.
    return Drops(np.clip(values, lower, upper), lower, upper)


def mean_by_item(values: Sequence[float], feed: Feed) -> np.ndarray:
    """The mean over the steps of each item, [items].

    Args:
        values: one for each step, in order.
        feed: what the steps are of.
    """
    lengths = np.array([len(sequence) for sequence in feed.samples.sequences])
    starts = np.concatenate([[0], lengths.cumsum()[:-1]])
    sums = np.add.reduceat(np.asarray(values, np.float64), starts)
    means: np.ndarray = sums / lengths
    return means

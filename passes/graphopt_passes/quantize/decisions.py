"""How often a model would decide for another class, foreseen from few samples.

Where 2 decisions of 100 change, 64 samples show one or two, or none: too few to count. But all
samples show how far apart the two best classes are, and how much the scores move. If the score of
each class gets noise of deviation s, the difference of two has sqrt(2) s, and the best of a sample
changes places with the second with the probability

    Phi(-margin / (sqrt(2) s))

The mean of it over the samples is what is to be expected on others. It rests on the few samples
whose margin is small, and there may be none: if margins are distributed exponentially, the mean
margin says how many there will be, and the larger of the two shares is taken.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from scipy.special import erfcx, ndtr

from graphopt.contract import Context
from graphopt.observe import Question, Statistics
from graphopt.statistics import Patches, Rows

BEST = 10
"""Classes whose scores are looked at: the noise of those that never win counts for nothing."""

PROBABILITY_TOLERANCE = 1e-3
"""By how much the sum of probabilities may miss 1."""

SCORE_MINIMUM = 1e-30
"""Of a probability, before its logarithm is taken."""


def scores_asked(model: ir.Model) -> list[Question]:
    """For the outputs that hold a row of scores, one for each class: what these rows are.

    They have the classes along their second axis, and no other axis but that of the batch.
    """
    return [
        Question(value.name or "", "rows", patches=_one_place(len(value.shape or ())))
        for value in model.graph.outputs
        if _has_classes(value)
    ]


def _has_classes(value: ir.Value) -> bool:
    dims = () if value.shape is None else value.shape.dims
    if value.dtype != ir.DataType.FLOAT or value.producer() is None or len(dims) < 2:
        return False
    return isinstance(dims[1], int) and dims[1] > 1 and all(d == 1 for d in dims[2:])


def _one_place(rank: int) -> Patches | None:
    """A window of one place, by which the rows of [batch, classes, 1, 1] are those of classes."""
    if rank == 2:
        return None
    ones = (1,) * (rank - 2)
    return Patches(ones, ones, ones, (0,) * 2 * len(ones))


def expected_changes(
    first: ir.Model, second: ir.Model, asked: Sequence[Question], context: Context
) -> float:
    """The share of decisions that is expected to change, of the output where it is largest.

    Args:
        first: the reference.
        second: the model that is compared with it.
        asked: for the scores; see `scores_asked`.
        context: with samples.

    Raises:
        GraphoptError: onnxruntime does not run one of the models.
    """
    before, after = context.observe(first, asked), context.observe(second, asked)
    return max(share_of_changes(_rows(before[q]), _rows(after[q])) for q in asked)


def _rows(statistics: Statistics) -> np.ndarray:
    assert isinstance(statistics, Rows)
    values = statistics.values
    return values.reshape(-1, values.shape[-1])


def share_of_changes(first: np.ndarray, second: np.ndarray) -> float:
    """The share of decisions that is expected to change.

    Args:
        first: scores of the reference, [samples, classes]: logits or probabilities.
        second: the same of the model that is compared with it.

    Returns:
        In [0, 1]; 1 where the rows are not the same ones, or hold what is no number.
    """
    if first.shape != second.shape or not np.isfinite(second).all():
        return 1.0
    if not first.size:
        return 0.0
    scores, others = _scores(first, first), _scores(second, first)
    order = np.argsort(-scores, axis=1)[:, :BEST]
    best = np.take_along_axis(scores, order, axis=1)
    moved = np.take_along_axis(others, order, axis=1) - best
    deviation = np.sqrt(moved.var(axis=1, ddof=1).mean())
    margins = best[:, 0] - best[:, 1]
    seen = ndtr(-margins / max(np.sqrt(2) * deviation, 1e-30)).mean()
    # The mean of Phi(-m / (sqrt(2) s)) over m of density exp(-m / mean) / mean.
    foreseen = 0.5 - 0.5 * erfcx(deviation / max(margins.mean(), 1e-30))
    return float(max(seen, foreseen))


def _scores(rows: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """What differences are taken of: logarithms, where the rows of the reference are probable."""
    wide = rows.astype(np.float64)
    sums = reference.astype(np.float64).sum(axis=1)
    probable = (reference >= 0).all() and np.abs(sums - 1).max() <= PROBABILITY_TOLERANCE
    return np.log(np.maximum(wide, SCORE_MINIMUM)) if probable else wide

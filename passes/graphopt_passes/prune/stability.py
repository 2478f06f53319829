"""How sure it is that a weight matters.

The importance of an entry is |W_ij| sqrt(m_j) with the second moment m_j of its input (Wanda; Sun
et al. 2023, arXiv 2306.11695). Moments come by disjoint chunk of the samples, and other samples
would have given others: by the Bayesian bootstrap (Rubin 1981), a mean over chunks with random
shares v stands for each, uniform among those that are positive and add up to 1 (Dirichlet). It is
computed as

    m_b = m_0 + sum_c v_c (m_c - m_0),

and deviations from the first resample, so that what is the same in all chunks has a deviation of 0,
to the last bit, and a factor of 1. An entry's importances are its magnitude times numbers of its
input: their mean and deviation are found for inputs alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from graphopt_passes.prune.masks import Floats, Mask, Pattern

RESAMPLES = 64
"""A power of two: what is kept in all of them has a frequency of 1, to the last bit."""

DOUBT, DOUBT_MAXIMUM = 200.0, 16.0
"""Where moments are sure to a fiftieth, they are damped 4 times as much more, and so on.

A mask that follows less of what few samples have in common than that is no longer as good.
"""

Mode = Literal["stability", "selection", "keep-uncertain"]

_Doubles = npt.NDArray[np.float64]


def factors(
    weight: Floats,
    moments: Floats,
    keep: int,
    mode: Mode,
    kappa: float,
    generator: np.random.Generator,
    pattern: Pattern,
    taps: int,
) -> npt.NDArray[np.float32]:
    """What the score of each entry is multiplied with, by how sure its importance is.

    With mu and sd the mean and the deviation of importances over resamples:

    - stability: e / (sd + e) with e the median of those mu that are not 0. Times mu, that is in
      proportion to mu / (sd + e).
    - keep-uncertain: (mu + kappa sd) / mu, for an upper confidence bound (PLATON; Zhang et al.
      2022, arXiv 2206.12562).
    - selection: 1, plus the share of the resamples whose mask has the entry, less 1 where the mask
      by mu has it (stability selection; Meinshausen and Buehlmann 2010).

    Args:
        weight: of shape [rows, inputs], finite.
        moments: of inputs, by chunk: of shape [chunks, inputs], or [chunks, rows, inputs] where
            rows see inputs of their own. Not negative.
        keep: so many entries are to stay; for selection.
        mode: see above.
        kappa: how many deviations are added; for keep-uncertain.
        generator: of the shares of chunks.
        pattern: of the mask; for selection.
        taps: of each input channel; for selection.

    Returns:
        Of the weight's shape; exactly 1 throughout where all chunks are equal, or there are none.
    """
    if not len(moments):
        return np.ones(weight.shape, np.float32)
    shares = _shares(moments, generator)
    mean, deviation = _mean_and_deviation(_roots(moments, shares))
    if mode == "keep-uncertain":
        # The magnitude cancels.
        more = np.divide(deviation, mean, out=np.zeros_like(mean), where=mean > 0)
        return np.asarray(np.broadcast_to(1 + kappa * more, weight.shape), np.float32)
    importances = _times_magnitude(weight, mean)
    if mode == "stability":
        usual = _usual(importances)
        return np.asarray(usual / (_times_magnitude(weight, deviation) + usual))
    resampled = (_times_magnitude(weight, root) for root in _roots(moments, shares))
    times = _times_kept((pattern.largest(i, keep, taps) for i in resampled), weight.shape)
    frequency = np.divide(times, RESAMPLES, dtype=np.float32)
    return np.asarray((1 + frequency) - pattern.largest(importances, keep, taps))


def mask_stability(
    weight: Floats,
    moments: Floats,
    keep: int,
    factors: Floats,
    generator: np.random.Generator,
    pattern: Pattern,
    taps: int,
) -> float:
    """How alike the masks are that other samples would have given: 1 where all are the same.

    The Jaccard index of two masks is what both keep over what either keeps. Of all pairs of
    resamples, this is the mean of the former over the mean of the latter. An entry that c of B
    masks keep is in c (c - 1) of the B (B - 1) ordered pairs, so that masks need not be held:

        mean intersection = sum c (c - 1) / (B (B - 1)),
        mean union        = 2 sum c / B - mean intersection.

    Args:
        weight: see `factors`.
        moments: see `factors`.
        keep: so many entries are to stay.
        factors: that the importances of each resample are multiplied with, of the weight's shape.
        generator: see `factors`.
        pattern: of the masks.
        taps: of each input channel.
    """
    if not len(moments):
        return 1.0
    roots = _roots(moments, _shares(moments, generator))
    resampled = (_times_magnitude(weight, root) * factors for root in roots)
    times = _times_kept((pattern.largest(i, keep, taps) for i in resampled), weight.shape)
    both = float((times * (times - 1)).sum(dtype=np.int64)) / (RESAMPLES * (RESAMPLES - 1))
    either = 2 * float(times.sum(dtype=np.int64)) / RESAMPLES - both
    return both / either if either else 1.0


def doubt_of(moments: Floats) -> float:
    """DOUBT times the relative deviation of the mean of moments over chunks, within a maximum.

        sqrt(sum_j var_j / chunks / sum_j mean_j^2)

    Args:
        moments: of inputs, by chunk, at least 2; the first axis is that of chunks.

    Returns:
        Exactly 0 where all chunks are equal.
    """
    apart = (moments - moments[0]).reshape(len(moments), -1).astype(np.float64)
    mean = np.asarray(moments[0], np.float64).reshape(-1) + apart.mean(axis=0)
    power = float(np.square(mean).sum())
    deviation = float(apart.var(axis=0, ddof=1).sum()) / len(moments)
    return min(DOUBT * (deviation / power) ** 0.5, DOUBT_MAXIMUM) if power else 0.0


def checkpoint_factors(checkpoints: Floats) -> npt.NDArray[np.float32]:
    """What the magnitude of each entry is multiplied with, by how alike checkpoints have it.

    With mean and sd over checkpoints and e the median of those |mean| that are not 0:

        e / (sd + e) * (share of the checkpoints that have the sign of the mean)

    Args:
        checkpoints: of one weight, of shape [checkpoints, rows, inputs]; at least 2, finite.

    Returns:
        Of shape [rows, inputs]; exactly 1 where all checkpoints are equal.
    """
    mean, deviation = _mean_and_deviation(c.astype(np.float64) for c in checkpoints)
    usual = _usual(np.abs(mean))
    sign = np.sign(mean)
    agreeing = np.zeros(mean.shape, np.int64)
    for checkpoint in checkpoints:
        agreeing += np.sign(checkpoint) == sign
    return np.asarray(usual / (deviation + usual) * (agreeing / len(checkpoints)), np.float32)


def _shares(moments: Floats, generator: np.random.Generator) -> _Doubles:
    """Of chunks in resamples, of shape [resamples, chunks]; each row adds up to 1."""
    return generator.dirichlet(np.ones(len(moments)), RESAMPLES)


def _roots(moments: Floats, shares: _Doubles) -> Iterator[_Doubles]:
    """Of each resample the square roots of its moments; see the top of the file."""
    first = moments[0].astype(np.float64)
    apart = moments - first
    for row in shares:
        # Rounding may leave less than 0.
        yield np.sqrt(np.maximum(first + np.tensordot(row, apart, axes=1), 0.0))


def _times_magnitude(weight: Floats, numbers: _Doubles) -> npt.NDArray[np.float32]:
    """Magnitudes times numbers of the inputs, of the weight's shape."""
    return np.asarray(np.abs(weight, dtype=np.float32) * numbers.astype(np.float32))


def _mean_and_deviation(arrays: Iterable[_Doubles]) -> tuple[_Doubles, _Doubles]:
    """Over arrays of one shape, by their deviations from the first of them."""
    later = iter(arrays)
    first = next(later)
    total, squares, count = np.zeros(first.shape), np.zeros(first.shape), 1
    for array in later:
        apart = array - first
        total += apart
        squares += np.square(apart)
        count += 1
    mean = total / count
    return first + mean, np.sqrt(np.maximum(squares / count - np.square(mean), 0.0))


def _times_kept(masks: Iterable[Mask], shape: tuple[int, ...]) -> npt.NDArray[np.int16]:
    """How many of the masks keep each entry; RESAMPLES squared is within the dtype."""
    times = np.zeros(shape, np.int16)
    for mask in masks:
        times += mask
    return times


def _usual(numbers: npt.NDArray[Any]) -> float:
    """The median of those that are not 0; 1 where all are."""
    found = numbers[numbers != 0]
    return float(np.median(found)) if found.size else 1.0

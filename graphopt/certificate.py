"""What a sample of items proves of all items: bounds on the mean drop of a metric.

All bounds hold for any distribution of bounded values and any number of them, provided that they
are independent, and that neither their order nor the limit was chosen by looking at them.

The bound of bounded values is by betting (Waudby-Smith & Ramdas 2023, JRSS-B 86, "Estimating means
of bounded random variables by betting"). With losses l from 0 to 1, who doubts that their mean is u
or more stakes something on each, before it is seen, and has after them

    prod (1 + stake_i (u - l_i)),    0 <= stake_i <= 1 / (1 - u),

which is never negative, and at most 1 in expectation if the mean is u or more. So it ever reaches
1 / delta with a probability of at most delta (Ville). Half of the capital is staked in full as long
as nothing is lost, which is best where no item gets worse. The other half follows the predictable
plug-in of section 3.3 there, by the variance of the values so far, which is best where items get
worse and others better. A stake is the same for every u, but for its cap; so each factor grows with
u, and with it the capital, and the bound is found by bisection.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy.special import bdtr, betainccinv

_CAP = 0.75
"""Of the largest stake, so that one loss of 1 leaves a quarter of the capital."""

_VARIANCE = 0.25
"""Of the losses, before any is seen; it counts as one of them."""

_AIM = math.log(2 / 0.05)
"""The logarithm of what each half is to become: stakes are the best for a delta near 0.05, and
valid for any."""

_BISECTIONS = 40

ITEMS_MAXIMUM = 1 << 24
"""A limit for which more items than this are needed is 0 for all purposes."""


def betting_upper_bound(values: np.ndarray, lower: float, upper: float, delta: float) -> float:
    """An upper confidence bound of a mean, adaptive to how much the values vary.

    Args:
        values: independent, [items], each from `lower` to `upper`, in an order that was chosen
            without looking at them.
        lower: what no value is below, known beforehand.
        upper: what no value is above, known beforehand.
        delta: probability with which the mean may be above the bound.

    Returns:
        The bound, `upper` where the values prove nothing.

    Raises:
        ValueError: a value is not within its bounds, or `delta` not within 0 and 1.
    """
    _check_delta(delta)
    bets = _bets(values, lower, upper)
    low, high = float(bets.losses.mean()) if len(bets.losses) else 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if bets.log_capital(middle) >= -math.log(delta):
            high = middle
        else:
            low = middle
    return lower + high * (upper - lower)


def exact_upper_bound(values: np.ndarray, delta: float) -> float:
    """The bound of Clopper and Pearson (1934) for the mean of values that are 0 or 1.

    Args:
        values: independent, [items], each 0 or 1 by what it is, not by luck: where other values
            were possible, take `betting_upper_bound`.
        delta: probability with which the mean may be above the bound.

    Raises:
        ValueError: a value is neither 0 nor 1, or `delta` not within 0 and 1.
    """
    _check_delta(delta)
    ones, count = _ones(values), len(values)
    if ones == count:
        return 1.0
    return float(betainccinv(ones + 1, count - ones, delta))


def upper_bound(
    values: np.ndarray, lower: float, upper: float, delta: float, binary: bool = False
) -> float:
    """The tighter of the bounds that hold: `exact_upper_bound` where values are 0 or 1 only.

    Args:
        values: see `betting_upper_bound`.
        lower: see `betting_upper_bound`.
        upper: see `betting_upper_bound`.
        delta: see `betting_upper_bound`.
        binary: a value can only be `lower` or `upper`. It does not follow from the values:
            to choose the bound by them would take more chances than `delta`.

    Raises:
        ValueError: as above.
    """
    if not binary:
        return betting_upper_bound(values, lower, upper, delta)
    return lower + exact_upper_bound((values - lower) / (upper - lower), delta) * (upper - lower)


def p_value(
    values: np.ndarray, limit: float, lower: float, upper: float, binary: bool = False
) -> float:
    """How likely values as low as these are, at most, if their mean is `limit` or more.

    It is at most delta just where `upper_bound` with the same delta is at most `limit`.

    Args:
        values: see `betting_upper_bound`.
        limit: the mean that is doubted, from `lower` to `upper`.
        lower: see `betting_upper_bound`.
        upper: see `betting_upper_bound`.
        binary: see `upper_bound`.

    Raises:
        ValueError: a value or the limit is not within the bounds.
    """
    if not lower <= limit <= upper:
        raise ValueError(f"the limit {limit:g} is not from {lower:g} to {upper:g}")
    mean = (limit - lower) / (upper - lower)
    if binary:
        ones = _ones((np.asarray(values) - lower) / (upper - lower))
        return float(bdtr(ones, len(values), mean))
    bets = _bets(values, lower, upper)
    if len(bets.losses) and bets.losses.mean() >= mean:
        # Luck with the order may have made a fortune; a bound below what was seen convinces nobody.
        return 1.0
    return math.exp(-max(0.0, bets.log_capital(mean)))


def certified_prefix(
    points: Iterable[np.ndarray],
    limit: float,
    delta: float,
    lower: float,
    upper: float,
    binary: bool = False,
) -> int:
    """How many of a sequence of points are proven to have a mean of at most `limit`, together.

    Learn then Test (Angelopoulos et al. 2021, arXiv 2110.01052) with fixed-sequence testing: each
    point is tested at the whole delta, and the first that fails ends it, so the probability that
    even one of the certified points is above the limit is at most delta.

    Args:
        points: the values of each, from the safest to the boldest, an order that was chosen without
            looking at them; read one at a time and no further than to the first that fails.
        limit: see `p_value`.
        delta: probability with which one certified point or more may be wrong.
        lower: see `betting_upper_bound`.
        upper: see `betting_upper_bound`.
        binary: see `upper_bound`.

    Raises:
        ValueError: a value or the limit is not within the bounds.
    """
    _check_delta(delta)
    certified = 0
    for values in points:
        if p_value(values, limit, lower, upper, binary) > delta:
            break
        certified += 1
    return certified


def fewest_items(
    limit: float, delta: float, lower: float, upper: float, binary: bool = False
) -> int:
    """How many items prove a mean of at most `limit` if the value of each is 0: none got worse.

    Args:
        limit: above 0.
        delta: probability with which the proof may be wrong.
        lower: 0 for losses, which are never better than 0; -upper for differences.
        upper: see `betting_upper_bound`.
        binary: see `upper_bound`.

    Raises:
        ValueError: no number of items proves it: the limit is 0 or below.
    """
    _check_delta(delta)
    if not lower <= 0 < limit:
        raise ValueError(f"items that are all 0 never prove a mean of at most {limit:g}")
    if limit >= upper:
        return 0 if limit > upper else 1
    mean = (limit - lower) / (upper - lower)

    def proves(count: int) -> bool:
        if binary:
            return count * math.log1p(-mean) <= math.log(delta)
        return _bets(np.zeros(count), lower, upper).log_capital(mean) >= -math.log(delta)

    # With fewer, not even full stakes on each item do it.
    gain = math.log1p(limit / (upper - limit))
    high = math.ceil(min(-math.log(delta) / gain, ITEMS_MAXIMUM + 1)) if gain else ITEMS_MAXIMUM + 1
    low = high - 1
    while high <= ITEMS_MAXIMUM and not proves(high):
        low, high = high, high + max(1, high // 8)
    if high > ITEMS_MAXIMUM:
        raise ValueError(f"a limit of {limit:g} takes more than {ITEMS_MAXIMUM:,} items")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if proves(middle) else (middle, high)
    return high


def paired_standard_error(first: np.ndarray, second: np.ndarray) -> float:
    """The standard error of the mean difference of scores of the same items.

    Much smaller than that of either mean, as what makes an item hard is in both.

    Args:
        first: [items], scores of one model.
        second: [items], those of another, in the same order.

    Returns:
        In the unit of the scores; infinite for fewer than two items, which tell nothing of it.
    """
    if len(first) < 2:
        return math.inf
    return float(np.std(np.subtract(first, second), ddof=1) / math.sqrt(len(first)))


# ------------------------------------------------------------------ the bets


@dataclass(frozen=True)
class _Bets:
    """What is bet on.

    Attributes:
        losses: [items], from 0 to 1.
        stakes: [items], what the plug-in stakes on each if the cap allows it.
    """

    losses: np.ndarray
    stakes: np.ndarray

    def log_capital(self, mean: float) -> float:
        """The logarithm of the most that bets against a mean of `mean` or more have made of 1."""
        if not len(self.losses):
            return 0.0
        if mean >= 1:
            # A mean of 1 leaves no loss below it.
            return math.inf if (self.losses < 1).any() else 0.0
        edge = mean - self.losses
        with np.errstate(divide="ignore"):
            # A full stake is lost as a whole; log1p of a hair below -1 would be NaN.
            full = np.log1p(np.maximum(edge / (1 - mean), -1.0)).cumsum()
        plugged = np.log1p(np.minimum(self.stakes, _CAP / (1 - mean)) * edge).cumsum()
        return float(np.logaddexp(full, plugged).max()) - math.log(2)


def _bets(values: np.ndarray, lower: float, upper: float) -> _Bets:
    """The values as shares of the way from `lower` to `upper`, and what is staked on each.

    With n of them and a variance of v, a stake of sqrt(2 ln(1 / delta) / (n v)) brings the capital
    to 1 / delta for the smallest mean (equation 26 of the paper). The variance is that of the
    losses before, the first guess of their mean that nothing gets worse: a value of 0.
    """
    if not -math.inf < lower < upper < math.inf:
        raise ValueError(f"bounds from {lower:g} to {upper:g}; they must be finite, and rise")
    given = np.asarray(values, np.float64)
    if not ((given >= lower) & (given <= upper)).all():
        raise ValueError(
            f"values from {given.min():g} to {given.max():g} leave their bounds, {lower:g} to "
            f"{upper:g}"
        )
    losses = (given - lower) / (upper - lower)
    guess = min(1.0, max(0.0, -lower / (upper - lower)))
    seen = np.arange(len(losses)) + 2
    means = (guess + losses.cumsum()) / seen
    variances = (_VARIANCE + ((losses - means) ** 2).cumsum()) / seen
    before = np.concatenate([[_VARIANCE], variances[:-1]])[: len(losses)]
    return _Bets(losses, np.sqrt(2 * _AIM / (before * max(len(losses), 1))))


def _ones(values: np.ndarray) -> int:
    array = np.asarray(values)
    if not np.isin(array, (0, 1)).all():
        raise ValueError("values other than 0 and 1 have no exact bound")
    return int(array.sum())


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise ValueError(f"delta is {delta:g}; it must be between 0 and 1")

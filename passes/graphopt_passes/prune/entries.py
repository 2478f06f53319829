"""Which entries of a weight stay, and what these become, so that the output changes least.

What counts is the error of the layer's output, E |(P - W) z|^2 = tr(D H D^T) with D = P - W and the
moments H = E[z z^T] of what the layer reads. Three ways to choose are here: by magnitude |w|; by
|w| sqrt(H_jj), Wanda (arXiv 2306.11695); and by what removing an entry costs when the others make
good for it, |w| / sqrt([H^-1]_jj), as in the optimal brain surgeon. For the last, one choice after
the other is best where the weight is small (ExactOBS, arXiv 2208.11580), and alternating directions
find all at once where it is not (ALPS, arXiv 2406.07831).

Weights are of shape [N, K]. Moments are of shape [G, K, K], of G groups of N / G rows each. They
must be positive definite; see `damped`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.linalg import eigh

from graphopt_passes.prune.masks import Pattern, Unstructured

Floats = npt.NDArray[np.floating[Any]]
Mask = npt.NDArray[np.bool_]

Criterion = Literal["magnitude", "activations", "second-order"]

DAMPING = 0.003
"""Share of the mean of the diagonal that is added to it at least."""

ROUNDING = 1e-6
"""Of second moments, for each input: what less of their variance is, float32 makes of sums."""

EXACT_PRODUCTS_MAXIMUM = 3e8
"""Removing one entry after the other takes N K^3 products; more are not worth the wait."""

ALTERNATIONS = 60
"""Of alternating directions at most; the choice seldom moves after so many."""

_PENALTY, _CHECKED = 0.1, 3
_GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
"""The penalty grows by the second where more than the first share of the entries has moved."""

CONJUGATE_STEPS = 40


UNSTRUCTURED = Unstructured()


@dataclass(frozen=True, eq=False)
class Selection:
    """How entries are chosen.

    Attributes:
        criterion: what an entry is worth.
        pattern: in which they stay.
        taps: of the window of a Conv, which run fastest along the inputs; 1 for others.
        factors: what the worth of each entry is multiplied with, of shape [N, K]; None stands for
            1 everywhere.
    """

    criterion: Criterion = "second-order"
    pattern: Pattern = UNSTRUCTURED
    taps: int = 1
    factors: Floats | None = None

    def largest(self, worth: Floats, keep: int) -> Mask:
        """The entries that stay, by what they are worth before factors."""
        weighed = worth if self.factors is None else worth * self.factors
        return self.pattern.largest(np.square(weighed), keep, self.taps)


def damped(moments: Floats, rows: int, means: Floats | None = None, factor: float = 1.0) -> Floats:
    """Moments with a share of the mean of the diagonal added to it: more, the fewer rows were seen.

    Args:
        moments: of shape [G, K, K].
        rows: of which they are made.
        means: about which they are, of shape [G, K]; None for 0.
        factor: so many times the usual share.
    """
    inputs = moments.shape[-1]
    mean = np.einsum("gkk->g", moments) / inputs
    power = mean if means is None else mean + np.square(means).mean(axis=1)
    share = factor * max(DAMPING, inputs / max(rows, 1))
    ridge = np.maximum(share * mean, ROUNDING * inputs * power)
    # Where no input is ever other than zero, any weight will do.
    ridge = np.where(power > 0, ridge, 1.0)[:, np.newaxis, np.newaxis]
    return np.asarray(moments + ridge * np.eye(inputs))


def squared_error(weight: Floats, pruned: Floats, moments: Floats) -> float:
    """tr(D H D^T), summed over the groups."""
    change = _grouped(pruned - weight, moments)
    error = np.einsum("gnk,gnk->", np.matmul(change, moments), change, dtype=np.float64)
    return max(float(error), 0.0)


def worth_of(weight: Floats, moments: Floats, criterion: Criterion) -> Floats:
    """What each entry is worth, in the unit of the output; [N, K]."""
    if criterion == "magnitude":
        return np.abs(weight)
    if criterion == "activations":
        scales = np.sqrt(np.einsum("gkk->gk", moments))
    else:
        scales = 1 / np.sqrt(np.einsum("gkk->gk", np.linalg.inv(moments)))
    return _flat(np.abs(_grouped(weight, moments)) * scales[:, np.newaxis, :])


def pruned(weight: Floats, moments: Floats, keep: int, selection: Selection) -> Floats:
    """The weight with `keep` entries, refitted.

    Args:
        weight: float, of shape [N, K].
        moments: damped, of shape [G, K, K].
        keep: how many entries stay.
        selection: how they are chosen.

    Returns:
        Of the shape and type of the weight; what does not stay is 0.
    """
    if keep >= weight.size and selection.pattern.fixed_density is None:
        return weight
    return refitted(weight, moments, mask_of(weight, moments, keep, selection))


def largest_alone(weight: Floats, keep: int, selection: Selection) -> Floats:
    """The weight with its `keep` largest entries, where nothing is known of what it reads."""
    return np.where(selection.largest(np.abs(weight), keep), weight, weight.dtype.type(0))


def mask_of(weight: Floats, moments: Floats, keep: int, selection: Selection) -> Mask:
    """Which entries stay; see `pruned`."""
    if selection.criterion != "second-order":
        return selection.largest(worth_of(weight, moments, selection.criterion), keep)
    unstructured = isinstance(selection.pattern, Unstructured)
    rows, inputs = weight.shape
    if unstructured and rows * float(inputs) ** 3 <= EXACT_PRODUCTS_MAXIMUM:
        return _one_by_one(weight, moments, keep, selection)
    if len(moments) == 1:
        return _alternating(weight, moments[0], keep, selection)
    return selection.largest(worth_of(weight, moments, "second-order"), keep)


def refitted(weight: Floats, moments: Floats, mask: Mask, steps: int = CONJUGATE_STEPS) -> Floats:
    """The entries of a mask that come closest to a weight: conjugate gradients, all rows at once.

    Args:
        weight: of shape [N, K].
        moments: damped, of shape [G, K, K].
        mask: of the shape of the weight.
        steps: at most so many.
    """
    aim, stays = _grouped(weight.astype(np.float32), moments), _grouped(mask, moments)
    curved = moments.astype(np.float32)
    curvature = np.einsum("gkk->gk", curved)[:, np.newaxis, :]
    found = aim * stays
    rest = np.matmul(aim - found, curved) * stays
    step = rest / curvature
    power = np.einsum("gnk,gnk->gn", rest, step)
    first = power.sum()
    for _ in range(steps):
        if power.sum() <= 1e-10 * first:
            break
        pushed = np.matmul(step, curved) * stays
        length = _ratio(power, np.einsum("gnk,gnk->gn", step, pushed))
        found = found + length * step
        rest = rest - length * pushed
        scaled = rest / curvature
        before, power = power, np.einsum("gnk,gnk->gn", rest, scaled)
        step = scaled + _ratio(power, before) * step
    # Not -0.0, which is stored as a number.
    return _flat(np.where(stays, found, 0.0)).astype(weight.dtype)


def _ratio(above: Floats, below: Floats) -> Floats:
    """Of numbers of each row; 0 where nothing is left."""
    quotient = np.divide(above, below, out=np.zeros_like(above), where=below > 1e-30)
    return np.asarray(quotient[:, :, np.newaxis])


def _grouped(rows: npt.NDArray[Any], moments: Floats) -> npt.NDArray[Any]:
    return rows.reshape(len(moments), -1, rows.shape[1])


def _flat(groups: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return groups.reshape(-1, groups.shape[2])


# ------------------------------------------------------------------ which entries stay


def _one_by_one(weight: Floats, moments: Floats, keep: int, selection: Selection) -> Mask:
    """Remove from each row what costs least, until nothing is left; then take the cheapest of all.

    Removing entry j of a row costs w_j^2 / [H^-1]_jj, its other entries change by
    -w_j H^-1_j / [H^-1]_jj, and H^-1 loses H^-1_j H^-1_j^T / [H^-1]_jj.
    """
    rows, inputs = weight.shape
    each = np.repeat(np.linalg.inv(moments), rows // len(moments), axis=0)
    inverse, left = each.astype(np.float32), weight.astype(np.float32)
    factors = np.ones_like(left) if selection.factors is None else selection.factors
    every, stays = np.arange(rows), np.ones(weight.shape, np.bool_)
    costs, order = np.empty((rows, inputs), np.float32), np.empty((rows, inputs), np.intp)
    for number in range(inputs):
        diagonal = np.maximum(np.einsum("nkk->nk", inverse), 1e-30)
        cost = np.where(stays, np.square(left * factors) / diagonal, np.inf)
        least = np.argmin(cost, axis=1)
        order[:, number], costs[:, number] = least, cost[every, least]
        column = inverse[every, :, least] / diagonal[every, least][:, np.newaxis]
        left = left - left[every, least][:, np.newaxis] * column
        inverse -= column[:, :, np.newaxis] * inverse[every, np.newaxis, least]
        stays[every, least] = False
    # What comes later in a row cannot go before it.
    costs = np.maximum.accumulate(costs, axis=1)
    ranked = np.empty_like(costs)
    np.put_along_axis(ranked, order, costs, axis=1)
    # Of equal costs, the later one stays.
    places = np.empty(costs.shape, np.intp)
    np.put_along_axis(places, order, np.broadcast_to(np.arange(inputs), costs.shape), axis=1)
    kept = np.lexsort((places.ravel(), ranked.ravel()))[ranked.size - keep :]
    mask = np.zeros(ranked.size, np.bool_)
    mask[kept] = True
    return mask.reshape(ranked.shape)


def _alternating(weight: Floats, moments: Floats, keep: int, selection: Selection) -> Mask:
    """Alternate between the best weight near sparse ones and the sparse one nearest to it.

    With inputs scaled to unit power: X = (W H - V + p S)(H + p I)^-1, S = X + V / p in the pattern,
    V += p (X - S), and the penalty p grows until the entries of S stay the same.
    """
    scales = np.sqrt(np.diagonal(moments)).astype(np.float32)
    values, vectors = eigh((moments / np.outer(scales, scales)).astype(np.float32))
    values = np.maximum(values, 0)
    aim = weight.astype(np.float32) * scales
    aimed = ((aim @ vectors) * values) @ vectors.T
    dual, sparse, penalty = np.zeros_like(aim), aim, _PENALTY
    mask = checked = np.ones(weight.shape, np.bool_)
    for number in range(ALTERNATIONS):
        near = (((aimed - dual + penalty * sparse) @ vectors) / (values + penalty)) @ vectors.T
        moved = near + dual / penalty
        mask = selection.largest(np.abs(moved), keep)
        sparse = moved * mask
        dual = dual + penalty * (near - sparse)
        if number % _CHECKED:
            continue
        changed = np.count_nonzero(mask != checked)
        if not changed:
            break
        penalty *= next(by for share, by in _GROWTH if changed > share * max(keep, 1))
        checked = mask
    return mask

"""Weights to codes of a codebook so that the output of the layer changes least.

As in `rounding`, what counts is E |(Wq - W) x|^2 = tr(D H D^T) with D = Wq - W and H = E[x x^T].
But a code stands for any number here: Wq = scales * levels[codes], so that integers, clusters,
signs and the numbers of any narrow format are rounded by the same few functions.

Weights are of shape [N, K], N rows of K inputs. Scales are of shape [N, B]: a row has B blocks of
K / B inputs with a scale each. A Gram matrix H is of shape [K, K], or [N, K, K] where each row has
its own; None stands for the identity. It must be symmetric and positive semi-definite.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.linalg import cholesky, lapack

Floats = npt.NDArray[np.floating[Any]]
Codes = npt.NDArray[np.uint8]

DAMPING = 0.01
"""Share of the mean of the Gram's diagonal that is added to it, as in GPTQ (arXiv 2210.17323)."""

SWEEPS = 4
"""Of coordinate descent, between one refit and the next."""

REFITS = 3
"""Of levels and scales in turn with the codes; more gain nothing."""

_BLOCK = 128
_STEPS = 24
"""Of conjugate gradients: there are as many unknowns as levels, and the start is near."""

_TIE = 1.0 - 2.0**-16
"""A move that gains no more than rounding errors is none."""


@dataclass(frozen=True, eq=False)
class Rounded:
    """A weight in codes.

    Attributes:
        codes: uint8 of shape [N, K].
        levels: increasing, float32 of shape [levels]; or [N, B, levels], where each block of each
            row has levels of its own.
        scales: of shape [N, B], float32 or what the file holds; of any sign, and none is 0.
    """

    codes: Codes
    levels: Floats
    scales: Floats

    def numbers(self) -> Floats:
        """The weight that they stand for, float32 of shape [N, K]."""
        values = _levels_of(self.levels, self.codes)
        return np.asarray(values * spread_blocks(self.scales, self.codes.shape[1]))


def _levels_of(levels: Floats, codes: Codes) -> Floats:
    """The levels of codes of shape [N, K], as `Rounded` has both; float32."""
    wide = levels.astype(np.float32)
    if wide.ndim == 1:
        return np.asarray(wide[codes])
    blocks = codes.reshape(*wide.shape[:2], -1).astype(np.intp)
    return np.asarray(np.take_along_axis(wide, blocks, axis=2).reshape(codes.shape))


def spread_blocks(scales: Floats, inputs: int) -> Floats:
    """Scales of shape [N, B] for each input, float32 of shape [N, K], or [N, 1] for one block."""
    wide = scales.astype(np.float32)
    blocks = wide.shape[1]
    return wide if blocks == 1 else np.repeat(wide, inputs // blocks, axis=1)


def stored_scales(scales: Floats) -> Floats:
    """Scales as they are stored: float16 where none is too large or small for it, else float32."""
    half, usual = np.finfo(np.float16), scales.astype(np.float32)
    used = usual[usual != 0]
    fits = not used.size or (used.min() > half.tiny and used.max() < half.max)
    return usual.astype(np.float16) if fits else usual


def squared_error(weight: Floats, numbers: Floats, gram: Floats | None) -> float:
    """tr(D H D^T) of the numbers that stand for a weight, both of shape [N, K]."""
    change = np.subtract(numbers, weight, dtype=np.float32)
    return float(np.einsum("nk,nk->", times(change, gram), change, dtype=np.float64))


def times(rows: Floats, gram: Floats | None) -> Floats:
    """Row n of [N, K] times the Gram, or times Gram n."""
    if gram is None:
        return rows
    if gram.ndim == 2:
        return np.asarray(rows @ gram)
    return np.asarray(np.matmul(rows[:, np.newaxis, :], gram)[:, 0, :])


def diagonal(gram: Floats | None, inputs: int) -> Floats:
    """The second moments of the inputs, of shape [K] or [N, K]."""
    if gram is None:
        return np.ones(inputs, np.float32)
    return np.asarray(np.einsum("...kk->...k", gram))


def damped(gram: Floats | None, damping: float = DAMPING) -> Floats | None:
    """The Gram matrix with a share of the mean of its diagonal added, float32."""
    return None if gram is None else with_diagonal(gram, damping)


def with_diagonal(gram: Floats, share: float) -> Floats:
    """A Gram matrix, or one for each row, with a share of the mean of its diagonal added to it."""
    inputs = gram.shape[-1]
    mean = np.einsum("...kk->...", gram)[..., np.newaxis, np.newaxis] / inputs
    # Where no input is ever other than zero, any code will do.
    added = np.where(mean > 0, share * mean, 1.0) * np.eye(inputs)
    return np.asarray(gram + added, np.float32)


DAMPINGS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)

_FOUR_LEVELS = np.array([-1.51, -0.4528, 0.4528, 1.51], np.float32)
"""Of the least error for normal numbers (Max 1960)."""


def best_damping(weight: Floats, gram: Floats, other: Floats) -> float:
    """The damping by which a weight is rounded best for samples that are not in its Gram.

    Feedback makes good on the directions in which inputs were seen to lie. Of a few dozen samples,
    most of these are chance.

    Args:
        weight: float32 of shape [N, K].
        gram: of the samples to round by, [K, K].
        other: of others.
    """
    scales = np.sqrt(np.mean(np.square(weight), axis=1, keepdims=True, dtype=np.float64))
    scales = np.where(scales > 0, scales, 1.0).astype(np.float32)

    def error(damping: float) -> float:
        codes = feedback(weight, _FOUR_LEVELS, scales, damped(gram, damping))
        return squared_error(weight, Rounded(codes, _FOUR_LEVELS, scales).numbers(), other)

    return min(DAMPINGS, key=error)


# ------------------------------------------------------------------ codes


def nearest(weight: Floats, levels: Floats) -> Codes:
    """The code of the level nearest to each weight, uint8; of two equally near, the lower."""
    return np.asarray(np.searchsorted(_borders(levels), weight), np.uint8)


def _borders(levels: Floats) -> Floats:
    return np.asarray((levels[1:] + levels[:-1]) / 2)


@dataclass(frozen=True, eq=False)
class _Book:
    """Levels for the columns of a weight: for one input, the numbers of all rows.

    Attributes:
        levels: increasing, of shape [levels]; or [B, levels, N].
        borders: between them; what lies on one belongs to the lower level.
        width: how many inputs a block has.
    """

    levels: Floats
    borders: Floats
    width: int

    def codes(self, column: int, numbers: Floats) -> npt.NDArray[np.integer[Any]]:
        """The codes of the levels nearest to numbers of shape [N]."""
        if self.levels.ndim == 1:
            return np.searchsorted(self.borders, numbers)
        return np.asarray((numbers > self.borders[column // self.width]).sum(axis=0))

    def numbers(self, column: int, codes: npt.NDArray[np.integer[Any]]) -> Floats:
        """The levels of codes of shape [N]."""
        if self.levels.ndim == 1:
            return np.asarray(self.levels[codes])
        return np.asarray(self.levels[column // self.width, codes, np.arange(len(codes))])

    def of_rows(self, chosen: npt.NDArray[np.intp]) -> _Book:
        """The same for some of the rows."""
        if self.levels.ndim == 1:
            return self
        return replace(self, levels=self.levels[..., chosen], borders=self.borders[..., chosen])


def _book(levels: Floats, inputs: int) -> _Book:
    """Of levels as `Rounded` has them."""
    wide = levels.astype(np.float32)
    if wide.ndim == 1:
        return _Book(wide, _borders(wide), inputs)
    wide = np.moveaxis(wide, 0, 2).copy()
    return _Book(wide, (wide[:, 1:] + wide[:, :-1]) / 2, inputs // len(wide))


def feedback(weight: Floats, levels: Floats, scales: Floats, gram: Floats | None) -> Codes:
    """Round one input after the other; what each is wrong by, those after it make good.

    That is GPTQ (arXiv 2210.17323): with U the upper Cholesky factor of H^-1, rounding column j by
    an error e changes each later column k by -e U[j, k] / U[j, j]. Inputs of the largest second
    moments come first, while most are left to make good.

    Args:
        weight: float32 of shape [N, K].
        levels: increasing, of shape [levels] or [N, B, levels].
        scales: of shape [N, B].
        gram: damped, of shape [K, K]. Of one Gram for each row, and of None, no use is made.

    Returns:
        Codes of shape [N, K].
    """
    spread = np.broadcast_to(spread_blocks(scales, weight.shape[1]), weight.shape)
    factor = None if gram is None or gram.ndim == 3 else _factor_of_inverse(gram)
    if gram is None or factor is None:
        return _nearest(weight / spread, levels)
    order, upper = factor
    rest = np.ascontiguousarray(weight[:, order].T)
    spread = np.ascontiguousarray(spread[:, order].T)
    codes = np.empty(rest.shape, np.uint8)
    book = _book(levels, weight.shape[1])
    for start in range(0, len(rest), _BLOCK):
        block = slice(start, start + _BLOCK)
        errors = _feed_block(
            rest[block], spread[block], codes[block], upper[block, block], book, order[block]
        )
        rest[start + _BLOCK :] -= upper[block, start + _BLOCK :].T @ errors
    found = np.empty_like(codes)
    found[order] = codes
    return np.ascontiguousarray(found.T)


def _factor_of_inverse(gram: Floats) -> tuple[npt.NDArray[np.intp], Floats] | None:
    """The order of the inputs, and the upper Cholesky factor of the inverse in it."""
    order = np.argsort(-np.diagonal(gram), kind="stable")
    lower, failed = lapack.dpotrf(gram[np.ix_(order, order)].astype(np.float64), lower=1)
    if failed:
        return None
    inverse, failed = lapack.dpotri(lower, lower=1)
    if failed:
        return None
    inverse = np.tril(inverse) + np.tril(inverse, -1).T
    return order, np.asarray(cholesky(inverse), np.float32)


def _nearest(weight: Floats, levels: Floats) -> Codes:
    """As `nearest`, also where each block of each row has levels of its own."""
    if levels.ndim == 1:
        return nearest(weight, levels)
    book, codes = _book(levels, weight.shape[1]), np.empty(weight.shape[::-1], np.uint8)
    for column, numbers in enumerate(weight.T):
        codes[column] = book.codes(column, numbers)
    return np.ascontiguousarray(codes.T)


def _feed_block(
    rest: Floats,
    spread: Floats,
    codes: Codes,
    upper: Floats,
    book: _Book,
    columns: npt.NDArray[np.intp],
) -> Floats:
    """Round a block of columns, lying along the first axis, in place; their errors over U[j, j]."""
    errors = np.empty_like(rest)
    for j, numbers in enumerate(rest):
        code = book.codes(columns[j], numbers / spread[j])
        codes[j] = code
        errors[j] = (numbers - book.numbers(columns[j], code) * spread[j]) / upper[j, j]
        rest[j + 1 :] -= upper[j, j + 1 :, np.newaxis] * errors[j]
    return errors


def descend(
    weight: Floats,
    rounded: Rounded,
    gram: Floats | None,
    sweeps: int = SWEEPS,
    fixed: npt.NDArray[np.bool_] | None = None,
) -> Rounded:
    """Cyclic coordinate descent: each code in turn becomes the best one, given all others.

    See `rounding.descend`; here the best code is the level nearest to the best number.

    Args:
        weight: float32 of shape [N, K].
        rounded: to begin with.
        gram: damped.
        sweeps: at most so many; rows that one leaves as they are take no part in the next.
        fixed: codes that stay, of shape [N, K].
    """
    if gram is None:
        return rounded
    book = _book(rounded.levels, weight.shape[1])
    grams = gram[..., np.newaxis] if gram.ndim == 2 else np.moveaxis(gram, 0, 2).copy()
    spread = np.broadcast_to(spread_blocks(rounded.scales, weight.shape[1]), weight.shape).T.copy()
    codes = rounded.codes.T.copy()
    rest = (rounded.numbers() - weight).T.copy()
    held = None if fixed is None else fixed.T
    active = np.arange(len(weight))
    for _ in range(sweeps):
        current = codes[:, active]
        moved = _sweep(
            grams,
            rest,
            current,
            spread[:, active],
            book.of_rows(active),
            None if held is None else held[:, active],
        )
        codes[:, active] = current
        if not moved.any():
            break
        active, rest = active[moved], rest[:, moved]
        grams = grams if grams.shape[2] == 1 else grams[:, :, moved]
    return replace(rounded, codes=np.ascontiguousarray(codes.T))


def _sweep(
    grams: Floats,
    rest: Floats,
    codes: Codes,
    spread: Floats,
    book: _Book,
    held: npt.NDArray[np.bool_] | None,
) -> npt.NDArray[np.bool_]:
    """Set every code to the best once; which rows have changed. Rows lie along the last axis."""
    moved = np.zeros(codes.shape[1], np.bool_)
    for start in range(0, len(codes), _BLOCK):
        block = slice(start, start + _BLOCK)
        columns = grams[block]
        slope = (
            columns[..., 0] @ rest
            if columns.shape[2] == 1
            else np.einsum("jkn,kn->jn", columns, rest)
        )
        own, before = grams[block, block], rest[block].copy()
        for j, numbers in enumerate(rest[block]):
            at = start + j
            curvature = own[j, j]
            now = book.numbers(at, codes[at]) * spread[at]
            code = book.codes(at, (now - slope[j] * _TIE / curvature) / spread[at])
            change = book.numbers(at, code) * spread[at] - now
            worse = change * (2 * slope[j] + change * curvature) >= 0
            change[worse if held is None else worse | held[at]] = 0.0
            if not change.any():
                continue
            turned = change != 0
            codes[at, turned] = code[turned]
            numbers += change
            slope[j + 1 :] += own[j, j + 1 :] * change
        moved |= (rest[block] != before).any(axis=0)
    return moved


# ------------------------------------------------------------------ levels and scales


def refit_levels(
    weight: Floats, rounded: Rounded, gram: Floats | None, keeps_zero: bool = False
) -> Rounded:
    """The best levels for codes and scales as they are.

    The error is quadratic in the levels c: with P the map from levels to numbers,
    P c = scales * c[codes], its minimum solves P^T H P c = P^T H w. That is done by conjugate
    gradients, each step one product with the Gram; the matrix itself would take N of them.

    Args:
        weight: float32 of shape [N, K].
        rounded: whose levels are the start.
        gram: damped.
        keeps_zero: a level of 0 stays as it is.
    """
    count, inputs = len(rounded.levels), weight.shape[1]
    spread = np.broadcast_to(spread_blocks(rounded.scales, inputs), weight.shape)
    free = (rounded.levels != 0) | (not keeps_zero)

    def numbers(levels: Floats) -> Floats:
        return np.asarray(levels.astype(np.float32)[rounded.codes] * spread)

    def gathered(rows: Floats) -> Floats:
        sums = np.bincount(rounded.codes.reshape(-1), (rows * spread).reshape(-1), count)
        return np.asarray(sums * free)

    levels = rounded.levels.astype(np.float64)
    left = gathered(times(weight - numbers(levels), gram))
    direction, power = left.copy(), float(left @ left)
    first = power
    for _ in range(_STEPS):
        if power <= 1e-12 * first:
            break
        curved = gathered(times(numbers(direction), gram))
        curvature = float(direction @ curved)
        if curvature <= 0.0:
            break
        levels = levels + power / curvature * direction
        left = left - power / curvature * curved
        power, before = float(left @ left), power
        direction = left + power / before * direction
    order = np.argsort(levels, kind="stable")
    rank = np.empty(count, np.uint8)
    rank[order] = np.arange(count)
    return replace(
        rounded, codes=rank[rounded.codes], levels=levels[order].astype(rounded.levels.dtype)
    )


def refit_scales(weight: Floats, rounded: Rounded, gram: Floats | None) -> Rounded:
    """The best scale of each block for codes and levels as they are, one block after the other.

    For the numbers q of a block at scale 1 and all other blocks as they are, with R what the row is
    wrong by, the best change of the scale is -(q H R) / (q H q). A scale keeps its sign.

    Args:
        weight: float32 of shape [N, K].
        rounded: whose scales are the start.
        gram: damped.
    """
    blocks, inputs = rounded.scales.shape[1], weight.shape[1]
    units = rounded.levels.astype(np.float32)[rounded.codes]
    scales = rounded.scales.astype(np.float64)
    rest = rounded.numbers() - weight
    slope: Floats
    curved: Floats
    width = inputs // blocks
    for block in range(blocks):
        part = slice(block * width, (block + 1) * width)
        own = units[:, part]
        if gram is None:
            slope, curved = rest[:, part], own
        elif gram.ndim == 2:
            slope, curved = rest @ gram[:, part], own @ gram[part, part]
        else:
            slope = np.einsum("nk,nkj->nj", rest, gram[:, :, part])
            curved = np.einsum("nk,nkj->nj", own, gram[:, part, part])
        power = np.einsum("nk,nk->n", curved, own, dtype=np.float64)
        change = np.zeros(len(weight))
        np.divide(
            -np.einsum("nk,nk->n", slope, own, dtype=np.float64), power, out=change, where=power > 0
        )
        change[(scales[:, block] + change) * scales[:, block] <= 0] = 0.0
        scales[:, block] += change
        rest[:, part] += (change[:, np.newaxis] * own).astype(np.float32)
    kept = rounded.scales.dtype
    stored = scales.astype(kept)
    wide = stored.astype(np.float32)
    usable = np.isfinite(wide) & (wide * np.sign(scales) > 0)
    return replace(rounded, scales=np.where(usable, stored, rounded.scales).astype(kept))


def fit(
    weight: Floats,
    start: Rounded,
    gram: Floats | None,
    learns_levels: bool = True,
    learns_scales: bool = True,
    keeps_zeros: bool = False,
    refits: int = REFITS,
) -> Rounded:
    """Codes, levels and scales that change the outputs least, from levels and scales to begin with.

    Args:
        weight: float32 of shape [N, K], finite.
        start: its codes do not count.
        gram: not damped; None for nearest codes.
        learns_levels: levels are refitted.
        learns_scales: scales are refitted.
        keeps_zeros: weights of exactly 0 stay so, and the level 0, which must be there.
        refits: how often.
    """
    gram = damped(gram)
    fixed = weight == 0 if keeps_zeros else None
    codes = feedback(weight, start.levels.astype(np.float32), start.scales, gram)
    now = _pinned(replace(start, codes=codes), fixed)
    for _ in range(refits):
        now = descend(weight, now, gram, fixed=fixed)
        if learns_levels:
            now = refit_levels(weight, now, gram, keeps_zeros)
        if learns_scales:
            now = refit_scales(weight, now, gram)
        if gram is None:
            spread = spread_blocks(now.scales, weight.shape[1])
            now = _pinned(replace(now, codes=nearest(weight / spread, now.levels)), fixed)
    now = descend(weight, now, gram, fixed=fixed)
    return refit_levels(weight, now, gram, keeps_zeros) if learns_levels else now


def _pinned(rounded: Rounded, fixed: npt.NDArray[np.bool_] | None) -> Rounded:
    """The same with the code of 0 where it is fixed."""
    if fixed is None or not fixed.any():
        return rounded
    zero = np.uint8(np.flatnonzero(rounded.levels == 0)[0])
    return replace(rounded, codes=np.where(fixed, zero, rounded.codes))

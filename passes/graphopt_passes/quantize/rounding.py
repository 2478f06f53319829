"""Weights to int8 codes so that the output of the layer changes least, not the weight.

A linear layer computes y = W x, row c of W for output channel c. With codes C and one scale per row
it computes with Wq = s * C instead, and what its output is wrong by, on average over the inputs, is

    E |(Wq - W)[c] x|^2  =  (Wq - W)[c] H (Wq - W)[c]^T,        H = E[x x^T]

so all that has to be known of the inputs is their Gram matrix H, of shape [K, K]. A depthwise
convolution has one for each channel: [N, K, K]. Which of the two a function is given, it sees by
the number of dimensions. Grams must be symmetric and positive semi-definite; a factor before one
changes no code. Where a Gram is float32, so are the large products; else all is float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Floats = npt.NDArray[np.floating[Any]]
Codes = npt.NDArray[np.int8]
_Float = TypeVar("_Float", bound=np.floating[Any])

LOW, HIGH = -127, 127
"""Symmetric, as -128 has no counterpart."""

SHRINKS = tuple(1.0 - 0.02 * step for step in range(26))
"""1.0, 0.98, ... 0.5: the share of the largest weight that gets the largest code."""

SWEEPS = 10
"""QuantEase gains little after a few; rows that no sweep changes drop out before."""

DAMPING = 0.01
"""Share of the mean of the Gram's diagonal that is added to it, as in GPTQ (arXiv 2210.17323)."""

ENUMERATED = 12
"""Most weights in a row of which all roundings are tried: 2^12 patterns."""

_BLOCK = 128
_ROWS = 256
_TIE = 1.0 - 2.0**-16
"""A move that gains no more than rounding errors is none: without that, ties could go round."""


# ------------------------------------------------------------------ scales and nearest codes


def scales_of(
    weight: Floats, high: int = HIGH, shrink: float = 1.0, floor: float | Array = 0.0
) -> Array:
    """Symmetric scales: the largest magnitude in each row over the largest code.

    Args:
        weight: of shape [N, K], finite.
        high: the largest code.
        shrink: share of the largest magnitude that is not clipped.
        floor: no scale is less; one for all or of shape [N]. An int32 bias b with scale s_x * s_w
            needs s_w > |b| / (2^31 s_x).

    Returns:
        Of shape [N], in the weight's unit, positive. Every one is a float32 held as float64, so
        that codes are made for the scale that a file can hold. A row of zeros, or of numbers so
        small that its scale would be no normal float32, gets the largest scale of the others (1.0
        if there is none): codes are 0 with any, and a bias in its units is then neither beyond
        int32 nor coarser than that of all others.

    Raises:
        ValueError: a weight is not finite.
    """
    largest = np.abs(weight).max(axis=1, initial=0.0).astype(np.float64)
    if not np.isfinite(largest).all():
        raise ValueError("weights must be finite")
    usual = np.finfo(np.float32)
    scale = np.minimum(largest * (shrink / high), float(usual.max)).astype(np.float32)
    small = scale < usual.tiny
    scale[small] = scale[~small].max(initial=0.0) or 1.0
    floored: Array = np.maximum(scale, np.asarray(floor, np.float32)).astype(np.float64)
    return floored


def search_scales(
    weight: Floats,
    gram: Floats,
    high: int = HIGH,
    floor: float | Array = 0.0,
    shrinks: Sequence[float] = SHRINKS,
) -> Array:
    """For each row, the shrunk scale with which nearest codes do least harm to the output.

    Args:
        weight: of shape [N, K], finite.
        gram: [K, K] or [N, K, K].
        high: the largest code; the smallest is -high.
        floor: as in `scales_of`.
        shrinks: what is tried, in order of preference where the error is the same.

    Returns:
        Scales of shape [N], as `scales_of` returns them.
    """
    best = scales_of(weight, high, shrinks[0], floor)
    least = np.full(len(weight), np.inf)
    for shrink in shrinks:
        scale = scales_of(weight, high, shrink, floor)
        codes = round_nearest(weight, scale, -high, high)
        error = output_error(weight, dequantize(codes, scale), gram)
        better = error < least
        best[better], least[better] = scale[better], error[better]
    return best


def round_nearest(weight: Floats, scale: Array, low: int = LOW, high: int = HIGH) -> Codes:
    """The codes nearest to weight / scale, ties to even as QuantizeLinear rounds.

    Args:
        weight: of shape [N, K], finite.
        scale: of shape [N], positive.
        low: the smallest code.
        high: the largest code.

    Returns:
        Codes of shape [N, K].
    """
    return np.clip(np.rint(weight / scale[:, None]), low, high).astype(np.int8)


def dequantize(codes: Codes, scale: Array) -> Array:
    """The weights of shape [N, K] that codes of that shape and scales of shape [N] stand for."""
    return codes * scale[:, None]


# ------------------------------------------------------------------ what a rounding costs


def output_error(weight: Floats, quantized: Floats, gram: Floats) -> Array:
    """What each output is wrong by: diag((Wq - W) H (Wq - W)^T).

    Args:
        weight: W of shape [N, K].
        quantized: Wq of shape [N, K], dequantized.
        gram: H, [K, K] or [N, K, K].

    Returns:
        Mean squared errors of shape [N], in the unit of the output squared; none is negative.
    """
    return _power(np.subtract(quantized, weight, dtype=np.float64), gram)


def relative_output_error(weight: Floats, quantized: Floats, gram: Floats) -> Array:
    """`output_error` over the power of the output itself, diag(W H W^T).

    Args:
        weight: W of shape [N, K].
        quantized: Wq of shape [N, K], dequantized.
        gram: H, [K, K] or [N, K, K].

    Returns:
        Of shape [N], without unit; 0 where the error is 0, infinite where only the power is 0.
    """
    error, power = output_error(weight, quantized, gram), _power(weight, gram)
    without = np.where(error > 0.0, np.inf, 0.0)
    np.divide(error, power, out=without, where=power > 0.0)
    return without


def _power(rows: Floats, gram: Floats) -> Array:
    rows, gram = rows.astype(_precision(gram)), gram.astype(_precision(gram), copy=False)
    products = np.einsum("nk,nk->n", _times(rows, gram), rows, dtype=np.float64)
    power: Array = np.maximum(products, 0.0)
    return power


def _times(rows: npt.NDArray[_Float], gram: npt.NDArray[_Float]) -> npt.NDArray[_Float]:
    """Row n of [N, K] times the Gram, or times Gram n."""
    product: npt.NDArray[_Float] = (
        rows @ gram if gram.ndim == 2 else np.matmul(rows[:, None, :], gram)[:, 0, :]
    )
    return product


def _precision(gram: Floats) -> type[np.floating[Any]]:
    return np.float32 if gram.dtype == np.float32 else np.float64


# ------------------------------------------------------------------ better codes


def round_to_gram(
    weight: Floats,
    scale: Array,
    gram: Floats,
    sweeps: int = SWEEPS,
    damping: float = DAMPING,
) -> Codes:
    """The best codes that are known how to find: enumerated where there are few, then descended.

    Args:
        weight: of shape [N, K], finite.
        scale: of shape [N], positive.
        gram: [K, K] or [N, K, K].
        sweeps: at most so many.
        damping: share of the mean of a Gram's diagonal that is added to the diagonal.

    Returns:
        Codes of shape [N, K], 0 where the weight is; with damping 0 no row has a larger error than
        with nearest codes.
    """
    codes = round_nearest(weight, scale)
    if gram.ndim == 3 and weight.shape[1] <= ENUMERATED:
        codes = enumerate_exactly(weight, scale, gram, damping)
    return descend(weight, scale, gram, codes, sweeps, damping)


def descend(
    weight: Floats,
    scale: Array,
    gram: Floats,
    codes: Codes,
    sweeps: int = SWEEPS,
    damping: float = DAMPING,
    low: int = LOW,
    high: int = HIGH,
) -> Codes:
    """Cyclic coordinate descent: each code in turn becomes the best one, given all others.

    That is QuantEase (arXiv 2309.01885). In units of codes, with R = C - W/s and D = R H, the best
    real value of a code is C[:, j] - D[:, j] / H[j, j], the best code the nearest to it, and when
    it is set, D changes by what R[:, j] changed by, times row j of H. That is done for a block of
    columns at a time, whose D is one matrix product. No step increases the (damped) error, but for
    rounding errors.

    Args:
        weight: of shape [N, K], finite.
        scale: of shape [N], positive.
        gram: [K, K] or [N, K, K].
        codes: of shape [N, K], to begin with.
        sweeps: at most so many; rows that one leaves as they are take no part in the next.
        damping: share of the mean of a Gram's diagonal that is added to the diagonal: it draws
            codes to the nearest, where few samples say little about the inputs.
        low: the smallest code.
        high: the largest code.

    Returns:
        Codes of shape [N, K]. Those of weights that are 0, as after pruning, stay as they are;
        without damping, so do those of inputs that are always zero (H[j, j] = 0).
    """
    kind = _precision(gram)
    damped = _damped(gram.astype(kind, copy=False), damping)
    grams = damped[..., None] if damped.ndim == 2 else np.moveaxis(damped, 0, 2).copy()
    found = codes.copy()
    active = np.arange(len(weight))
    rest = np.subtract(codes, weight / scale[:, None]).T.astype(kind)
    free = (weight != 0).T
    for _ in range(sweeps):
        current = found[active].T.astype(kind)
        moved = _sweep(grams, rest, current, free[:, active], low, high)
        found[active] = current.T
        if not moved.any():
            break
        active, rest = active[moved], rest[:, moved]
        grams = grams if grams.shape[2] == 1 else grams[:, :, moved]
    return found


def _sweep(
    grams: Floats,
    rest: Floats,
    codes: Floats,
    free: npt.NDArray[np.bool_],
    low: int,
    high: int,
) -> npt.NDArray[np.bool_]:
    """Set every code to the best once. Rows lie along the last axis, so that they are adjacent.

    Args:
        grams: [K, K, 1], or [K, K, N].
        rest: R as [K, N], changed in place.
        codes: C as [K, N], changed in place.
        free: which of them may change, of shape [K, N].
        low: the smallest code.
        high: the largest code.

    Returns:
        Which rows have changed, of shape [N].
    """
    moved = np.zeros(codes.shape[1], np.bool_)
    for start in range(0, len(codes), _BLOCK):
        block = slice(start, start + _BLOCK)
        before = codes[block].copy()
        slope = _slope(grams[block], rest)
        _sweep_block(grams[block, block], slope, codes[block], free[block], low, high)
        changes = codes[block] - before
        rest[block] += changes
        moved |= changes.any(axis=0)
    return moved


def _sweep_block(
    grams: Floats,
    slope: Floats,
    codes: Floats,
    free: npt.NDArray[np.bool_],
    low: int,
    high: int,
) -> None:
    """The same within a block, with its own part of every argument and D in place of R."""
    curvature = np.einsum("kkn->kn", grams)
    best = np.zeros(curvature.shape, curvature.dtype)
    np.divide(-_TIE, curvature, out=best, where=curvature > 0.0)
    for j, code in enumerate(codes):
        change = np.rint(slope[j] * best[j]) * free[j]
        if not change.any():
            continue
        np.clip(code + change, low, high, out=change)
        change -= code
        code += change
        slope[j + 1 :] += grams[j, j + 1 :] * change


def _slope(grams: Floats, rest: Floats) -> Floats:
    """Some columns of D, as [J, N], from columns J of the Grams [J, K, 1 or N] and R as [K, N]."""
    if grams.shape[2] == 1:
        product: Floats = grams[..., 0] @ rest
        return product
    each: Floats = np.einsum("jkn,kn->jn", grams, rest)
    return each


def enumerate_exactly(
    weight: Floats,
    scale: Array,
    grams: Floats,
    damping: float = DAMPING,
    low: int = LOW,
    high: int = HIGH,
) -> Codes:
    """The best of all 2^K ways to round each weight of a row down or up.

    Args:
        weight: of shape [N, K], finite, with K at most `ENUMERATED`.
        scale: of shape [N], positive.
        grams: [N, K, K], or [K, K] for all rows.
        damping: share of the mean of a Gram's diagonal that is added to the diagonal.
        low: the smallest code.
        high: the largest code.

    Returns:
        Codes of shape [N, K]. Where it makes no difference, the nearest.

    Raises:
        ValueError: K is too large; `descend` is for that.
    """
    count, width = weight.shape
    if width > ENUMERATED:
        raise ValueError(f"rows of {width} weights have too many roundings; use descend")
    damped = np.broadcast_to(_damped(grams.astype(np.float64), damping), (count, width, width))
    patterns = (np.arange(1 << width)[:, None] >> np.arange(width) & 1).astype(np.float64)
    pairs = (patterns[:, :, None] * patterns[:, None, :]).reshape(len(patterns), -1)
    codes = round_nearest(weight, scale, low, high)
    for start in range(0, count, _ROWS):
        rows = slice(start, start + _ROWS)
        exact = weight[rows].astype(np.float64) / scale[rows, None]
        codes[rows] = _best_pattern(exact, codes[rows], damped[rows], patterns, pairs, low, high)
    return codes


def _best_pattern(
    exact: Array, nearest: Codes, grams: Array, patterns: Array, pairs: Array, low: int, high: int
) -> Codes:
    """Codes that are the nearest, or its neighbours beyond the exact value where a pattern has 1.

    With r = nearest - exact and t the step to the neighbour, pattern p changes the error by
    2 (p t) H r + (p t) H (p t), which is linear in p and in its pairs p p^T.
    """
    rest = nearest - exact
    other = np.clip(nearest - np.sign(rest), low, high)
    matters = np.einsum("nkk->nk", grams) > 0.0
    step = np.where(matters, other - nearest, 0.0)
    linear = 2.0 * step * _times(rest, grams)
    quadratic = grams * step[:, :, None] * step[:, None, :]
    change = linear @ patterns.T + quadratic.reshape(len(exact), -1) @ pairs.T
    best: Codes = (nearest + step * patterns[np.argmin(change, axis=1)]).astype(np.int8)
    return best


# ------------------------------------------------------------------ inputs that are quantized too


def asymmetric_target(
    weight: Floats, cross: Floats, gram: Floats, share: float = 1.0, damping: float = DAMPING
) -> Array:
    """The weight that makes, of the inputs as they are after quantization, the outputs from before.

    What to round then is W' that minimises E |W' xq - W x|^2 + l |W' - W|^2, namely

        W' = W + W (C - G) (G + l I)^-1,        C = E[x xq^T],  G = E[xq xq^T]

    and G is the Gram to round it with: the exact form of GPTAQ's asymmetric calibration (arXiv
    2504.02692). Without damping it is W C G^-1. The damping draws to W rather than to zero, so
    that W stays what it is, to the last bit, where quantization did not change the inputs.

    Args:
        weight: W of shape [N, K].
        cross: C, [K, K] or [N, K, K].
        gram: G, of the same shape.
        share: of the way from W to W' to go, in [0, 1]; less overfits less.
        damping: l as a share of the mean of a Gram's diagonal.

    Returns:
        Of shape [N, K].

    Raises:
        numpy.linalg.LinAlgError: the Gram is singular, which damping would have mended.
    """
    exact = gram.astype(np.float64)
    system = _damped(exact, damping)
    _set_dead_to_one(system)
    surplus = _times(weight.astype(np.float64), cross.astype(np.float64) - exact)
    return weight + share * _solve(system, surplus)


def _solve(systems: Array, rows: Array) -> Array:
    """Rows [N, K] times the inverse of [K, K], or each times that of its own in [N, K, K]."""
    if systems.ndim == 3:
        return np.asarray(np.linalg.solve(systems, rows[..., None])[..., 0], np.float64)
    # Importing scipy.linalg takes longer than most of the work here.
    from scipy.linalg import cho_factor, cho_solve

    solution: Array = cho_solve(cho_factor(systems, overwrite_a=True), rows.T).T
    return solution


def _damped(grams: npt.NDArray[_Float], damping: float) -> npt.NDArray[_Float]:
    """A copy with `damping` times the mean of the diagonal added to the diagonal."""
    result = grams.copy()
    diagonal = np.einsum("...kk->...k", result)
    diagonal += damping * diagonal.mean(axis=-1, keepdims=True)
    return result


def _set_dead_to_one(grams: Floats) -> None:
    """Of inputs that are always zero, so that there is an inverse; nothing depends on it."""
    diagonal = np.einsum("...kk->...k", grams)
    diagonal[diagonal <= 0.0] = 1.0

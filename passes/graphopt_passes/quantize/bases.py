"""Weights as sums of signs, W = a_1 B_1 + ... + a_M B_M, and as the three numbers -a, 0 and a.

Each B has the shape of the weight and is -1 or 1 throughout; each block of a row has its own a. So
M bases give a block 2^M levels, which lie on a lattice of M parameters. One basis with the mean
magnitude is XNOR-Net's weight (arXiv 1603.05279); several that start greedily on what is left and
then find codes and parameters in turn are alternating multi-bit quantization (arXiv 1802.00150);
-a, 0 and a are ternary weight networks (arXiv 1605.04711). Here all serve the outputs of the layer:
codes by feedback of errors and coordinate descent over the block's own lattice, parameters by
joint least squares.

Shapes are those of `codebooks`: weights [N, K], scales [N, B] for each basis.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from graphopt_passes.quantize.codebooks import (
    Codes,
    Floats,
    Rounded,
    damped,
    descend,
    feedback,
    fit,
    stored_scales,
    times,
)

SIGNS = np.array([-1.0, 1.0], np.float32)
TERNARY = np.array([-1.0, 0.0, 1.0], np.float32)

REFITS = 3
"""Of codes and scales in turn, with the Gram; more gain little."""

NEAREST_REFITS = 20
"""Of codes and scales in turn, where an error of each number counts by itself."""


# ------------------------------------------------------------------ lattices


@dataclass(frozen=True, eq=False)
class Lattice:
    """The levels that bases can make in each block.

    Attributes:
        scales: of the bases, not negative, float64 of shape [M, N, B].
        levels: increasing, float32 of shape [N, B, 2^M].
        patterns: of each level, with a bit for each basis that is 1 in it; uint8 of that shape.
    """

    scales: Floats
    levels: Floats
    patterns: Codes

    def rounded(self, codes: Codes) -> Rounded:
        """The weight that has the level of each code, [N, K], in its block."""
        return Rounded(codes, self.levels, _ones(codes))

    def signs(self, codes: Codes) -> Floats:
        """The bases that codes of shape [N, K] stand for: float32 of shape [M, N, K], -1 or 1."""
        patterns = _looked_up(self.patterns, codes)
        return np.stack([SIGNS[(patterns >> k) & 1] for k in range(len(self.scales))])

    def codes(self, signs: Floats) -> Codes:
        """The codes of bases of shape [M, N, K]."""
        bits = ((row > 0).astype(np.uint8) << k for k, row in enumerate(signs))
        places = np.argsort(self.patterns, axis=2, kind="stable").astype(np.uint8)
        return _looked_up(places, sum(bits, np.zeros(signs.shape[1:], np.uint8)))


def lattice_of(scales: Floats) -> Lattice:
    """The lattice of bases with scales of shape [M, N, B], which are not negative."""
    count = len(scales)
    patterns = np.arange(1 << count, dtype=np.uint8)
    signs = 2.0 * ((patterns[:, np.newaxis] >> np.arange(count)) & 1) - 1.0
    levels = np.einsum("pm,mnb->nbp", signs, scales)
    order = np.argsort(levels, axis=2, kind="stable")
    levels = np.take_along_axis(levels, order, axis=2).astype(np.float32)
    return Lattice(scales, levels, patterns[order])


def _looked_up(table: Codes, codes: Codes) -> Codes:
    """Entries of a table of shape [N, B, entries] for codes of shape [N, K]."""
    blocks = codes.reshape(*table.shape[:2], -1).astype(np.intp)
    return np.take_along_axis(table, blocks, axis=2).reshape(codes.shape)


def _ones(rows: Codes | Floats) -> Floats:
    return np.ones((len(rows), 1), np.float32)


# ------------------------------------------------------------------ sums of signs


def sum_of_signs(
    weight: Floats, bases: int, blocks: int, counted: Floats, gram: Floats | None
) -> tuple[Rounded, ...]:
    """Signs and scales whose sum changes the outputs least.

    Args:
        weight: float32 of shape [N, K], finite.
        bases: M, how many.
        blocks: B, of each row.
        counted: what the squared error of a number counts where it is alone, broadcastable to the
            weight.
        gram: not damped; None leaves it at that.

    Returns:
        For each basis its signs with its scales, of float16 where these fit.
    """
    signs, scales = nearest_signs(weight, bases, blocks, counted)
    gram = damped(gram)
    if gram is not None:
        lattice = lattice_of(scales)
        signs = lattice.signs(feedback(weight, lattice.levels, _ones(weight), gram))
        for _ in range(REFITS):
            signs, scales = joint_scales(weight, signs, scales, gram)
            lattice = lattice_of(scales)
            codes = descend(weight, lattice.rounded(lattice.codes(signs)), gram).codes
            signs = lattice.signs(codes)
        signs, scales = joint_scales(weight, signs, scales, gram)
    kept = stored_scales(scales)
    codes = (signs > 0).astype(np.uint8)
    return tuple(Rounded(code, SIGNS, scale) for code, scale in zip(codes, kept, strict=True))


def nearest_signs(
    weight: Floats, bases: int, blocks: int, counted: Floats
) -> tuple[Floats, Floats]:
    """Signs and scales of the least error where an error of each number counts by itself.

    One basis and two are exact. Of more, greedy ones come first, and then the nearest levels of the
    lattice and the best scales for these in turn, which never makes an error larger.

    Args:
        weight: of shape [N, K].
        bases: M.
        blocks: B.
        counted: broadcastable to the weight.

    Returns:
        float32 of shape [M, N, K] and float64 of shape [M, N, B].
    """
    shares = _shares(weight, blocks, counted)
    signs, scales = greedy_signs(weight, bases, blocks, counted)
    if bases == 2:
        signs, scales = np.zeros_like(signs), two_scales(weight, blocks, counted)
    for _ in range(NEAREST_REFITS if bases > 1 else 0):
        lattice = lattice_of(scales)
        found = lattice.signs(feedback(weight, lattice.levels, _ones(weight), None))
        if np.array_equal(found, signs):
            break
        signs, scales = _positive(found, _best_scales(weight, found, shares))
    return signs, scales


def two_scales(weight: Floats, blocks: int, counted: Floats) -> Floats:
    """The scales of two bases of the least error, where an error counts by itself: [2, N, B].

    Magnitudes get two levels, the sum of the scales and their difference: the two means of the
    best of all cuts through the sorted magnitudes.
    """
    counts, sums = _sorted_sums(weight, blocks, counted)
    low = 1.0 - counts, sums[:, :, -1:] - sums
    large = np.divide(sums, counts, out=np.zeros_like(sums), where=counts > 0)
    # A share that is left by rounding only is none.
    small = np.divide(low[1], low[0], out=np.zeros_like(sums), where=low[0] > 1e-12)
    best = np.argmax(large * sums + small * low[1], axis=2)[:, :, np.newaxis]
    large, small = (np.take_along_axis(means, best, axis=2)[:, :, 0] for means in (large, small))
    return np.stack([(large + small) / 2, np.maximum(large - small, 0.0) / 2])


def _sorted_sums(weight: Floats, blocks: int, counted: Floats) -> tuple[Floats, Floats]:
    """Of the largest magnitudes of each block what they count, and how much they are in all.

    Returns:
        For 1, 2, ... K / B of them the sums of h and of h |w|, each of shape [N, B, K / B].
    """
    shares = _shares(weight, blocks, counted)
    sizes = np.abs(weight.reshape(shares.shape)).astype(np.float64)
    order = np.argsort(-sizes, axis=2, kind="stable")
    counts = np.cumsum(np.take_along_axis(shares, order, axis=2), axis=2)
    sums = np.cumsum(np.take_along_axis(shares * sizes, order, axis=2), axis=2)
    return counts, sums


def greedy_signs(weight: Floats, bases: int, blocks: int, counted: Floats) -> tuple[Floats, Floats]:
    """Each basis the signs of what those before leave, its scale the mean magnitude of that."""
    shares = _shares(weight, blocks, counted)
    rest = weight.reshape(shares.shape).astype(np.float64)
    signs, scales = [], []
    for _ in range(bases):
        signs.append(SIGNS[(rest >= 0).astype(np.intp)])
        scales.append((np.abs(rest) * shares).sum(axis=2))
        rest = rest - signs[-1] * scales[-1][:, :, np.newaxis]
    return np.stack(signs).reshape(bases, *weight.shape), np.stack(scales)


def _shares(weight: Floats, blocks: int, counted: Floats) -> Floats:
    """What each number of a block counts, as a share of the block: float64 [N, B, K / B]."""
    wide = np.broadcast_to(counted, weight.shape).reshape(len(weight), blocks, -1)
    total = wide.sum(axis=2, keepdims=True, dtype=np.float64)
    # Where nothing counts, all numbers do alike.
    return np.where(total > 0, wide, 1.0) / np.where(total > 0, total, wide.shape[2])


def _best_scales(weight: Floats, signs: Floats, shares: Floats) -> Floats:
    """The best scales for signs, [M, N, B], by least squares in each block."""
    blocked = signs.reshape(len(signs), *shares.shape)
    normal = np.einsum("mnbj,lnbj,nbj->nbml", blocked, blocked, shares, optimize=True)
    aims = np.einsum("mnbj,nbj->nbm", blocked, weight.reshape(shares.shape) * shares)
    return np.moveaxis(_solved(normal, aims), 2, 0)


def joint_scales(
    weight: Floats, signs: Floats, scales: Floats, gram: Floats
) -> tuple[Floats, Floats]:
    """The best scales of all bases for signs as they are, one block after the other.

    For the bases B of a block, in all other blocks zero, and what the row is wrong by, R, the best
    change of their scales solves (B H B^T) a = B H R.

    Args:
        weight: of shape [N, K].
        signs: of shape [M, N, K].
        scales: of shape [M, N, B], to begin with.
        gram: damped.

    Returns:
        Signs, of a basis turned round where its scale was negative, and scales.
    """
    scales, blocks = scales.copy(), scales.shape[2]
    width = weight.shape[1] // blocks
    rest = weight - np.einsum("mnk,mnk->nk", signs, np.repeat(scales, width, axis=2))
    for block in range(blocks):
        part = slice(block * width, (block + 1) * width)
        own = signs[:, :, part]
        curved = np.stack([times(basis, gram[..., part, :]) for basis in own])
        normal = np.einsum("mnj,lnj->nml", curved[:, :, part], own, optimize=True)
        change = _solved(normal, np.einsum("mnk,nk->nm", curved, rest))
        scales[:, :, block] += change.T
        rest[:, part] -= np.einsum("nm,mnj->nj", change, own)
    return _positive(signs, scales)


def _solved(normal: Floats, aims: Floats) -> Floats:
    """The least solutions of equations [..., M, M] that may depend on each other."""
    inverse = np.linalg.pinv(normal.astype(np.float64), rcond=1e-6, hermitian=True)
    return np.asarray(np.einsum("...ml,...l->...m", inverse, aims))


def _positive(signs: Floats, scales: Floats) -> tuple[Floats, Floats]:
    """The same with no scale below zero."""
    turned = np.where(scales < 0, np.float32(-1), np.float32(1))
    width = signs.shape[2] // scales.shape[2]
    return signs * np.repeat(turned, width, axis=2), np.abs(scales)


# ------------------------------------------------------------------ three numbers


def ternary(weight: Floats, blocks: int, counted: Floats, gram: Floats | None) -> Rounded:
    """Codes of -1, 0 and 1 with scales that change the outputs least; see `sum_of_signs`."""
    scales = ternary_scales(weight, blocks, counted)
    stored = stored_scales(np.where(scales > 0, scales, 1.0))
    start = Rounded(np.zeros(weight.shape, np.uint8), TERNARY, stored)
    return fit(weight, start, gram, learns_levels=False)


def ternary_scales(weight: Floats, blocks: int, counted: Floats) -> Floats:
    """The scale of the least error for each block, where an error counts by itself: [N, B].

    Whichever it is, the numbers over half of it are not 0, so that they are the largest. Of all
    such choices that with the greatest (sum of h |w|)^2 / (sum of h) is best.
    """
    counts, sums = _sorted_sums(weight, blocks, counted)
    means = np.divide(sums, counts, out=np.zeros_like(sums), where=counts > 0)
    best = np.argmax(means * sums, axis=2)[:, :, np.newaxis]
    return np.take_along_axis(means, best, axis=2)[:, :, 0]

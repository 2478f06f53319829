"""Rows of a matrix that are nearly multiples of each other: which they are, and what they share.

Every row joins a leader, of which it is a multiple within a given cosine, or is a leader itself.
Rows are compared in blocks, by matrix products, and very many only with those that lie on the same
sides of a few random planes (Charikar 2002, Similarity estimation techniques from rounding
algorithms). So memory grows with the matrix, and not with the square of its rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

COMPARED_ROWS_MAXIMUM = 1 << 14
"""More rows are compared only with those of their bucket."""

BUCKET_ROWS = 1 << 10
"""In a bucket, about."""

ROUNDS = 6
"""Of buckets, each with planes of its own: near rows miss each other in one of them easily."""

BLOCK, CHUNK = 1 << 10, 1 << 12
"""So many rows are compared with so many leaders at a time: 16 MB of cosines."""

ROUNDING = 1e-6
"""Cosines that float32 cannot tell from each other."""

FIT_ROUNDS = 8
"""The power method turns by the square of the sine at each, and that is small for near rows."""


def distinct_rows(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first of each kind of rows that are equal, in order, and which of these each row is.

    Args:
        matrix: of shape [rows, inputs], of any type of floating point without NaN.

    Returns:
        Row numbers of shape [kinds], and int64 of shape [rows] into these.
    """
    # Minus zero is zero; bytes say else.
    rows = np.ascontiguousarray(matrix + matrix.dtype.type(0))
    whole = rows.view(np.dtype((np.void, rows.dtype.itemsize * rows.shape[1])))[:, 0]
    _, first, kind = np.unique(whole, return_index=True, return_inverse=True)
    order = np.argsort(first)
    return first[order], np.argsort(order)[kind]


def leaders_of(rows: np.ndarray, similarity: float, generator: np.random.Generator) -> np.ndarray:
    """For each row the leader that it is nearly a multiple of, or itself: int64 of shape [rows].

    Rows of zeros lead themselves.

    Args:
        rows: float32 of shape [rows, inputs].
        similarity: the smallest |cosine| between a row and its leader. 1 stands for multiples, as
            far as float32 can tell.
        generator: chooses planes where there are very many rows.
    """
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    units = rows / np.where(norms > 0, norms, 1)
    leader = np.arange(len(rows))
    for bucket in _buckets(units, generator):
        free = bucket[leader[bucket] == bucket]
        # A row that leads joins no other, which its rows need not be near to.
        leads = np.bincount(leader, minlength=len(rows))[free] > 1
        free = free[np.argsort(~leads, kind="stable")]
        leader[free] = _led(units, free, int(leads.sum()), similarity - ROUNDING)
    return leader


def _buckets(units: np.ndarray, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """Row numbers to compare with each other: all at once, or in rounds."""
    if len(units) <= COMPARED_ROWS_MAXIMUM:
        yield np.arange(len(units))
        return
    bits = int(np.ceil(np.log2(len(units) / BUCKET_ROWS)))
    for _ in range(ROUNDS):
        planes = generator.standard_normal((units.shape[1], bits + 1)).astype(np.float32)
        sides = units @ planes > 0
        # A row and its opposite are multiples of each other.
        sides = sides[:, 1:] ^ sides[:, :1]
        codes = sides @ (1 << np.arange(bits))
        order = np.argsort(codes, kind="stable")
        yield from np.split(order, np.flatnonzero(np.diff(codes[order])) + 1)


def _led(units: np.ndarray, rows: np.ndarray, leading: int, threshold: float) -> np.ndarray:
    """For each of some rows its leader among these.

    Args:
        units: of all rows.
        rows: their numbers; the first join nobody.
        leading: how many are the first.
        threshold: the smallest |cosine|.
    """
    found, leader = rows[:0], rows.copy()
    for start in range(0, len(rows), BLOCK):
        block = rows[start : start + BLOCK]
        stays = np.arange(start, start + len(block)) < leading
        nearest, cosines = _nearest(units, block, found)
        alone = stays | (cosines < threshold)
        near = np.abs(units[block[alone]] @ units[block[alone]].T) >= threshold
        alone[alone] = _first_of(near, stays[alone])
        found = np.concatenate([found, block[alone]])
        nearest, _ = _nearest(units, block[~alone], found)
        leader[start : start + len(block)][~alone] = nearest
    return leader


def _nearest(
    units: np.ndarray, rows: np.ndarray, leaders: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """For each row the leader of the largest |cosine|, and this; -1 where there are none."""
    nearest, largest = rows.copy(), np.full(len(rows), -1, np.float32)
    for start in range(0, len(leaders), CHUNK):
        chunk = leaders[start : start + CHUNK]
        cosines = np.abs(units[rows] @ units[chunk].T)
        place, cosine = cosines.argmax(axis=1), cosines.max(axis=1)
        nearest = np.where(cosine > largest, chunk[place], nearest)
        largest = np.maximum(cosine, largest)
    return nearest, largest


def _first_of(near: np.ndarray, stays: np.ndarray) -> np.ndarray:
    """Which rows lead: those that are near to no leader before them.

    Args:
        near: bool of shape [rows, rows].
        stays: rows that lead in any case.
    """
    before = np.tril(near, -1)
    leads = stays | ~before.any(axis=1)
    for row in np.flatnonzero(~leads):
        leads[row] = not (before[row] & leads).any()
    return leads


def fit_rows(
    rows: np.ndarray, seen: np.ndarray, counts: np.ndarray, leader: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rows that groups share, and the factors that bring them closest to the rows.

    A group's is the leading direction s of its rows as the outputs see them, the one with the least
    sum of c_i |v_i - a_i s|^2. The power method finds it: a_i = v_i s / s s, s = sum of c_i a_i v_i
    over the sum of c_i a_i^2. A row that shares with no other stays bit for bit, with the factor 1.

    Args:
        rows: of shape [rows, inputs], of any type of floating point.
        seen: float32, the rows v times a root of the Gram matrix of the inputs, or as they are.
        counts: how often each row occurs, c.
        leader: of each row, see `leaders_of`.

    Returns:
        The shared rows, of shape [groups, inputs] and the type of the rows; which of these each
        row has, int64 of shape [rows]; and factors, float32 of shape [rows].
    """
    first, group = np.unique(leader, return_inverse=True)
    shared, factors = rows[first], np.ones(len(rows), np.float32)
    many = np.flatnonzero(np.bincount(group)[group] > 1)
    if not len(many):
        return shared, group, factors
    many = many[np.argsort(group[many], kind="stable")]
    groups, starts, place = np.unique(group[many], return_index=True, return_inverse=True)
    own, weights = seen[many], counts[many].astype(np.float64)

    def mean(of: np.ndarray, factor: np.ndarray) -> np.ndarray:
        summed = np.add.reduceat((weights * factor)[:, np.newaxis] * of, starts, axis=0)
        return np.asarray(summed / np.add.reduceat(weights * factor**2, starts)[:, np.newaxis])

    def factors_of(direction: np.ndarray) -> np.ndarray:
        power = np.einsum("gk,gk->g", direction, direction)[place]
        return np.asarray(np.einsum("nk,nk->n", own, direction[place]) / power)

    factor = factors_of(seen[first[groups]].astype(np.float64))
    for _ in range(FIT_ROUNDS):
        last, factor = factor, factors_of(mean(own, factor))
    shared[groups], factors[many] = mean(rows[many], last), factor
    return shared, group, factors

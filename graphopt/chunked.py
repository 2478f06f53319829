"""Second moments of what a layer multiplies with its weight, by chunks of the samples.

How much they differ from chunk to chunk says how sure a figure is that follows from them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from graphopt.statistics import Patches, rows_of

CHUNKS = 16
"""Enough to resample, and few enough that each sees several samples of a hundred."""


@dataclass
class Chunks:
    """Sums of squares of the rows that a layer multiplies with its weight, by disjoint chunk.

    Array number i goes to chunk i % CHUNKS.

    Attributes:
        patches: geometry of a Conv; None for a product with the last axis.
        squares: sums over the rows of a chunk, float64 of shape [chunks, group, inputs].
        rows: how many rows there were in each chunk, int64 of shape [chunks].
        arrays: how many arrays there were.
    """

    patches: Patches | None = None
    squares: np.ndarray = field(default_factory=lambda: np.zeros((CHUNKS, 0, 0)))
    rows: np.ndarray = field(default_factory=lambda: np.zeros(CHUNKS, np.int64))
    arrays: int = 0

    def add(self, array: np.ndarray) -> None:
        """Take in one array of floating point; see `rows_of`."""
        rows = rows_of(array, self.patches, self.arrays)
        chunk = self.arrays % CHUNKS
        self.arrays += 1
        if not rows.shape[1]:
            return
        if not self.rows.any():
            self.squares = np.zeros((CHUNKS, rows.shape[0], rows.shape[2]))
        self.squares[chunk] += np.einsum("gri,gri->gi", rows, rows, dtype=np.float64)
        self.rows[chunk] += rows.shape[1]

    @property
    def moments(self) -> np.ndarray:
        """Second moments of the chunks that have rows, float64 of shape [chunks, group, inputs]."""
        used = self.rows > 0
        return np.asarray(self.squares[used] / self.rows[used, np.newaxis, np.newaxis])

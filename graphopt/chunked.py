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

    Array number i goes to chunk i % CHUNKS, and is the i // CHUNKS-th there: chunks of equal arrays
    are equal, to the last bit.

    Attributes:
        patches: geometry of a Conv; None for a product with the last axis.
        means: of the squares of the rows of a chunk, float64 of shape [chunks, group, inputs].
        rows: how many rows there were in each chunk, int64 of shape [chunks].
        arrays: how many arrays there were.
    """

    patches: Patches | None = None
    means: np.ndarray = field(default_factory=lambda: np.zeros((CHUNKS, 0, 0)))
    rows: np.ndarray = field(default_factory=lambda: np.zeros(CHUNKS, np.int64))
    arrays: int = 0

    def add(self, array: np.ndarray) -> None:
        """Take in one array of floating point; see `rows_of`."""
        place, chunk = divmod(self.arrays, CHUNKS)
        rows = rows_of(array, self.patches, place)
        self.arrays += 1
        if not rows.shape[1]:
            return
        if not self.rows.any():
            self.means = np.zeros((CHUNKS, rows.shape[0], rows.shape[2]))
        self.rows[chunk] += rows.shape[1]
        mean = np.einsum("gri,gri->gi", rows, rows, dtype=np.float64) / rows.shape[1]
        # In this form, the mean of what is always the same is just that.
        self.means[chunk] += (mean - self.means[chunk]) * (rows.shape[1] / self.rows[chunk])

    @property
    def moments(self) -> np.ndarray:
        """Second moments of the chunks that have rows, float64 of shape [chunks, group, inputs]."""
        return np.asarray(self.means[self.rows > 0])

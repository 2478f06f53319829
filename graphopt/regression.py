"""What a layer reads, beside what it should give: the moments of a least-squares problem."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from graphopt.statistics import ROW_MAGNITUDE_MAXIMUM, Patches, chosen_rows, spread_evenly


@dataclass
class Regression:
    """Moments of the rows that a layer multiplies with its weight, and of the rows it should give.

    Attributes:
        patches: geometry of a Conv; None for a product with the last axis.
        total: sum over rows z of z z^T, float64 of shape [group, inputs, inputs].
        cross: sum over rows of t z^T, float64 of shape [group, outputs, inputs].
        sums: sum over rows of z, float64 of shape [group, inputs].
        aims: sum over rows of t, float64 of shape [group, outputs].
        squares: sum over rows of t squared, the same.
        rows: how many rows there were.
        arrays: how many arrays there were.
    """

    patches: Patches | None = None
    total: np.ndarray = field(default_factory=lambda: np.zeros((0, 0, 0)))
    cross: np.ndarray = field(default_factory=lambda: np.zeros((0, 0, 0)))
    sums: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    aims: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    squares: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    rows: int = 0
    arrays: int = 0

    def add(self, array: np.ndarray, aim: np.ndarray) -> None:
        """Take in what the layer reads, and what it should give for that.

        Args:
            array: [..., inputs]; for a Conv [batch, channels, ...].
            aim: [..., outputs]; for a Conv [batch, outputs, ...], as the Conv gives it. An array
                of any other number of rows is left out, with what is read.
        """
        if not self._belong_together(array, aim):
            self.arrays += 1
            return
        with np.errstate(over="ignore"):
            read = np.asarray(chosen_rows(array, self.patches, self.arrays), np.float32)
            given = np.asarray(self._aims_of(aim, read.shape[2]), np.float32)
        self.arrays += 1
        with np.errstate(invalid="ignore"):
            usable = np.logical_and.reduce(
                [(np.abs(rows) <= ROW_MAGNITUDE_MAXIMUM).all(axis=(0, 2)) for rows in (read, given)]
            )
        if not usable.any():
            return
        read, given = read[:, usable], given[:, usable]
        across = given.transpose(0, 2, 1)
        found = (
            np.matmul(read.transpose(0, 2, 1), read).astype(np.float64),
            np.matmul(across, read).astype(np.float64),
            read.sum(1, dtype=np.float64),
            given.sum(1, dtype=np.float64),
            np.square(given, dtype=np.float64).sum(1),
        )
        before = (self.total, self.cross, self.sums, self.aims, self.squares)
        if self.rows:
            for new, old in zip(found, before, strict=True):
                new += old
        self.total, self.cross, self.sums, self.aims, self.squares = found
        self.rows += read.shape[1]

    def _belong_together(self, array: np.ndarray, aim: np.ndarray) -> bool:
        """There is a row that the layer should give for each that it reads."""
        if self.patches is None:
            return array.shape[:-1] == aim.shape[:-1]
        return (len(aim), *aim.shape[2:]) == (len(array), *self.patches.places(array.shape[2:]))

    def _aims_of(self, aim: np.ndarray, inputs: int) -> np.ndarray:
        """Rows at the same places as those of what is read: [group, rows, outputs of a group]."""
        if self.patches is None:
            rows = aim.reshape(-1, aim.shape[-1])
            return rows[np.newaxis, spread_evenly(len(rows), inputs, self.arrays)]
        group, places = self.patches.group, (aim.shape[0], *aim.shape[2:])
        chosen = spread_evenly(int(np.prod(places)), inputs, self.arrays)
        first, *others = np.unravel_index(chosen, places)
        index: tuple[Any, ...] = (slice(None), first, *others)
        rows = np.moveaxis(aim, 1, 0)[index]
        return np.asarray(rows.reshape(group, -1, len(chosen)).transpose(0, 2, 1))

    @property
    def means(self) -> np.ndarray:
        """Of what is read, float64 of shape [group, inputs]."""
        return np.asarray(self.sums / max(self.rows, 1))

    @property
    def aim_means(self) -> np.ndarray:
        """Of what should be given, float64 of shape [group, outputs]."""
        return np.asarray(self.aims / max(self.rows, 1))

    def moments(self, central: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """E z z^T, E t z^T and E t^2; about the means, where a constant can be added to t.

        Returns:
            float64 of shapes [group, inputs, inputs], [group, outputs, inputs], [group, outputs].
        """
        count = max(self.rows, 1)
        total, cross, squares = self.total / count, self.cross / count, self.squares / count
        if not central:
            return total, cross, squares
        read, given = self.means, self.aim_means
        return (
            total - read[:, :, np.newaxis] * read[:, np.newaxis, :],
            cross - given[:, :, np.newaxis] * read[:, np.newaxis, :],
            squares - np.square(given),
        )

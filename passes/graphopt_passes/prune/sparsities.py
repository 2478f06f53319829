"""How many entries each weight keeps, where the outputs say how much an error in it matters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graphopt.contract import Context
from graphopt.encoding import Encoding
from graphopt_passes.prune.entries import (
    Criterion,
    Floats,
    Selection,
    damped,
    largest_alone,
    refitted,
    squared_error,
    worth_of,
)
from graphopt_passes.quantize.narrow_weights import Solution, Target, correct_bias
from graphopt_passes.quantize.narrowing import Form, Problem

SPARSITIES = tuple(share / 20 for share in range(1, 20))
"""What is chosen from."""

PROBED = 0.6
"""The sparsity at which each weight is tried alone."""

ENTRY_BYTES = 4
"""In which an entry that stays is counted, for the choice."""

_STEPS = 15


@dataclass(frozen=True, eq=False)
class Dense(Solution):
    """Other numbers for a weight, in its type.

    Attributes:
        matrix: float, of shape [rows, inputs].
    """

    matrix: Floats | None = None

    def numbers(self) -> np.ndarray:
        """The weight, float32 of shape [rows, inputs]."""
        assert self.matrix is not None
        return np.asarray(self.matrix, np.float32)


@dataclass(frozen=True)
class Pruned:
    """A weight of which a share of the entries is zero.

    Attributes:
        sparsity: that share.
        criterion: by which entries stay.
    """

    sparsity: float
    criterion: Criterion

    @property
    def label(self) -> str:
        """For the ledger."""
        return f"{self.sparsity:.0%} zeros"

    def keep(self, target: Target) -> int:
        """How many entries stay."""
        return round(target.size * (1 - self.sparsity))

    def stored_bytes(self, target: Target) -> int:
        """What the entries that stay count."""
        return ENTRY_BYTES * self.keep(target)

    def solve(self, problem: Problem) -> Solution:
        """The weight, refitted; all entries are chosen at once, by what they are worth."""
        weight, moments = problem.weight, moments_of(problem)
        selection, keep = Selection(self.criterion), self.keep(problem.target)
        if moments is None:
            return Dense((), writer=_write, matrix=largest_alone(weight, keep, selection))
        mask = selection.largest(worth_of(weight, moments, self.criterion), keep)
        matrix = refitted(weight, moments, mask, _STEPS)
        return Dense((), writer=_write, matrix=matrix)


def moments_of(problem: Problem) -> Floats | None:
    """What the weight is multiplied with, of shape [G, K, K], damped; None if it is not known."""
    inputs = problem.weight.shape[1]
    if problem.gram is None:
        return None
    gram = np.asarray(problem.gram, np.float64).reshape(-1, inputs, inputs)
    means = None if problem.means is None else problem.means[: len(gram)]
    return damped(gram, np.iinfo(np.int32).max, means)


def estimates_of_pruned(problem: Problem, forms: Sequence[Form]) -> list[float]:
    """The squared errors of sparsities: what their entries are worth, all together.

    Entries that make good for each other are worth more together; how much more is taken from one
    sparsity that is tried.
    """
    moments = moments_of(problem)
    sparse = [form for form in forms if isinstance(form, Pruned)]
    probe = Pruned(PROBED, sparse[0].criterion)
    weight, scale = problem.weight, 1.0
    worth = np.abs(weight) if moments is None else worth_of(weight, moments, probe.criterion)
    squares = np.sort(np.square(worth, dtype=np.float64), axis=None)
    costs = np.concatenate([[0.0], np.cumsum(squares)])
    if moments is not None:
        tried = squared_error(weight, probe.solve(problem).numbers(), moments)
        scale = tried / max(costs[worth.size - probe.keep(problem.target)], 1e-300)
    return [float(costs[worth.size - form.keep(problem.target)] * scale) for form in sparse]


def _write(target: Target, solution: Solution, encoding: Encoding, context: Context) -> None:
    """Store other numbers in the place of a weight."""
    value = target.value
    array = target.stored(solution.numbers()).astype(target.dtype.numpy())
    value.const_value = context.tensor(array, target.name)
    correct_bias(target, solution, encoding, context)

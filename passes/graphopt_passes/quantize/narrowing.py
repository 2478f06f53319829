"""Makes the weights of a model narrow, each in the form that a budget allows.

How much an error in one weight matters is measured: each is rounded coarsely, alone, and the
outputs are compared with those of the model as it was given. What another form of that weight does
follows from how much closer it is to the weight, as the outputs were seen to weigh its inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

import numpy as np
import onnx_ir as ir

from graphopt.contract import Change, Context
from graphopt.encoding import NODES_BYTES
from graphopt.observe import Answers
from graphopt.statistics import Gram
from graphopt.validation import OutputError, worst
from graphopt_passes.quantize.allocation import Choice, closest_within, smallest_within
from graphopt_passes.quantize.codebooks import damped, squared_error
from graphopt_passes.quantize.narrow_weights import Solution, Target, targets_of, write

COMPARED_SAMPLES, ALONE_SAMPLES = 32, 8
"""On so many samples at most errors are measured: of all weights, and at least of each alone."""

ALONE_RUNS_MAXIMUM = 1024
"""Where there are many weights, fewer samples are taken, so that there are no more runs."""

ROUNDS = 4
"""How often the budget of the sum is corrected by what all weights together were seen to do."""

GRAM_BYTES_MAXIMUM = 1 << 27
"""A Gram matrix for each row of a weight takes no more; else all rows have their mean."""


@dataclass(frozen=True, eq=False)
class Problem:
    """What is to be rounded.

    Attributes:
        target: the weight.
        weight: float32 of shape [rows, inputs].
        gram: second moments of the inputs, or their covariance where the bias makes good for the
            rest; None where they are not known.
        means: of the inputs, [rows or 1, inputs]; None where no bias can make good for them.
    """

    target: Target
    weight: np.ndarray
    gram: np.ndarray | None
    means: np.ndarray | None

    @property
    def diagonal(self) -> np.ndarray:
        """What a squared error of each number counts, broadcastable to the weight."""
        if self.gram is None:
            return np.ones((1, 1), np.float32)
        moments = np.atleast_2d(np.einsum("...kk->...k", self.gram))
        # A variance of nothing may come out below zero.
        return np.asarray(np.maximum(moments, 0.0), np.float32)

    def error(self, solution: Solution) -> float:
        """The squared error of the outputs of the layer."""
        return squared_error(self.weight, solution.numbers(), self.gram)

    def with_shift(self, solution: Solution) -> Solution:
        """The same, with what the bias has to make good for."""
        if self.means is None:
            return solution
        change = self.weight - solution.numbers()
        return replace(
            solution, shift=np.einsum("nk,nk->n", change, np.broadcast_to(self.means, change.shape))
        )


class Form(Protocol):
    """A way to make a weight narrow."""

    @property
    def label(self) -> str:
        """For the ledger: "16 clusters", say."""

    def stored_bytes(self, target: Target) -> int:
        """What the numbers take in the file."""

    def solve(self, problem: Problem) -> Solution:
        """The weight in this form."""


Compare = Callable[[ir.Model], tuple[OutputError, ...]]

Estimates = Callable[[Problem, Sequence[Form]], Sequence[float]]
"""The squared errors that forms make in the outputs of a layer, in any unit that they share."""


@dataclass(frozen=True)
class Budget:
    """What limits how narrow weights become.

    Attributes:
        bits: for each number on average, codebooks and scales included; None for no such limit.
        error: relative L2 error of the worst output that they may add, in its square.
    """

    bits: float | None
    error: float


@dataclass
class Narrowing:
    """Chooses forms for the weights of one model.

    Attributes:
        model: not modified, but by `run`.
        context: with samples, or without.
        forms: from the narrowest to the widest.
        probe: the form in which each weight is tried alone.
        estimates: how forms compare.
        change: told what is done, and what is left alone.
        targets: of the model.
        damping: share of the mean of a Gram's diagonal that is added to it, for what a few samples
            do not show.
        foretells: an estimate is made also where there is only one form.
    """

    model: ir.Model
    context: Context
    forms: Sequence[Form]
    probe: Form
    estimates: Estimates
    change: Change
    targets: Sequence[Target]
    damping: float = 0.0
    foretells: bool = False
    _answers: Answers = field(default_factory=dict)
    _solutions: dict[tuple[int, str], Solution] = field(default_factory=dict)
    _measures: dict[int, tuple[Compare, float]] = field(default_factory=dict)

    def run(self, budget: Budget) -> None:
        """Rewrite the model, within the budget."""
        layers = [t.layer for t in self.targets if t.layer is not None]
        if self.has_samples and layers:
            self._answers = self.context.observe(self.model, [one.ask("gram") for one in layers])
        if len(self.forms) == 1:
            chosen: list[Form | None] = [self.forms[0]] * len(self.targets)
        else:
            chosen = self._chosen(budget)
        estimate = self._estimate(chosen) if len(self.forms) > 1 or self.foretells else None
        self.context.progress(f"estimated: {estimate}")
        solutions = self._solved(chosen)
        if estimate is not None and solutions:
            seen = f"; measured {self._square(solutions) ** 0.5:.3g}" if self.has_samples else ""
            self.change.note(f"estimated {estimate}{seen}")
        write(self.model, self.targets, solutions, self.context)
        for target, form in zip(self.targets, chosen, strict=True):
            if form is None:
                self.change.skip(target.value, "it is smaller, or better, as it is")
            else:
                self.change.count(f"weight of {target.operator} stored as {form.label}")

    @property
    def has_samples(self) -> bool:
        """There is something to look at the model on."""
        return self.context.observer is not None

    # -------------------------------------------------------------- solutions

    def _problem(self, index: int) -> Problem:
        target = self.targets[index]
        weight = target.matrix()
        gram = None
        if target.layer is not None and self._answers:
            gram = self._answers[target.layer.ask("gram")]
        if not isinstance(gram, Gram) or not gram.rows or not np.isfinite(gram.total).all():
            return Problem(target, weight, None, None)
        assert target.layer is not None
        corrects = target.layer.can_correct_bias
        moments = gram.covariance if corrects else gram.mean
        means = np.repeat(gram.means, len(weight) // len(gram.means), axis=0) if corrects else None
        known = _for_rows(moments, len(weight))
        return Problem(target, weight, damped(known, self.damping), means)

    def _solution(self, index: int, form: Form) -> Solution:
        key = index, form.label
        if key not in self._solutions:
            problem = self._problem(index)
            self._solutions[key] = problem.with_shift(form.solve(problem))
        return self._solutions[key]

    def _solved(self, chosen: Sequence[Form | None]) -> dict[int, Solution]:
        found = {}
        for index, form in enumerate(chosen):
            if form is not None:
                self.context.progress(f"rounding weight {index + 1} of {len(chosen)}")
                found[index] = self._solution(index, form)
        return found

    # -------------------------------------------------------------- the choice

    def _chosen(self, budget: Budget) -> list[Form | None]:
        """A form for each weight, or None for it as it is."""
        choices = self._choices
        if budget.bits is not None:
            numbers = sum(target.size for target in self.targets)
            extra = NODES_BYTES * len(self.targets)
            return self._named(closest_within(choices, numbers * budget.bits / 8 + extra))
        limit = budget.error**2
        if not self.has_samples:
            return self._named(smallest_within(choices, limit))
        return self._within(choices, limit)

    @cached_property
    def _choices(self) -> list[list[Choice]]:
        """For each weight what it costs as it is, then in each form."""
        squares = self._squares()
        return [
            [Choice(t.stored_bytes, 0.0)]
            + [
                Choice(form.stored_bytes(t) + NODES_BYTES, square)
                for form, square in zip(self.forms, of_forms, strict=True)
            ]
            for t, of_forms in zip(self.targets, squares, strict=True)
        ]

    def _estimate(self, chosen: Sequence[Form | None]) -> str:
        """What forms are expected to take in the file, and to do to the worst output."""
        taken = [
            of_weight[0 if form is None else 1 + self.forms.index(form)]
            for of_weight, form in zip(self._choices, chosen, strict=True)
        ]
        before = sum(of_weight[0].stored_bytes for of_weight in self._choices)
        after = sum(choice.stored_bytes for choice in taken)
        error = sum(choice.square for choice in taken) ** 0.5
        what = "relative L2 error" if self.has_samples else "relative L2 error of the weights"
        return f"{before:,} -> {after:,} bytes of weights, {what} {error:.3g}"

    def _within(self, choices: Sequence[Sequence[Choice]], limit: float) -> list[Form | None]:
        """The smallest choice that was seen to add no more than the limit to the squared error."""
        asked, best = limit, None
        for _ in range(ROUNDS):
            chosen = self._named(smallest_within(choices, asked))
            square = self._square(self._solved(chosen))
            if square <= limit:
                best = chosen
                if square >= 0.8 * limit:
                    break
            asked *= 0.95 * limit / max(square, 0.1 * limit)
        return best if best is not None else [None] * len(self.targets)

    def _named(self, chosen: Sequence[int]) -> list[Form | None]:
        return [None if index == 0 else self.forms[index - 1] for index in chosen]

    def _squares(self) -> list[list[float]]:
        """For each weight and form, what it adds to the squared error of the outputs."""
        found = []
        samples = min(COMPARED_SAMPLES, ALONE_RUNS_MAXIMUM // len(self.targets))
        samples = max(samples, ALONE_SAMPLES)
        for index, target in enumerate(self.targets):
            self.context.progress(f"measuring weight {index + 1} of {len(self.targets)}")
            problem = self._problem(index)
            probe, *estimates = self.estimates(problem, [self.probe, *self.forms])
            if self.has_samples:
                square = self._square({index: self._solution(index, self.probe)}, samples)
                per_error = square / max(probe, 1e-30)
            else:
                # Nothing is known but how large the numbers are: each weight counts alike.
                power = np.einsum("nk,nk->", problem.weight, problem.weight, dtype=np.float64)
                per_error = 1 / max(float(power) * len(self.targets), 1e-30)
            self.context.progress(f"{target.name}: {per_error * probe:.3g}")
            found.append([per_error * estimate for estimate in estimates])
        return found

    def _square(self, solutions: Mapping[int, Solution], samples: int = COMPARED_SAMPLES) -> float:
        """What solutions add to the squared error of the worst output."""
        candidate = self.model.clone()
        # What is only tried goes to no file.
        context = replace(self.context, scratch=None)
        targets = targets_of(candidate, 1, Change())
        by_name = {target.name: target for target in targets}
        write(candidate, [by_name[t.name] for t in self.targets], solutions, context)
        if samples not in self._measures:
            compare = self.context.against(self.context.original, samples)
            self._measures[samples] = compare, worst(compare(self.model)) ** 2
        compare, before = self._measures[samples]
        return max(worst(compare(candidate)) ** 2 - before, 0.0)


def _for_rows(moments: np.ndarray, rows: int) -> np.ndarray:
    """One matrix for all rows where there is one group; else one for each row.

    Args:
        moments: of shape [group, inputs, inputs].
        rows: of the weight.
    """
    if len(moments) == 1:
        return np.asarray(moments[0], np.float32)
    if rows * moments[0].size * 4 > GRAM_BYTES_MAXIMUM:
        return np.asarray(moments.mean(axis=0), np.float32)
    return np.repeat(moments.astype(np.float32), rows // len(moments), axis=0)

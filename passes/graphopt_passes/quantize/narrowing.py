"""Makes the weights of a model narrow, each in the form that a budget allows.

How much an error in one weight matters is measured: each is rounded coarsely, alone, and the
outputs are compared with those of the model as it was given. What another form of that weight does
follows from how much closer it is to the weight, as the outputs were seen to weigh its inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol, TypeGuard

import numpy as np
import onnx_ir as ir

from graphopt.allocation import Choice, closest_within, smallest_within
from graphopt.contract import Change, Context
from graphopt.encoding import NODES_BYTES, SCALES_BYTES
from graphopt.observe import Answers, content_key
from graphopt.operators import all_graphs
from graphopt.saving import stored_bytes
from graphopt.statistics import Gram
from graphopt.validation import OutputError, worst
from graphopt_passes.quantize.codebooks import best_damping, squared_error, with_diagonal
from graphopt_passes.quantize.narrow_weights import (
    Solution,
    Target,
    arrays_of,
    graph_of,
    solution_of,
    write,
)
from graphopt_passes.quantize.refitting import refit_layers

COMPARED_SAMPLES, ALONE_SAMPLES = 32, 8
"""On so many samples at most errors are measured: of all weights, and at least of each alone."""

ALONE_RUNS_MAXIMUM = 1024
"""Where there are many weights, fewer samples are taken, so that there are no more runs."""

ROUNDS = 4
"""How often the budget of the sum is corrected by what all weights together were seen to do."""

FILLED = 0.002
"""Less of a file that is left is not worth another round."""

SEEN_ROUNDS = 12
"""As `ROUNDS`, where a round corrects the forms that it tried and no others."""

GRAM_BYTES_MAXIMUM = 1 << 27
"""A Gram matrix for each row of a weight takes no more; else all rows have their mean."""

LOOKED_UP = 0.1
"""What an error in a row of a table counts where it is looked up, beside a product with the table:
share of the mean of the Gram's diagonal. For the table of stories260k in 4 bits, 0, 0.1, 1 and 10
gave 1.5, 1.3, 1.6 and 2.2 % more perplexity, and no Gram 2.8 %."""


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
        # A covariance of nothing may come out below zero.
        return max(squared_error(self.weight, solution.numbers(), self.gram), 0.0)

    def with_shift(self, solution: Solution) -> Solution:
        """The same, with what the bias has to make good for."""
        if self.means is None or solution.as_trained:
            return solution
        return replace(solution, shift=self.shift(solution.numbers()))

    def shift(self, numbers: np.ndarray) -> np.ndarray | None:
        """What numbers in the place of the weight take from the mean of each row's output.

        None where no bias can make good for it.
        """
        if self.means is None:
            return None
        change = self.weight - numbers
        return np.asarray(np.einsum("nk,nk->n", change, np.broadcast_to(self.means, change.shape)))


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
        file_bytes: of the whole model, as it is stored; None for no such limit.
    """

    bits: float | None
    error: float
    file_bytes: float | None = None


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
        foretells: what weights do is measured on samples that they are not rounded by, also where
            there is only one form. From these samples it follows too how much is added to a Gram's
            diagonal, for what the others do not show.
        refits: weights that stay are fitted to what the others have become.
    """

    model: ir.Model
    context: Context
    forms: Sequence[Form]
    probe: Form
    estimates: Estimates
    change: Change
    targets: Sequence[Target]
    foretells: bool = False
    refits: bool = False
    _judge: Context | None = None
    _dampings: dict[int, float] = field(default_factory=dict)
    _solutions: dict[tuple[int, str], Solution] = field(default_factory=dict)
    _measures: dict[int, tuple[Compare, list[float]]] = field(default_factory=dict)

    def run(self, budget: Budget | None) -> None:
        """Rewrite the model, within the budget; without one, all weights in the first form."""
        measuring = self._apart() if self.foretells else self
        if budget is None or (len(self.forms) == 1 and not self.foretells):
            chosen: Sequence[Form | None] = [self.forms[0]] * len(self.targets)
        else:
            chosen = measuring._chosen(budget)
        if measuring is not self:
            measuring._foretell(chosen)
        self.rewrite(chosen)

    def rewrite(self, chosen: Sequence[Form | None]) -> None:
        """Rewrite the model: each weight in its form, or as it is."""
        refits = self.refits and self.has_samples and self._changes(chosen)
        before = self.model.clone() if refits else self.model
        self._write(self.model, self.targets, chosen, self.context)
        if refits:
            refit_layers(self.model, before, self.context, self.change)
        for target, form in zip(self.targets, chosen, strict=True):
            if form is None:
                self.change.skip(target.value, "it is smaller, or better, as it is")
            else:
                self.change.count(f"weight of {target.operator} stored as {form.label}")

    def _changes(self, chosen: Sequence[Form | None]) -> bool:
        """A weight becomes another one, and is not only stored as it was trained."""
        return not all(solution.as_trained for solution in self._solved(chosen).values())

    @property
    def has_samples(self) -> bool:
        """There is something to look at the model on."""
        return self.context.observer is not None

    def _apart(self) -> Narrowing:
        """The same that rounds by two thirds of the samples and measures on the others."""
        if self.context.observer is None:
            return replace(self)
        fitted, judged = self.context.observer.apart()
        apart = replace(
            self,
            context=replace(self.context, observer=fitted),
            _judge=replace(self.context, observer=judged),
            _solutions={},
            _measures={},
        )
        if fitted is not judged:
            self._dampings.update(apart._best_dampings())
        return apart

    # -------------------------------------------------------------- solutions

    @cached_property
    def _answers(self) -> Answers:
        """What the inputs of layers are like, on the samples to round by."""
        return self._grams(self.context)

    def _grams(self, context: Context) -> Answers:
        asked = [question for target in self.targets for question in target.asked]
        if context.observer is None or not asked:
            return {}
        return context.observe(self.model, asked)

    def _best_dampings(self) -> dict[int, float]:
        """For each weight the one that serves the samples best that it is not rounded by."""
        assert self._judge is not None
        judged, found = self._grams(self._judge), {}
        for index, target in enumerate(self.targets):
            problem = self._problem(index, shrinks=False)
            other = self._problem(index, judged, shrinks=False)
            if problem.gram is not None and problem.gram.ndim == 2 and other.gram is not None:
                self.context.progress(f"looking at the inputs of {target.name}")
                found[index] = best_damping(problem.weight, problem.gram, other.gram)
        return found

    def _problem(self, index: int, answers: Answers | None = None, shrinks: bool = True) -> Problem:
        answers = self._answers if answers is None else answers
        return problem_of(self.targets[index], answers, self._dampings.get(index), shrinks)

    def _solution(self, index: int, form: Form) -> Solution:
        key = index, form.label
        if key not in self._solutions:
            self._solutions[key] = self._remembered(index, form)
        return self._solutions[key]

    def _remembered(self, index: int, form: Form) -> Solution:
        """The solution that a search has found before, or a new one."""
        memo = self.context.memo
        if memo is None:
            return self._solve(index, form)
        key = f"{self._key} {self.targets[index].name} {form} {self._dampings.get(index)}"
        arrays = memo.get(key)
        if arrays is not None:
            return solution_of(arrays)
        solution = self._solve(index, form)
        if solution.writer is None:
            memo.put(key, arrays_of(solution))
        return solution

    def _solve(self, index: int, form: Form) -> Solution:
        problem = self._problem(index)
        return problem.with_shift(form.solve(problem))

    @cached_property
    def _key(self) -> str:
        """What solutions depend on beside the weight and its form; asked before any is written."""
        observer = self.context.observer
        return content_key(self.model) if observer is None else observer.key_of(self.model)

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
        choices = self.choices
        if budget.bits is not None:
            numbers = sum(target.size for target in self.targets)
            extra = (NODES_BYTES + SCALES_BYTES) * len(self.targets)
            return self._named(closest_within(choices, numbers * budget.bits / 8 + extra))
        if budget.file_bytes is not None:
            return self._filling(choices, budget.file_bytes)
        limit = budget.error**2
        if not self.has_samples:
            return self._named(smallest_within(choices, limit))
        return self._seen_within(limit) if self.foretells else self._within(choices, limit)

    @cached_property
    def choices(self) -> list[list[Choice]]:
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

    def _foretell(self, chosen: Sequence[Form | None]) -> None:
        """Say what is to be expected, and what was measured."""
        estimate = self._estimate(chosen)
        self.context.progress(f"estimated {estimate}")
        if any(chosen):
            measured = ""
            if self.has_samples:
                measured = f"; measured {self._square(self._solved(chosen)) ** 0.5:.3g}"
            self.change.note(f"estimated {estimate}{measured}")

    def _estimate(self, chosen: Sequence[Form | None]) -> str:
        """What forms are expected to take in the file, and to do to the outputs on their mean."""
        taken = [
            of_weight[0 if form is None else 1 + self.forms.index(form)]
            for of_weight, form in zip(self.choices, chosen, strict=True)
        ]
        before = sum(of_weight[0].stored_bytes for of_weight in self.choices)
        after = sum(choice.stored_bytes for choice in taken)
        error = sum(choice.square for choice in taken) ** 0.5
        what = "relative L2 error" if self.has_samples else "relative L2 error of the weights"
        return f"{before:,} -> {after:,} bytes of weights, {what} {error:.3g}"

    def _filling(self, choices: Sequence[Sequence[Choice]], file_bytes: float) -> list[Form | None]:
        """The closest choice with which the file was seen to take no more than so many bytes."""
        weights = sum(target.stored_bytes for target in self.targets)
        asked = file_bytes - (stored_bytes(self.model) - weights)
        best, most, enough = None, 0, FILLED * file_bytes
        for _ in range(SEEN_ROUNDS):
            chosen = self._named(closest_within(choices, asked))
            candidate, targets, context = self._copy()
            self._write(candidate, targets, chosen, context)
            _drop_unread(candidate)
            taken = stored_bytes(candidate)
            if most < taken <= file_bytes:
                best, most = chosen, taken
            if most >= file_bytes - enough:
                break
            asked += file_bytes - taken - (enough if taken > file_bytes else 0.0)
        if best is None:
            self.change.note(f"the smallest choice takes {taken:,} bytes, over {file_bytes:,.0f}")
            return chosen
        return best

    def _write(
        self,
        model: ir.Model,
        targets: Sequence[Target],
        chosen: Sequence[Form | None],
        context: Context,
    ) -> None:
        """Put forms in the place of weights."""
        kept = [index for index, form in enumerate(chosen) if form is None]
        write(model, targets, self._solved(chosen), context, kept)

    def _copy(self) -> tuple[ir.Model, list[Target], Context]:
        """Of the model, to try something, with its targets; what is tried goes to no file."""
        candidate = self.model.clone()
        pairs = zip(all_graphs(self.model), all_graphs(candidate), strict=True)
        values = {old: _values_of(new) for old, new in pairs}
        targets = [t.copied(values[graph_of(t.value)][t.name]) for t in self.targets]
        return candidate, targets, replace(self.context, scratch=None)

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

    def _seen_within(self, limit: float) -> list[Form | None]:
        """As `_within`, where few weights and coarse forms let the errors add up otherwise.

        What chosen forms were seen to do corrects what is expected of them, and of them alone.
        """
        choices, best = [list(of_weight) for of_weight in self.choices], None
        for _ in range(SEEN_ROUNDS):
            indices = smallest_within(choices, limit)
            chosen = self._named(indices)
            square = self._square(self._solved(chosen)) if any(chosen) else 0.0
            if square <= limit:
                best = chosen
                break
            expected = sum(of[i].square for of, i in zip(choices, indices, strict=True))
            for of_weight, i in zip(choices, indices, strict=True):
                worse = of_weight[i].square * square / max(expected, 1e-30)
                of_weight[i] = replace(of_weight[i], square=worse)
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
                probed = {index: self._solution(index, self.probe)}
                square = self._mean_square(probed, samples)
                per_error = square / max(probe, 1e-30)
            else:
                # Nothing is known but how large the numbers are: each weight counts alike.
                power = np.einsum("nk,nk->", problem.weight, problem.weight, dtype=np.float64)
                per_error = 1 / max(float(power) * len(self.targets), 1e-30)
            self.context.progress(f"{target.name}: {per_error * probe:.3g}")
            found.append([per_error * max(estimate, 0.0) for estimate in estimates])
        return found

    def _square(self, solutions: Mapping[int, Solution]) -> float:
        """What solutions add to the squared error of the worst output."""
        return max(0.0, *self._added(solutions, COMPARED_SAMPLES))

    def _mean_square(self, solutions: Mapping[int, Solution], samples: int) -> float:
        """What they add on the mean of all outputs: a weight near one of them troubles no other."""
        added = self._added(solutions, samples)
        finite = [square for square in added if math.isfinite(square)]
        # What cannot be compared says nothing of how much a weight counts.
        return max(math.fsum(finite) / len(finite), 0.0) if finite else math.inf

    def _added(self, solutions: Mapping[int, Solution], samples: int) -> list[float]:
        """What solutions add to the squared relative L2 error of each output."""
        candidate, targets, context = self._copy()
        write(candidate, targets, solutions, context)
        if samples not in self._measures:
            compare = (self._judge or self.context).against(self.context.original, samples)
            self._measures[samples] = compare, _squared(compare(self.model))
        compare, before = self._measures[samples]
        after = _squared(compare(candidate))
        # An output that could not be compared before either is no worse.
        return [b - a if math.isfinite(a) else 0.0 for a, b in zip(before, after, strict=True)]


def _values_of(graph: ir.Graph) -> dict[str, ir.Value]:
    """By name, of one graph: bodies may have values of the same name."""
    made = {output.name or "": output for node in graph for output in node.outputs}
    return {**graph.initializers, **made}


def _squared(outputs: Sequence[OutputError]) -> list[float]:
    return [worst([output]) ** 2 for output in outputs]


def _drop_unread(model: ir.Model) -> None:
    """Remove initializers that nothing reads any more, as is done with what a pass leaves."""
    for graph in all_graphs(model):
        for name, value in list(graph.initializers.items()):
            if not (value.uses() or value.is_graph_input() or value.is_graph_output()):
                del graph.initializers[name]


def problem_of(
    target: Target, answers: Answers, damping: float | None = None, shrinks: bool = True
) -> Problem:
    """A weight, with what is known of its inputs.

    Args:
        target: the weight.
        answers: to what targets ask; empty where there are no samples.
        damping: share of the mean of the Gram's diagonal that is added to it; None shrinks it by
            how many rows were seen.
        shrinks: the Gram is changed at all.
    """
    weight = target.matrix()
    asked = target.asked if answers else ()
    grams = [gram for q in asked if _fits(gram := answers[q], weight)]
    if not grams:
        return Problem(target, weight, None, None)
    gram = grams[0]
    corrects = target.layer is not None and target.layer.can_correct_bias
    moments = gram.covariance if corrects else np.sum([one.mean for one in grams], axis=0)
    means = np.repeat(gram.means, len(weight) // len(gram.means), axis=0) if corrects else None
    known = _for_rows(moments, len(weight))
    if target.is_looked_up:
        known = with_diagonal(known, LOOKED_UP)
    if shrinks:
        known = _shrunk(known, gram.rows) if damping is None else with_diagonal(known, damping)
    return Problem(target, weight, known, means)


def _fits(gram: object, weight: np.ndarray) -> TypeGuard[Gram]:
    """The Gram of rows that the weight is multiplied with: there are some, and all are numbers."""
    if not isinstance(gram, Gram) or not gram.rows or not np.isfinite(gram.total).all():
        return False
    return bool(gram.total.shape[-1] == weight.shape[1])


def _shrunk(gram: np.ndarray, rows: int) -> np.ndarray:
    """A Gram matrix with less of what it says about pairs of inputs, the fewer rows it is made of.

    Of fewer rows than inputs, some direction was never seen, and codes would put all their error
    there. Moments of single inputs need few rows, so that the matrix is drawn to its diagonal.
    (Schäfer and Strimmer 2005, A shrinkage approach to large-scale covariance matrix estimation.)

    Args:
        gram: of shape [..., inputs, inputs].
        rows: that were seen.
    """
    share = gram.shape[-1] / (gram.shape[-1] + rows)
    single = np.einsum("...kk->...k", gram)[..., np.newaxis] * np.eye(
        gram.shape[-1], dtype=np.float32
    )
    return np.asarray((1 - share) * gram + share * single, np.float32)


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

"""Prunes the weights of a model, first to last, each so that the model does what it did.

With samples, every layer is asked for what it gave before any weight was pruned, of what it reads
now (`aims`): so it makes good for what was lost before it. Least squares say what it would become
without zeros, the criterion which entries stay, least squares again what these become, and the
bias makes the means right. A gain makes the variances right, where that helps the outputs. Images
are looked at mirrored and magnified, too, where they are few (`graphopt/variations.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
import onnx_ir as ir

from graphopt.allocation import Choice, closest_within, smallest_within
from graphopt.contract import Change, Context
from graphopt.encoding import NODES_BYTES
from graphopt.rewriting import Names
from graphopt.validation import OutputError, worst
from graphopt_passes.prune.aims import Aim, aims_of, give, has_aim, reading_the_same, sum_of
from graphopt_passes.prune.entries import (
    Criterion,
    Floats,
    Selection,
    damped,
    largest_alone,
    mask_of,
    pruned,
    refitted,
)
from graphopt_passes.prune.masks import Pattern, uniform
from graphopt_passes.prune.sparsities import (
    ENTRY_BYTES,
    PROBED,
    SPARSITIES,
    Pruned,
    estimates_of_pruned,
    moments_of,
)
from graphopt_passes.prune.weights import prunable_weights, taps_of
from graphopt_passes.quantize.layers import Layer
from graphopt_passes.quantize.narrow_weights import Target
from graphopt_passes.quantize.narrowing import COMPARED_SAMPLES, Narrowing, problem_of

Factors = Callable[[Target, int], Floats | None]
"""What the worth of the entries of a weight is multiplied with, given how many stay."""

Doubts = Callable[[Target], float]
"""By how much more moments are damped than they are otherwise, where entries are chosen."""

Gains = Literal["none", "alone", "all"]

RIDGE_STEP, RIDGE_MAXIMUM = 4.0, 64.0
"""What is tried next, and the most."""

ROUNDS = 3
"""How often a limit on what is foretold is corrected by what was seen."""

MILDER = 0.1
"""Less sparsity, where it was too much."""

NEAR = 0.9
"""An error of so much of what is allowed needs no further round."""


@dataclass
class Pruning:
    """Prunes the weights of one model.

    Attributes:
        model: rewritten in place.
        context: with samples, or without.
        criterion: by which entries stay.
        pattern: in which they do.
        change: told what is done, and what is left alone.
        min_elements: smaller weights stay.
        factors: see `Factors`.
        doubts: see `Doubts`.
        numbers: the type whose numbers the entries that stay become.
        gains: which layers vary as they did: "none", those that make good for no other one
            ("alone"), or "all"; None for what serves the outputs best.
        ridge: so many times the usual share is added to the diagonal of moments; likewise.
        only: names of the weights that are pruned; None for all.
    """

    model: ir.Model
    context: Context
    criterion: Criterion
    pattern: Pattern
    change: Change
    min_elements: int = 1
    factors: Factors = lambda *_: None
    doubts: Doubts = lambda _: 0.0
    numbers: ir.DataType = ir.DataType.FLOAT
    gains: Gains | None = None
    ridge: float = 1.0
    only: Collection[str] | None = None

    @cached_property
    def targets(self) -> list[Target]:
        """What is pruned, in the order in which it runs."""
        found = prunable_weights(self.model, self.min_elements, self.pattern, self.change)
        return found if self.only is None else [t for t in found if t.name in self.only]

    def apply(self, sparsity: float, error: float, layers: str) -> None:
        """Prune all weights, to a share of zeros or, where an error is given, within it.

        Args:
            sparsity: of all entries.
            error: see `within`; 0 for none.
            layers: "by-loss" or "uniform".
        """
        if not self.targets:
            return
        density = self.pattern.fixed_density
        sizes = [target.size for target in self.targets]
        if density is not None or layers == "uniform":
            kept = (1 - sparsity) if density is None else density
            self.run([int(keep) for keep in uniform(sizes, round(sum(sizes) * kept))])
        else:
            self.run(self.within(error) if error else self.by_loss(sparsity))

    # -------------------------------------------------------------- how many entries stay

    def by_loss(self, sparsity: float) -> list[int]:
        """How many entries each weight keeps, so that the outputs change least.

        Args:
            sparsity: share of all entries that is to go.
        """
        total = round(sum(target.size for target in self.targets) * (1 - sparsity))
        bytes_of_all = ENTRY_BYTES * total + NODES_BYTES * len(self.targets)
        keeps = self._keeps(closest_within(self._choices, bytes_of_all))
        # Weights that stay as they are leave the bytes of their nodes, and there may be more zeros
        # than are chosen from.
        return [int(keep) for keep in uniform(keeps, min(total, sum(keeps)))]

    def within(self, error: float) -> list[int]:
        """How few entries weights can keep for what they add to be seen to be no more than that.

        Args:
            error: relative L2 error of the worst output, on the calibration samples.
        """
        compare = self.context.against(self.context.original, COMPARED_SAMPLES)
        before = _square(compare(self.model))
        asked, best = error**2, [target.size for target in self.targets]
        for _ in range(ROUNDS):
            keeps = self._keeps(smallest_within(self._choices, asked))
            self._tune(keeps)
            trial = self._trial(replace(self.context, scratch=None))
            trial._run(keeps)
            seen = _square(compare(trial.model)) - before
            if seen <= error**2 and sum(keeps) < sum(best):
                best = keeps
            if NEAR * error <= max(seen, 0.0) ** 0.5 <= error:
                break
            asked *= NEAR**2 * error**2 / max(seen, 0.1 * error**2)
        return best

    @cached_property
    def _choices(self) -> list[list[Choice]]:
        forms = [Pruned(sparsity, self.criterion) for sparsity in reversed(SPARSITIES)]
        return Narrowing(
            self.model,
            self.context.varied(),
            forms,
            Pruned(PROBED, self.criterion),
            estimates_of_pruned,
            Change(),
            self.targets,
        ).choices

    def _keeps(self, chosen: Sequence[int]) -> list[int]:
        return [
            target.size if index == 0 else Pruned(SPARSITIES[-index], self.criterion).keep(target)
            for target, index in zip(self.targets, chosen, strict=True)
        ]

    # -------------------------------------------------------------- pruning

    def run(self, keeps: Sequence[int]) -> None:
        """Prune each weight to so many entries."""
        self._tune(keeps)
        self._run(keeps)

    def _tune(self, keeps: Sequence[int]) -> None:
        """Choose, once, how to fit so that it serves samples by which nothing was fitted.

        Least squares with few entries give what they can foretell, which varies less than what
        later layers were made for: residual networks lose a third less with gains, others more.
        And how much of what few samples show is chance, their number alone does not say.
        """
        if self.gains is not None or self.context.observer is None:
            return
        fitted, judged = self.context.observer.apart()
        judging = replace(self.context, observer=judged).varied()
        compare = judging.against(self.model, COMPARED_SAMPLES)
        few = replace(self.context, observer=fitted, scratch=None)

        def error(gains: Gains, ridge: float) -> float:
            trial = replace(self._trial(few), gains=gains, ridge=ridge)
            trial._run(keeps)
            return _square(compare(trial.model))

        sums = any(one.layer is not None and sum_of(one.layer)[1] for one in self.targets)
        tried: tuple[Gains, ...] = ("none", "alone", "all") if sums else ("none", "all")
        found = {gains: error(gains, self.ridge) for gains in tried}
        self.gains = best = min(tried, key=lambda one: found[one])
        least = found[best]
        while self.ridge < RIDGE_MAXIMUM:
            square = error(best, RIDGE_STEP * self.ridge)
            if square >= least:
                break
            self.ridge, least = RIDGE_STEP * self.ridge, square

    def _trial(self, context: Context) -> Pruning:
        """The same on a clone."""
        return replace(self, model=self.model.clone(), context=context, change=Change())

    def _run(self, keeps: Sequence[int]) -> None:
        before, number = self.model.clone(), 0
        context = self.context.varied()
        for together in reading_the_same([target.layer for target in self.targets]):
            for layer, aim in zip(together, self._aims(together, before, context), strict=True):
                self.context.progress(f"pruning weight {number + 1} of {len(self.targets)}")
                target, keep = self.targets[number], keeps[number]
                factors = self.factors(target, keep)
                selection = Selection(self.criterion, self.pattern, taps_of(target), factors)
                if aim is not None and layer is not None:
                    doubt = self.doubts(target)
                    self._prune_to_aim(layer, aim, keep, selection, doubt)
                else:
                    self._prune_alone(target, keep, selection)
                self.change.count(f"weight of {target.operator} pruned")
                number += 1

    def _aims(
        self, layers: Sequence[Layer | None], before: ir.Model, context: Context
    ) -> list[Aim | None]:
        """What each layer should give; None for what is no layer, or is not looked at."""
        looked_at = [layer for layer in layers if layer is not None and has_aim(layer)]
        if self.context.observer is None or len(looked_at) < len(layers):
            return [None] * len(layers)
        return aims_of(looked_at, self.model, before, context)

    def _prune_to_aim(
        self, layer: Layer, aim: Aim, keep: int, selection: Selection, doubt: float
    ) -> None:
        seen = aim.moments, aim.rows, aim.read_means
        weight, moments = layer.matrix(), damped(*seen, self.ridge)
        wanted = aim.weight(weight, moments)
        flat = wanted.reshape(-1, wanted.shape[2])
        if self.criterion == "magnitude":
            # By the weight as it was trained, whatever the samples are.
            mask = mask_of(weight.reshape(flat.shape), moments, keep, selection)
            found = refitted(flat, moments, mask)
        elif doubt:
            unsure = damped(*seen, self.ridge * (1 + doubt))
            chosen = aim.weight(weight, unsure).reshape(flat.shape)
            found = refitted(flat, moments, mask_of(chosen, unsure, keep, selection))
        else:
            found = pruned(flat, moments, keep, selection)
        grouped = found.reshape(wanted.shape)
        if self.gains == "all" or (self.gains == "alone" and not aim.makes_good):
            grouped = aim.with_variance(grouped)
        give(layer, self._rounded(grouped), aim, Names(self.model), self.context)

    def _prune_alone(self, target: Target, keep: int, selection: Selection) -> None:
        """Where nothing says what a weight should give but the weight itself."""
        asked = target.asked if self.context.observer is not None else ()
        answers = self.context.observe(self.model, asked) if asked else {}
        problem = problem_of(target, answers)
        moments = moments_of(problem)
        doubt = 0.0 if moments is None else self.doubts(target)
        if moments is None:
            found = largest_alone(problem.weight, keep, selection)
        elif doubt:
            unsure = damped(moments, np.iinfo(np.int32).max, factor=doubt)
            mask = mask_of(problem.weight, unsure, keep, selection)
            found = refitted(problem.weight, moments, mask)
        else:
            found = pruned(problem.weight, moments, keep, selection)
        target.value.const_value = self.context.tensor(
            target.stored(self._rounded(found)).astype(target.dtype.numpy()), target.name
        )

    def _rounded(self, weight: Floats) -> Floats:
        """As the numbers will be stored."""
        if self.numbers == ir.DataType.FLOAT:
            return weight
        return weight.astype(self.numbers.numpy()).astype(weight.dtype)


def _square(outputs: Sequence[OutputError]) -> float:
    """The squared relative L2 error of the worst output."""
    return max(worst([output]) ** 2 for output in outputs)


def fewer_zeros(sparsity: float) -> float | None:
    """A milder sparsity to try where one changes the outputs too much; None where none is left."""
    return round(sparsity - MILDER, 3) if sparsity >= 2 * MILDER else None

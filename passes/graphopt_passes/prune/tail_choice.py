"""Which tail works on fewer places, so that a budget is met at the least error; see `tails`.

What that takes from the outputs, and what removing units does to what is left, do not add up in any
simple way. So it is tried, on samples by which nothing was fitted: without a tail, then with one
after the other, the shortest first, as long as it becomes better.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

import onnx_ir as ir

from graphopt.contract import Change, Context
from graphopt.layer_costs import macs_of_nodes, sizes_of_sample
from graphopt_passes.prune.tails import Tail, pool, quarter, tails_of
from graphopt_passes.prune.unit_budgets import Budget
from graphopt_passes.prune.unit_refitting import refit_units
from graphopt_passes.prune.unit_scores import mean_square
from graphopt_passes.quantize.narrowing import COMPARED_SAMPLES

FRACTIONS = (0.25, 0.5, 0.75, 1.0)
"""Of what is to be saved; the tails that come nearest to saving these are tried."""

SAVED_MINIMUM = 0.02
"""Of the multiply-accumulates; less is not worth a try."""


@dataclass(frozen=True)
class Shortened:
    """A tail that works on fewer places.

    Attributes:
        number: among the tails of the model.
        refits: its layers are refitted.
    """

    number: int
    refits: bool


Prune = Callable[[ir.Model, Context, Change, float], bool]
"""Removes units of a model until such a share of the budget is left; False where it cannot."""


@dataclass(frozen=True)
class TailChoice:
    """Meets a budget with one model.

    Attributes:
        model: rewritten in place, by `run`.
        context: with samples.
        budget: what is to be saved.
        share: of it that is to stay.
        prune: what does the rest.
    """

    model: ir.Model
    context: Context
    budget: Budget
    share: float
    prune: Prune

    def run(self, change: Change) -> None:
        """Shorten the tail where that serves the outputs, and prune what is left."""
        self._apply(self.model, self._best(), self.context, change)

    def _best(self) -> Shortened | None:
        numbers = list(self._numbers())
        if not numbers or self.context.observer is None:
            return None
        fitted, judged = self.context.observer.apart()
        few = replace(self.context, observer=fitted, scratch=None)
        judging = replace(self.context, observer=judged).varied()
        compare = judging.against(self.model, COMPARED_SAMPLES)

        def square(one: Shortened | None, share: float | None = None) -> float:
            trial = replace(self, model=self.model.clone(), share=share or self.share)
            done = trial._apply(trial.model, one, few, Change())
            return mean_square(compare(trial.model)) if done else math.inf

        best, least = None, square(None)
        for number in numbers:
            # Whether to refit, the tail alone says.
            forms = [Shortened(number, refits) for refits in (False, True)]
            form = min(forms, key=lambda one: square(one, 1.0))
            found = square(form)
            if found >= least:
                break
            best, least = form, found
        return best

    def _numbers(self) -> Iterator[int]:
        """Of the tails to try, from the shortest on."""
        sample = next(iter(self.context.samples), {})
        macs = macs_of_nodes(self.model, sizes_of_sample(self.model, sample))
        total = sum(count or 0 for count in macs.values())
        saved = {
            number: sum((macs.get(n) or 0) * (1 - quarter(n)) for n in tail.nodes) / max(total, 1)
            for number, tail in enumerate(tails_of(self.model))
        }
        worth = [number for number, share in saved.items() if share >= SAVED_MINIMUM]
        aims = [fraction * (1 - self.share) for fraction in FRACTIONS]
        # Of equal ones the first, which is the shortest.
        nearest = [min(worth, key=lambda n: abs(saved[n] - aim)) for aim in aims if worth]
        yield from sorted(set(nearest), key=lambda number: saved[number])

    def _apply(
        self, model: ir.Model, one: Shortened | None, context: Context, change: Change
    ) -> bool:
        left = self.share
        if one is not None:
            before = model.clone()
            tail = next(islice(tails_of(model), one.number, None))
            pooled = pool(model, tail)
            if pooled is None:
                return False
            self._tell(tail, change)
            if one.refits:
                looking = context.varied()
                refit_units(model, before, looking, change, only=tail.nodes, pooled=pooled)
            left = left / self.budget.share(model, before)
        return left >= 1 or self.prune(model, context, change, left)

    def _tell(self, tail: Tail, change: Change) -> None:
        count = sum(node.op_type == "Conv" for node in tail.nodes)
        change.count("Conv at a quarter of the places", count)
        change.note(f"what reads {tail.value.name} reads the mean over each two by two places")

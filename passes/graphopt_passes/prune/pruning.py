"""Prunes the weights of a model, first to last, each so that the model does what it did.

With samples, every layer is asked for what it gave before any weight was pruned, of what it reads
now (`aims`): so it makes good for what was lost before it. Least squares say what it would become
without zeros, the criterion which entries stay, least squares again what these become; the bias
makes the means right, and a gain the variances.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from graphopt.contract import Change, Context
from graphopt.encoding import NODES_BYTES
from graphopt.rewriting import Names
from graphopt_passes.prune.aims import Aim, aim_of, has_aim
from graphopt_passes.prune.masks import Pattern
from graphopt_passes.prune.sparsities import (
    ENTRY_BYTES,
    PROBED,
    SPARSITIES,
    Pruned,
    estimates_of_pruned,
    moments_of,
)
from graphopt_passes.prune.support import (
    Criterion,
    Floats,
    Selection,
    damped,
    mask_of,
    pruned,
    refitted,
)
from graphopt_passes.prune.weights import taps_of
from graphopt_passes.quantize.allocation import closest_within
from graphopt_passes.quantize.layers import Layer
from graphopt_passes.quantize.narrow_weights import Target, shift_bias
from graphopt_passes.quantize.narrowing import Narrowing, problem_of

Factors = Callable[[ir.Model, Target, int], Floats | None]
"""What the worth of the entries of a weight is multiplied with, given how many stay."""


@dataclass(frozen=True)
class Pruning:
    """Prunes the weights of one model.

    Attributes:
        model: rewritten in place.
        context: with samples, or without.
        targets: of the model, in the order in which they run.
        criterion: by which entries stay.
        pattern: in which they do.
        change: told what is done.
        factors: see `Factors`.
        numbers: in which the entries that stay are stored.
    """

    model: ir.Model
    context: Context
    targets: Sequence[Target]
    criterion: Criterion
    pattern: Pattern
    change: Change
    factors: Factors = lambda *_: None
    numbers: ir.DataType = ir.DataType.FLOAT

    def by_loss(self, sparsity: float) -> list[int]:
        """How many entries each weight keeps, so that the outputs change least.

        Args:
            sparsity: share of all entries that is to go.
        """
        total = round(sum(target.size for target in self.targets) * (1 - sparsity))
        choices = self._narrowing().choices
        chosen = closest_within(choices, ENTRY_BYTES * total + NODES_BYTES * len(choices))
        keeps = [
            target.size if index == 0 else Pruned(SPARSITIES[-index], self.criterion).keep(target)
            for target, index in zip(self.targets, chosen, strict=True)
        ]
        # Weights that stay as they are leave the bytes of their nodes.
        keeps[int(np.argmax(keeps))] -= max(sum(keeps) - total, 0)
        return keeps

    def _narrowing(self) -> Narrowing:
        forms = [Pruned(sparsity, self.criterion) for sparsity in reversed(SPARSITIES)]
        return Narrowing(
            self.model,
            self.context,
            forms,
            Pruned(PROBED, self.criterion),
            estimates_of_pruned,
            Change(),
            self.targets,
        )

    def run(self, keeps: Sequence[int]) -> None:
        """Prune each weight to so many entries."""
        before = self.model.clone()
        for number, (target, keep) in enumerate(zip(self.targets, keeps, strict=True)):
            self.context.progress(f"pruning weight {number + 1} of {len(self.targets)}")
            factors = self.factors(self.model, target, keep)
            selection = Selection(self.criterion, self.pattern, taps_of(target), factors)
            aim = self._aim(target, before)
            if aim is not None and target.layer is not None:
                self._prune_to_aim(target, target.layer, aim, keep, selection)
            else:
                self._prune_alone(target, keep, selection)
            self.change.count(f"weight of {target.operator} pruned")

    def _aim(self, target: Target, before: ir.Model) -> Aim | None:
        if self.context.observer is None or target.layer is None or not has_aim(target.layer):
            return None
        return aim_of(target.layer, self.model, before, self.context)

    def _prune_to_aim(
        self, target: Target, layer: Layer, aim: Aim, keep: int, selection: Selection
    ) -> None:
        weight, moments = layer.matrix(), damped(aim.moments, aim.rows)
        wanted = aim.weight(weight, moments)
        flat = wanted.reshape(-1, wanted.shape[2])
        if self.criterion == "magnitude":
            # By the weight as it was trained, whatever the samples are.
            mask = mask_of(weight.reshape(flat.shape), moments, keep, selection)
            found = refitted(flat, moments, mask)
        else:
            found = pruned(flat, moments, keep, selection)
        found = self._rounded(found.reshape(wanted.shape))
        target.value.const_value = self.context.tensor(
            layer.stored(found).astype(target.dtype.numpy()), target.name
        )
        if layer.can_correct_bias:
            old = layer.bias()
            shift = aim.bias(found) - (0.0 if old is None else old)
            shift_bias(layer, shift, Names(self.model), self.context)

    def _prune_alone(self, target: Target, keep: int, selection: Selection) -> None:
        """Where nothing says what a weight should give but the weight itself."""
        asked = target.asked if self.context.observer is not None else ()
        answers = self.context.observe(self.model, asked) if asked else {}
        problem = problem_of(target, answers)
        if problem.gram is None and self.criterion != "magnitude":
            selection = replace(selection, criterion="magnitude")
        found = pruned(problem.weight, moments_of(problem), keep, selection)
        target.value.const_value = self.context.tensor(
            target.stored(self._rounded(found)).astype(target.dtype.numpy()), target.name
        )

    def _rounded(self, weight: Floats) -> Floats:
        """As it will be stored."""
        if self.numbers == ir.DataType.FLOAT:
            return weight
        return weight.astype(self.numbers.numpy()).astype(weight.dtype)

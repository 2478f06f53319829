"""How sure the importance of each entry of a model's weights is, from samples and checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import onnx_ir as ir

from graphopt.chunked import Chunks
from graphopt.content import read_array
from graphopt.contract import Change, Context
from graphopt.observe import Answers, Question
from graphopt_passes.prune.entries import Floats
from graphopt_passes.prune.masks import Unstructured
from graphopt_passes.prune.stability import (
    Mode,
    checkpoint_factors,
    doubt_of,
    factors,
    mask_stability,
)
from graphopt_passes.prune.weights import taps_of
from graphopt_passes.quantize.narrow_weights import Target


@dataclass(frozen=True)
class Sureness:
    """Gives factors to what the entries of weights are worth; see `stability`.

    Attributes:
        model: as it is before any weight is pruned.
        context: with samples.
        targets: of the model.
        mode: see `stability.factors`.
        kappa: likewise.
        checkpoints: other models with weights of the same names.
    """

    model: ir.Model
    context: Context
    targets: Sequence[Target]
    mode: Mode
    kappa: float
    checkpoints: Sequence[ir.Model] = ()
    _alike: dict[tuple[str, int], tuple[float, float, int]] = field(default_factory=dict)
    _last: dict[str, tuple[float, float, int]] = field(default_factory=dict)

    def factors(self, target: Target, keep: int) -> Floats:
        """What the worth of each entry is multiplied with, of shape [N, K].

        Args:
            target: not pruned yet.
            keep: how many entries stay.
        """
        weight = target.matrix()
        found = np.ones(weight.shape, np.float32)
        moments = self._moments(target)
        if moments is not None:
            pattern, taps, ones = Unstructured(), taps_of(target), found
            what = (weight, moments, keep)
            found = factors(*what, self.mode, self.kappa, self._generator(target), pattern, taps)
            if (target.name, keep) not in self._alike:
                self._alike[target.name, keep] = (
                    mask_stability(*what, ones, self._generator(target), pattern, taps),
                    mask_stability(*what, found, self._generator(target), pattern, taps),
                    target.size,
                )
            # Told of what was asked for last.
            self._last[target.name] = self._alike[target.name, keep]
        seen = self._seen(target)
        return found if len(seen) < 2 else found * checkpoint_factors(np.stack(seen))

    def doubt(self, target: Target) -> float:
        """By how much more moments are to be damped, where entries are chosen, than by their rows.

        What inputs have in common is less sure than how large they are, and a mask that follows it
        is another one for other samples. So moments are drawn to their diagonal, in proportion to
        their relative deviation: for the mask alone, as what the entries become is no less exact
        for it. Exactly 0 where all chunks are equal.

        Args:
            target: not pruned yet.
        """
        moments = self._moments(target)
        if self.mode != "stability" or moments is None or len(moments) < 2:
            return 0.0
        return doubt_of(moments)

    def tell(self, change: Change) -> None:
        """Say how alike the masks of resamples are."""
        if self._last:
            plain, sure, sizes = np.array(list(self._last.values())).T
            alike = [float(np.average(shares, weights=sizes)) for shares in (plain, sure)]
            change.note(
                f"masks of {len(sizes)} weights are alike between resamples of the samples to a "
                f"Jaccard index of {alike[1]:.4f}; by importance alone, {alike[0]:.4f}"
            )
        if self.checkpoints:
            known = sum(len(self._seen(target)) > 1 for target in self.targets)
            change.note(f"{known} of {len(self.targets)} weights are in checkpoints, too")

    def _generator(self, target: Target) -> np.random.Generator:
        return self.context.generator(f"stability of {target.name}")

    @cached_property
    def _answers(self) -> Answers:
        asked = [self._question(target) for target in self.targets]
        return self.context.observe(self.model, [q for q in asked if q is not None])

    def _question(self, target: Target) -> Question | None:
        return replace(target.asked[0], about="chunks") if target.asked else None

    def _moments(self, target: Target) -> np.ndarray | None:
        """By chunk, of shape [chunks, K], or [chunks, N, K] where rows read inputs of their own."""
        question = self._question(target)
        chunks = None if question is None else self._answers[question]
        if not isinstance(chunks, Chunks) or not len(chunks.moments):
            return None
        moments = chunks.moments
        if moments.shape[2] != target.inputs:
            return None
        if moments.shape[1] == 1:
            return np.asarray(moments[:, 0])
        return np.repeat(moments, target.rows // moments.shape[1], axis=1)

    def _seen(self, target: Target) -> list[np.ndarray]:
        """The weight in the model as it was given, and in checkpoints, where it is of its shape."""
        if not self.checkpoints:
            return []
        models = (self.context.original, *self.checkpoints)
        values = (model.graph.initializers.get(target.name) for model in models)
        tensors = (value.const_value for value in values if value is not None)
        arrays = (read_array(tensor) for tensor in tensors if tensor is not None)
        alike = (array for array in arrays if array.shape == target.shape)
        return [target.rows_of(array) for array in alike if np.isfinite(array).all()]

"""prune-importance: set the weights to zero that the outputs need least, and refit the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import onnx_ir as ir

from graphopt.contract import Bounds, Change, Context, Effect, Pass
from graphopt_passes.prune.masks import pattern_of, uniform
from graphopt_passes.prune.pruning import Pruning
from graphopt_passes.prune.weights import prunable_weights
from graphopt_passes.quantize.granularity import WEIGHTS


@dataclass(frozen=True)
class PruneImportance(Pass):
    """Set the weights to zero that the outputs need least, and refit the others.

    Attributes:
        sparsity: share of the entries of all weights that becomes zero.
        criterion: what an entry is worth: what removing it costs when the others make good for it
            (second-order), or its magnitude times that of its input (activations, Wanda).
    """

    name: ClassVar[str] = "prune-importance"
    effect: ClassVar[Effect] = Effect.LOSSY
    operators: ClassVar[frozenset[str] | None] = frozenset(WEIGHTS)
    needs_samples: ClassVar[bool] = True
    max_error: ClassVar[float] = 0.3

    sparsity: Annotated[float, Bounds(0.0, 0.99)] = 0.5
    criterion: Literal["second-order", "activations"] = "second-order"
    layers: Literal["by-loss", "uniform"] = "by-loss"
    pattern: str = "unstructured"
    min_elements: Annotated[int, Bounds(1)] = 256

    def apply(self, model: ir.Model, context: Context) -> Change:
        """Prune all weights."""
        change, pattern = Change(), pattern_of(self.pattern)
        targets = prunable_weights(model, self.min_elements, pattern, change)
        if not targets:
            return change
        pruning = Pruning(model, context, targets, self.criterion, pattern, change)
        sizes = [target.size for target in targets]
        if self.layers == "uniform" or pattern.fixed_density is not None:
            keeps = [int(k) for k in uniform(sizes, round(sum(sizes) * (1 - self.sparsity)))]
        else:
            keeps = pruning.by_loss(self.sparsity)
        pruning.run(keeps)
        return change

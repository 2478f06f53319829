"""prune-magnitude: set the smallest weights to zero, and refit the others where samples allow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import numpy as np
import onnx_ir as ir

from graphopt.contract import Bounds, Change, Context, Effect, Pass
from graphopt_passes.prune.masks import Counts, erk, global_largest, lamp, pattern_of, uniform
from graphopt_passes.prune.pruning import Pruning, fewer_zeros
from graphopt_passes.prune.storing import TYPES, Form, Numbers, store, why_not_stored
from graphopt_passes.quantize.granularity import WEIGHTS
from graphopt_passes.quantize.narrow_weights import Target
from graphopt_passes.share.zeros import unpacked_zeros


@dataclass(frozen=True)
class PruneMagnitude(Pass):
    """Set the smallest weights to zero, and refit the others where samples allow.

    Without samples that is all. With them, the entries that stay are refitted, first layer to last,
    so that each gives what it gave of what it reads now, and the bias makes the means right;
    prune-importance then also lets samples say which entries stay, and loses less.

    The file becomes smaller; onnxruntime has no sparse kernels, so that speed and memory stay.

    Attributes:
        sparsity: share of the entries of all weights together that becomes zero.
        layers: how they are spread. "lamp": by magnitude squared over the squares of all that are
            as large in the weight (Lee et al. 2021, arXiv 2010.07611). "uniform": the same share of
            each. "global": the smallest of all. "erk": density by the sum of a weight's dimensions
            over their product (Evci et al. 2020, arXiv 1911.11134).
        pattern: "unstructured"; "N:M", so that of M consecutive input channels N stay; or "RxC",
            blocks of R outputs and C inputs.
        refit: fit what stays to the samples.
        min_elements: smaller weights stay.
        numbers: the entries that stay become numbers of this type.
        form: "packed" stores zeros in a bit or less, "dense" like other numbers.

    Raises:
        SpecError: there is no such pattern.
    """

    name: ClassVar[str] = "prune-magnitude"
    effect: ClassVar[Effect] = Effect.LOSSY
    operators: ClassVar[frozenset[str] | None] = frozenset(WEIGHTS)
    max_error: ClassVar[float] = 0.3
    max_latency: ClassVar[float | None] = 1.03

    sparsity: Annotated[float, Bounds(0.0, 0.99)] = 0.5
    layers: Literal["lamp", "uniform", "global", "erk"] = "lamp"
    pattern: str = "unstructured"
    refit: bool = True
    min_elements: Annotated[int, Bounds(1)] = 256
    numbers: Numbers = "float32"
    form: Form = "packed"

    def __post_init__(self) -> None:
        super().__post_init__()
        pattern_of(self.pattern)

    def refuse(self, model: ir.Model, context: Context) -> str | None:
        """Refuse opsets before that of the nodes that are written."""
        return why_not_stored(model, self.form)

    def apply(self, model: ir.Model, context: Context) -> Change:
        """Prune all weights."""
        change = Change()
        with unpacked_zeros(model, context):
            pruning = Pruning(
                model,
                context if self.refit else replace(context, observer=None),
                "magnitude",
                pattern_of(self.pattern),
                change,
                self.min_elements,
                numbers=TYPES[self.numbers],
            )
            keeps = self._keeps(pruning.targets)
            if self._changes(pruning.targets, keeps):
                pruning.run(keeps)
        store(model, self.form, context, change)
        return change

    def _changes(self, targets: Sequence[Target], keeps: Sequence[int]) -> bool:
        """Something becomes zero: not where weights were trained with these zeros already."""
        if self.pattern != "unstructured" or self.numbers != "float32" or not self.sparsity:
            return bool(targets)
        return any(keep < t.nonzeros for t, keep in zip(targets, keeps, strict=True))

    def _keeps(self, targets: Sequence[Target]) -> list[int]:
        """How many entries each weight keeps."""
        sizes = [target.size for target in targets]
        density = pattern_of(self.pattern).fixed_density
        keep = round(sum(sizes) * (1 - self.sparsity if density is None else density))
        if density is not None or self.layers == "uniform":
            counts = uniform(sizes, keep)
        elif self.layers == "erk":
            counts = erk([target.shape for target in targets], keep)
        else:
            counts = _BY_MAGNITUDE[self.layers]([np.abs(t.matrix()) for t in targets], keep)
        return [int(count) for count in counts]

    def narrow(self) -> PruneMagnitude | None:
        """Fewer zeros."""
        fixed = pattern_of(self.pattern).fixed_density is not None
        milder = None if fixed else fewer_zeros(self.sparsity)
        return None if milder is None else replace(self, sparsity=milder)


_BY_MAGNITUDE: dict[str, Callable[[Sequence[np.ndarray], int], Counts]] = {
    "global": global_largest,
    "lamp": lamp,
}

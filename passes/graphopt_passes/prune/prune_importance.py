"""prune-importance: set the weights to zero that the outputs need least, and refit the others."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import onnx_ir as ir

from graphopt.contract import Bounds, Change, Context, Effect, Pass
from graphopt.errors import SpecError
from graphopt_passes.prune.masks import pattern_of
from graphopt_passes.prune.pruning import Pruning, fewer_zeros
from graphopt_passes.prune.storing import TYPES, Form, Numbers, store, why_not_stored
from graphopt_passes.quantize.each import parse_each, skip_others
from graphopt_passes.quantize.granularity import WEIGHTS
from graphopt_passes.share.zeros import unpacked_zeros


@dataclass(frozen=True)
class PruneImportance(Pass):
    """Set the weights to zero that the outputs need least, and refit the others.

    Each weight is tried alone, pruned to 60 %: what that does to the outputs, and what its entries
    are worth, says how many of them it keeps. Then layers are pruned first to last. Each is to give
    what it gave in the model as it came, of what it reads now, so that it makes good for what those
    before it have lost; where its output is added to another value, for that, too. Which entries
    stay is what removing them costs when the others make good for it: one after the other where the
    weight is small (ExactOBS, arXiv 2208.11580), all at once by alternating directions elsewhere
    (ALPS, arXiv 2406.07831). The others are refitted by least squares, and the bias makes the means
    right. Labels are not needed; colour images, up to 128, are also fitted to mirrored and cut out.

    The file becomes smaller; onnxruntime has no sparse kernels, so that speed and memory stay.

    Attributes:
        sparsity: share of the entries of all weights together that becomes zero.
        error: relative L2 error of the worst output that may be added, on the calibration samples;
            with it, the sparsity is the largest that stays within it. 0 leaves it to `sparsity`.
        criterion: "second-order" is that; "activations" is magnitude times that of what an entry is
            multiplied with (Wanda, arXiv 2306.11695).
        layers: "by-loss" lets each weight keep what the outputs need; "uniform" the same share.
        pattern: "unstructured"; "N:M", so that of M consecutive input channels N stay; or "RxC",
            blocks of R outputs and C inputs.
        min_elements: smaller weights stay.
        numbers: the entries that stay become numbers of this type.
        form: "packed" stores zeros in a bit or less, "dense" like other numbers.
        each: shares of zeros of single weights, `NAME:SHARE`; all others stay.

    Raises:
        SpecError: there is no such pattern, or an error is asked for of one that says how many
            entries stay, or for uniform layers; or a share of `each` is no share.
    """

    name: ClassVar[str] = "prune-importance"
    effect: ClassVar[Effect] = Effect.LOSSY
    operators: ClassVar[frozenset[str] | None] = frozenset(WEIGHTS)
    needs_samples: ClassVar[bool] = True
    max_error: ClassVar[float] = 0.3
    max_latency: ClassVar[float | None] = 1.03

    sparsity: Annotated[float, Bounds(0.0, 0.99)] = 0.5
    error: Annotated[float, Bounds(0.0, None)] = 0.0
    criterion: Literal["second-order", "activations"] = "second-order"
    layers: Literal["by-loss", "uniform"] = "by-loss"
    pattern: str = "unstructured"
    min_elements: Annotated[int, Bounds(1)] = 256
    numbers: Numbers = "float32"
    form: Form = "packed"
    each: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(0 <= share < 1 for share in self._each.values()):
            raise SpecError(
                "'prune-importance' gives each weight a share of zeros from 0 to below 1"
            )
        if pattern_of(self.pattern).fixed_density is not None and self.error:
            raise SpecError(f"pattern {self.pattern} says how many entries stay; leave error away")
        if self.layers == "uniform" and self.error:
            raise SpecError("an error is spread over layers by loss; leave error or layers away")

    @property
    def _each(self) -> dict[str, float]:
        return parse_each(self.name, self.each, float, "the share of its zeros, 0.5 say")

    def refuse(self, model: ir.Model, context: Context) -> str | None:
        """Refuse opsets before that of the nodes that are written."""
        return why_not_stored(model, self.form)

    def apply(self, model: ir.Model, context: Context) -> Change:
        """Prune all weights."""
        change = Change()
        with unpacked_zeros(model, context):
            pruning = Pruning(
                model,
                context,
                self.criterion,
                pattern_of(self.pattern),
                change,
                1 if self.each else self.min_elements,
                numbers=TYPES[self.numbers],
                only=self._each if self.each else None,
            )
            if self.each:
                self._prune_each(pruning)
            else:
                pruning.apply(self.sparsity, self.error, self.layers)
        store(model, self.form, context, change)
        return change

    def _prune_each(self, pruning: Pruning) -> None:
        """Prune the weights that are named, each as it is said."""
        each = self._each
        skip_others(each, [target.name for target in pruning.targets], pruning.change)
        if len(pruning.targets) == 1:
            # Nothing is made good for by later layers, which the tuning is about.
            pruning.gains = "none"
        if pruning.targets:
            pruning.run([round(t.size * (1 - each[t.name])) for t in pruning.targets])

    def narrow(self) -> PruneImportance | None:
        """Half the error, or fewer zeros."""
        if self.each:
            milder_each = tuple(
                f"{name}:{milder}"
                for name, share in self._each.items()
                if (milder := fewer_zeros(share)) is not None
            )
            return replace(self, each=milder_each) if milder_each else None
        if self.error:
            return replace(self, error=self.error / 2) if self.error >= 0.01 else None
        fixed = pattern_of(self.pattern).fixed_density is not None
        milder = None if fixed else fewer_zeros(self.sparsity)
        return None if milder is None else replace(self, sparsity=milder)

"""prune-stability: set the weights to zero whose importance the samples do not make sure of."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar

import onnx_ir as ir

from graphopt.contract import Bounds, Change, Context, Effect, Pass
from graphopt.errors import SpecError
from graphopt.loading import load
from graphopt_passes.prune.masks import Unstructured
from graphopt_passes.prune.prune_importance import PruneImportance
from graphopt_passes.prune.pruning import Pruning
from graphopt_passes.prune.stability import Mode
from graphopt_passes.prune.storing import TYPES, Form, Numbers, store, why_not_stored
from graphopt_passes.prune.sureness import Sureness
from graphopt_passes.quantize.granularity import WEIGHTS
from graphopt_passes.share.zeros import unpacked_zeros


@dataclass(frozen=True)
class PruneStability(Pass):
    """Set the weights to zero whose importance is small or unsure, and refit the others.

    As prune-importance, but what an entry is worth counts less the less sure it is: samples fall
    into 16 chunks, a Bayesian bootstrap over these gives importances that other samples could have
    given, and the worth is in proportion to their mean over their deviation (and a constant). What
    is the same in all chunks is pruned as prune-importance does it, to the bit. And the less sure
    moments are, the less the choice of entries follows what only these samples have in common. The
    ledger tells how alike the masks of resamples are, as their Jaccard index.

    Attributes:
        sparsity: share of the entries of all weights together that becomes zero.
        error: relative L2 error of the worst output that may be added, on the calibration samples;
            with it, the sparsity is the largest that stays within it. 0 leaves it to `sparsity`.
        mode: "stability" is that. "selection" counts how often resamples keep an entry (Meinshausen
            and Bühlmann 2010). "keep-uncertain" keeps what is unsure: mean plus kappa deviations
            (PLATON, arXiv 2206.12562).
        kappa: of keep-uncertain.
        checkpoints: files of the same model at other times of its training, whose weights have the
            same names; an entry also counts less the more it differs between them, and the more of
            them have the other sign.
        min_elements: smaller weights stay.
        numbers: the entries that stay become numbers of this type.
        form: "packed" stores zeros in a bit or less, "dense" like other numbers.

    Raises:
        SpecError: kappa is given without keep-uncertain.
    """

    name: ClassVar[str] = "prune-stability"
    effect: ClassVar[Effect] = Effect.LOSSY
    operators: ClassVar[frozenset[str] | None] = frozenset(WEIGHTS)
    needs_samples: ClassVar[bool] = True
    max_error: ClassVar[float] = PruneImportance.max_error
    max_latency: ClassVar[float | None] = 1.03

    sparsity: Annotated[float, Bounds(0.0, 0.99)] = 0.5
    error: Annotated[float, Bounds(0.0, None)] = 0.0
    mode: Mode = "stability"
    kappa: Annotated[float, Bounds(0.0, None)] = 1.0
    checkpoints: tuple[str, ...] = ()
    min_elements: Annotated[int, Bounds(1)] = 256
    numbers: Numbers = "float32"
    form: Form = "packed"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kappa != 1 and self.mode != "keep-uncertain":
            raise SpecError("kappa is of mode=keep-uncertain; leave it away, or take that mode")

    def refuse(self, model: ir.Model, context: Context) -> str | None:
        """Refuse opsets before that of the nodes that are written, and checkpoints without file."""
        missing = next((path for path in self.checkpoints if not Path(path).is_file()), None)
        if missing is not None:
            return f"there is no checkpoint at {missing}"
        return why_not_stored(model, self.form)

    def apply(self, model: ir.Model, context: Context) -> Change:
        """Prune all weights."""
        change, checkpoints = Change(), [load(path) for path in self.checkpoints]
        with unpacked_zeros(model, context):
            pruning = Pruning(
                model,
                context,
                "second-order",
                Unstructured(),
                change,
                self.min_elements,
                numbers=TYPES[self.numbers],
            )
            before, targets = model.clone(), pruning.targets
            sureness = Sureness(before, context, targets, self.mode, self.kappa, checkpoints)
            pruning.factors, pruning.doubts = sureness.factors, sureness.doubt
            pruning.apply(self.sparsity, self.error, "by-loss")
        sureness.tell(change)
        store(model, self.form, context, change)
        return change

    def narrow(self) -> PruneStability | None:
        """Half the error, or fewer zeros."""
        if self.error:
            return replace(self, error=self.error / 2) if self.error >= 0.01 else None
        return (
            None if self.sparsity < 0.2 else replace(self, sparsity=round(self.sparsity - 0.1, 3))
        )

"""quantize-binary: store weights as signs and scales, where the outputs stand it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import onnx_ir as ir

from graphopt.code_fields import fields_of
from graphopt.contract import Bounds, Change, Context, Effect, Pass
from graphopt.encoding import FIRST_OPSET, NODES_BYTES, SCALES_BYTES
from graphopt.errors import SpecError
from graphopt_passes.quantize.bases import sum_of_signs, ternary
from graphopt_passes.quantize.cluster_weights import Clusters, estimates_of_clusters
from graphopt_passes.quantize.granularity import WEIGHTS
from graphopt_passes.quantize.narrow_weights import Solution, Target, targets_of
from graphopt_passes.quantize.narrowing import Budget, Form, Narrowing, Problem
from graphopt_passes.quantize.partly import Partly
from graphopt_passes.quantize.trained_grids import signs_of
from graphopt_passes.share.zeros import unpacked_zeros
from graphopt_passes.simplify.chains import why_refused

BASES_MAXIMUM = 3

TWO_BITS = Clusters(4)
"""Four free values and a scale for each row: the bits of two bases."""

SHARES = (0.75, 0.5, 0.25)
"""Of the inputs of a weight that may be in two bits while the others stay."""

WIDER = (8, 16, 32, 64, 256)
"""Clusters of layers that stand no two bits."""


@dataclass(frozen=True)
class QuantizeBinary(Pass):
    """Store weights as signs and scales, where the outputs stand it.

    A row of a weight (the numbers of one output), or each block of it, becomes a sum of one, two or
    three bases, each of them signs with one scale; or -a, 0 and a. Signs and scales are fitted in
    turn to change the layer's outputs least, by feedback of errors as in GPTQ, coordinate descent
    and joint least squares, and the bias takes back what changed in the means. Four free values
    take the two bits of two bases, are mostly closer, and are chosen from too. Where not all inputs
    of a weight stand two bits, a quarter, half or three quarters of them get four values, the
    others stay and take errors back. Without samples, numbers go to the nearest level.

    One basis is 1 bit, three numbers are 1.6. Hardly a network that was not trained for it stands
    that everywhere, so that each weight is tried, the estimate of bytes and error is told before
    anything is written, and what does not stand it stays. Few samples tell little of whether it
    does: with 64, keep some of your own to check by. Codes are packed, and nodes widen them that
    onnxruntime computes when it loads the model: files become smaller; speed and memory stay.

    Attributes:
        bases: of every weight that is made binary; 0 chooses for each.
        ternary: -a, 0 and a for every weight that is made binary.
        layers: which are: those that the error allows, or all.
        others: what the others become: they stay, or clusters of 3 to 8 bits.
        block: so many inputs share a scale, where they divide a row; 0 for all of it. Clusters have
            one for each row.
        error: relative L2 error of the worst output that may be added, in its square, on a third of
            the calibration samples, while weights are rounded by the others. Without samples, of
            the weights.
        min_elements: smaller weights stay.
        refit: weights that stay are fitted to the samples, so that their layers give what they gave
            before, as far as what they read now allows.

    Raises:
        SpecError: bases are asked for, and ternary too.
    """

    name: ClassVar[str] = "quantize-binary"
    effect: ClassVar[Effect] = Effect.LOSSY
    operators: ClassVar[frozenset[str] | None] = frozenset(WEIGHTS)
    max_error: ClassVar[float] = 0.2
    max_latency: ClassVar[float | None] = 1.03

    bases: Annotated[int, Bounds(0, BASES_MAXIMUM)] = 0
    ternary: bool = False
    layers: Literal["tolerant", "all"] = "tolerant"
    others: Literal["float", "clusters"] = "float"
    block: Annotated[int, Bounds(0)] = 0
    error: Annotated[float, Bounds(0.0, None)] = 0.05
    min_elements: Annotated[int, Bounds(1)] = 1024
    refit: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bases and self.ternary:
            raise SpecError("'quantize-binary' takes bases or ternary, not both; leave one away")

    def refuse(self, model: ir.Model, context: Context) -> str | None:
        """Refuse opsets before that of the nodes that are written."""
        return why_refused(model, FIRST_OPSET)

    def apply(self, model: ir.Model, context: Context) -> Change:
        """Make weights binary: all of them, or those that the error allows."""
        with unpacked_zeros(model, context):
            return self._applied(model, context)

    def _applied(self, model: ir.Model, context: Context) -> Change:
        change = Change()
        targets = [t for t in targets_of(model, self.min_elements, change) if _is_float(t, change)]
        if targets:
            narrowing = Narrowing(
                model,
                context,
                self._forms,
                TWO_BITS,
                _estimates,
                change,
                targets,
                foretells=True,
                refits=self.refit,
            )
            narrowing.run(Budget(None, self.error) if self.layers == "tolerant" else None)
        return change

    @property
    def _forms(self) -> list[Form]:
        """From the narrowest to the widest."""
        if self.ternary:
            narrow: list[Form] = [Ternary(self.block)]
        elif self.bases or self.layers == "all":
            narrow = [Signs(self.bases or 1, self.block)]
        else:
            narrow = [Signs(1, self.block), Ternary(self.block), Signs(2, self.block), TWO_BITS]
            narrow += [Partly(TWO_BITS, share) for share in SHARES]
        if self.layers == "all":
            return narrow
        wider = WIDER if self.others == "clusters" else ()
        return [*narrow, *map(Clusters, wider)]

    def narrow(self) -> QuantizeBinary | None:
        """Only the layers that stand it; then half the error."""
        if self.layers == "all":
            return replace(self, layers="tolerant")
        return replace(self, error=self.error / 2) if self.error >= 0.01 else None


def _is_float(target: Target, change: Change) -> bool:
    """The weight is widened to float, not to the int8 of an integer kernel."""
    if target.is_integer:
        change.skip(target.value, "its kernel works on int8; cluster-weights makes it narrow")
    return not target.is_integer


@dataclass(frozen=True)
class Signs:
    """A sum of bases.

    Attributes:
        bases: how many.
        block: so many inputs share a scale; 0 for a row.
    """

    bases: int
    block: int = 0

    @property
    def label(self) -> str:
        """For the ledger."""
        return "signs" if self.bases == 1 else f"{self.bases} bases of signs"

    def stored_bytes(self, target: Target) -> int:
        """Of signs and scales."""
        codes = fields_of(2)[0].stored_bytes(target.size)
        scales = 2 * target.rows * target.blocks_of(self.block)
        return self.bases * (codes + scales + SCALES_BYTES) + (self.bases - 1) * NODES_BYTES // 2

    def solve(self, problem: Problem) -> Solution:
        """The weight as a sum of signs."""
        blocks = problem.target.blocks_of(self.block)
        trained = signs_of(problem.weight, blocks)
        if trained is not None:
            return Solution((trained,), as_trained=True)
        return Solution(
            sum_of_signs(problem.weight, self.bases, blocks, problem.diagonal, problem.gram)
        )


@dataclass(frozen=True)
class Ternary:
    """-a, 0 and a.

    Attributes:
        block: so many inputs share a; 0 for a row.
    """

    block: int = 0

    @property
    def label(self) -> str:
        """For the ledger."""
        return "-a, 0 and a"

    def stored_bytes(self, target: Target) -> int:
        """Of codes and scales."""
        scales = 2 * target.rows * target.blocks_of(self.block)
        return fields_of(3)[0].stored_bytes(target.size) + scales + SCALES_BYTES

    def solve(self, problem: Problem) -> Solution:
        """The weight in three numbers for each block."""
        blocks = problem.target.blocks_of(self.block)
        return Solution((ternary(problem.weight, blocks, problem.diagonal, problem.gram),))


def _estimates(problem: Problem, forms: Sequence[Form]) -> list[float]:
    """The squared errors of forms of two bits or fewer, by solving; of others, from that.

    What feedback gains differs from form to form where there are few levels.
    """
    wide = [form for form in forms if isinstance(form, Clusters) and form != TWO_BITS]
    guesses = estimates_of_clusters(problem, [TWO_BITS, *wide])
    exact = problem.error(TWO_BITS.solve(problem))
    known = {
        form: guess * exact / max(guesses[0], 1e-30)
        for form, guess in zip([TWO_BITS, *wide], guesses, strict=True)
    }
    return [
        known[form] if isinstance(form, Clusters) else problem.error(form.solve(problem))
        for form in forms
    ]

"""prune-structures: remove channels, heads, hidden units and branches, and refit the rest."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import onnx_ir as ir

from graphopt.contract import Bounds, Change, Context, Effect, Pass
from graphopt_passes.prune.structures import Structures
from graphopt_passes.quantize.granularity import WEIGHTS

MULTIPLES = {"cpu": 8, "cuda": 8}
"""Of how many channels kernels work on at a time; see `prune-structures{multiple}`."""

LEAST = 0.95
"""Of the budget; a smaller part to go is not worth a try."""


@dataclass(frozen=True)
class PruneStructures(Pass):
    """Remove channels, heads, hidden units and residual branches, and refit the rest.

    Attributes:
        macs: share of the multiply-accumulates that stays.
        parameters: share of the parameters that stays; 0 where the budget is `macs`.
        multiple: numbers of channels that stay are multiples of it; 0 for what kernels like.
        blocks: whole residual branches may go.
        refit: layers are refitted to what they gave.
        keep: names of groups that stay as they are, with spaces between them.
    """

    name: ClassVar[str] = "prune-structures"
    effect: ClassVar[Effect] = Effect.LOSSY
    operators: ClassVar[frozenset[str] | None] = frozenset(WEIGHTS)
    needs_samples: ClassVar[bool] = True
    max_error: ClassVar[float] = 0.5

    macs: Annotated[float, Bounds(0.01, 1.0)] = 0.7
    parameters: Annotated[float, Bounds(0.0, 1.0)] = 0.0
    multiple: Annotated[int, Bounds(0, 256)] = 0
    blocks: bool = True
    refit: bool = True
    keep: str = ""

    def narrow(self) -> PruneStructures | None:
        """Half as much goes; None where that is next to nothing."""
        if self.parameters:
            milder = 1 - (1 - self.parameters) / 2
            return replace(self, parameters=milder) if milder <= LEAST else None
        milder = 1 - (1 - self.macs) / 2
        return replace(self, macs=milder) if milder <= LEAST else None

    def apply(self, model: ir.Model, context: Context) -> Change:
        """Prune to the budget."""
        change = Change()
        structures = Structures(
            model,
            context,
            change,
            of_parameters=self.parameters > 0,
            multiple=self.multiple or MULTIPLES[context.provider],
            keep=frozenset(self.keep.split()),
            drops_blocks=self.blocks,
            refits=self.refit,
        )
        if not structures.groups and not structures.blocks:
            return change
        structures.run(self.parameters or self.macs)
        return change

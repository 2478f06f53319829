"""prune-structures: remove channels, heads, hidden units and branches, and refit the rest."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import onnx_ir as ir

from graphopt.contract import Bounds, Change, Context, Effect, Pass
from graphopt.errors import SpecError, did_you_mean
from graphopt.groups import analyze
from graphopt.layer_costs import sizes_of_sample
from graphopt_passes.prune.lanes import measured_lanes
from graphopt_passes.prune.structures import Structures
from graphopt_passes.prune.tail_choice import TailChoice
from graphopt_passes.prune.unit_budgets import Budget, OfLatency, OfMacs, OfParameters
from graphopt_passes.quantize.granularity import WEIGHTS

MULTIPLES = {"cpu": 8, "cuda": 8}
"""Of how many channels kernels work on at a time; see `prune-structures{multiple}`."""

MACS = 0.7
"""Share of the multiply-accumulates that stays where no budget is stated."""

LEAST = 0.95
"""Of the budget; a smaller part to go is not worth a try."""


@dataclass(frozen=True)
class PruneStructures(Pass):
    """Remove channels, heads, hidden units and residual branches, and refit the rest.

    What can only be removed together is a group of units; `graphopt inspect --groups` shows them,
    and what keeps others. What it costs the layers that read a group to lose units, while the rest
    of their inputs make good for it, gives an order (structured optimal brain surgeon; ZipLM, arXiv
    2302.04089). What half of a group is worth to the outputs, and each residual branch, is measured
    on samples that gave no moments. So much goes of each as the budget asks at the least error, and
    then each layer, first to last, is refitted to what it gave, of what it reads now. Where only
    the mean over places of an image is read in the end, the last layers may work on the means of
    two by two places, if the budget is met better so. Labels are not needed.

    The result is a smaller dense model: it is faster, and takes less memory, wherever it runs. What
    a compact network has lost so, least squares cannot bring back: look at what the metric says.

    Attributes:
        macs: share of the multiply-accumulates that stays.
        parameters: share of the parameters that stays, instead; 0 for no such budget.
        latency: share of the time of a run that stays, instead, as it is measured while the pass
            works; 0 for no such budget.
        multiple: numbers of channels that stay are multiples of it; 0 for 8, or, where latency is
            the budget, for as many as kernels are seen to take at a time (16 on AVX512).
        blocks: whole residual branches may go.
        places: the last layers of what ends in a mean over places may work on a quarter of them.
        refit: layers are refitted to what they gave.
        keep: names of groups that stay as they are.

    Raises:
        SpecError: two budgets are stated.
    """

    name: ClassVar[str] = "prune-structures"
    effect: ClassVar[Effect] = Effect.LOSSY
    operators: ClassVar[frozenset[str] | None] = frozenset(WEIGHTS)
    needs_samples: ClassVar[bool] = True
    max_error: ClassVar[float] = 0.15

    macs: Annotated[float, Bounds(0.01, 1.0)] = MACS
    parameters: Annotated[float, Bounds(0.0, 1.0)] = 0.0
    latency: Annotated[float, Bounds(0.0, 1.0)] = 0.0
    multiple: Annotated[int, Bounds(0, 256)] = 0
    blocks: bool = True
    places: bool = True
    refit: bool = True
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        stated = {"macs": self.macs != MACS, "parameters": self.parameters, "latency": self.latency}
        names = [name for name, budget in stated.items() if budget]
        if len(names) > 1:
            raise SpecError(f"{' and '.join(names)} are two budgets; say one of them")

    def refuse(self, model: ir.Model, context: Context) -> str | None:
        """Refuse names that no group has."""
        known = {group.name for group in analyze(model).all} if self.keep else set()
        unknown = next((name for name in self.keep if name not in known), None)
        if unknown is None:
            return None
        return f"no group is called {unknown!r}{did_you_mean(unknown, known)}"

    def narrow(self) -> PruneStructures | None:
        """Half as much goes; None where that is next to nothing."""
        milder = 1 - (1 - self._share) / 2
        if milder > LEAST:
            return None
        if self.latency:
            return replace(self, latency=milder)
        return replace(self, parameters=milder) if self.parameters else replace(self, macs=milder)

    def apply(self, model: ir.Model, context: Context) -> Change:
        """Prune to the budget."""
        change, budget = Change(), self._budget(model, context)

        def prune(part: ir.Model, looking: Context, told: Change, share: float) -> bool:
            structures = Structures(
                part,
                looking,
                told,
                budget,
                multiple=self._multiple(budget, context),
                keep=frozenset(self.keep),
                drops_blocks=self.blocks,
                refits=self.refit,
            )
            return bool(structures.groups or structures.blocks) and structures.run(share)

        if self.places and not self.parameters:
            TailChoice(model, context, budget, self._share, prune).run(change)
        else:
            prune(model, context, change, self._share)
        return change

    @property
    def _share(self) -> float:
        return self.latency or self.parameters or self.macs

    def _budget(self, model: ir.Model, context: Context) -> Budget:
        if self.parameters:
            return OfParameters()
        sizes = sizes_of_sample(model, next(iter(context.samples), {}))
        if not self.latency:
            return OfMacs(sizes)
        lanes = measured_lanes(context.provider)
        return OfLatency(context.samples, context.provider, sizes, lanes)

    def _multiple(self, budget: Budget, context: Context) -> int:
        return self.multiple or (budget.lanes if self.latency else MULTIPLES[context.provider])

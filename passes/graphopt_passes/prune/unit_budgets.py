"""What pruning is to save: multiply-accumulates, parameters, or time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import onnx_ir as ir

from graphopt.benchmark import latency_ratio
from graphopt.contract import Sample
from graphopt.layer_costs import macs_of_nodes
from graphopt.node_times import node_times
from graphopt_passes.prune.unit_costs import Term, latency_terms, macs_terms, parameters_terms


class Budget(Protocol):
    """Something that a model takes."""

    @property
    def lanes(self) -> int:
        """So many channels along an axis cost what the next multiple of it does."""

    def terms(self, model: ir.Model) -> list[Term]:
        """What a model takes, by layer; the model has inferred shapes and is not modified."""

    def share(self, model: ir.Model, before: ir.Model) -> float:
        """What a model takes, of what another one does."""


@dataclass(frozen=True)
class OfMacs:
    """Multiply-accumulates.

    Attributes:
        sizes: of dimensions that the file leaves open; see `graphopt.layer_costs.free_sizes`.
    """

    sizes: Mapping[str, int]
    lanes: int = 1

    def terms(self, model: ir.Model) -> list[Term]:
        """See `Budget`."""
        return macs_terms(model, self.sizes)

    def share(self, model: ir.Model, before: ir.Model) -> float:
        """See `Budget`."""
        return self._macs(model) / max(self._macs(before), 1)

    def _macs(self, model: ir.Model) -> int:
        return sum(macs or 0 for macs in macs_of_nodes(model, self.sizes).values())


@dataclass(frozen=True)
class OfParameters:
    """Numbers in the weights."""

    lanes: int = 1

    def terms(self, model: ir.Model) -> list[Term]:
        """See `Budget`."""
        return parameters_terms(model)

    def share(self, model: ir.Model, before: ir.Model) -> float:
        """See `Budget`."""
        now, then = (sum(t.amount for t in parameters_terms(m)) for m in (model, before))
        return now / max(then, 1)


@dataclass(frozen=True)
class OfLatency:
    """Time of a run at one thread, measured; two runs may choose otherwise.

    Attributes:
        samples: to run on.
        provider: "cpu" or "cuda".
        sizes: see `OfMacs`.
        lanes: see `Budget`.
    """

    samples: Iterable[Sample]
    provider: str
    sizes: Mapping[str, int]
    lanes: int

    def terms(self, model: ir.Model) -> list[Term]:
        """See `Budget`."""
        return latency_terms(model, node_times(model, self.samples, self.provider), self.sizes)

    def share(self, model: ir.Model, before: ir.Model) -> float:
        """See `Budget`."""
        return latency_ratio(before, model, self.samples, self.provider)

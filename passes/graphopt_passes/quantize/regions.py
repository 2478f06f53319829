"""Which of the nodes that can work on codes do: those for which it pays, as a minimum cut.

Each node works on codes or on floats at a cost, and a value costs once where it must change its
form. The cheapest choice for all of them together is a minimum cut of a graph that has these costs
as capacities (Picard and Ratliff 1975, Minimum cuts and related problems; Greig et al. 1989), so
that it is found exactly: no value changes form for nothing, and a region on floats is as large as
it has to be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

from graphopt_passes.quantize.latency import DEQUANTIZE_NS, QUANTIZE_NS, Cost
from graphopt_passes.quantize.units import Unit, can_make_floats

CODES, FLOATS = 0, 1
"""The two ends of the cut."""

CAPACITY_MAXIMUM = (1 << 31) - 1
"""Of an arc: the solver counts in int32."""


def chosen_units(
    units: Sequence[Unit],
    costs: Mapping[Unit, Cost],
    elements_of: Callable[[ir.Value], float],
    rounding_ns: Mapping[ir.Value, float] | None = None,
) -> list[Unit]:
    """The units that are to work on codes, in order.

    Args:
        units: all candidates, in order.
        costs: of each.
        elements_of: how many elements a value has.
        rounding_ns: what it costs that a value is rounded to codes, where it is.
    """
    if not units:
        return []
    rounding_ns = rounding_ns or {}
    network = _Network(2 + len(units))
    places = {unit.node: 2 + n for n, unit in enumerate(units)}
    makers = {
        o: place for unit, place in zip(units, places.values(), strict=True) for o in unit.outputs
    }
    for unit, place in zip(units, places.values(), strict=True):
        network.arc(CODES, place, costs[unit].floats_ns)
        network.arc(place, FLOATS, costs[unit].codes_ns)
    may_leave = {o for unit in units if can_make_floats(unit) for o in unit.outputs}
    moved = {o for unit in units if unit.kind == "movement" for o in unit.outputs}
    rounded = makers.keys() - may_leave - moved
    for value in dict.fromkeys(v for unit in units for v in (*unit.sources, *unit.outputs)):
        readers = {places.get(use.node, FLOATS) for use in value.uses()}
        readers |= {FLOATS} if value.is_graph_output() else set()
        # Integer kernels of these make floats at no cost, where nothing reads codes.
        dequantize = readers != {FLOATS} or value not in may_leave
        maker, elements = makers.get(value, FLOATS), elements_of(value)
        _add_changes(network, maker, readers, elements, dequantize)
        if value in rounding_ns:
            # Movement makes codes of codes, which are rounded already.
            unless = maker if value in moved else FLOATS
            rounding = readers | ({maker} if value in rounded else set())
            _add_rounding(network, rounding, unless, rounding_ns[value])
    on_codes = network.near_codes()
    return [unit for unit in units if places[unit.node] in on_codes]


def _add_changes(
    network: _Network, maker: int, readers: set[int], elements: float, dequantize: bool
) -> None:
    """What it costs where a value is made in one form and read in the other, once each way."""
    others = readers - {FLOATS}
    if others:
        quantized = network.place()
        network.arc(quantized, maker, QUANTIZE_NS * elements)
        for reader in others:
            network.forbid(reader, quantized)
    if maker == FLOATS or not dequantize:
        return
    dequantized = network.place()
    network.arc(maker, dequantized, DEQUANTIZE_NS * elements)
    for reader in readers:
        network.forbid(dequantized, reader)


def _add_rounding(network: _Network, rounding: set[int], unless: int, cost_ns: float) -> None:
    """What it costs where one of these is on codes, unless another place is."""
    rounded = network.place()
    network.arc(rounded, unless, cost_ns)
    for place in rounding - {FLOATS}:
        network.forbid(place, rounded)


@dataclass
class _Network:
    """Arcs between places: one that leads from the side of codes to that of floats is paid for."""

    places: int
    _arcs: list[tuple[int, int, float]] = field(default_factory=list)

    def place(self) -> int:
        self.places += 1
        return self.places - 1

    def arc(self, start: int, end: int, cost_ns: float) -> None:
        self._arcs.append((start, end, cost_ns))

    def forbid(self, start: int, end: int) -> None:
        """No cut has the start on the side of codes and the end on that of floats."""
        self._arcs.append((start, end, np.inf))

    def near_codes(self) -> set[int]:
        """The places on the side of codes in a cut of least cost."""
        starts, ends, costs_ns = (np.array(column) for column in zip(*self._arcs, strict=True))
        finite = np.isfinite(costs_ns)
        # All costs together must not reach what is forbidden.
        scale = min(1.0, CAPACITY_MAXIMUM / 2 / max(float(costs_ns[finite].sum()), 1.0))
        capacities = np.where(finite, np.rint(costs_ns * scale), CAPACITY_MAXIMUM - 1)
        shape = (self.places, self.places)
        data = capacities.astype(np.int32)
        whole = csr_array((data, (starts.astype(np.int32), ends.astype(np.int32))), shape=shape)
        left = whole - maximum_flow(whole, CODES, FLOATS).flow
        left.eliminate_zeros()
        order = breadth_first_order(left, CODES, return_predecessors=False)
        return set(map(int, order))


class SameScale:
    """Values that share scale and zero point, because movement passes codes from one to the other.

    A union of disjoint sets; the first value of each set stands for it.
    """

    def __init__(self) -> None:
        self._parent: dict[ir.Value, ir.Value] = {}

    def of(self, value: ir.Value) -> ir.Value:
        """The value that stands for the set."""
        while (parent := self._parent.get(value, value)) is not value:
            value = parent
        return value

    def join(self, first: ir.Value, others: Iterable[ir.Value]) -> None:
        """Let all these values share."""
        root = self.of(first)
        for other in others:
            self._parent[self.of(other)] = root

"""What a model costs with fewer units: multiply-accumulates, or parameters.

A product of two values takes as many multiply-accumulates as the product of the sizes of their
axes. So the cost of a model is a sum of terms, each a number times the sizes of axes, relative to
what they were; and the size of an axis is linear in how many units of each group stay.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.groups import Group
from graphopt.layer_costs import macs_of_nodes
from graphopt.multiply_accumulates import operands_of
from graphopt.operators import all_graphs, is_onnx
from graphopt.rewriting import constant_tensor

Axis = tuple[ir.Value, int]


@dataclass(frozen=True, eq=False)
class Term:
    """A part of what a model costs.

    Attributes:
        amount: with all units.
        axes: whose relative sizes it is multiplied with.
        nodes: it is gone with any of them.
    """

    amount: float
    axes: tuple[Axis, ...]
    nodes: tuple[ir.Node, ...]


@dataclass(frozen=True)
class Costs:
    """What a model costs, by how many units of each group stay.

    Attributes:
        groups: of the model.
        terms: whose sum it is.
        lanes: an axis costs what one of the next multiple of it in size does.
    """

    groups: Sequence[Group]
    terms: Sequence[Term]
    lanes: int = 1

    def __post_init__(self) -> None:
        shares: dict[Axis, dict[int, float]] = defaultdict(dict)
        sizes: dict[Axis, int] = {}
        for number, group in enumerate(self.groups):
            for place in group.places:
                axis = place.value, place.axis % max(_rank(place.value), 1)
                shares[axis][number] = len(place.indices) / place.size
                sizes[axis] = place.size
        object.__setattr__(self, "_sizes", sizes)
        object.__setattr__(self, "_shares", shares)
        touching: list[list[int]] = [[] for _ in self.groups]
        for index, term in enumerate(self.terms):
            for number in {n for axis in term.axes for n in shares.get(axis, ())}:
                touching[number].append(index)
        object.__setattr__(self, "_touching", touching)

    @property
    def total(self) -> float:
        """With all units."""
        return sum(term.amount for term in self.terms)

    def of(self, counts: Sequence[int], gone: frozenset[ir.Node] = frozenset()) -> float:
        """With so many units of each group, without some nodes."""
        shares = np.array([c / g.units for c, g in zip(counts, self.groups, strict=True)])
        return sum(
            float(self._amount(term, shares))
            for term in self.terms
            if not gone or gone.isdisjoint(term.nodes)
        )

    def along(
        self,
        number: int,
        allowed: np.ndarray,
        counts: Sequence[int],
        gone: frozenset[ir.Node] = frozenset(),
    ) -> np.ndarray:
        """The part that depends on a group, for each number of units that could stay of it.

        Args:
            number: of the group.
            allowed: int64 [n]: numbers of its units.
            counts: of all groups.
            gone: nodes that are not there.
        """
        shares: list[float | np.ndarray] = [
            c / g.units for c, g in zip(counts, self.groups, strict=True)
        ]
        shares[number] = allowed / self.groups[number].units
        total = np.zeros(len(allowed))
        for index in self._touching[number]:  # type: ignore[attr-defined]
            term = self.terms[index]
            if not gone or gone.isdisjoint(term.nodes):
                total = total + self._amount(term, shares)
        return total

    def _amount(
        self, term: Term, shares: Sequence[float | np.ndarray] | np.ndarray
    ) -> float | np.ndarray:
        amount: float | np.ndarray = term.amount
        for axis in term.axes:
            of_axis = self._shares.get(axis)  # type: ignore[attr-defined]
            if of_axis:
                left = 1 - sum(s * (1 - shares[n]) for n, s in of_axis.items())
                amount = amount * self._filled(left, self._sizes[axis])  # type: ignore[attr-defined]
        return amount

    def _filled(self, share: float | np.ndarray, size: int) -> float | np.ndarray:
        """The share of an axis that is worked on."""
        if self.lanes == 1:
            return share
        # Sizes are whole numbers but for rounding.
        blocks = np.ceil(np.round(share * size, 6) / self.lanes)
        return blocks / math.ceil(size / self.lanes)


def _rank(value: ir.Value) -> int:
    return value.shape.rank() if value.shape is not None else 0


def macs_terms(model: ir.Model, sizes: Mapping[str, int]) -> list[Term]:
    """The multiply-accumulates of a model.

    Args:
        model: with inferred shapes; not modified.
        sizes: of dimensions that the file leaves open.
    """
    found = []
    for node, macs in macs_of_nodes(model, sizes).items():
        if macs:
            parts = list(_parts(node))
            total = sum(size for size, _ in parts)
            found += [Term(macs * size / total, axes, (node,)) for size, axes in parts]
    return found


def latency_terms(
    model: ir.Model, times_us: Mapping[ir.Node, float], sizes: Mapping[str, int]
) -> list[Term]:
    """The time of a run of a model, microseconds.

    What multiplies takes time like its multiply-accumulates do, and what does not like the number
    of elements that it makes.

    Args:
        model: with inferred shapes; not modified.
        times_us: of its nodes; see `graphopt.node_times`.
        sizes: of dimensions that the file leaves open.
    """
    macs = macs_of_nodes(model, sizes)
    found = []
    for node, time_us in times_us.items():
        if macs.get(node):
            parts = list(_parts(node))
            total = sum(size for size, _ in parts)
            found += [Term(time_us * size / total, axes, (node,)) for size, axes in parts]
        elif node.outputs:
            axes = tuple((node.outputs[0], axis) for axis in range(_rank(node.outputs[0])))
            found.append(Term(time_us, axes, (node,)))
    return found


def parameters_terms(model: ir.Model) -> list[Term]:
    """The numbers in the weights of a model: what products read, and tables that are looked up.

    Masks, positions and the like are none.
    """
    found = []
    for graph in all_graphs(model):
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is None or not tensor.dtype.is_floating_point() or not len(tensor.shape):
                continue
            nodes = tuple(use.node for use in value.uses())
            if not any(operands_of(node) or is_onnx(node, "Gather") for node in nodes):
                continue
            # A weight that several nodes read goes with none of them alone.
            owner = nodes if len(nodes) == 1 else ()
            axes = tuple((value, axis) for axis in range(len(tensor.shape)))
            found.append(Term(tensor.size, axes, owner))
    return found


def _parts(node: ir.Node) -> Iterator[tuple[int, tuple[Axis, ...]]]:
    """The axes that the multiply-accumulates of a node are proportional to, for each weight.

    Of a product of two computed values: all axes of the first, and the last of the second.
    """
    operands = [v for i in operands_of(node) if i < len(node.inputs) and (v := node.inputs[i])]
    tensors = [(v, t) for v in operands if (t := constant_tensor(v)) is not None]
    for value, tensor in tensors:
        rank = len(tensor.shape)
        yield math.prod(tensor.shape.numpy()), tuple((value, axis) for axis in range(rank))
    if not tensors:
        axes = [(value, axis) for value in operands[:1] for axis in range(_rank(value))]
        axes += [(value, _rank(value) - 1) for value in operands[1:2] if _rank(value)]
        yield 1, tuple(axes)

"""Which channels, heads and hidden units of a model can be removed, and what goes with them.

A unit is everything that can only be removed together: an output channel of a Conv, its bias and
its place in each normalization, activation and residual sum that it reaches, and the input channel
of every layer that reads it. Units that lie on the same axes make a group; some or all but one of
them may go. A unit is frozen where a part of it must stay: because the model outputs it, a Softmax
normalizes over it, or an operator is not known.

What a unit contributes leaves it through the weights of layers that sum over it, and nowhere else.
So a model without some units computes what the model computes with these weights at zero.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.contract import describe
from graphopt.couplings import (
    Consumer,
    Couplings,
    Producer,
    couplings_without_ties,
    site_of,
)
from graphopt.group_rules import RULES
from graphopt.operators import ONNX_DOMAINS, WITH_BODIES, all_graphs

__all__ = ["Consumer", "Group", "Groups", "Place", "Producer", "analyze"]

FIRST_OPSET = 7
"""Before it, operators are told how to broadcast by attributes."""

REASONS_MAXIMUM = 3
"""Of why a unit is frozen, that are told."""


@dataclass(frozen=True, eq=False)
class Place:
    """An axis on which units of a group lie.

    Attributes:
        value: an initializer, a constant or an activation.
        axis: of the value.
        size: of the axis.
        indices: int64 [n]: those along the axis where units of the group lie, rising.
        units: int64 [n]: the unit at each of them.
    """

    value: ir.Value
    axis: int
    size: int
    indices: np.ndarray
    units: np.ndarray

    @property
    def labels(self) -> np.ndarray:
        """int64 [size]: the unit at each index, -1 where there is none of the group."""
        labels = np.full(self.size, -1)
        labels[self.indices] = self.units
        return labels


@dataclass(frozen=True, eq=False)
class Group:
    """Units that lie on the same axes.

    Attributes:
        name: by which a user finds it: the node that first makes its units, and a number where that
            makes several groups.
        units: how many there are.
        places: all axes that they lie on, in the order of the graph.
        producers: constants that make them.
        consumers: constants that take them out: zero there, a unit counts for nothing.
        frozen: why none of them can be removed; None where they can.
    """

    name: str
    units: int
    places: tuple[Place, ...]
    producers: tuple[Producer, ...]
    consumers: tuple[Consumer, ...]
    frozen: str | None

    def place(self, value: ir.Value, axis: int) -> Place:
        """Where its units lie on an axis of a value.

        Raises:
            KeyError: none do.
        """
        for place in self.places:
            if place.value is value and place.axis == axis:
                return place
        raise KeyError(f"{value.name} axis {axis}")

    def describe(self) -> dict[str, Any]:
        """The group in words and numbers that JSON knows."""
        return {
            "name": self.name,
            "units": self.units,
            "frozen": self.frozen,
            "producers": [
                {"node": describe(p.node), "weight": describe(p.weight), "axis": p.axis}
                for p in self.producers
            ],
            "consumers": [
                {"node": describe(c.node), "weight": describe(c.weight), "axis": c.axis}
                for c in self.consumers
            ],
            "places": [
                {"value": describe(p.value), "axis": p.axis, "size": p.size} for p in self.places
            ],
        }


@dataclass(frozen=True)
class Groups:
    """All groups of a model whose units a constant makes, in the order of the graph.

    Attributes:
        all: those that can be pruned, and those that cannot.
    """

    all: tuple[Group, ...]

    def on(self, value: ir.Value, axis: int) -> tuple[Group, ...]:
        """The groups that have units on an axis of a value: together they say what stays of it."""
        return self._by_axis.get((value, axis), ())

    @cached_property
    def _by_axis(self) -> dict[tuple[ir.Value, int], tuple[Group, ...]]:
        found: dict[tuple[ir.Value, int], tuple[Group, ...]] = {}
        for group in self.all:
            for place in group.places:
                key = place.value, place.axis
                found[key] = (*found.get(key, ()), group)
        return found

    @cached_property
    def prunable(self) -> tuple[Group, ...]:
        """Those of which units can be removed."""
        return tuple(group for group in self.all if group.frozen is None)

    @cached_property
    def frozen(self) -> tuple[Group, ...]:
        """Those that have to stay as they are."""
        return tuple(group for group in self.all if group.frozen is not None)

    def describe(self) -> list[dict[str, Any]]:
        """All groups in words and numbers that JSON knows."""
        return [group.describe() for group in self.all]


def analyze(model: ir.Model) -> Groups:
    """Find the groups of a model, those of the bodies of If, Loop and Scan included.

    Args:
        model: with inferred shapes (see `graphopt.skeleton.infer_shapes`); not modified.
    """
    couplings, opset = couplings_without_ties(model)
    for graph in all_graphs(model):
        what = "of the model" if graph is model.graph else "of a body"
        for value in graph.inputs:
            couplings.freeze_value(value, f"{describe(value)} is an input {what}")
        for value in graph.outputs:
            couplings.freeze_value(value, f"{describe(value)} is an output {what}")
        for node in graph:
            _look_at(node, couplings, opset)
    couplings.resolve()
    return Groups(tuple(_groups(couplings)))


def _look_at(node: ir.Node, couplings: Couplings, opset: int) -> None:
    site = site_of(node, couplings, opset)
    if site is None:
        for value in (*node.inputs, *node.outputs):
            if value is not None:
                reason = f"{node.op_type} {describe(node)}: not all shapes are known"
                couplings.freeze_value(value, reason)
        return
    rule = RULES.get(node.op_type) if node.domain in ONNX_DOMAINS else None
    if rule is not None and opset >= FIRST_OPSET:
        rule(site)
        site.freeze_rest("works along it")
    elif opset < FIRST_OPSET:
        site.freeze_rest(f"opset {opset} is older than {FIRST_OPSET}")
    elif node.op_type in WITH_BODIES and node.domain in ONNX_DOMAINS:
        site.freeze_rest("has bodies")
    else:
        site.freeze_rest("nothing is known of the operator")


def _groups(couplings: Couplings) -> list[Group]:
    classes = couplings.classes()
    unit_of = np.full(int(classes.max(initial=-1)) + 1, -1)
    groups = []
    for axes, why, members in _alike(couplings, classes):
        unit_of[members] = np.arange(len(members))
        groups.append(_group(couplings, classes, unit_of, axes, why))
        unit_of[members] = -1
    order_of = {producer: index for index, producer in enumerate(couplings.producers)}
    groups.sort(key=lambda group: order_of[group.producers[0]])
    return _named_apart(groups)


def _alike(
    couplings: Couplings, classes: np.ndarray
) -> Iterator[tuple[list[int], tuple[str, ...], list[int]]]:
    """Axes, reasons to be frozen, and the classes that have these; of what constants make."""
    atom_axes = couplings.atom_axes()
    is_made = _made_by_constants(couplings, classes, atom_axes)
    reasons: dict[int, dict[str, None]] = defaultdict(dict)
    for found, reason in couplings.frozen(classes):
        for one in found[is_made[found]].tolist():
            reasons[one][reason] = None

    alike: dict[tuple[bytes, tuple[str, ...]], list[int]] = defaultdict(list)
    atoms = np.flatnonzero(is_made[classes])
    atoms = atoms[np.argsort(classes[atoms], kind="stable")]
    starts = np.flatnonzero(np.diff(classes[atoms], prepend=-1))
    for of_one in np.split(atoms, starts[1:]) if atoms.size else ():
        one = int(classes[of_one[0]])
        axes = np.unique(atom_axes[of_one])
        alike[axes.tobytes(), tuple(reasons.get(one, ()))].append(one)
    for (content, why), members in alike.items():
        yield np.frombuffer(content, np.int64).tolist(), why, members


def _made_by_constants(
    couplings: Couplings, classes: np.ndarray, atom_axes: np.ndarray
) -> np.ndarray:
    """Bool [classes]: whether a constant makes channels of the class."""
    made_axes = np.zeros(len(couplings.axes), bool)
    made_axes[[couplings.axis_number(p.weight, p.axis) for p in couplings.producers]] = True
    is_made = np.zeros(int(classes.max(initial=-1)) + 1, bool)
    is_made[classes[made_axes[atom_axes]]] = True
    return is_made


def _named_apart(groups: Sequence[Group]) -> list[Group]:
    """The groups, with a number after a name that is there already."""
    taken: Counter[str] = Counter()
    named = []
    for group in groups:
        taken[group.name] += 1
        number = taken[group.name]
        name = group.name if number == 1 else f"{group.name} ({number})"
        named.append(replace(group, name=name))
    return named


def _group(
    couplings: Couplings,
    classes: np.ndarray,
    unit_of: np.ndarray,
    axes: Sequence[int],
    why: tuple[str, ...],
) -> Group:
    numbers = set(axes)
    places = []
    for number in axes:
        value, axis = couplings.axes[number]
        labels = unit_of[classes[couplings.atoms(value, axis)]]
        indices = np.flatnonzero(labels >= 0)
        places.append(Place(value, axis, labels.size, indices, labels[indices]))
    producers = tuple(
        p for p in couplings.producers if couplings.axis_number(p.weight, p.axis) in numbers
    )
    consumers = tuple(
        c for c in couplings.consumers if couplings.axis_number(c.weight, c.axis) in numbers
    )
    units = 1 + max(int(place.units.max()) for place in places)
    frozen = "; ".join(why[:REASONS_MAXIMUM]) or None
    if frozen is None and not consumers:
        frozen = "nothing reads it"
    if frozen is None and units == 1:
        frozen = "all of it is one unit"
    return Group(describe(producers[0].node), units, tuple(places), producers, consumers, frozen)

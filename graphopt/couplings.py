"""Which indices along the axes of values can only be removed together.

Every dimension of a known size above 1 of every value, initializers included, has one atom per
index. The rule of an operator (`graphopt.group_rules`) says which atoms of a node's inputs and
outputs are one. What a rule does not mention is frozen, so that of an operator without a rule
everything is. The classes that follow are what `graphopt.groups` makes groups of.

Dependency graphs for pruning: Fang et al., "DepGraph: Towards Any Structural Pruning", 2023.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from graphopt.contract import describe
from graphopt.operators import all_graphs, opset_of
from graphopt.reshape_blocks import Block, Choices
from graphopt.shape_facts import ShapeFacts
from graphopt.sizes import Size


class Consumer(NamedTuple):
    """A sum over an axis, weighted by a constant: where a removed unit's contribution goes.

    Attributes:
        node: computes the sum.
        weight: the constant; zero at an index, what the node reads there counts for nothing.
        axis: of the weight that is summed over.
        data: what is weighted; None where it is the node's own state (R of LSTM).
        data_axis: the axis of `data` that is summed over.
    """

    node: ir.Node
    weight: ir.Value
    axis: int
    data: ir.Value | None
    data_axis: int


class Producer(NamedTuple):
    """A constant that makes channels: an index of its axis is one of the node's outputs.

    Attributes:
        node: reads the weight.
        weight: the constant.
        axis: of the weight that is not summed over.
    """

    node: ir.Node
    weight: ir.Value
    axis: int


class End(NamedTuple):
    """An input or output of a node.

    Attributes:
        value: what goes in or comes out.
        slot: its index among the inputs; -1 - index among the outputs.
        sizes: of its axes, symbols where they are not known.
    """

    value: ir.Value
    slot: int
    sizes: tuple[Size, ...]

    @property
    def rank(self) -> int:
        """How many axes it has."""
        return len(self.sizes)

    def size(self, axis: int) -> int | None:
        """The size along an axis, which may be negative; None where it is not known."""
        size = self.sizes[axis]
        return size if isinstance(size, int) else None


@dataclass
class Couplings:
    """Atoms, what ties them, and what freezes them.

    Attributes:
        facts: about the shapes of the model's values.
        atoms_count: how many there are.
        starts: by value, the first atom of each axis; None for an axis without atoms.
        axes: the value and the axis of each axis that has atoms, by number.
        producers: constants that make channels.
        consumers: constants that take channels out.
    """

    facts: ShapeFacts
    atoms_count: int = 0
    starts: dict[ir.Value, tuple[int | None, ...]] = field(default_factory=dict)
    axes: list[tuple[ir.Value, int]] = field(default_factory=list)
    producers: list[Producer] = field(default_factory=list)
    consumers: list[Consumer] = field(default_factory=list)
    _first_axis: dict[ir.Value, int] = field(default_factory=dict)
    _sizes: list[int] = field(default_factory=list)
    _edges: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    _frozen: list[tuple[np.ndarray, str]] = field(default_factory=list)
    _choices: Choices = field(default_factory=Choices)

    # -------------------------------------------------------------- atoms

    def add(self, value: ir.Value) -> None:
        """Give the value its atoms, if its shape is known."""
        shape = self.facts.shape(value)
        if value in self.starts or shape is None:
            return
        starts: list[int | None] = []
        self._first_axis[value] = len(self.axes)
        for axis, size in enumerate(shape):
            has_atoms = isinstance(size, int) and size > 1
            starts.append(self.atoms_count if has_atoms else None)
            self.axes.append((value, axis))
            self._sizes.append(int(size) if has_atoms else 0)  # type: ignore[arg-type]
            self.atoms_count += self._sizes[-1]
        self.starts[value] = tuple(starts)

    def axis_number(self, value: ir.Value, axis: int) -> int:
        """The number of an axis of a value that has a known rank."""
        return self._first_axis[value] + axis % len(self.starts[value])

    def atoms(self, value: ir.Value, axis: int) -> np.ndarray:
        """The atoms along an axis; empty where it has none."""
        start = self.starts[value][axis]
        size = self._sizes[self.axis_number(value, axis)]
        return np.arange(start or 0, (start or 0) + size)

    def atom_axes(self) -> np.ndarray:
        """int64 [atoms]: the number of the axis that each atom lies on."""
        return np.repeat(np.arange(len(self.axes)), self._sizes)

    # -------------------------------------------------------------- what is said of them

    def tie(self, first: np.ndarray, second: np.ndarray) -> None:
        """Atoms are one, pair by pair."""
        self._edges.append((first, second))

    def link(self, first: int, second: int) -> None:
        """Two axes are one, index by index."""
        self._choices.link(first, second)

    def freeze(self, value: ir.Value, axis: int, reason: str) -> None:
        """No index of an axis can be removed."""
        if self.starts[value][axis] is not None:
            self._choices.freeze(self.axis_number(value, axis), reason)
            self._frozen.append((self.atoms(value, axis), reason))

    def freeze_atoms(self, atoms: np.ndarray, reason: str) -> None:
        """These cannot be removed."""
        self._frozen.append((atoms, reason))

    def freeze_value(self, value: ir.Value, reason: str) -> None:
        """Nothing of a value can be removed."""
        for axis in range(len(self.starts.get(value, ()))):
            self.freeze(value, axis, reason)

    def makes(self, producer: Producer) -> None:
        """A constant makes channels."""
        self.producers.append(producer)
        self._choices.enliven(self.axis_number(producer.weight, producer.axis))

    def reshape(self, block: Block) -> None:
        """Axes that a Reshape splits or merges; see `reshape_blocks`."""
        self._choices.blocks.append(block)

    # -------------------------------------------------------------- what follows

    def resolve(self) -> None:
        """Decide what goes through each Reshape. Once, after all nodes have been looked at."""
        for block, factor, reason in self._choices.resolve():
            kept = () if factor is None else (factor.input_axis, factor.output_axis)
            for number in (*block.inputs, *block.outputs):
                if number not in kept:
                    self.freeze(*self.axes[number], reason)
            if factor is None:
                continue
            first, second = (self.atoms(*self.axes[number]) for number in kept)
            representative = np.empty(factor.size, np.int64)
            representative[factor.input_digits()] = first
            self.tie(first, representative[factor.input_digits()])
            self.tie(second, representative[factor.output_digits()])

    def classes(self) -> np.ndarray:
        """int64 [atoms]: the class of each atom, of those that can only be removed together."""
        none = np.empty(0, np.int64)
        first = np.concatenate([none, *(one for one, _ in self._edges)])
        second = np.concatenate([none, *(other for _, other in self._edges)])
        shape = (self.atoms_count, self.atoms_count)
        graph = coo_array((np.ones(first.size, bool), (first, second)), shape=shape)
        _, labels = connected_components(graph, directed=False)
        return np.asarray(labels, np.int64)

    def frozen(self, classes: np.ndarray) -> Iterator[tuple[np.ndarray, str]]:
        """Classes that are frozen, and why, in the order of the graph; one may come often."""
        for atoms, reason in self._frozen:
            yield np.unique(classes[atoms]), reason


@dataclass
class Site:
    """What a rule says of one node.

    Attributes:
        node: the node.
        couplings: of the model.
        opset: of the model.
        ends: all inputs and outputs that the node has, by slot.
    """

    node: ir.Node
    couplings: Couplings
    opset: int
    ends: dict[int, End]
    _mentioned: set[tuple[int, int]] = field(default_factory=set)

    def input(self, index: int) -> End | None:
        """The input at an index; None where it is left out."""
        return self.ends.get(index)

    def output(self, index: int = 0) -> End | None:
        """The output at an index; None where it is left out."""
        return self.ends.get(-1 - index)

    def inputs(self) -> list[End]:
        """All inputs that there are."""
        return [end for slot, end in self.ends.items() if slot >= 0]

    def passes(self, end: End, axis: int) -> None:
        """The axis is tied to nothing here."""
        self._mentioned.add((end.slot, axis % end.rank))

    def tie(
        self,
        first: End,
        first_axis: int,
        second: End,
        second_axis: int,
        first_index: np.ndarray | None = None,
        second_index: np.ndarray | None = None,
    ) -> None:
        """Two axes are one, or what the indices pick from them is, pair by pair.

        An axis of size 1 is broadcast against the other, where no indices are given.
        """
        self.passes(first, first_axis)
        self.passes(second, second_axis)
        ends = ((first, first_axis, first_index), (second, second_axis, second_index))
        sizes = [end.size(axis) for end, axis, _ in ends]
        if any(size is None for size in sizes):
            for end, axis, _ in ends:
                self.freeze(end, axis, "the size that meets it is not known")
            return
        picked = first_index is not None or second_index is not None
        if any(size is not None and size <= 1 for size in sizes):
            for end, axis, index in ends if picked else ():
                self._freeze_picked(end, axis, index)
            return
        if not _agree(*((index, end.size(axis)) for end, axis, index in ends)):
            # In a branch that is never taken, for example.
            for end, axis, _ in ends:
                self.freeze(end, axis, "sizes do not agree")
            return
        one, other = (self._picked(end, axis, index) for end, axis, index in ends)
        self.couplings.tie(one, other)
        if not picked:
            numbers = [self.couplings.axis_number(end.value, axis) for end, axis, _ in ends]
            self.couplings.link(*numbers)

    def sink(self, data: End, data_axis: int, weight: End, axis: int) -> None:
        """The data's axis is summed over, weighted by a constant along an axis of its own."""
        self.tie(data, data_axis, weight, axis)
        self.takes(data, data_axis, weight, axis)

    def takes(self, data: End | None, data_axis: int, weight: End, axis: int) -> None:
        """As `sink`, of axes that are tied in another way."""
        self.passes(weight, axis)
        self.couplings.consumers.append(
            Consumer(
                self.node,
                weight.value,
                axis % weight.rank,
                data.value if data is not None else None,
                data_axis % data.rank if data is not None else -1,
            )
        )

    def makes(self, weight: End, axis: int) -> None:
        """A constant makes channels along an axis."""
        self.couplings.makes(Producer(self.node, weight.value, axis % weight.rank))

    def freeze(self, end: End, axis: int, why: str) -> None:
        """No index of the axis can be removed."""
        self.passes(end, axis)
        self.couplings.freeze(end.value, axis % end.rank, self._reason(why))

    def freeze_positions(self, end: End, axis: int, index: np.ndarray, why: str) -> None:
        """These indices of the axis cannot be removed; others may be."""
        self.passes(end, axis)
        atoms = self._picked(end, axis, index)
        self.couplings.freeze_atoms(atoms, self._reason(why))

    def reshape(self, block: Block, source: End, target: End) -> None:
        """The axes of a block are split or merged."""
        for end, numbers in ((source, block.inputs), (target, block.outputs)):
            for number in numbers:
                self.passes(end, self.couplings.axes[number][1])
        self.couplings.reshape(block)

    def freeze_rest(self, why: str) -> None:
        """Freeze what the rule did not mention."""
        for end in self.ends.values():
            for axis in range(end.rank):
                if (end.slot, axis) not in self._mentioned:
                    self.couplings.freeze(end.value, axis, self._reason(why))

    def _reason(self, why: str) -> str:
        return f"{self.node.op_type} {describe(self.node)}: {why}"

    def _picked(self, end: End, axis: int, index: np.ndarray | None) -> np.ndarray:
        atoms = self.couplings.atoms(end.value, axis)
        return atoms if index is None or not atoms.size else atoms[index]

    def _freeze_picked(self, end: End, axis: int, index: np.ndarray | None) -> None:
        self.freeze_positions(
            end, axis, index if index is not None else np.arange(end.size(axis) or 0),
            "nothing would be left of what it meets",
        )  # fmt: skip


def _agree(*picked: tuple[np.ndarray | None, int | None]) -> bool:
    """The indices are in range, and as many are picked on both sides."""
    counts = []
    for index, size in picked:
        if index is not None and index.size and index.max() >= (size or 0):
            return False
        counts.append(size if index is None else index.size)
    return counts[0] == counts[1]


def broadcast_to(site: Site, source: End, target: End) -> None:
    """Tie the axes of what is broadcast with those of the result, aligned at the end."""
    for axis in range(source.rank):
        site.tie(source, axis, target, target.rank - source.rank + axis)


def values_of(model: ir.Model) -> Iterator[ir.Value]:
    """All values of the graph and its subgraphs."""
    for graph in all_graphs(model):
        yield from graph.inputs
        yield from graph.initializers.values()
        for node in graph:
            yield from filter(is_there, node.outputs)


def is_there(value: ir.Value | None) -> bool:
    """The value is not one that is left out."""
    return value is not None and bool(value.name)


def site_of(node: ir.Node, couplings: Couplings, opset: int) -> Site | None:
    """The node's inputs and outputs; None where not even the rank of one is known."""
    slots: Iterable[tuple[int, ir.Value | None]] = (
        *enumerate(node.inputs),
        *((-1 - index, value) for index, value in enumerate(node.outputs)),
    )
    ends = {}
    for slot, value in slots:
        if value is None or not is_there(value):
            continue
        sizes = couplings.facts.shape(value)
        if sizes is None:
            return None
        ends[slot] = End(value, slot, sizes)
    return Site(node, couplings, opset, ends)


def couplings_without_ties(model: ir.Model) -> tuple[Couplings, int]:
    """The atoms of a model, of which nothing is said yet, and its opset."""
    couplings = Couplings(ShapeFacts(model))
    for value in values_of(model):
        couplings.add(value)
    return couplings, opset_of(model)

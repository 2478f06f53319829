"""Nodes in the order in which they run, with the places of what they read and make."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir
from torch import Tensor

from graphopt.contract import describe
from graphopt.operators import subgraphs
from graphopt.training.binding import widened
from graphopt.training.operators.element_types import BARE_UNSIGNED
from graphopt.training.operators.operator_types import Results

_NONE, _SINK = 0, 1
"""The slots of inputs that are left out, and of what a node makes and was given already."""


@dataclass(frozen=True, slots=True)
class Step:
    """A node that runs.

    Attributes:
        node: which one.
        kernel: what it computes.
        inputs: the slots that it reads.
        outputs: the slots that it fills; fewer than the node has where the last are not read.
        releases: the slots that nothing reads after it.
        cut: of the outputs, those through which no gradient goes back: for each its slot, and one
            that keeps it as it was computed.
    """

    node: ir.Node
    kernel: Callable[..., Results]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    releases: tuple[int, ...]
    cut: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Program:
    """Steps over numbered slots, which hold tensors.

    Attributes:
        start: what the slots hold before: constants, and None where nothing is yet.
        given: the slots of what it is called with.
        steps: in order.
        wanted: the slots of its results.
    """

    start: Sequence[Tensor | None]
    given: tuple[int, ...]
    steps: tuple[Step, ...]
    wanted: tuple[int, ...]

    def __call__(self, given: Iterable[Tensor]) -> list[Tensor]:
        """Run the steps.

        Args:
            given: a tensor for each of the given values, in their order.
        """
        slots = list(self.start)
        for place, tensor in zip(self.given, given, strict=True):
            slots[place] = tensor
        for step in self.steps:
            inputs = [slots[slot] for slot in step.inputs]
            try:
                results = _run(step, inputs)
            except Exception as error:
                error.add_note(f"in node {describe(step.node)!r} ({step.node.op_type})")
                raise
            if isinstance(results, Tensor):
                slots[step.outputs[0]] = results
            else:
                for slot, result in zip(step.outputs, results, strict=False):
                    slots[slot] = result
            for slot, whole in step.cut:
                found = slots[whole] = slots[slot]
                slots[slot] = None if found is None else found.detach()
            for unread in step.releases:
                slots[unread] = None
        return [wanted for slot in self.wanted if (wanted := slots[slot]) is not None]


def _run(step: Step, inputs: list[Tensor | None]) -> Results:
    for tensor in inputs:
        if tensor is not None and tensor.dtype in BARE_UNSIGNED:
            return widened(step.node, step.kernel, inputs)
    return step.kernel(*inputs)


def reads_of(node: ir.Node) -> tuple[ir.Value | None, ...]:
    """The inputs of a node, then what its graphs read from around it, each once."""
    bodies = subgraphs(node)
    return (*node.inputs, *outer_values(bodies)) if bodies else tuple(node.inputs)


def outer_values(graphs: Sequence[ir.Graph]) -> tuple[ir.Value, ...]:
    """What graphs read that is not their own, each once, in the order in which it is read."""
    found: dict[ir.Value, None] = {}
    for graph in graphs:
        own = {*graph.inputs, *graph.initializers.values()}
        for node in graph:
            found.update((v, None) for v in reads_of(node) if v is not None and v not in own)
            own.update(node.outputs)
        found.update((value, None) for value in graph.outputs if value not in own)
    return tuple(found)


def assemble(
    nodes: Iterable[ir.Node],
    given: Sequence[ir.Value],
    constants: Mapping[ir.Value, Tensor],
    wanted: Sequence[ir.Value],
    kernel_of: Callable[[ir.Node], Callable[..., Results]],
    cut: Collection[ir.Value] = (),
) -> Program:
    """The program of some nodes.

    Args:
        nodes: in an order in which they can run.
        given: what it is called with.
        constants: what else is known, by value.
        wanted: the results.
        kernel_of: makes a node a function of what it reads; see `reads_of`.
        cut: values through which no gradient goes back.
    """
    nodes = list(nodes)
    slots: dict[ir.Value, int] = {}
    start: list[Tensor | None] = [None, None]
    for value in (*given, *constants, *(o for node in nodes for o in node.outputs)):
        if value not in slots:
            slots[value] = len(start)
            start.append(constants.get(value))
    known = {*given, *constants}
    given_slots = tuple(slots[value] for value in given)
    whole = {v: len(start) + n for n, v in enumerate(v for v in wanted if v in cut and v in slots)}
    start += [None] * len(whole)
    last_reader: dict[ir.Value, int] = {}
    for index, node in enumerate(nodes):
        touched = (*reads_of(node), *node.outputs)
        last_reader.update((v, index) for v in touched if v is not None)
    for kept in (*wanted, *constants):
        last_reader.pop(kept, None)
    releases: list[list[int]] = [[] for _ in nodes]
    for released, index in last_reader.items():
        releases[index].append(slots[released])
    steps = tuple(
        Step(
            node,
            kernel_of(node),
            tuple(_NONE if value is None else slots[value] for value in reads_of(node)),
            tuple(_SINK if output in known else slots[output] for output in node.outputs),
            (*releases[index], *([_SINK] if known.intersection(node.outputs) else [])),
            tuple((slots[o], whole.get(o, _NONE)) for o in node.outputs if o in cut),
        )
        for index, node in enumerate(nodes)
    )
    results = tuple(whole.get(value, slots[value]) for value in wanted)
    return Program(tuple(start), given_slots, steps, results)

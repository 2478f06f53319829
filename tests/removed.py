"""The law of removal: a model without some units computes what it does with them at zero."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import onnx_ir as ir

from graphopt.contract import Context, Sample
from graphopt.groups import Group, Groups, analyze
from graphopt.random_samples import random_samples
from graphopt.rewriting import Names, add_initializer
from graphopt.runtime import Reference, Session
from graphopt.skeleton import infer_shapes, known_shape, why_invalid
from graphopt_passes.prune.removal import remove, zeroed

REL_L2_MAXIMUM = 1e-4


def groups_of(model: ir.Model) -> Groups:
    """The groups, with shapes inferred first."""
    infer_shapes(model)
    return analyze(model)


def some_of(groups: Sequence[Group], seed: int, share: float = 0.5) -> dict[Group, np.ndarray]:
    """About this share of the units of each group, but one at least."""
    random = np.random.default_rng(seed)
    kept = {}
    for group in groups:
        stays = random.random(group.units) < share
        stays[random.integers(group.units)] = True
        kept[group] = stays
    return kept


def without(model: ir.Model, kept: dict[Group, np.ndarray]) -> ir.Model:
    """A copy without the units that do not stay; it has groups of its own, in the same order."""
    copy = model.clone()
    prunable = {group.name: group for group in groups_of(copy).prunable}
    remove(copy, {prunable[g.name]: stays for g, stays in kept.items()}, Context(lambda: model))
    return copy


def assert_law(
    model: ir.Model,
    samples: Sequence[Sample] | None = None,
    seeds: Sequence[int] = (0, 1),
    share: float = 0.5,
) -> int:
    """Units of all groups can be removed; how many groups there are."""
    groups = groups_of(model).prunable
    if not groups:
        return 0
    if samples is None:
        samples = random_samples(model, 2)
    for seed in seeds:
        kept = some_of(groups, seed, share)
        smaller = without(model, kept)
        problem = why_invalid(smaller)
        assert problem is None, problem
        _assert_smaller(smaller, kept)
        first = Session(zeroed(model, kept), Reference.AS_WRITTEN)
        second = Session(smaller, Reference.AS_WRITTEN)
        for sample in samples:
            _assert_equal(first.run(sample), second.run(sample))
    return len(groups)


def _assert_smaller(smaller: ir.Model, kept: dict[Group, np.ndarray]) -> None:
    """Weights of the groups have the sizes that were asked for, as far as one group is on them."""
    for group, stays in kept.items():
        for producer in group.producers:
            labels = group.place(producer.weight, producer.axis).labels
            value = smaller.graph.initializers.get(producer.weight.name or "")
            if value is not None and labels.min() >= 0:
                shape = known_shape(value)
                assert shape is not None and shape[producer.axis] == stays[labels].sum()


def _assert_equal(expected: dict[str, np.ndarray], got: dict[str, np.ndarray]) -> None:
    for name, wanted in expected.items():
        made = got[name]
        assert wanted.shape == made.shape and wanted.dtype == made.dtype, name
        if wanted.dtype.kind != "f":
            assert (wanted == made).all(), name
        elif np.isfinite(wanted).all():
            # What is not finite, no weight of zero takes out.
            error = np.linalg.norm(wanted.astype(np.float64) - made.astype(np.float64))
            assert error <= REL_L2_MAXIMUM * np.linalg.norm(wanted.astype(np.float64)), name


def between_layers(model: ir.Model, turn: int) -> bool:
    """Put a MatMul of random weights before each input and behind each output; whether one fits.

    Then what an operator says of its channels matters, whichever operator it is.

    Args:
        model: rewritten in place.
        turn: chooses the axis that the MatMul works along.
    """
    graph, names = model.graph, Names(model)
    count = 0
    for value in tuple(graph.inputs):
        axis = _axis(value, turn)
        if axis is None:
            continue
        uses = tuple(value.uses())
        nodes, made = _layer(graph, value, axis, names)
        for use in uses:
            use.node.replace_input_with(use.idx, made)
        graph.insert_before(graph[0], nodes)
        count += 1
    for index, value in enumerate(tuple(graph.outputs)):
        axis = _axis(value, turn)
        if axis is None or value.producer() is None:
            continue
        nodes, made = _layer(graph, value, axis, names)
        graph.extend(nodes)
        graph.outputs[index] = made
        count += 1
    return count > 0


def _axis(value: ir.Value, turn: int) -> int | None:
    shape = value.shape
    if value.dtype != ir.DataType.FLOAT or shape is None or len(shape) < 2:
        return None
    axes = [i for i, size in enumerate(shape) if isinstance(size, int) and 1 < size < 100]
    return axes[turn % len(axes)] if axes else None


def _layer(
    graph: ir.Graph, value: ir.Value, axis: int, names: Names
) -> tuple[list[ir.Node], ir.Value]:
    assert value.shape is not None
    rank, size = len(value.shape), int(value.shape[axis])  # type: ignore[arg-type]
    order = [*(i for i in range(rank) if i != axis), axis]
    random = np.random.default_rng(len(value.name or ""))
    array = (random.standard_normal((size, size)) / np.sqrt(size)).astype(np.float32)
    weight = add_initializer(graph, array, names.new("between_weight"))
    nodes = [
        ir.node("Transpose", [value], {"perm": order}),
        ir.node("MatMul", [None, weight]),
        ir.node("Transpose", [None], {"perm": [order.index(i) for i in range(rank)]}),
    ]
    for before, node in pairwise(nodes):
        node.replace_input_with(0, before.outputs[0])
    for node in nodes:
        node.name = names.new(f"between_{node.op_type}")
        node.outputs[0].name = names.new("between")
        node.outputs[0].type = value.type
    nodes[-1].outputs[0].shape = value.shape
    return nodes, nodes[-1].outputs[0]

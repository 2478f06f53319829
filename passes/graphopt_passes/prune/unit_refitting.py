"""Refits layers to what they gave before units were removed, of what they read now."""

from __future__ import annotations

from collections.abc import Container, Sequence

import onnx_ir as ir

from graphopt.contract import Change, Context
from graphopt.groups import Consumer
from graphopt.rewriting import Names
from graphopt_passes.prune.aims import EVERYTHING, Kept, aims_of, give, has_aim, reading_the_same
from graphopt_passes.prune.sinks import shrunk
from graphopt_passes.quantize.layers import Layer, layer_of
from graphopt_passes.quantize.narrow_weights import Target, targets_of

UNCHANGED = 1e-8
"""A layer that gives what it should, but for this share of its squares, is not refitted."""


def refit_units(
    model: ir.Model,
    before: ir.Model,
    context: Context,
    change: Change,
    kept: Kept = EVERYTHING,
    only: Container[ir.Node] | None = None,
    pooled: Container[str] = (),
) -> None:
    """Refit layers, first to last, to what they gave.

    Args:
        model: rewritten in place: weights and biases.
        before: the same model with all units; values have the same names.
        context: with samples.
        change: told what is done.
        kept: of values that have fewer units, those that stay.
        only: refit these nodes; None for all.
        pooled: the names of values of which the model has the means of neighbours; see `tails`.
    """
    targets = [t for t in targets_of(model, 1, Change()) if _can_refit(t)]
    places = {node: place for place, node in enumerate(model.graph)}
    layers = [t.layer for t in targets if t.layer is not None]
    if only is not None:
        layers = [layer for layer in layers if layer.node in only]
    layers.sort(key=lambda layer: places[layer.node])
    read, names, number = _read_by(layers), Names(model), 0
    for together in reading_the_same(layers):
        context.progress(f"refitting layer {number + 1} of {len(layers)}")
        of_value = [layer for layer in together if layer is not None]
        aims = aims_of(of_value, model, before, context, kept, pooled)
        number += len(together)
        for layer, aim in zip(of_value, aims, strict=True):
            weight = layer.matrix()
            if aim is None or aim.missed(weight) <= UNCHANGED * float(aim.squares.sum()):
                continue
            found = aim.weight(weight, shrunk(aim.moments, aim.rows))
            # Where thresholds are put on outputs, as by a detector, what varies less is lost.
            found = found if layer.node in read else aim.with_variance(found)
            give(layer, found, aim, names, context)
            change.count(f"{layer.node.op_type} refitted")


def _can_refit(target: Target) -> bool:
    if target.layer is None or target.is_integer or target.in_body:
        return False
    return target.value.is_initializer() and has_aim(target.layer)


def is_refitted(consumer: Consumer) -> bool:
    """Its weight is refitted after units are removed."""
    node = consumer.node
    if node.op_type not in ("Conv", "Gemm", "MatMul") or node.inputs[1] is not consumer.weight:
        return False
    rank = consumer.weight.shape.rank() if consumer.weight.shape is not None else 0
    if node.op_type == "MatMul" and rank != 2:
        return False
    return len(consumer.weight.uses()) == 1 and has_aim(layer_of(node))


def _read_by(layers: Sequence[Layer]) -> set[ir.Node]:
    """The nodes that layers read, directly or not."""
    waiting = [layer.source for layer in layers]
    seen = set[ir.Node]()
    while waiting:
        node = waiting.pop().producer()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [value for value in node.inputs if value is not None]
    return seen

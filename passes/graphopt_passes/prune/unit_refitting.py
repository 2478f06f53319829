"""Refits layers to what they gave before units were removed, of what they read now."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from graphopt.contract import Change, Context
from graphopt.groups import Consumer
from graphopt.rewriting import Names
from graphopt_passes.prune.aims import Aim, Kept, aims_of, has_aim, sum_of
from graphopt_passes.prune.sinks import shrunk
from graphopt_passes.prune.support import Floats
from graphopt_passes.quantize.layers import Layer, layer_of
from graphopt_passes.quantize.narrow_weights import Target, shift_bias, targets_of

UNCHANGED = 1e-8
"""A layer that gives what it should, but for this share of its squares, is not refitted."""

GAIN_MAXIMUM = 2.0
"""By which what the last layers give is multiplied at most, so that it varies as it did."""


def refit_units(
    model: ir.Model, before: ir.Model, context: Context, change: Change, kept: Kept
) -> None:
    """Refit all layers, first to last, to what they gave.

    Args:
        model: rewritten in place: weights and biases.
        before: the same model with all units; values have the same names.
        context: with samples.
        change: told what is done.
        kept: of values that have fewer units, those that stay.
    """
    targets = [t for t in targets_of(model, 1, Change()) if _can_refit(t)]
    places = {node: place for place, node in enumerate(model.graph)}
    layers = [t.layer for t in targets if t.layer is not None]
    layers.sort(key=lambda layer: places[layer.node])
    read = _read_by(layers)
    number = 0
    for together in _reading_the_same(layers):
        context.progress(f"refitting layer {number + 1} of {len(layers)}")
        aims = aims_of(together, model, before, context, kept)
        number += len(together)
        for layer, aim in zip(together, aims, strict=True):
            if aim is not None:
                _refit_layer(layer, aim, model, context, change, is_last=layer.node not in read)


def _reading_the_same(layers: Sequence[Layer]) -> list[list[Layer]]:
    """The layers in order, those of one value next to each other together: they need one look.

    But what is added to something makes good for what that has lost until its turn comes.
    """
    found: list[list[Layer]] = []
    for layer in layers:
        if found and found[-1][-1].source is layer.source and not sum_of(layer)[1]:
            found[-1].append(layer)
        else:
            found.append([layer])
    return found


def _refit_layer(
    layer: Layer, aim: Aim, model: ir.Model, context: Context, change: Change, is_last: bool
) -> None:
    weight = layer.matrix()
    if _missed(weight, aim) <= UNCHANGED * float(aim.squares.sum()):
        return
    found = aim.weight(weight, shrunk(aim.moments, aim.rows))
    if is_last:
        found = found * _gains(found, aim)[:, :, np.newaxis]
    value = layer.weight
    tensor = value.const_value
    assert tensor is not None
    stored = layer.stored(found).astype(tensor.dtype.numpy())
    value.const_value = context.tensor(stored, value.name or "")
    if layer.can_correct_bias:
        old = layer.bias()
        shift = aim.bias(found) - (0.0 if old is None else old)
        shift_bias(layer, shift, Names(model), context)
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


def _missed(weight: Floats, aim: Aim) -> float:
    """E |W z + b - t|^2 about the means, summed over the outputs."""
    given = np.einsum("gnk,gnk->", weight @ aim.moments, weight)
    return float(aim.squares.sum() - 2 * np.einsum("gnk,gnk->", weight, aim.cross) + given)


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


def _gains(weight: Floats, aim: Aim) -> Floats:
    """By how much outputs vary less than they should; [groups, outputs].

    Least squares give the less the less they know. Where thresholds are put on outputs, as by a
    detector, that would be lost. (For all layers: Jordan et al. 2023, REPAIR, arXiv 2211.08403.)
    """
    power = np.einsum("gnk,gnk->gn", weight @ aim.moments, weight)
    wanted = np.maximum(aim.squares, 0)
    gains = np.sqrt(wanted / np.maximum(power, 1e-12 * wanted + 1e-30))
    return np.asarray(np.clip(gains, 1.0, GAIN_MAXIMUM))

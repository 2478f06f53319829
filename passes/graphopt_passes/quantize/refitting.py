"""Refits layers that stay float to what the layers before them have become.

A layer gave W x + b. Since weights before it were rounded it reads z instead of x, and the weight
that comes nearest to what it gave is, with covariances over the samples,

    W' = W + W E[(x - z) z^T] (E[z z^T] + ridge)^-1
    b' = b + W E[x] - W' E[z]

ordinary least squares, drawn to the weight as it was. It takes back what the errors have in common
with what the layer reads; no labels are needed. (He, Zhang and Sun 2017, arXiv 1707.06168, do the
same for pruned channels.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from scipy.linalg import cho_factor, cho_solve

from graphopt.contract import Change, Context
from graphopt.observe import Question
from graphopt.operators import all_graphs, is_onnx, nodes_within
from graphopt.rewriting import Names
from graphopt.statistics import Gram
from graphopt_passes.quantize.codebooks import DAMPING
from graphopt_passes.quantize.layers import GRAM_INPUTS_MAXIMUM, Layer
from graphopt_passes.quantize.narrow_weights import shift_bias, targets_of
from graphopt_passes.quantize.twins import side_by_side, values_of

UNCHANGED = 1e-4
"""A layer whose inputs have changed by no more, relative to them, stays as it is."""

VARIES = 1e-5
"""Of the second moments; a smaller part of them is what float32 makes of sums and means."""


@dataclass(frozen=True)
class Pair:
    """What a layer read and what it reads.

    Attributes:
        now: covariance of what it reads, float64 of shape [inputs, inputs]; second moments where
            the layer has no bias.
        change: covariance of what it read less what it reads, with what it reads: the same shape.
        means: of both, what it read first, float64 of shape [inputs].
        share: squared change over the squares of what it read.
        varies: what it reads is not the same, or all but the same, on all samples.
        rows: that were seen.
    """

    now: np.ndarray
    change: np.ndarray
    means: tuple[np.ndarray, np.ndarray]
    share: float
    varies: bool
    rows: int


def refit_layers(model: ir.Model, before: ir.Model, context: Context, change: Change) -> None:
    """Refit the float layers of a model, first to last, to what they gave before.

    Args:
        model: rewritten in place: weights and biases.
        before: the same model before other weights were rounded; its layers have the same names.
        context: with samples.
        change: told what is done.
    """
    names, changed = Names(model), _changed(model, before)
    for layer in _float_layers(model):
        if layer.source not in changed:
            continue
        context.progress(f"refitting {layer.weight.name}")
        pair = _pair(layer, model, before, context)
        if pair is not None and pair.varies and pair.share > UNCHANGED**2:
            _refit(layer, pair, names, context)
            change.count(f"weight of {layer.node.op_type} refitted")


def _changed(model: ir.Model, before: ir.Model) -> set[ir.Value]:
    """What hangs on constants that are others than before; nothing else can have changed."""
    known = {name: value.const_value for name, value in before.graph.initializers.items()}
    found = {
        value
        for graph in all_graphs(model)
        for name, value in graph.initializers.items()
        if known.get(name) is not value.const_value
    }
    for node in model.graph:
        read = (value for inner in nodes_within(node) for value in inner.inputs)
        if not found.isdisjoint(read):
            found.update(node.outputs)
    return found


def _float_layers(model: ir.Model) -> list[Layer]:
    """Products of what is computed with a float weight of their own, in their order."""
    places = {node: index for index, node in enumerate(model.graph)}
    layers = [
        target.layer
        for target in targets_of(model, 1, Change())
        if target.layer is not None and target.value.is_initializer()
    ]
    layers = [layer for layer in layers if _can_be_refitted(layer)]
    return sorted(layers, key=lambda layer: places[layer.node])


def _can_be_refitted(layer: Layer) -> bool:
    inputs = layer.dimensions[2]
    if layer.source.producer() is None or layer.node.attributes.get_int("transA", False):
        return False
    return layer.group == 1 and 2 * inputs <= GRAM_INPUTS_MAXIMUM


def _pair(layer: Layer, model: ir.Model, before: ir.Model, context: Context) -> Pair | None:
    """Moments of what a layer read and reads; None where no sample reaches it."""
    twin, joined = _twin(model, before, layer)
    question = Question(joined, "gram", patches=layer.patches())
    gram = context.observe(twin, [question], remembers=False)[question]
    if not isinstance(gram, Gram) or not gram.rows or not np.isfinite(gram.total).all():
        return None
    corrects = layer.can_correct_bias
    moments = (gram.covariance if corrects else gram.mean)[0]
    inputs = layer.dimensions[2]
    then, now = slice(None, inputs), slice(inputs, None)
    square = np.trace(gram.mean[0][then, then])
    both = np.trace(gram.mean[0][now, now]) - 2 * np.trace(gram.mean[0][then, now])
    return Pair(
        now=moments[now, now],
        change=moments[then, now] - moments[now, now],
        means=(gram.means[0][then], gram.means[0][now]),
        share=float((square + both) / max(square, 1e-300)),
        varies=bool(np.trace(moments[now, now]) > VARIES * np.trace(gram.mean[0][now, now])),
        rows=gram.rows,
    )


def _refit(layer: Layer, pair: Pair, names: Names, context: Context) -> None:
    weight = layer.matrix()[0]
    inputs = len(pair.now)
    # Of few rows, least squares would fit the noise.
    share = max(DAMPING, inputs / pair.rows)
    ridge = share * np.trace(pair.now) / inputs + np.finfo(np.float32).tiny
    factor = cho_factor(pair.now + ridge * np.eye(inputs))
    refitted = weight + cho_solve(factor, (weight @ pair.change).T).T
    value = layer.weight
    stored = layer.stored(refitted[np.newaxis].astype(np.float32))
    value.const_value = context.tensor(stored, value.name or "")
    if layer.can_correct_bias:
        shift = weight @ pair.means[0] - refitted @ pair.means[1]
        shift_bias(layer, shift, names, context)


def _twin(model: ir.Model, before: ir.Model, layer: Layer) -> tuple[ir.Model, str]:
    """A model that computes what both do, and the name of what the layer read beside what it reads.

    They lie side by side along the axis of the inputs: twice the channels of a Conv.
    """
    twin, theirs = side_by_side(model, before)
    source = layer.source.name or ""
    (own,) = values_of(twin, [source])
    axis = 1 if is_onnx(layer.node, "Conv") else -1
    joined = ir.node("Concat", [theirs[source], own], {"axis": axis}, name="")
    joined.outputs[0].name = Names(twin).new("joined")
    joined.outputs[0].type = own.type
    twin.graph.append(joined)
    return twin, joined.outputs[0].name or ""

"""equalize-layers: let the channels between two layers share a scale without loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.contract import Change, Context, Effect, Pass
from graphopt.operators import is_onnx
from graphopt.rewriting import why_too_old
from graphopt_passes.quantize.balancing import balance
from graphopt_passes.quantize.flows import FIRST_OPSET, PRODUCTS, Blocked, Order
from graphopt_passes.quantize.rescaling import Rescaling, Source, column_maxima, product_source
from graphopt_passes.quantize.stretches import (
    FACTOR_MAXIMUM,
    FACTOR_MINIMUM,
    ROUNDS_MAXIMUM,
    Stretch,
    stretches_of,
)

LEVEL = 0.5
"""Factors that are all within so many powers of two of 1 are not worth writing."""

CONVERGED = 0.05
"""Where some are worth it, they are followed down to so many powers of two."""


@dataclass(frozen=True)
class EqualizeLayers(Pass):
    """Move factors of channels from one Conv, Gemm or MatMul to those that read them.

    Where only positively homogeneous operators lie between two layers, W1 and b1 can be divided by
    a number for each output, and the columns of W2 multiplied with it. With samples, the numbers
    are those that cost the least when the values between and W2 are rounded to 8 bits, if that is a
    tenth less than before. Without samples they let rows of W1 and columns of W2 be of the same
    size, sqrt(max|W1[i]| / max|W2[:, i]|), which is what scales by tensor want; weights with scales
    by channel gain little from it.

    A Clip with an upper limit, as of ReLU6, stays: the limit is one number for all channels.
    """

    name: ClassVar[str] = "equalize-layers"
    effect: ClassVar[Effect] = Effect.ROUNDING
    operators: ClassVar[frozenset[str] | None] = frozenset(PRODUCTS)

    def refuse(self, model: ir.Model, context: Context) -> str | None:
        """In older opsets operators have numbers where the rules do not look."""
        return why_too_old(model, FIRST_OPSET)

    def apply(self, model: ir.Model, context: Context) -> Change:
        """With samples in the main graph, which can be observed; without also in bodies."""
        change = Change()
        for graph in context.index_of(model).graphs:
            sources = _sources(graph, change)
            if context.observer is not None and graph is not model.graph:
                for source in sources:
                    change.skip(source.node, "what goes on in a body cannot be observed")
                continue
            stretches = stretches_of(sources, Order(graph), change)
            if context.observer is not None:
                balance(model, stretches, "equalized with what follows", context, change)
            else:
                _level_weights(model, stretches, context, change)
        return change


def _sources(graph: ir.Graph, change: Change) -> list[Source]:
    found = []
    for node in graph:
        if not is_onnx(node, *PRODUCTS):
            continue
        try:
            found.append(product_source(node))
        except Blocked as reason:
            change.skip(node, str(reason))
    return found


def _level_weights(
    model: ir.Model, stretches: Sequence[Stretch], context: Context, change: Change
) -> None:
    """Until rows and columns are of the same size, forwards and backwards in turns."""
    done = Rescaling()
    if all(_unevenness(_level_factors(s, done)) < LEVEL for s in stretches):
        return
    changed: dict[Source, None] = {}
    for turn in range(ROUNDS_MAXIMUM):
        before = done
        for stretch in stretches if turn % 2 == 0 else stretches[::-1]:
            factors = _level_factors(stretch, done)
            if _unevenness(factors) < CONVERGED:
                continue
            after = done.divided(stretch.source, stretch.flow, factors)
            if after is not None:
                done = after
                changed[stretch.source] = None
        if done is before:
            break
    for source in changed:
        change.count(f"{source.node.op_type} levelled with what follows")
    done.write(model, context)


def _unevenness(factors: np.ndarray) -> float:
    return float(np.abs(np.log2(factors)).max(initial=0.0))


def _level_factors(stretch: Stretch, done: Rescaling) -> np.ndarray:
    source, flow = stretch.source, stretch.flow
    assert source.layer is not None
    rows = np.abs(done.matrix(source.layer)).max(axis=2).reshape(-1)
    columns = np.zeros(source.count)
    for sink in flow.sinks:
        own = sink.channels.own
        largest = column_maxima(sink.layer, done.matrix(sink.layer))
        np.maximum.at(columns, sink.channels.origin[own], largest[own])
    live = (rows > 0) & (columns > 0) & np.isfinite(rows) & np.isfinite(columns)
    factors = np.ones(source.count)
    factors[live] = np.sqrt(rows[live] / columns[live])
    return np.clip(factors, FACTOR_MINIMUM, FACTOR_MAXIMUM)

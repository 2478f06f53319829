"""quantize-dynamic: let MatMul, Gemm and LSTM work on 8-bit integers, quantized at run time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.contract import Bounds, Change, Context, Effect, Pass
from graphopt.operators import RECURRENT, is_onnx
from graphopt.rewriting import Names, why_too_old
from graphopt.skeleton import known_shape
from graphopt_passes.quantize.activations import Activations, least_rows, observe_activations
from graphopt_passes.quantize.columns import (
    CODE_MAXIMUM,
    REDUCED_CODE_MAXIMUM,
    error_of_product,
    outlier_of,
)
from graphopt_passes.quantize.dynamic_costs import (
    dynamic_lstm_ns,
    float_lstm_ns,
    float_ns,
    product_ns,
    quantize_ns,
)
from graphopt_passes.quantize.dynamic_layers import (
    PRODUCTS,
    Candidate,
    NotQuantized,
    candidate_of,
)
from graphopt_passes.quantize.dynamic_writing import DOMAIN, VERSION, DynamicWriting
from graphopt_passes.quantize.each import skip_others
from graphopt_passes.share.zeros import unpacked_zeros

FIRST_OPSET = 11
"""DynamicQuantizeLinear is there from here on."""

NARROWEST_LAYER_ERROR = 0.01
"""Rounding alone changes most layers by so much."""


@dataclass(frozen=True)
class QuantizeDynamic(Pass):
    """Let MatMul, Gemm and LSTM work on 8-bit integers, their activations quantized at run time.

    Weights become int8 with a scale for each output. MatMul and Gemm are written in standard
    operators that onnxruntime fuses to one integer kernel. An LSTM becomes DynamicQuantizeLSTM of
    com.microsoft, which runs on onnxruntime only; `recurrent=false` leaves it. Conv stays: what
    there is for it (ConvInteger) is 4 to 6 times slower than float.

    No samples are needed, as each run takes the range of a whole tensor. So what comes out for one
    item of a batch depends on the others beside it, and an infinity spoils them all. With samples,
    layers whose activations do not bear that are left alone.

    Attributes:
        minimum_gain: a layer is quantized where float takes at least so many times as long, as a
            model of the cost has it; 0 quantizes for size alone.
        layer_error: and where its output changes by no more, in relative L2 norm on the samples. Of
            an LSTM, what the gates get from its input.
        recurrent: LSTM too.
        rows: how many rows a MatMul or Gemm has where neither shapes nor samples say it; the known
            dimensions alone may make more.
        reduce_range: weights of 7 bits, for CPUs with AVX2 and no VNNI, whose kernels saturate.
        only: names of weights (of an LSTM, that of its input) whose layers alone are looked at.
    """

    name: ClassVar[str] = "quantize-dynamic"
    effect: ClassVar[Effect] = Effect.LOSSY
    operators: ClassVar[frozenset[str] | None] = frozenset(PRODUCTS + RECURRENT)
    max_error: ClassVar[float] = 0.15
    max_latency: ClassVar[float | None] = 0.97

    minimum_gain: Annotated[float, Bounds(0, 100)] = 1.1
    layer_error: Annotated[float, Bounds(0, 1)] = 0.05
    recurrent: bool = True
    rows: Annotated[int, Bounds(1, None)] = 16
    reduce_range: bool = False
    only: tuple[str, ...] = ()

    def refuse(self, model: ir.Model, context: Context) -> str | None:
        """Where the operators are missing, or their kernels."""
        if context.provider != "cpu":
            return "the integer kernels are those of the CPU provider"
        if self.recurrent and model.opset_imports.get(DOMAIN, VERSION) != VERSION:
            return f"the model imports a version of {DOMAIN} other than {VERSION}"
        return why_too_old(model, FIRST_OPSET)

    def apply(self, model: ir.Model, context: Context) -> Change:
        """Choose layers of the main graph by cost and error, then rewrite them."""
        with unpacked_zeros(model, context):
            return self._applied(model, context)

    def _applied(self, model: ir.Model, context: Context) -> Change:
        change = Change()
        layers = self._candidates(model, context, change)
        if self.only:
            names = [weight_name(layer) for layer in layers]
            skip_others(dict.fromkeys(self.only), names, change)
            layers = [layer for layer in layers if weight_name(layer) in self.only]
        if not layers:
            return change
        activations = observe_activations(model, (layer.source for layer in layers), context)
        layers = _finite(layers, activations, change)
        layers = list(self._faster(layers, activations, change))
        layers = list(self._exact_enough(layers, activations, change))
        layers = _without_second_copies(layers, change)
        writing = DynamicWriting(model, Names(model), context.tensor, self._code_maximum)
        for layer in layers:
            change.count(f"{layer.node.op_type} on 8-bit integers")
            if layer.is_recurrent:
                writing.recurrent(layer)
            else:
                writing.product(layer)
        return change

    def narrow(self) -> Pass | None:
        """Standard operators only; then fewer layers, where there are samples to choose by."""
        if self.recurrent:
            return replace(self, recurrent=False)
        if self.layer_error <= NARROWEST_LAYER_ERROR:
            return None
        return replace(self, layer_error=max(self.layer_error / 2, NARROWEST_LAYER_ERROR))

    # -------------------------------------------------------------- which layers

    def _candidates(self, model: ir.Model, context: Context, change: Change) -> list[Candidate]:
        found = []
        for node in context.index_of(model).of(*PRODUCTS, *RECURRENT):
            if is_onnx(node, "LSTM") and not self.recurrent:
                change.skip(node, f"recurrent is off, and only {DOMAIN} has an integer LSTM")
                continue
            try:
                found.append(candidate_of(node, model.graph))
            except NotQuantized as reason:
                change.skip(node, str(reason))
        return found

    def _faster(
        self, layers: Sequence[Candidate], activations: Activations, change: Change
    ) -> Iterator[Candidate]:
        """The layers that gain enough, in order; products of one value pay for its codes once."""
        costs = {layer: self._cost_ns(layer, activations) for layer in layers}
        shared: dict[ir.Value, list[Candidate]] = defaultdict(list)
        for layer in layers:
            before, after, _ = costs[layer]
            if not layer.is_recurrent and before >= self.minimum_gain * after:
                shared[layer.source].append(layer)
        for layer in layers:
            before, after, coding = costs[layer]
            group = shared[layer.source] if not layer.is_recurrent else []
            if layer in group:
                before = sum(costs[one][0] for one in group)
                after = sum(costs[one][1] for one in group)
            if before >= self.minimum_gain * (after + coding):
                yield layer
            else:
                change.skip(layer.node, self._why_slow(before, after + coding))

    def _why_slow(self, before_ns: float, after_ns: float) -> str:
        times = f"{before_ns / 1000:.1f} µs in float, {after_ns / 1000:.1f} µs on integers"
        return f"it would gain less than {self.minimum_gain}: about {times}"

    def _cost_ns(self, layer: Candidate, activations: Activations) -> tuple[float, float, float]:
        """In float; on integers, less what quantizes its input; and that."""
        rows = activations.row_count(layer.source, layer.inputs)
        if not layer.is_recurrent:
            outputs = layer.weights[0].shape[-1]
            count = max(self.rows, least_rows(layer.source)) if rows is None else rows
            return (
                float_ns(count, layer.inputs, outputs),
                product_ns(count, layer.inputs, outputs),
                quantize_ns(count, layer.inputs),
            )
        directions, hidden, _ = layer.weights[1].shape
        steps, batch = _steps_and_batch(layer.source, rows)
        before = float_lstm_ns(steps, batch, layer.inputs, hidden)
        after = dynamic_lstm_ns(steps, batch, layer.inputs, hidden)
        return directions * before, directions * after, 0.0

    @property
    def _code_maximum(self) -> int:
        return REDUCED_CODE_MAXIMUM if self.reduce_range else CODE_MAXIMUM

    def _exact_enough(
        self, layers: Sequence[Candidate], activations: Activations, change: Change
    ) -> Iterator[Candidate]:
        """The layers that bear to be rounded, in order."""
        for layer in layers:
            arrays = [weight.array() for weight in layer.weights]
            if not all(np.isfinite(array).all() for array in arrays):
                change.skip(layer.node, "its weight is not finite")
                continue
            rows = activations.rows(layer.source)
            error = error_of_product(rows, arrays[0], self._code_maximum)
            if error > self.layer_error:
                change.skip(layer.node, _why_inexact(error, self.layer_error, rows))
            else:
                yield layer


def weight_name(layer: Candidate) -> str:
    """The name of the weight of a layer; of an LSTM, of that of its input."""
    weight = layer.node.inputs[1]
    return "" if weight is None or weight.name is None else weight.name


def _finite(
    layers: Sequence[Candidate], activations: Activations, change: Change
) -> list[Candidate]:
    """The layers whose activations have a range to speak of."""
    for layer in layers:
        if activations.has_extremes(layer.source):
            change.skip(layer.node, "its input holds infinities, NaN or masks on the samples")
    return [layer for layer in layers if not activations.has_extremes(layer.source)]


def _steps_and_batch(source: ir.Value, rows: float | None) -> tuple[float, float]:
    """Of the input of an LSTM, [steps, batch, inputs]; 1 where nothing says it.

    Args:
        source: the input.
        rows: steps times batch.
    """
    shape = known_shape(source)
    known = (None, None) if shape is None or len(shape) != 3 else (shape[0], shape[1])
    steps, batch = (float(d) if isinstance(d, int) else None for d in known)
    if steps is not None:
        return steps, batch if batch is not None else max((rows or steps) / max(steps, 1.0), 1.0)
    batch = 1.0 if batch is None else batch
    return (1.0 if rows is None else rows / max(batch, 1.0)), batch


def _why_inexact(error: float, limit: float, rows: np.ndarray) -> str:
    reason = f"its output would change by {error:.1%} on the samples, more than {limit:.1%}"
    outlier = outlier_of(rows)
    if outlier is None:
        return reason
    channel, ratio = outlier
    return f"{reason}: input channel {channel} reaches {ratio:.0f} times as far as most"


def _without_second_copies(layers: Sequence[Candidate], change: Change) -> list[Candidate]:
    """The layers of whose weights no float copy would have to stay for others."""
    chosen = list(layers)
    while True:
        nodes = {layer.node for layer in chosen}
        kept = [x for x in chosen if all(_is_read_by(w.value, nodes) for w in x.weights)]
        for layer in chosen:
            if layer not in kept:
                change.skip(layer.node, "its weight is shared with what stays in float")
        if len(kept) == len(chosen):
            return kept
        chosen = kept


def _is_read_by(value: ir.Value, nodes: set[ir.Node]) -> bool:
    return not value.is_graph_output() and all(use.node in nodes for use in value.uses())

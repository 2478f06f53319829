"""quantize-weights: store float weights as 8-bit codes, which are widened at load."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.content import read_array
from graphopt.contract import Bounds, Change, Context, Effect, Pass
from graphopt.observe import Answers
from graphopt.operators import all_graphs, is_onnx
from graphopt.packing import FOLDED_BYTES_MAXIMUM, is_packed
from graphopt.rewriting import Names, constant_tensor, only_reader
from graphopt.skeleton import INFERRED
from graphopt.statistics import Gram
from graphopt.validation import worst
from graphopt_passes.fuse.misfit import Misfit
from graphopt_passes.quantize.balanced_rounding import Coded, largest, round_to_codes, scale_type
from graphopt_passes.quantize.granularity import WEIGHTS, Axes, Role, role_of
from graphopt_passes.quantize.layers import Layer, layer_of
from graphopt_passes.quantize.weights import packed_layer
from graphopt_passes.simplify.chains import why_refused

FIRST_OPSET = 7
"""Before it, Mul broadcasts by attributes."""

FEW_CHANNELS = 5
"""One more than an image has, with its alpha channel."""

MORE_ELEMENTS = (1 << 13, 1 << 16)
"""The smallest weights of ever narrower forms."""

NAMES, NODES_BYTES = 7, 150
"""What nodes and initializers take in the file: a name so many times, and so many bytes."""

COMPARED_SAMPLES, ALONE_SAMPLES = 32, 4
"""On so many samples at most is the error of all weights, and of one alone, measured."""

BUDGETS = 4
"""How often the squared error that weights may add by their sum is halved."""

TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)
"""Of weights that are packed."""


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Store weights as int8 with a scale for each output channel, a quarter of the bytes.

    A weight W becomes Mul(Cast(codes), scales), which onnxruntime computes once, when it loads the
    model: the kernels, the fusions and the speed are those of the float model, and so is its
    memory, but for the time of loading, which takes twice as much of both. A DequantizeLinear would
    run at every inference, or have the activations of a MatMul rounded too.

    Weights are those of Conv, ConvTranspose, Gemm, MatMul, LSTM, GRU and RNN, and tables of Gather,
    also in subgraphs. Each block of codes has the scale largest / 127: one output channel, one row
    of a gate, one row of a table; where readers disagree, as the first one has it.

    Attributes:
        min_elements: smaller weights are not worth the nodes.
        min_channels: weights of fewer inputs or outputs stay as they are. Rounding shows most in
            filters of a signal or an image and in those that make a single output.
        error: relative L2 error of the worst output that packing may add, in its square, on the
            calibration samples; where it adds more, the weights that save few bytes for what they
            add stay. Without samples the gate decides.
    """

    name: ClassVar[str] = "quantize-weights"
    effect: ClassVar[Effect] = Effect.LOSSY
    operators: ClassVar[frozenset[str] | None] = frozenset(WEIGHTS)
    max_error: ClassVar[float] = 0.15
    max_latency: ClassVar[float | None] = 1.03

    min_elements: Annotated[int, Bounds(1)] = 256
    min_channels: Annotated[int, Bounds(1)] = 1
    error: Annotated[float, Bounds(0.0, None)] = 0.05

    def refuse(self, model: ir.Model, context: Context) -> str | None:
        """Refuse opsets before 7, which broadcast in another way."""
        return why_refused(model, FIRST_OPSET)

    def apply(self, model: ir.Model, context: Context) -> Change:
        """Pack one weight after the other; with samples, as many as keep the outputs close."""
        if context.observer is None:
            return self._pack(model, context)
        before = _error(model, context)
        if self._error_of(model, context, None) <= math.hypot(before, self.error):
            return self._pack(model, context)
        return self._pack(model, context, self._least_sensitive(model, context, before))

    def _least_sensitive(self, model: ir.Model, context: Context, before: float) -> frozenset[str]:
        """The weights that save the most bytes for what each adds, alone, to the squared error."""
        saved, squares = self._saved_bytes(model), {}
        before_few = _error(model, context, ALONE_SAMPLES)
        for number, name in enumerate(saved):
            context.progress(f"measuring weight {number + 1} of {len(saved)}")
            error = self._error_of(model, context, frozenset({name}), ALONE_SAMPLES)
            squares[name] = max(error**2 - before_few**2, 0.0)
        order = sorted(saved, key=lambda name: squares[name] / saved[name])
        sums = np.cumsum([squares[name] for name in order])
        for halved in range(BUDGETS):
            chosen = frozenset(order[: int(np.sum(sums <= self.error**2 / 2**halved))])
            if self._error_of(model, context, chosen) <= math.hypot(before, self.error):
                return chosen
        return frozenset()

    def _error_of(
        self,
        model: ir.Model,
        context: Context,
        only: frozenset[str] | None,
        samples: int = COMPARED_SAMPLES,
    ) -> float:
        """The error of the model with all weights packed, or with those of these names."""
        candidate = model.clone()
        # What is only tried goes to no file.
        self._pack(candidate, replace(context, scratch=None), only)
        return _error(candidate, context, samples)

    def _pack(
        self, model: ir.Model, context: Context, only: frozenset[str] | None = None
    ) -> Change:
        change, names = Change(), Names(model)
        layers = _layers(model) if context.observer is not None else {}
        asked = [layer.ask("gram") for layer in layers.values()]
        answers = context.observe(model, asked) if asked else {}
        for graph in all_graphs(model):
            for value in list(graph.initializers.values()):
                if not _is_candidate(value, self.min_elements):
                    continue
                if only is not None and value.name not in only:
                    change.skip(value, "packing it adds too much to the error of the outputs")
                    continue
                try:
                    role = self._role(value)
                except Misfit as reason:
                    change.skip(value, str(reason))
                    continue
                coded = round_to_codes(_array(value), role.shared or ())
                shift = np.zeros(0)
                if value in layers:
                    coded, shift = _against_inputs(layers[value], coded, answers)
                _replace(value, coded, names, context)
                if shift.any():
                    _shift_bias(layers[value], shift, names, context)
                change.count(f"weight of {role.operator} stored as int8")
        return change

    def narrow(self) -> QuantizeWeights | None:
        """Leave alone what is next to a signal, an image or a single output; then small weights.

        A small weight adds as much to the error as a large one, and saves little.
        """
        if self.min_channels < FEW_CHANNELS:
            return replace(self, min_channels=FEW_CHANNELS)
        more = next((n for n in MORE_ELEMENTS if n > self.min_elements), None)
        return None if more is None else replace(self, min_elements=more)

    def _saved_bytes(self, model: ir.Model) -> dict[str, int]:
        """What packing takes from the file, by the names of the weights that can be packed."""
        found = {}
        for graph in all_graphs(model):
            for value in graph.initializers.values():
                if _is_candidate(value, self.min_elements):
                    with suppress(Misfit):
                        shared = self._role(value).shared or ()
                        saved_bytes = _array(value).nbytes - _packed_bytes(value, shared)
                        found[value.name or ""] = saved_bytes
        return found

    def _role(self, value: ir.Value) -> Role:
        """How a weight is read.

        Raises:
            Misfit: it had better stay as it is.
        """
        tensor = value.const_value
        assert tensor is not None
        if value.is_graph_input():
            raise Misfit("an input that a caller can override")
        role = role_of(value, tuple(map(int, tensor.shape.numpy())))
        if role.channels < self.min_channels:
            raise Misfit(f"of its inputs and its outputs, the fewer are {role.channels}")
        if tensor.dtype not in TYPES:
            raise Misfit(f"a weight of type {tensor.dtype.name} is not packed")
        if tensor.nbytes > FOLDED_BYTES_MAXIMUM:
            raise Misfit("over 1 GiB onnxruntime would widen it at every inference")
        shared = role.shared or ()
        if _packed_bytes(value, shared) >= tensor.nbytes:
            raise Misfit("codes and scales would take no fewer bytes")
        if not np.isfinite(largest(_array(value), shared)).all():
            raise Misfit("it holds infinity or NaN")
        return role


def _array(value: ir.Value) -> np.ndarray:
    assert value.const_value is not None
    return read_array(value.const_value)


def _error(model: ir.Model, context: Context, samples: int = COMPARED_SAMPLES) -> float:
    """The relative L2 error of the worst output against the model as it was given.

    Against the model before the pass, nodes on codes would show their own rounding once more: the
    smallest change turns some codes over. Errors of independent roundings add in their squares.
    """
    return worst(context.compare(context.original, model, samples))


def _layers(model: ir.Model) -> dict[ir.Value, Layer]:
    """The weights that one product of the main graph reads, whose inputs can be looked at."""
    found = {}
    for node in model.graph:
        if not is_onnx(node, "Conv", "Gemm", "MatMul") or len(node.inputs) < 2:
            continue
        data, weight = node.inputs[0], node.inputs[1]
        if data is None or weight is None or data.dtype != ir.DataType.FLOAT:
            continue
        tensor = constant_tensor(weight)
        if tensor is None or only_reader(weight) is not node or constant_tensor(data) is not None:
            continue
        layer = layer_of(node)
        if (is_onnx(node, "Conv") or len(tensor.shape) == 2) and layer.has_gram:
            found[weight] = layer
    return found


def _against_inputs(layer: Layer, coded: Coded, answers: Answers) -> tuple[Coded, np.ndarray]:
    """Codes and scales that change the outputs least on the samples, and a shift of the bias."""
    gram = answers[layer.ask("gram")]
    assert isinstance(gram, Gram)
    outputs = math.prod(layer.dimensions[:2])
    if not gram.rows or coded.scales.size != outputs:
        return coded, np.zeros(outputs)
    packed = packed_layer(layer, gram, layer.can_correct_bias)
    scales = packed.scales.astype(coded.scales.dtype).reshape(coded.scales.shape)
    return Coded(packed.codes, scales), packed.shift


def _shift_bias(layer: Layer, shift: np.ndarray, names: Names, context: Context) -> None:
    """Add to the bias of a layer, or give it one."""
    node, graph, old = layer.node, layer.node.graph, layer.bias()
    assert isinstance(graph, ir.Graph)
    dtype = layer.source.dtype
    assert dtype is not None
    bias = (shift if old is None else old + shift).astype(dtype.numpy())
    name = names.new("bias" if old is None else f"{node.inputs[2].name}_corrected")  # type: ignore[union-attr]
    node.resize_inputs(3)
    node.replace_input_with(2, context.initializer(graph, bias, name))


def _is_candidate(value: ir.Value, min_elements: int) -> bool:
    """A large constant of floating point, no vector, that is not the scale of codes already."""
    tensor = value.const_value
    if tensor is None or tensor.size < min_elements or not tensor.dtype.is_floating_point():
        return False
    if len(tensor.shape) < 2:
        return False
    return not all(is_packed(use.node.outputs[0]) for use in value.uses())


def _packed_bytes(value: ir.Value, shared: Axes) -> int:
    """What codes, scales and the nodes take in the file, about."""
    tensor = value.const_value
    assert tensor is not None
    blocks = [size for axis, size in enumerate(tensor.shape.numpy()) if axis not in shared]
    scale_bytes = math.prod(blocks) * scale_type(tensor.dtype.numpy()).itemsize
    return tensor.size + scale_bytes + NAMES * len(value.name or "") + NODES_BYTES


def _replace(value: ir.Value, coded: Coded, names: Names, context: Context) -> None:
    """Let nodes at the head of the graph make the weight, under its name."""
    graph, name, tensor = value.graph, value.name, value.const_value
    assert isinstance(graph, ir.Graph) and name is not None and tensor is not None
    codes, scales = (
        context.initializer(graph, array, new)
        for array, new in (
            (coded.codes, names.new(f"{name}_codes")),
            (coded.scales, names.new(f"{name}_scales")),
        )
    )
    del graph.initializers[name]
    value.name = None
    wide, half = scales.dtype, tensor.dtype == ir.DataType.FLOAT16
    nodes = [_node("Cast", [codes], wide, names.new(f"{name}_wide"))]
    product = names.new(f"{name}_float") if half else name
    nodes.append(_node("Mul", [nodes[0].outputs[0], scales], wide, product))
    if half:
        # onnxruntime's CPU provider has no Mul in float16 that it could compute at load.
        nodes.append(_node("Cast", [nodes[1].outputs[0]], tensor.dtype, name))
    graph.insert_before(graph[0], nodes)
    value.replace_all_uses_with(nodes[-1].outputs[0])


def _node(
    op_type: str, inputs: Sequence[ir.Value], dtype: ir.DataType | None, name: str
) -> ir.Node:
    """A node on the codes, of one output of their shape."""
    node = ir.node(op_type, inputs, {"to": dtype} if op_type == "Cast" else {}, name=name)
    (output,) = node.outputs
    output.name, output.shape = name, inputs[0].shape
    output.type = ir.TensorType(dtype) if dtype is not None else None
    # It can be inferred again; no file need state it.
    output.meta[INFERRED] = True
    return node

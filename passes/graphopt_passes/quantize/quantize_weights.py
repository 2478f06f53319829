"""quantize-weights: store float weights as integers of 8 bits or fewer."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import ml_dtypes
import numpy as np
import onnx_ir as ir

from graphopt import encoding
from graphopt.content import read_array
from graphopt.contract import Bounds, Change, Context, Effect, Pass
from graphopt.errors import SpecError
from graphopt.observe import Answers
from graphopt.operators import all_graphs, is_onnx, opset_of
from graphopt.packing import FOLDED_BYTES_MAXIMUM, is_packed, repeats_rows
from graphopt.rewriting import Names, constant_tensor, only_reader
from graphopt.skeleton import INFERRED
from graphopt.statistics import Gram
from graphopt.validation import worst
from graphopt_passes.fuse.misfit import Misfit
from graphopt_passes.quantize.balanced_rounding import Coded, largest, round_to_codes, scale_type
from graphopt_passes.quantize.each import parse_each, skip_others
from graphopt_passes.quantize.granularity import WEIGHTS, Axes, Role, role_of
from graphopt_passes.quantize.integer_weights import Integers, Method, estimates_of_integers
from graphopt_passes.quantize.kernel_weights import BLOCK_MINIMUM, FIRST_OPSETS, KernelIntegers
from graphopt_passes.quantize.layers import Layer, layer_of
from graphopt_passes.quantize.narrow_weights import shift_bias, targets_of
from graphopt_passes.quantize.narrowing import Budget, Narrowing
from graphopt_passes.quantize.weights import packed_layer
from graphopt_passes.share.zeros import unpacked_zeros
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

Bits = Literal[8, 6, 5, 4, 3, 2, 0]

CHOSEN_BITS: tuple[Bits, ...] = (2, 3, 4, 5, 6, 8)
KERNEL_BITS: tuple[Bits, ...] = (2, 4, 8)
"""What is chosen from; the latter for onnxruntime's kernel, which has no others."""

PROBED_BITS = 3

TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)
"""Of weights that are packed."""


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Store weights as integers with a scale for each output channel or block of inputs.

    By default these have 8 bits: a weight W becomes Mul(Cast(codes), scales), which onnxruntime
    computes once, when it loads the model. The kernels, the fusions and the speed are those of the
    float model, and so is its memory, but for the time of loading, which takes twice as much of
    both. A DequantizeLinear would run at every inference, or have the activations of a MatMul
    rounded too.

    Weights are those of Conv, ConvTranspose, Gemm, MatMul, LSTM, GRU and RNN, and tables of Gather,
    also in subgraphs. Each block of codes has the scale largest / 127: one output channel, one row
    of a gate, one row of a table; where readers disagree, as the first one has it. A table that is
    the head of a language model too is stored once, and rounded for the head.

    Fewer bits are packed, and also widened at load, unless `form=kernel` leaves the weights of
    MatMul and Gemm to MatMulNBits of onnxruntime's CPU provider, which keeps them narrow in memory
    too. In 4 bits it takes a fifth of the time of float for one row (a token at a time), and more
    than float for a hundred. Its accuracy level is 4 by default: it rounds activations to int8, a
    scale for each block, which changes outputs by 3e-3 to 6e-3 of their size. At level 1 it
    computes in float32; for few rows that takes four times as long in 4 bits, and in 8 bits, for
    which there is no fast way, 3 to 20 times as long as float. Where a level is stated, tables of
    Gather stay narrow in memory as well.

    Attributes:
        min_elements: smaller weights are not worth the nodes.
        min_channels: weights of fewer inputs or outputs stay as they are. Rounding shows most in
            filters of a signal or an image and in those that make a single output.
        error: relative L2 error of the worst output that packing may add, in its square, on the
            calibration samples; where it adds more, the weights that save few bytes for what they
            add stay. Without samples the gate decides. Fewer bits than 8 are limited by it only
            where `bits=0` chooses them, without samples by the error of the weights.
        bits: of each number: 8, 6, 5, 4, 3 or 2; for the kernel 8, 4 or 2. 0 chooses for each
            weight, by what rounding it alone does to the outputs.
        average_bits: scales included, that `bits=0` may take; 0 lets `error` limit it.
        block: inputs that share a scale; 0 for all of them. What does not divide them becomes the
            next larger number that does. For the kernel a power of two from 16 on.
        method: how fewer bits are rounded. "nearest" gives the largest number of a block the last
            integer. "hqq" seeks scales that do not mind a few large numbers. "gptq" changes the
            outputs least on the samples: scales are searched for and refitted, what one number is
            wrong by those after it make good, and each is moved until none gains. "auto" is "gptq"
            for weights whose inputs the samples show, else "hqq".
        scales: how scales are stored that are folded at load. In float8 (e4m3) they take half as
            much: blocks of 16 then are better than blocks of 32 with float16, and no larger.
        form: "load" widens when the model is loaded; "kernel" does so for weights that the kernels
            cannot read: tables of Gather, unless there is an accuracy level, and what more than one
            node reads.
        accuracy_level: of com.microsoft.MatMulNBits, which then is written itself: 4, or 1. 0
            writes DequantizeLinear, of which onnxruntime makes it at load, at level 4. With a level
            tables of Gather are looked up in codes, by com.microsoft.GatherBlockQuantized of the
            CPU provider, in 4 bits in a fifth of the memory. One row takes as long as of floats,
            and a hundred 3 times as long (2 in 8 bits); where little else is done, only a run
            without the clock keeps that. An index out of bounds gives zeros, and is no error. A
            table that is the head of a language model too is stored once, and multiplied with as it
            is.
        each: bits of single weights, `NAME:BITS`, in the form and by the method of the other
            options; all others stay.

    Raises:
        SpecError: `each` states bits that are not chosen from.
    """

    name: ClassVar[str] = "quantize-weights"
    effect: ClassVar[Effect] = Effect.LOSSY
    operators: ClassVar[frozenset[str] | None] = frozenset(WEIGHTS)
    max_error: ClassVar[float] = 0.15
    max_latency: ClassVar[float | None] = 1.03

    min_elements: Annotated[int, Bounds(1)] = 256
    min_channels: Annotated[int, Bounds(1)] = 1
    error: Annotated[float, Bounds(0.0, None)] = 0.05
    bits: Bits = 8
    average_bits: Annotated[float, Bounds(0.0, 8.0)] = 0.0
    block: Annotated[int, Bounds(0)] = 0
    method: Method = "auto"
    scales: Literal["float16", "float8"] = "float16"
    form: Literal["load", "kernel"] = "load"
    accuracy_level: Literal[0, 1, 4] = 0
    each: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        wrong = [bits for bits in self._each.values() if bits not in self._bits_there_are]
        if wrong:
            raise SpecError(
                f"'quantize-weights' gives each weight one of {self._bits_there_are} bits in "
                f"form={self.form}; not {wrong[0]}"
            )

    @property
    def _each(self) -> dict[str, int]:
        return parse_each(self.name, self.each, int, "of bits")

    @property
    def _bits_there_are(self) -> tuple[Bits, ...]:
        return KERNEL_BITS if self.form == "kernel" else CHOSEN_BITS

    def refuse(self, model: ir.Model, context: Context) -> str | None:
        """Refuse opsets before those of the nodes that are written, and what no kernel takes."""
        if self._is_plain:
            return why_refused(model, FIRST_OPSET)
        if self.form == "load" and self.accuracy_level:
            return "accuracy-level is that of a kernel: form=kernel"
        if self.form == "load":
            return why_refused(model, encoding.FIRST_OPSET)
        if self.bits and self.bits not in KERNEL_BITS:
            return f"no kernel multiplies with {self.bits} bits; form=load stores them"
        if self.block < BLOCK_MINIMUM or self.block & (self.block - 1):
            return f"the kernel takes blocks of 16, 32, 64, 128 inputs, not of {self.block}"
        if self.accuracy_level:
            return why_refused(model, encoding.FIRST_OPSET)
        fewest = min(self._each.values(), default=self.bits or max(KERNEL_BITS))
        first = FIRST_OPSETS[fewest]
        if opset_of(model) < first:
            bits = fewest if self.bits or self.each else 4
            return f"{bits} bits in blocks need opset {first}: raise-opset{{opset={first}}}"
        return why_refused(model, first)

    @property
    def _is_plain(self) -> bool:
        """8 bits, a scale for each output channel, by Cast and Mul."""
        chosen = self.bits, self.block, self.method, self.form
        return chosen == (8, 0, "auto", "load") and not self.each

    def apply(self, model: ir.Model, context: Context) -> Change:
        """Pack one weight after the other; with samples, as many as keep the outputs close."""
        with unpacked_zeros(model, context):
            return self._applied(model, context)

    def _applied(self, model: ir.Model, context: Context) -> Change:
        if not self._is_plain:
            return self._narrowed(model, context)
        if context.observer is None:
            return self._pack(model, context)
        before = _error(model, context)
        if self._error_of(model, context, None) <= math.hypot(before, self.error):
            return self._pack(model, context)
        return self._pack(model, context, self._least_sensitive(model, context, before))

    # -------------------------------------------------------------- few bits

    def _narrowed(self, model: ir.Model, context: Context) -> Change:
        """All weights in the bits that are asked for, or in as many each as the budget allows."""
        change = Change()
        targets = []
        for target in targets_of(model, self.min_elements, change):
            fewer = min(target.rows, target.inputs)
            if fewer < self.min_channels and target.operator != "Gather":
                change.skip(target.value, f"of its inputs and its outputs, the fewer are {fewer}")
            else:
                targets.append(target)
        if not targets:
            return change
        looks_up = context.provider == "cpu"
        forms = [self._form(bits, looks_up) for bits in self._choices(opset_of(model))]
        # No kernel has its bits.
        probe = Integers(PROBED_BITS, self.block, self.method, self._scale_type)
        if isinstance(forms[0], KernelIntegers):
            reasons = Counter(filter(None, map(forms[0].why_folded, targets)))
            for reason, count in reasons.items():
                change.note(f"{count} of {len(targets)} weights are widened at load: {reason}")
        budget = None if self.bits else Budget(self.average_bits or None, self.error)
        estimates = estimates_of_integers
        narrowing = Narrowing(model, context, forms, probe, estimates, change, targets)
        if self.each:
            self._rewrite_each(narrowing)
        else:
            narrowing.run(budget)
        return change

    def _rewrite_each(self, narrowing: Narrowing) -> None:
        """Round the weights that are named, each as it is said."""
        each, looks_up = self._each, narrowing.context.provider == "cpu"
        skip_others(each, [t.name for t in narrowing.targets], narrowing.change)
        narrowing.targets = [t for t in narrowing.targets if t.name in each]
        narrowing.rewrite([self._form(each[t.name], looks_up) for t in narrowing.targets])

    def _choices(self, opset: int) -> tuple[int, ...]:
        if self.bits:
            return (self.bits,)
        if self.form == "load":
            return CHOSEN_BITS
        return tuple(b for b in KERNEL_BITS if self.accuracy_level or opset >= FIRST_OPSETS[b])

    def _form(self, bits: int, looks_up: bool) -> Integers:
        if self.form == "kernel":
            return KernelIntegers(
                bits,
                self.block,
                self.method,
                accuracy_level=self.accuracy_level,
                looks_up=looks_up,
            )
        return Integers(bits, self.block, self.method, self._scale_type)

    @property
    def _scale_type(self) -> type:
        return np.float16 if self.scales == "float16" else ml_dtypes.float8_e4m3fn

    # -------------------------------------------------------------- 8 bits

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
                    shift_bias(layers[value], shift, names, context)
                change.count(f"weight of {role.operator} stored as int8")
        return change

    def narrow(self) -> QuantizeWeights | None:
        """More bits; then leave alone what is next to a signal, an image or a single output.

        Then small weights: one adds as much to the error as a large one, and saves little.
        """
        if self.each:
            return self._with_more_bits_each()
        if not self.bits and self.average_bits:
            average = min(self.average_bits + 1, 8.0)
            return replace(self, average_bits=average) if average > self.average_bits else None
        if not self.bits:
            return replace(self, error=self.error / 2) if self.error >= 0.01 else None
        if self.bits < 8:
            choices = KERNEL_BITS if self.form == "kernel" else CHOSEN_BITS
            return replace(self, bits=next(bits for bits in choices if bits > self.bits))
        if self.min_channels < FEW_CHANNELS:
            return replace(self, min_channels=FEW_CHANNELS)
        more = next((n for n in MORE_ELEMENTS if n > self.min_elements), None)
        return None if more is None else replace(self, min_elements=more)

    def _with_more_bits_each(self) -> QuantizeWeights | None:
        choices = self._bits_there_are
        more = {
            name: next((b for b in choices if b > bits), bits) for name, bits in self._each.items()
        }
        texts = tuple(f"{name}:{bits}" for name, bits in more.items())
        return replace(self, each=texts) if texts != self.each else None

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


def _is_candidate(value: ir.Value, min_elements: int) -> bool:
    """A large constant of floating point, no vector, that is not the scale of codes already."""
    tensor = value.const_value
    if tensor is None or tensor.size < min_elements or not tensor.dtype.is_floating_point():
        return False
    if len(tensor.shape) < 2:
        return False
    readers = (use.node for use in value.uses())
    return not all(is_packed(node.outputs[0]) and not repeats_rows(node) for node in readers)


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

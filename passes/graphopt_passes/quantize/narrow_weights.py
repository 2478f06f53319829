"""The weights of a model that can be made narrow, as matrices, and how they are written back.

Three kinds are found. A float weight becomes codes that are widened to float at load. The int8
weight of a layer whose activations are quantized too becomes codes that are widened to int8 there,
so that the integer kernel stays. And a weight that is stored as int8 and widened by Cast and Mul is
a float weight of which less is known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np
import onnx_ir as ir

from graphopt.code_fields import fields_of
from graphopt.contract import Change, Context
from graphopt.encoding import Encoding, Narrow, why_too_large
from graphopt.observe import Question
from graphopt.operators import all_graphs, is_onnx
from graphopt.packing import is_packed, repeats_rows
from graphopt.rewriting import Names, constant_tensor, input_of, only_reader
from graphopt.sparse_encoding import MASK_BYTES
from graphopt_passes.fuse.misfit import Misfit
from graphopt_passes.quantize.codebooks import Rounded, stored_scales
from graphopt_passes.quantize.granularity import Axes, role_of
from graphopt_passes.quantize.layers import (
    GRAM_INPUTS_MAXIMUM,
    Layer,
    layer_of,
    numbers_of,
    stored_tensor,
)
from graphopt_passes.simplify.chains import remove_if_unread

TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)
"""Of float weights that are made narrow."""

HALVES_MINIMUM = 24
"""Fewer numbers of float16 take no fewer bytes than float32, with the Cast."""

LEVEL_MAXIMUM = 127
"""Of int8 levels: symmetric, as the codes of the layer were."""


@dataclass(frozen=True, eq=False)
class Target:
    """A weight that can be made narrow.

    Attributes:
        value: that its reader reads: an initializer, or what nodes widen.
        operator: of its reader.
        shared: the axes along which its numbers belong to one row of the matrix.
        layer: of which it is the weight, where its inputs can be looked at.
        is_integer: the kernel works on int8 codes, which a DequantizeLinear reads.
        others: of a weight that more than one node reads, the products among these whose inputs
            are rows of its matrix and can be looked at.
        is_looked_up: a Gather reads it.
        in_body: its graph is the body of an If, Loop or Scan.
    """

    value: ir.Value
    operator: str
    shared: Axes
    layer: Layer | None
    is_integer: bool
    others: tuple[Question, ...] = ()
    is_looked_up: bool = False
    in_body: bool = False

    def copied(self, value: ir.Value) -> Target:
        """The same in a clone of the model, where the weight is another value."""
        reader = only_reader(value) if self.layer is not None else None
        return replace(self, value=value, layer=None if reader is None else layer_of(reader))

    @property
    def asked(self) -> tuple[Question, ...]:
        """What to ask for the Gram matrices of all rows that it is multiplied with."""
        return self.others if self.layer is None else (self.layer.ask("gram"),)

    @property
    def name(self) -> str:
        """Of the value."""
        return self.value.name or ""

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        tensor = stored_tensor(self.value)
        assert tensor is not None
        return tuple(map(int, tensor.shape.numpy()))

    @property
    def dtype(self) -> ir.DataType:
        """Of its numbers, as they are stored."""
        tensor = stored_tensor(self.value)
        assert tensor is not None
        return tensor.dtype

    @property
    def size(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    @property
    def rows(self) -> int:
        """Of the matrix."""
        return math.prod(self.shape[axis] for axis in self._kept)

    @property
    def inputs(self) -> int:
        """Of a row."""
        return self.size // max(self.rows, 1)

    @property
    def stored_bytes(self) -> int:
        """What the numbers take in the file now."""
        tensor = stored_tensor(self.value)
        assert tensor is not None
        return tensor.nbytes

    @cached_property
    def nonzeros(self) -> int:
        """How many of its numbers are not zero."""
        return int(np.count_nonzero(numbers_of(self.value)))

    def code_bytes(self, levels: int, keeps_zeros: bool = True) -> int:
        """What codes of so many levels take in the file, with a mask where that is less.

        Args:
            levels: of a code.
            keeps_zeros: zeros have a code of their own.
        """
        whole = sum(field.stored_bytes(self.size) for field in fields_of(levels))
        if not keeps_zeros or levels < 3:
            return whole
        others = sum(field.stored_bytes(self.nonzeros) for field in fields_of(levels - 1))
        return min(whole, MASK_BYTES + self.size // 8 + others)

    @property
    def _kept(self) -> Axes:
        return tuple(axis for axis in range(len(self.shape)) if axis not in self.shared)

    def matrix(self, dtype: type = np.float32) -> np.ndarray:
        """The weight, float32 or of another type, of shape [rows, inputs]."""
        return self.rows_of(np.asarray(numbers_of(self.value), dtype))

    def rows_of(self, array: np.ndarray) -> np.ndarray:
        """An array in the layout of the weight as a matrix of shape [rows, inputs]."""
        return np.ascontiguousarray(
            array.transpose(*self._kept, *self.shared).reshape(self.rows, self.inputs)
        )

    def stored(self, matrix: np.ndarray) -> np.ndarray:
        """A matrix of that shape, of any type, in the layout of the weight."""
        order = (*self._kept, *self.shared)
        moved = matrix.reshape([self.shape[axis] for axis in order])
        return np.ascontiguousarray(moved.transpose(np.argsort(order)))

    @property
    def channel_axis(self) -> int | None:
        """Along which the channels of its inputs lie, before the taps of a window."""
        return self.shared[0] if self.shared else None

    @property
    def channels(self) -> int:
        """Of its inputs; 1 where they have none."""
        return 1 if self.channel_axis is None else self.shape[self.channel_axis]

    def stored_channels(self, matrix: np.ndarray) -> np.ndarray:
        """A matrix of some channels' inputs in the layout of a weight that has no others."""
        if self.channel_axis is None:
            return self.stored(matrix)
        order = (*self._kept, *self.shared)
        taps = self.inputs // self.channels
        sizes = {axis: self.shape[axis] for axis in order}
        sizes[self.channel_axis] = matrix.shape[1] // taps
        moved = matrix.reshape([sizes[axis] for axis in order])
        return np.ascontiguousarray(moved.transpose(np.argsort(order)))

    @property
    def row_axis(self) -> int | None:
        """Along which its rows lie; None where they lie along several, or where it is one row."""
        axes = [axis for axis in self._kept if self.shape[axis] > 1]
        return axes[0] if len(axes) == 1 else None

    def stored_rows(self, rows: np.ndarray) -> np.ndarray:
        """Rows of shape [N, inputs] in the layout of a weight that has N along `row_axis`."""
        order = (*self._kept, *self.shared)
        shape = [len(rows) if axis == self.row_axis else self.shape[axis] for axis in order]
        return np.ascontiguousarray(rows.reshape(shape).transpose(np.argsort(order)))

    def blocks_of(self, inputs: int) -> int:
        """Into how many blocks of so many inputs a row can be cut; 1 where it cannot.

        Blocks are parts of one axis.
        """
        axes = [axis for axis in self.shared if self.shape[axis] > 1]
        if not inputs or len(axes) != 1 or self.inputs % inputs:
            return 1
        return self.inputs // inputs

    def stored_blocks(self, blocks: np.ndarray) -> np.ndarray:
        """Scales of shape [rows, blocks], broadcastable in blocks to the weight."""
        order = (*self._kept, *self.shared)
        shape = [self.shape[axis] if axis in self._kept else 1 for axis in order]
        if blocks.shape[1] > 1:
            (axis,) = (a for a in self.shared if self.shape[a] > 1)
            shape[order.index(axis)] = blocks.shape[1]
        return np.ascontiguousarray(blocks.reshape(shape).transpose(np.argsort(order)))


@dataclass(frozen=True, eq=False)
class Solution:
    """What replaces a weight.

    Attributes:
        parts: the weight is the sum of these.
        shift: what each row adds to the mean of its output, to be taken from the bias; float64 of
            shape [rows], or None.
        writer: puts it into the graph; None for nodes that onnxruntime folds at load.
        as_trained: nothing is lost: the weight was trained in this form.
    """

    parts: tuple[Rounded, ...]
    shift: np.ndarray | None = None
    writer: Writer | None = None
    as_trained: bool = False

    def numbers(self) -> np.ndarray:
        """The weight, float32 of shape [rows, inputs]."""
        return np.asarray(sum((p.numbers() for p in self.parts[1:]), self.parts[0].numbers()))


Writer = Callable[[Target, Solution, Encoding, Context], None]


def arrays_of(solution: Solution) -> dict[str, np.ndarray]:
    """All that a solution without a writer holds, by name, for `graphopt.memo.Memo`."""
    arrays = {"as_trained": np.array(solution.as_trained)}
    if solution.shift is not None:
        arrays["shift"] = solution.shift
    for number, part in enumerate(solution.parts):
        arrays[f"codes{number}"] = part.codes
        arrays[f"levels{number}"] = part.levels
        arrays[f"scales{number}"] = part.scales
    return arrays


def solution_of(arrays: Mapping[str, np.ndarray]) -> Solution:
    """The solution of which these are the arrays."""
    count = sum(name.startswith("codes") for name in arrays)
    parts = [
        Rounded(arrays[f"codes{n}"], arrays[f"levels{n}"], arrays[f"scales{n}"])
        for n in range(count)
    ]
    return Solution(tuple(parts), arrays.get("shift"), as_trained=bool(arrays["as_trained"]))


# ------------------------------------------------------------------ what is found


def targets_of(model: ir.Model, min_elements: int, change: Change) -> list[Target]:
    """The weights of a model that can be made narrow, in order; what cannot, with the reason.

    Args:
        model: not modified.
        min_elements: smaller weights are not looked at.
        change: told what is left alone.
    """
    found = []
    for graph in all_graphs(model):
        for value in _weights_in(graph):
            tensor = stored_tensor(value)
            if tensor is None or tensor.size < min_elements or len(tensor.shape) < 2:
                continue
            try:
                found.append(_target(value, model))
            except Misfit as reason:
                change.skip(value, str(reason))
    return found


def _weights_in(graph: ir.Graph) -> Iterator[ir.Value]:
    """Float initializers, and what a DequantizeLinear or a Mul makes of int8 ones."""
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.dtype.is_floating_point() and not _are_scales(value):
            yield value
    for node in graph:
        if is_onnx(node, "DequantizeLinear", "Mul") and is_packed(node.outputs[0]):
            yield node.outputs[0]


def _are_scales(value: ir.Value) -> bool:
    """Nodes that widen packed weights read it, and not as rows that weights share."""
    readers = (use.node for use in value.uses() if use.idx != 0 or not repeats_rows(use.node))
    return any(is_packed(output) for node in readers for output in node.outputs)


def _target(value: ir.Value, model: ir.Model) -> Target:
    """What a weight is to its readers.

    Raises:
        Misfit: it had better stay as it is.
    """
    if value.is_graph_input():
        raise Misfit("an input that a caller can override")
    node = value.producer()
    is_integer = node is not None and is_onnx(node, "DequantizeLinear")
    tensor = stored_tensor(value)
    assert tensor is not None
    if node is None and tensor.dtype not in TYPES:
        raise Misfit(f"a weight of type {tensor.dtype.name} is not made narrow")
    role = role_of(value, tuple(map(int, tensor.shape.numpy())))
    reader = only_reader(value)
    if is_integer and value.dtype not in (None, ir.DataType.FLOAT):
        raise Misfit("it is dequantized to another type than float32")
    if is_integer and reader is not None and not _has_plain_bias(layer_of(reader)):
        raise Misfit("the bias beside its codes is no number for each output")
    if is_integer and role.operator == "MatMul" and len(tensor.shape) != 2:
        raise Misfit("a stack of matrices on codes has scales of its own kind")
    if is_integer and not (reader is not None and _is_on_codes(reader, value)):
        raise Misfit("it is dequantized for a float operator")
    if is_integer and (node is None or only_reader(node.inputs[0]) is not node):  # type: ignore[arg-type]
        raise Misfit("more than one DequantizeLinear reads its codes")
    dtype = ir.DataType.INT8 if is_integer else value.dtype or tensor.dtype
    reason = why_too_large(tensor.size, dtype)
    if reason is not None:
        raise Misfit(reason)
    if not np.isfinite(numbers_of(value)).all():
        raise Misfit("it holds infinity or NaN")
    shared = role.shared or ()
    layer = _layer_of(value, reader, model)
    others = _others(value, shared, model) if layer is None and len(tensor.shape) == 2 else ()
    looked_up = any(is_onnx(use.node, "Gather") for use in value.uses())
    in_body = graph_of(value) is not model.graph
    return Target(value, role.operator, shared, layer, is_integer, others, looked_up, in_body)


def _has_plain_bias(layer: Layer) -> bool:
    """Its bias is constant and has a number for each output, or there is none."""
    old = input_of(layer.node, 2)
    tensor = None if old is None else stored_tensor(old)
    outputs = math.prod(layer.dimensions[:2])
    return old is None or (
        tensor is not None and tuple(tensor.shape.numpy()) in ((outputs,), (1, outputs))
    )


def _is_on_codes(node: ir.Node, weight: ir.Value) -> bool:
    """A product of what a DequantizeLinear makes of codes that were computed, with the weight."""
    if not is_onnx(node, "Conv", "Gemm", "MatMul") or node.inputs[1] is not weight:
        return False
    source = node.inputs[0].producer() if node.inputs[0] is not None else None
    return source is not None and is_onnx(source, "DequantizeLinear")


def _layer_of(value: ir.Value, node: ir.Node | None, model: ir.Model) -> Layer | None:
    """The product whose weight it alone is, if its inputs can be looked at."""
    if node is None or node.graph is not model.graph or not is_onnx(node, "Conv", "Gemm", "MatMul"):
        return None
    data = node.inputs[0]
    if data is None or node.inputs[1] is not value or data.dtype != ir.DataType.FLOAT:
        return None
    if constant_tensor(data) is not None:
        return None
    tensor, layer = stored_tensor(value), layer_of(node)
    assert tensor is not None
    fits = is_onnx(node, "Conv") or len(tensor.shape) == 2
    return layer if fits and layer.has_gram else None


def _others(value: ir.Value, shared: Axes, model: ir.Model) -> tuple[Question, ...]:
    tensor = stored_tensor(value)
    assert tensor is not None
    if len(shared) != 1 or int(tensor.shape.numpy()[shared[0]]) > GRAM_INPUTS_MAXIMUM:
        return ()
    return tuple(dict.fromkeys(_products_of(value, shared, model)))


def _products_of(value: ir.Value, shared: Axes, model: ir.Model) -> Iterator[Question]:
    """The products with a matrix, as it is or transposed, whose inputs lie along an axis of it."""
    for use in value.uses():
        node = use.node
        if is_onnx(node, "Transpose") and node.attributes.get_ints("perm", (1, 0)) == (1, 0):
            yield from _products_of(node.outputs[0], tuple(1 - axis for axis in shared), model)
        elif is_onnx(node, "Gemm", "MatMul") and use.idx == 1 and node.graph is model.graph:
            data, across = node.inputs[0], node.attributes.get_int("transB", 0)
            if data is None or data.dtype != ir.DataType.FLOAT or constant_tensor(data) is not None:
                continue
            if shared == (across,) and not node.attributes.get_int("transA", 0):
                yield Question(data.name or "", "gram")


# ------------------------------------------------------------------ writing


def write(
    model: ir.Model,
    targets: Sequence[Target],
    solutions: Mapping[int, Solution],
    context: Context,
    kept: Iterable[int] = (),
) -> None:
    """Put solutions in the place of weights.

    Args:
        model: rewritten in place.
        targets: of it.
        solutions: by the index of the target.
        context: keeps what is large.
        kept: the indices of weights that stay; of those on codes, scale and bias become narrow.
    """
    names = Names(model)
    encodings: dict[ir.Graph, Encoding] = {}
    for index in (*solutions, *kept):
        target, solution = targets[index], solutions.get(index)
        graph = graph_of(target.value)
        if graph not in encodings:
            encodings[graph] = Encoding(graph, names, context.tensor)
        encoding = encodings[graph]
        if solution is None:
            _narrow_parameters(target, encoding, context)
        elif solution.writer is not None:
            solution.writer(target, solution, encoding, context)
        elif target.is_integer:
            _write_integers(target, solution, encoding, context)
        else:
            _write_floats(target, solution, encoding, context)
    for encoding in encodings.values():
        encoding.close()


def graph_of(value: ir.Value) -> ir.Graph:
    """The graph that an initializer is of, or the node that makes a value."""
    node = value.producer()
    graph = value.graph if node is None else node.graph
    assert isinstance(graph, ir.Graph)
    return graph


def write_narrow(target: Target, narrows: Sequence[Narrow], encoding: Encoding) -> None:
    """Put the sum of narrow weights in the place of a float weight, under its name.

    Args:
        target: no integer one.
        narrows: of its shape.
        encoding: of its graph.
    """
    put(target, partial(encoding.total, narrows), encoding)


def put(target: Target, make: Callable[[ir.DataType, str], ir.Value], encoding: Encoding) -> None:
    """Put another value in the place of a float weight.

    Args:
        target: no integer one.
        make: the value, of a type and a name.
        encoding: of its graph.
    """
    value, name, node = target.value, target.name, target.value.producer()
    tensor = stored_tensor(value)
    assert tensor is not None
    dtype = value.dtype or tensor.dtype
    if node is None:
        del encoding.graph.initializers[name]
    value.name = None
    value.replace_all_uses_with(make(dtype, name))
    remove_if_unread(node)


def _write_floats(target: Target, solution: Solution, encoding: Encoding, context: Context) -> None:
    write_narrow(target, [narrow_of(target, part) for part in solution.parts], encoding)
    correct_bias(target, solution, encoding, context)


def correct_bias(target: Target, solution: Solution, encoding: Encoding, context: Context) -> None:
    """Let the bias of a layer take back what its weight changes in the means."""
    if target.layer is not None and solution.shift is not None and solution.shift.any():
        shift_bias(target.layer, solution.shift, encoding.names, context)


def narrow_of(target: Target, part: Rounded) -> Narrow:
    """A part of a weight in its layout; of all its inputs, or of some channels."""
    codes = target.stored_channels(part.codes)
    scales = target.stored_blocks(part.scales)
    levels = part.levels.astype(np.float32)
    if part.scales.shape[1] == 1 and (part.scales == part.scales[0]).all():
        # One number for all of them is the codebook's.
        return Narrow(codes, levels * np.float32(part.scales[0, 0]))
    return Narrow(codes, levels, scales)


def _write_integers(
    target: Target, solution: Solution, encoding: Encoding, context: Context
) -> None:
    """int8 levels, and new scales for the DequantizeLinear and the bias."""
    layer, node = target.layer or layer_of(_reader_of(target)), target.value.producer()
    assert node is not None and node.inputs[0] is not None
    (part,) = solution.parts
    bias = layer.bias()
    if solution.shift is not None:
        bias = solution.shift if bias is None else bias + solution.shift
    codes, name = node.inputs[0], node.inputs[0].name or ""
    narrow = Narrow(target.stored(part.codes), np.asarray(part.levels, np.int8))
    del encoding.graph.initializers[name]
    codes.name = None
    node.replace_input_with(0, encoding.weight(narrow, ir.DataType.INT8, name))
    scales = part.scales.reshape(-1)
    _write_scales(layer, scales, encoding)
    _write_bias(layer, bias, scales, encoding, context)


def _narrow_parameters(target: Target, encoding: Encoding, context: Context) -> None:
    """Store the scales of codes that stay, and the bias beside them, in fewer bytes."""
    node = target.value.producer()
    scales = constant_tensor(node.inputs[1]) if target.is_integer and node is not None else None
    tensor = stored_tensor(target.value)
    if node is None or scales is None or tensor is None or tensor.dtype != ir.DataType.INT8:
        return
    layer = target.layer or layer_of(_reader_of(target))
    numbers = np.asarray(scales.numpy(), np.float32).reshape(-1)
    if not (numbers > 0).all():
        # Of an output whose weights are all 0, the bias could not be told.
        return
    if numbers.size > 1:
        if node.attributes.get_int("axis", 1) % len(target.shape) != layer.axis:
            # Not one for each output.
            return
        numbers = narrow_scales(numbers)
        _write_scales(layer, numbers, encoding)
    _write_bias(layer, layer.bias(), numbers, encoding, context)


def _reader_of(target: Target) -> ir.Node:
    node = only_reader(target.value)
    assert node is not None
    return node


def narrow_scales(scales: np.ndarray) -> np.ndarray:
    """Scales in float16, where they fit and are enough to make good for the Cast; else float32."""
    return stored_scales(scales) if scales.size >= HALVES_MINIMUM else scales.astype(np.float32)


def _narrow_bias(bias: np.ndarray) -> np.ndarray:
    """A bias in float16, likewise; it fits with errors that are small beside the largest number."""
    halves = bias.astype(np.float16)
    error = np.abs(halves.astype(np.float64) - bias)
    fits = (error <= np.abs(bias).max() * 2.0**-11).all()
    return halves if fits and bias.size >= HALVES_MINIMUM else bias.astype(np.float32)


def _write_scales(layer: Layer, scales: np.ndarray, encoding: Encoding) -> None:
    """Give the codes of a layer scales, of shape [outputs]."""
    node = layer.weight.producer()
    assert node is not None
    node.replace_input_with(1, encoding.floats(scales))
    node.attributes["axis"] = ir.AttrInt64("axis", layer.axis)
    # Zero points are 0, as where there are none; but a Gemm without runs in float.
    if is_onnx(layer.node, "Conv"):
        node.resize_inputs(2)
    else:
        _state_zeros(node, len(scales), encoding)


def _state_zeros(node: ir.Node, channels: int, encoding: Encoding) -> None:
    """Let a DequantizeLinear of int8 have as many zero points as scales."""
    stated = constant_tensor(input_of(node, 2))
    if stated is None or stated.size != channels or stated.dtype != ir.DataType.INT8:
        node.resize_inputs(3)
        node.replace_input_with(2, encoding.zeros(channels))


def _write_bias(
    layer: Layer,
    bias: np.ndarray | None,
    scales: np.ndarray,
    encoding: Encoding,
    context: Context,
) -> None:
    """The bias of a layer on codes: of a Conv in float, of a Gemm in integers.

    onnxruntime makes integers of the bias of a Conv itself, so that their scales, which depend on
    those of the weight, need not be stored. A Gemm whose output stays float it would compute in
    float, if the bias were.

    Args:
        layer: on codes.
        bias: float64 of shape [outputs]; nothing is done where there is none.
        scales: of the weight, of shape [outputs] or [1].
        encoding: of the graph.
        context: keeps what is large.
    """
    node, old = layer.node, input_of(layer.node, 2)
    if bias is None or not bias.any() or not layer.can_have_bias:
        return
    dequantized = old.producer() if old is not None else None
    if is_onnx(node, "Conv") or dequantized is None:
        node.resize_inputs(3)
        node.replace_input_with(2, encoding.floats(_narrow_bias(bias)))
        remove_if_unread(dequantized)
    else:
        _write_integer_bias(layer, bias, scales, encoding.names, context)


def _write_integer_bias(
    layer: Layer, bias: np.ndarray, scales: np.ndarray, names: Names, context: Context
) -> None:
    """int32 codes in units of the products, by a DequantizeLinear of the layer's own."""
    node, graph, source = layer.node, layer.node.graph, layer.source.producer()
    input_scale = constant_tensor(source.inputs[1]) if source is not None else None
    old = input_of(node, 2)
    assert isinstance(graph, ir.Graph) and input_scale is not None and old is not None
    units = np.broadcast_to(input_scale.numpy() * scales.astype(np.float32), bias.shape)
    limits = np.iinfo(np.int32)
    codes = np.clip(np.rint(bias / units), limits.min, limits.max).astype(np.int32)
    stored = [context.initializer(graph, a, names.new("bias_codes")) for a in (codes, units)]
    made = ir.node("DequantizeLinear", stored, {"axis": 0}, name="")
    made.outputs[0].name, made.outputs[0].type = names.new("bias"), old.type
    graph.insert_before(node, [made])
    node.replace_input_with(2, made.outputs[0])
    remove_if_unread(old.producer())


def shift_bias(layer: Layer, shift: np.ndarray, names: Names, context: Context) -> None:
    """Add to the bias of a layer, or give it one."""
    node, graph, old = layer.node, layer.node.graph, layer.bias()
    assert isinstance(graph, ir.Graph)
    dtype = layer.source.dtype
    assert dtype is not None
    bias = (shift if old is None else old + shift).astype(dtype.numpy())
    name = names.new("bias" if old is None else f"{node.inputs[2].name}_corrected")  # type: ignore[union-attr]
    node.resize_inputs(3)
    node.replace_input_with(2, context.initializer(graph, bias, name))

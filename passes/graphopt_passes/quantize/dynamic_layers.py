"""Layers whose weights can become 8-bit integers while activations are quantized at run time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.content import read_array
from graphopt.operators import is_onnx
from graphopt.packing import is_packed
from graphopt.rewriting import constant_tensor, input_of
from graphopt_passes.quantize.columns import CODE_MAXIMUM

PRODUCTS = ("Gemm", "MatMul")

INPUTS_MAXIMUM = (2**31 - 1) // (255 * CODE_MAXIMUM)
"""Sums of more products of codes may not fit into 32 bits."""


class NotQuantized(Exception):
    """Why a layer is left alone."""


@dataclass(frozen=True, eq=False)
class Weight:
    """A constant factor of a layer.

    Attributes:
        value: holds it.
        transposed: its last two axes change places.
    """

    value: ir.Value
    transposed: bool

    @property
    def key(self) -> tuple[ir.Value, bool]:
        """The same for all that become the same codes."""
        return self.value, self.transposed

    def array(self) -> np.ndarray:
        """Float32 of shape [..., inputs, outputs]."""
        tensor = constant_tensor(self.value)
        assert tensor is not None
        array = read_array(tensor)
        return array.swapaxes(-1, -2) if self.transposed else array

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., inputs, outputs]."""
        tensor = constant_tensor(self.value)
        assert tensor is not None
        *others, first, second = (int(d) for d in tensor.shape.numpy())
        return (*others, second, first) if self.transposed else (*others, first, second)


@dataclass(frozen=True, eq=False)
class Candidate:
    """A MatMul or Gemm, or an LSTM.

    Attributes:
        node: of the main graph.
        source: the activations.
        weights: one; of an LSTM that of its input and that of its state, [directions, ...] each.
    """

    node: ir.Node
    source: ir.Value
    weights: tuple[Weight, ...]

    @property
    def is_recurrent(self) -> bool:
        """It is an LSTM."""
        return len(self.weights) == 2

    @property
    def inputs(self) -> int:
        """Elements of a row of the activations."""
        return self.weights[0].shape[-2]


def candidate_of(node: ir.Node, graph: ir.Graph) -> Candidate:
    """What a MatMul, Gemm, LSTM, GRU or RNN is.

    Args:
        node: of these operators.
        graph: the main graph of the model.

    Raises:
        NotQuantized: it cannot be quantized.
    """
    if is_onnx(node, "GRU", "RNN"):
        raise NotQuantized(f"onnxruntime has no integer kernel for {node.op_type}")
    if node.graph is not graph:
        raise NotQuantized("it is in a body of If, Loop or Scan, where samples do not show")
    source = _activations(node)
    return _recurrent(node, source) if is_onnx(node, "LSTM") else _product(node, source)


def _activations(node: ir.Node) -> ir.Value:
    source = input_of(node, 0)
    if source is None or source.dtype != ir.DataType.FLOAT:
        kind = "an unknown type" if source is None or source.dtype is None else source.dtype.name
        raise NotQuantized(f"it computes in {kind}, and the integer kernels in FLOAT only")
    if constant_tensor(source) is not None:
        raise NotQuantized("its input is constant")
    return source


def _weight(value: ir.Value | None, rank: int, transposed: bool) -> Weight:
    if is_packed(value):
        raise NotQuantized("its weight is packed already")
    tensor = constant_tensor(value)
    if value is None or tensor is None:
        overridable = value is not None and value.is_initializer()
        what = "an input that a caller can override" if overridable else "computed at run time"
        raise NotQuantized(f"its weight is {what}")
    if tensor.dtype != ir.DataType.FLOAT:
        raise NotQuantized(f"its weight is of type {tensor.dtype.name}, not FLOAT")
    shape = tuple(int(d) for d in tensor.shape.numpy())
    if len(shape) != rank or 0 in shape:
        raise NotQuantized(f"its weight has shape {list(shape)}")
    weight = Weight(value, transposed)
    if weight.shape[-2] > INPUTS_MAXIMUM:
        raise NotQuantized(f"{weight.shape[-2]} products of codes may not add up within 32 bits")
    return weight


def _product(node: ir.Node, source: ir.Value) -> Candidate:
    transposed = False
    if is_onnx(node, "Gemm"):
        stated = node.attributes
        if any(attribute.is_ref() for attribute in stated.values()):
            raise NotQuantized("an attribute is that of a function")
        if stated.get_int("transA", 0) or stated.get_float("alpha", 1.0) != 1:
            raise NotQuantized("it has transA or alpha")
        if stated.get_float("beta", 1.0) != 1 and input_of(node, 2) is not None:
            raise NotQuantized("it has beta")
        transposed = stated.get_int("transB", 0) != 0
    return Candidate(node, source, (_weight(input_of(node, 1), 2, transposed),))


def _recurrent(node: ir.Node, source: ir.Value) -> Candidate:
    if any(attribute.is_ref() for attribute in node.attributes.values()):
        raise NotQuantized("an attribute is that of a function")
    if node.attributes.get_int("layout", 0):
        raise NotQuantized("DynamicQuantizeLSTM has no layout with the batch first")
    # ONNX has [directions, 4 * hidden, inputs]; the integer kernel its transpose.
    weights = tuple(_weight(input_of(node, index), 3, transposed=True) for index in (1, 2))
    inputs, state = (weight.shape for weight in weights)
    if inputs[0] != state[0] or inputs[2] != state[2] or state[2] != 4 * state[1]:
        raise NotQuantized(f"its weights have shapes {list(inputs)} and {list(state)}")
    return Candidate(node, source, weights)

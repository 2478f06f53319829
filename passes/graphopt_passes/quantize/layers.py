"""Products as what they are: a matrix for each group of channels, applied to rows of inputs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.content import read_array
from graphopt.observe import Question
from graphopt.operators import is_onnx
from graphopt.rewriting import constant_tensor, input_of
from graphopt.statistics import Patches

GRAM_INPUTS_MAXIMUM = 2304
"""A layer of more inputs is rounded without a Gram matrix, which would take over 40 MB."""


@dataclass(frozen=True, eq=False)
class Layer:
    """A Conv, Gemm or MatMul with a constant weight.

    Attributes:
        node: of the model.
        group: groups of a Conv; 1 for others.
    """

    node: ir.Node
    group: int

    @property
    def axis(self) -> int:
        """Of the weight, along which its outputs lie."""
        if is_onnx(self.node, "MatMul"):
            return 1
        if is_onnx(self.node, "Gemm"):
            return 0 if self.node.attributes.get_int("transB", 0) else 1
        return 0

    @property
    def dimensions(self) -> tuple[int, int, int]:
        """Groups, outputs of a group, and inputs of a group."""
        shape = self._stored.shape.numpy()
        outputs = int(shape[self.axis])
        return self.group, outputs // self.group, math.prod(map(int, shape)) // outputs

    @property
    def taps(self) -> int:
        """Of the window of a Conv; 1 for others."""
        patches = self.patches()
        return 1 if patches is None else math.prod(patches.kernel)

    @property
    def is_depthwise(self) -> bool:
        """Each channel that goes out is made of the same channel of what comes in."""
        group, outputs, inputs = self.dimensions
        return group > 1 and outputs == 1 and inputs == self.taps

    @property
    def source(self) -> ir.Value:
        """The value that is multiplied with the weight."""
        value = self.node.inputs[0]
        assert value is not None
        return value

    @property
    def weight(self) -> ir.Value:
        """The weight."""
        value = self.node.inputs[1]
        assert value is not None
        return value

    @property
    def _stored(self) -> ir.TensorProtocol:
        """The weight, or its codes."""
        tensor = stored_tensor(self.weight)
        assert tensor is not None
        return tensor

    @property
    def can_have_bias(self) -> bool:
        """The operator has an input for one."""
        return not is_onnx(self.node, "MatMul")

    @property
    def can_correct_bias(self) -> bool:
        """A number can be added to each output, by the bias that is there or by a new one."""
        bias = input_of(self.node, 2)
        if not self.can_have_bias or is_scaled(self.node):
            return False
        tensor = None if bias is None else stored_tensor(bias)
        if bias is None or tensor is None:
            return bias is None
        outputs = math.prod(self.dimensions[:2])
        return tuple(tensor.shape.numpy()) in ((outputs,), (1, outputs))

    def matrix(self) -> np.ndarray:
        """The weight as float64 of shape [group, outputs of the group, inputs]."""
        array = np.asarray(numbers_of(self.weight), np.float64)
        rows = np.moveaxis(array, self.axis, 0)
        return rows.reshape(self.group, rows.shape[0] // self.group, -1)

    def stored(self, matrix: np.ndarray) -> np.ndarray:
        """A matrix of that shape, of any type, in the layout of the weight."""
        shape = list(self._stored.shape.numpy())
        outputs = shape.pop(self.axis)
        return np.ascontiguousarray(np.moveaxis(matrix.reshape(outputs, *shape), 0, self.axis))

    def bias(self) -> np.ndarray | None:
        """The bias, float64 of shape [outputs], or None."""
        value = input_of(self.node, 2)
        if value is None or stored_tensor(value) is None:
            return None
        return np.asarray(numbers_of(value), np.float64).reshape(-1)

    @property
    def has_gram(self) -> bool:
        """Its inputs are the last axis of what it reads, and few enough for their products."""
        if self.node.attributes.get_int("transA", False):
            return False
        return self.dimensions[2] <= GRAM_INPUTS_MAXIMUM

    def ask(self, about: str) -> Question:
        """A question on the rows that the weight is multiplied with: "gram" or "rows"."""
        return Question(self.source.name or "", about, patches=self.patches())

    def patches(self) -> Patches | None:
        """The windows of a Conv; None for others."""
        if not is_onnx(self.node, "Conv"):
            return None
        kernel = tuple(int(k) for k in self._stored.shape.numpy()[2:])
        rank, stated = len(kernel), self.node.attributes
        return Patches(
            kernel=kernel,
            strides=tuple(stated.get_ints("strides", (1,) * rank)),
            dilations=tuple(stated.get_ints("dilations", (1,) * rank)),
            pads=tuple(stated.get_ints("pads", (0,) * 2 * rank)),
            group=self.group,
            auto_pad=stated.get_string("auto_pad", "NOTSET"),
        )


def stored_tensor(value: ir.Value) -> ir.TensorProtocol | None:
    """The tensor of a constant, or of the codes that a node or two widen; None for what is neither.

    These are a DequantizeLinear, and a Mul with scales of a Cast.
    """
    node = value.producer()
    if node is None or is_onnx(node, "Constant"):
        return constant_tensor(value)
    if is_onnx(node, "Mul"):
        casts = [v.producer() for v in node.inputs if v is not None and constant_tensor(v) is None]
        node = casts[0] if len(casts) == 1 else None
        if node is None or not is_onnx(node, "Cast"):
            return None
    elif not is_onnx(node, "DequantizeLinear") or not _is_symmetric(node):
        return None
    return constant_tensor(node.inputs[0])


def _is_symmetric(node: ir.Node) -> bool:
    """A DequantizeLinear of constant scales, one or one for each channel, and zero points 0."""
    zero_point = input_of(node, 2)
    tensor = constant_tensor(zero_point)
    if constant_tensor(node.inputs[1]) is None or "block_size" in node.attributes:
        return False
    return zero_point is None or (tensor is not None and not read_array(tensor).any())


def numbers_of(value: ir.Value) -> np.ndarray:
    """What a weight is: constant, or codes that a DequantizeLinear or Cast and Mul widen."""
    tensor = stored_tensor(value)
    assert tensor is not None
    array, node = read_array(tensor), value.producer()
    if node is None or is_onnx(node, "Constant"):
        return array
    if is_onnx(node, "DequantizeLinear"):
        return np.asarray(array * _scales_of(node, array.ndim))
    scales = next(t for v in node.inputs if (t := constant_tensor(v)) is not None)
    return np.asarray(array * read_array(scales))


def _scales_of(node: ir.Node, rank: int) -> np.ndarray:
    """The scales of a DequantizeLinear, float32, broadcastable to codes of a rank."""
    tensor = constant_tensor(node.inputs[1])
    assert tensor is not None
    scales = np.asarray(read_array(tensor), np.float32)
    if not scales.ndim:
        return scales
    axis = node.attributes.get_int("axis", 1) % rank
    return scales.reshape([-1 if a == axis else 1 for a in range(rank)])


def is_scaled(node: ir.Node) -> bool:
    """A Gemm that multiplies its product or its bias with a number."""
    numbers = (node.attributes.get_float(name, 1.0) for name in ("alpha", "beta"))
    return is_onnx(node, "Gemm") and any(number != 1 for number in numbers)


def layer_of(node: ir.Node) -> Layer:
    """The layer that a product is."""
    return Layer(node, node.attributes.get_int("group", 1) if is_onnx(node, "Conv") else 1)


def products(rows: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """What a layer makes of rows: [group, rows, outputs of the group].

    Args:
        rows: [group, rows, inputs].
        matrix: [group, outputs, inputs].
    """
    if math.prod(matrix.shape[1:]) <= 64:
        return np.asarray(np.einsum("grk,gnk->grn", rows, matrix))
    return np.asarray(np.matmul(rows, matrix.transpose(0, 2, 1)))

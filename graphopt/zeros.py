"""How many numbers of a weight are zero, read in chunks.

Memory stays a few MB for what is stored as numbers, or as codes that a DequantizeLinear or an
operator of onnxruntime's own widens. What other nodes widen is computed, where it is not large.
"""

from __future__ import annotations

import logging
import math
from functools import cached_property

import numpy as np
import onnx_ir as ir

from graphopt.content import chunks, read_array
from graphopt.errors import GraphoptError
from graphopt.kernel_operands import KernelWeight
from graphopt.operators import all_graphs, is_onnx
from graphopt.packing import nodes_behind
from graphopt.rewriting import constant_tensor, input_of, static_shape
from graphopt.runtime import evaluate

logger = logging.getLogger("graphopt")

COMPUTED_MAXIMUM = 1 << 22
"""Packed weights of more numbers are not computed: as float32 they take 16 MB, and steps on the way
as much again."""

FLOATS = frozenset(
    {
        ir.DataType.FLOAT,
        ir.DataType.FLOAT16,
        ir.DataType.BFLOAT16,
        ir.DataType.DOUBLE,
        ir.DataType.FLOAT8E4M3FN,
        ir.DataType.FLOAT8E4M3FNUZ,
        ir.DataType.FLOAT8E5M2,
        ir.DataType.FLOAT8E5M2FNUZ,
    }
)

DEQUANTIZED = frozenset(
    {
        ir.DataType.INT2,
        ir.DataType.UINT2,
        ir.DataType.INT4,
        ir.DataType.UINT4,
        ir.DataType.INT8,
        ir.DataType.UINT8,
        ir.DataType.INT16,
        ir.DataType.UINT16,
        ir.DataType.INT32,
    }
)
"""Types that DequantizeLinear reads, of integers."""

_KEEPS_ZEROS = ("Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")


class ZeroCounts:
    """How many numbers of tensors are zero; each tensor is read once."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], tuple[ir.TensorProtocol, int]] = {}

    def of(self, tensor: ir.TensorProtocol) -> int | None:
        """The zeros of a tensor, of either sign; None of a type that is none of numbers.

        Raises:
            ModelError: external data cannot be read.
        """
        return self.equal(tensor, 0) if tensor.dtype in FLOATS | DEQUANTIZED else None

    def equal(self, tensor: ir.TensorProtocol, number: int, bits: int | None = None) -> int:
        """As `count_equal`."""
        key = id(tensor), number
        if key not in self._known:
            # The tensor is kept with its count, so that no other one gets its id.
            self._known[key] = tensor, count_equal(tensor, number, bits)
        return self._known[key][1]


class Zeros:
    """How many numbers of the weights of a model are zero."""

    def __init__(self, model: ir.Model, counts: ZeroCounts) -> None:
        self._model, self._counts = model, counts

    @cached_property
    def _order(self) -> dict[ir.Node, int]:
        nodes = (node for graph in all_graphs(self._model) for node in graph)
        return {node: place for place, node in enumerate(nodes)}

    def of_value(self, value: ir.Value) -> int | None:
        """How many numbers of a weight are zero; None where that is not cheap to tell.

        Args:
            value: a constant, or what nodes make of constants alone. Its shape is known.

        Raises:
            ModelError: external data cannot be read.
        """
        node = value.producer()
        while node is not None and is_onnx(node, *_KEEPS_ZEROS) and node.inputs[0] is not None:
            value = node.inputs[0]
            node = value.producer()
        tensor = constant_tensor(value)
        if tensor is not None:
            return self._counts.of(tensor)
        if node is not None and is_onnx(node, "DequantizeLinear"):
            count = self._of_dequantized(node)
            if count is not None:
                return count
        return self._of_computed(value)

    def of_kernel_weight(self, weight: KernelWeight) -> int | None:
        """As `of_value`, of a weight that operators read in codes."""
        tensor = constant_tensor(weight.codes)
        if tensor is None or weight.zero_points is not None:
            return None
        if 8 * tensor.nbytes != weight.bits * weight.elements:
            # Rows are filled up to whole blocks, by codes that are none of its numbers.
            return None
        in_bytes = tensor.dtype == ir.DataType.UINT8
        zero = 1 << (weight.bits - 1) if in_bytes else 0
        return self._counts.equal(tensor, zero, weight.bits)

    def _of_dequantized(self, node: ir.Node) -> int | None:
        """The codes that are the zero point: where it is one for all, and no scale is 0."""
        codes, scales = constant_tensor(node.inputs[0]), constant_tensor(node.inputs[1])
        if codes is None or codes.dtype not in DEQUANTIZED or scales is None:
            return None
        zero = _only_number(input_of(node, 2))
        if zero is None or not np.all(read_array(scales)):
            return None
        return self._counts.equal(codes, zero)

    def _of_computed(self, value: ir.Value) -> int | None:
        shape, nodes = static_shape(value), nodes_behind(value)
        if nodes is None or shape is None or math.prod(shape) > COMPUTED_MAXIMUM:
            return None
        try:
            nodes.sort(key=self._order.__getitem__)
            (array,) = evaluate(nodes, [value], self._model.opset_imports)
        except GraphoptError as error:
            logger.debug("the zeros of %s are not counted: %s", value.name, error)
            return None
        return array.size - int(np.count_nonzero(array))


def _only_number(zero_points: ir.Value | None) -> int | None:
    """The number that all zero points are; 0 where there are none."""
    if zero_points is None:
        return 0
    tensor = constant_tensor(zero_points)
    if tensor is None:
        return None
    found = np.unique(read_array(tensor))
    return int(found[0]) if found.size == 1 else None


def count_equal(tensor: ir.TensorProtocol, number: int, bits: int | None = None) -> int:
    """How many numbers of a tensor are equal to one.

    Args:
        tensor: of integers, or floating point of 8 bits and more.
        number: 0 where the tensor is of floating point.
        bits: of a code, where a byte of the tensor holds several.

    Raises:
        ModelError: external data cannot be read.
    """
    bits = bits or tensor.dtype.bitwidth
    if bits < 8:
        return _count_codes(tensor, number % (1 << bits), bits)
    dtype = tensor.dtype.numpy()
    if number:
        return sum(int(np.count_nonzero(c.view(dtype) == number)) for c in chunks(tensor))
    parts = (chunk.view(dtype) for chunk in chunks(tensor))
    return sum(part.size - int(np.count_nonzero(part)) for part in parts)


def _count_codes(tensor: ir.TensorProtocol, code: int, bits: int) -> int:
    """Codes that share bytes, the first in the lowest bits; what fills the last byte is 0."""
    each, mask = range(0, 8, bits), (1 << bits) - 1
    found = sum(
        int(np.count_nonzero((chunk >> shift) & mask == code))
        for chunk in chunks(tensor)
        for shift in each
    )
    codes = tensor.size if tensor.dtype.bitwidth == bits else tensor.nbytes * len(each)
    return found - (tensor.nbytes * len(each) - codes if code == 0 else 0)

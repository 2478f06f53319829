"""Weights that onnxruntime's own operators read as they are stored: no node widens them.

MatMulNBits multiplies with rows in blocks, and GatherBlockQuantized looks rows up, in blocks or
not. A weight that is both multiplied with and looked up is one constant, in blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from graphopt.content import read_array
from graphopt.operators import is_onnx
from graphopt.packing import constants_behind, is_constant
from graphopt.rewriting import constant_tensor, input_of

_CODES = {"GatherBlockQuantized": 0, "MatMulNBits": 1}
"""Operators of com.microsoft, and the index of the codes that they read."""

_BYTES = ir.DataType.UINT8
_DTYPES = {2: ir.DataType.UINT2, 4: ir.DataType.UINT4, 8: ir.DataType.UINT8}
"""Of codes in bytes, by their bits."""


@dataclass(frozen=True, eq=False)
class KernelWeight:
    """A weight in codes.

    Attributes:
        codes: the constant that holds them.
        scales: what the nodes read, or what that shows in another shape: [rows, blocks].
        zero_points: likewise; None where there are none.
        shape: rows, and inputs of a row.
        dtype: of a code: uint2, uint4, uint8, or that of the constant, which counts from 0.
        block: inputs that share a scale.
        lookups: the nodes that look rows up.
        products: the nodes that multiply with it.
    """

    codes: ir.Value
    scales: ir.Value
    zero_points: ir.Value | None
    shape: tuple[int, int]
    dtype: ir.DataType
    block: int
    lookups: tuple[ir.Node, ...]
    products: tuple[ir.Node, ...]

    @property
    def bits(self) -> int:
        """Of a code."""
        return int(self.dtype.bitwidth)

    @property
    def elements(self) -> int:
        """How many numbers it has."""
        return self.shape[0] * self.shape[1]

    @property
    def nodes(self) -> tuple[ir.Node, ...]:
        """All that read it."""
        return self.lookups + self.products

    def constants(self) -> list[ir.Value]:
        """All that it hangs on."""
        values = [v for node in self.nodes for v in _operands(node) if v is not None]
        behind = (c for value in values for c in constants_behind(value) or ())
        return list(dict.fromkeys((*filter(is_constant, values), *behind)))

    def numbers(self, scales: np.ndarray) -> np.ndarray:
        """The weight, bit for bit as it is looked up: of the shape and the type of the scales.

        Args:
            scales: of shape [rows, blocks], float32 or float16. There are no zero points.
        """
        tensor = constant_tensor(self.codes)
        assert tensor is not None and self.zero_points is None
        stored, (rows, inputs) = read_array(tensor), self.shape
        if tensor.dtype == _BYTES:
            each = np.arange(8 // self.bits, dtype=np.uint8) * np.uint8(self.bits)
            digits = stored.reshape(rows, -1, 1) >> each & np.uint8((1 << self.bits) - 1)
            codes = digits.reshape(rows, -1)[:, :inputs].astype(np.int16) - (1 << (self.bits - 1))
        else:
            codes = stored.reshape(rows, -1).astype(np.int16)
        blocks = scales.reshape(rows, -1).astype(np.float32)
        wide = np.repeat(blocks, self.block, axis=1)[:, :inputs]
        return np.asarray((codes * wide).astype(scales.dtype))


def kernel_weights(graphs: Iterable[ir.Graph]) -> list[KernelWeight]:
    """The weights of all graphs, in the order in which they are read first; none that are empty.

    The same codes with other scales are another weight.
    """
    found: dict[tuple[object, ...], KernelWeight] = {}
    for weight in (w for graph in graphs for node in graph for w in _weight_of(node)):
        key = weight.codes, weight.scales, weight.zero_points, weight.shape, weight.block
        if key in found:
            weight = replace(
                weight,
                lookups=found[key].lookups + weight.lookups,
                products=found[key].products + weight.products,
            )
        found[key] = weight
    return [w for w in found.values() if w.elements and _size(w.codes)]


def _size(value: ir.Value) -> int:
    tensor = constant_tensor(value)
    return 0 if tensor is None else tensor.size


def _weight_of(node: ir.Node) -> Iterator[KernelWeight]:
    stored, scales, zero_points = map(_reshaped, _operands(node))
    tensor, stated = constant_tensor(stored), node.attributes
    if stored is None or scales is None or tensor is None:
        return
    block, dtype = stated.get_int("block_size", 128), tensor.dtype
    if dtype == _BYTES:
        dtype = _DTYPES.get(stated.get_int("bits", 4), _BYTES)
    if node.op_type == "MatMulNBits":
        shape = stated.get_int("N", 0), stated.get_int("K", 0)
        yield KernelWeight(stored, scales, zero_points, shape, dtype, block, (), (node,))
        return
    dims = tuple(map(int, tensor.shape.numpy()))
    if len(dims) not in (2, 3):
        return
    together, last = tensor.dtype.bitwidth // dtype.bitwidth, len(dims) - 1
    in_rows = stated.get_int("gather_axis", 0) % len(dims) == 0
    in_rows = in_rows and stated.get_int("quantize_axis", 1) % len(dims) == last
    if in_rows and (last == 1 or dims[last] * together == block):
        shape = dims[0], math.prod(dims[1:]) * together
        yield KernelWeight(stored, scales, zero_points, shape, dtype, block, (node,), ())


def _operands(node: ir.Node) -> tuple[ir.Value | None, ir.Value | None, ir.Value | None]:
    """Codes, scales and zero points; None of an operator that has none."""
    index = _CODES.get(node.op_type)
    if index is None or node.domain != "com.microsoft":
        return None, None, None
    return input_of(node, index), input_of(node, 2), input_of(node, 3)


def _reshaped(value: ir.Value | None) -> ir.Value | None:
    """What a value shows, in this shape or another."""
    node = value.producer() if value is not None else None
    while node is not None and is_onnx(node, "Reshape"):
        value = node.inputs[0]
        node = value.producer() if value is not None else None
    return value

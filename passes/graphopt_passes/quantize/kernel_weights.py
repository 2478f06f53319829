"""Weights that onnxruntime's CPU provider multiplies with as they are stored, in 8, 4 or 2 bits.

Its MatMulNBits takes blocks of a row of inputs with a scale each, and a number of inputs in a block
that is a power of two. onnxruntime makes it at load of

    y = MatMul(x, DequantizeLinear<axis = 0, block_size = block>(codes, scales))

where codes are [K, N] and nothing else reads what is dequantized, and of Gemm without transB, alpha
or a bias of more than one dimension. Of any other form it would dequantize at every inference, and
also (1.32) where Relu or Clip comes next, which it takes for the end of an integer product.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir

from graphopt.contract import Context
from graphopt.encoding import Encoding
from graphopt.operators import is_onnx
from graphopt.packing import is_constant
from graphopt.rewriting import add_initializer, input_of
from graphopt.skeleton import INFERRED
from graphopt_passes.quantize.codebooks import Rounded
from graphopt_passes.quantize.integer_weights import Integers
from graphopt_passes.quantize.kernel_nodes import (
    DOMAIN,
    VERSION,
    packed_blocks,
    product_node,
    put_in_place,
)
from graphopt_passes.quantize.kernel_tables import scale_type_of, why_no_lookup, write_table
from graphopt_passes.quantize.layers import Layer, is_scaled
from graphopt_passes.quantize.narrow_weights import Solution, Target, shift_bias
from graphopt_passes.quantize.narrowing import Problem
from graphopt_passes.simplify.chains import rank_of, remove_if_unread

FIRST_OPSETS = {2: 25, 4: 21, 8: 21}
"""By bits: from it on DequantizeLinear has blocks, and the type."""

BLOCK_MINIMUM = 16

_TYPES = {2: ir.DataType.INT2, 4: ir.DataType.INT4, 8: ir.DataType.INT8}
_NUMPY = {2: ml_dtypes.int2, 4: ml_dtypes.int4, 8: np.int8}


@dataclass(frozen=True)
class KernelIntegers(Integers):
    """Integers for the kernel where it can read them, and else those that are widened at load.

    Attributes:
        accuracy_level: of MatMulNBits, written as such; 0 leaves standard operators.
        looks_up: tables of Gather are for GatherBlockQuantized, beside an accuracy level. It was
            tried on the CPU provider alone.
    """

    accuracy_level: int = 0
    looks_up: bool = True

    def why_folded(self, target: Target) -> str | None:
        """Why a weight is widened at load; None where the kernel reads it."""
        if target.is_looked_up:
            return self._why_not_looked_up(target)
        reason = why_no_kernel(target)
        if reason is None and not self.accuracy_level and _comes_before_clip(target):
            return "Relu or Clip comes next: only accuracy-level=4 (or 1) gives it the kernel"
        return reason

    def _why_not_looked_up(self, target: Target) -> str | None:
        if not self.accuracy_level:
            return "no standard operator looks codes up: only accuracy-level=4 (or 1) does"
        if not self.looks_up:
            return "codes are looked up on the CPU provider only"
        return why_no_lookup(target, self.bits, self.block)

    def stored_bytes(self, target: Target) -> int:
        """Of codes and scales."""
        if self.why_folded(target) is not None:
            return super().stored_bytes(target)
        blocks = -(-target.inputs // self.block)
        if target.is_looked_up:
            scales = target.rows * blocks * np.dtype(scale_type_of(target)).itemsize
            return target.size * self.bits // 8 + scales
        inputs = self.block * blocks if self.accuracy_level else target.inputs
        return -(-target.rows * inputs * self.bits // 8) + 4 * target.rows * blocks

    def solve(self, problem: Problem) -> Solution:
        """The weight in this form."""
        if self.why_folded(problem.target) is not None:
            return super().solve(problem)
        target = problem.target
        kind = scale_type_of(target) if target.is_looked_up else np.float32
        form = Integers(self.bits, self.block, self.method, kind, pads=True)
        return Solution((form.rounded(problem),), writer=self.write)

    def write(
        self, target: Target, solution: Solution, encoding: Encoding, context: Context
    ) -> None:
        """Let the product, or all that reads a table, read codes.

        Args:
            target: that `why_folded` finds nothing against.
            solution: of this form.
            encoding: of the graph of the product.
            context: keeps what is large.
        """
        (part,), layer, maker = solution.parts, target.layer, target.value.producer()
        if target.is_looked_up:
            level = self.accuracy_level
            write_table(target, part, self.bits, self.block, level, encoding, context)
            return
        assert layer is not None
        if solution.shift is not None and solution.shift.any():
            shift_bias(layer, solution.shift, encoding.names, context)
        if self.accuracy_level:
            self._write_kernel(layer, part, encoding, context)
        else:
            self._write_standard(layer, part, encoding, context)
        remove_if_unread(maker)

    def _write_standard(
        self, layer: Layer, part: Rounded, encoding: Encoding, context: Context
    ) -> None:
        node, names, graph = layer.node, encoding.names, encoding.graph
        name = layer.weight.name or "weight"
        integers = part.levels.astype(np.int8)[part.codes].T.astype(_NUMPY[self.bits])
        named = names.new(f"{name}_codes")
        tensor = context.tensor(np.ascontiguousarray(integers), named, _TYPES[self.bits])
        codes = add_initializer(graph, tensor, named)
        scales = context.initializer(
            graph, np.ascontiguousarray(part.scales.T), names.new(f"{name}_scales")
        )
        made = ir.node("DequantizeLinear", [codes, scales], {"axis": 0, "block_size": self.block})
        (output,) = made.outputs
        output.name = made.name = names.new(f"{name}_wide")
        output.type, output.shape = ir.TensorType(ir.DataType.FLOAT), codes.shape
        output.meta[INFERRED] = True
        graph.insert_before(node, made)
        node.replace_input_with(1, output)
        node.attributes.pop("transB", None)

    def _write_kernel(
        self, layer: Layer, part: Rounded, encoding: Encoding, context: Context
    ) -> None:
        node, names, graph = layer.node, encoding.names, encoding.graph
        name, (rows, inputs) = layer.weight.name or "weight", part.codes.shape
        packed = packed_blocks(part.codes, self.bits, self.block)
        codes, scales = (
            context.initializer(graph, array, names.new(f"{name}_{what}"))
            for what, array in (("codes", packed), ("scales", part.scales))
        )
        shape, level = (rows, inputs), self.accuracy_level
        kernel = product_node(node, codes, scales, shape, self.bits, self.block, level)
        put_in_place(node, kernel)
        graph.opset_imports.setdefault(DOMAIN, VERSION)


def why_no_kernel(target: Target) -> str | None:
    """Why MatMulNBits cannot read a weight; None where it can."""
    layer = target.layer
    if layer is None or target.is_integer or not is_onnx(layer.node, "Gemm", "MatMul"):
        return "no product alone reads it"
    stated = layer.node.attributes
    if is_scaled(layer.node) or stated.get_int("transA", 0) != 0:
        return "its Gemm has transA, alpha or beta"
    bias = input_of(layer.node, 2)
    if bias is not None and rank_of(bias) != 1:
        return "its bias has more than one dimension"
    return None


def _comes_before_clip(target: Target) -> bool:
    """Relu or Clip reads the product, or its sum with a bias, and is not the end of the graph."""
    assert target.layer is not None
    readers = [use.node for use in target.layer.node.outputs[0].uses()]
    sums = [node for node in readers if is_onnx(node, "Add") and any(map(is_constant, node.inputs))]
    readers += [use.node for node in sums for use in node.outputs[0].uses()]
    return any(is_onnx(node, "Relu", "Clip") and node.outputs[0].uses() for node in readers)

"""Nodes on constants, which onnxruntime computes at load: what narrow weights are written with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from graphopt.code_fields import Field
from graphopt.rewriting import Names, add_initializer
from graphopt.skeleton import INFERRED

TensorMaker = Callable[[np.ndarray, str], ir.TensorProtocol]

CUT_BYTES = 100
"""What the nodes take, about, that cut off what is behind the last code."""

_MADE, _CODES = "w", "c"
"""How values are called, with a number: in a small model, names take more bytes than codes. For the
same reason nodes have none."""


@dataclass
class FoldedNodes:
    """Writes nodes on constants into one graph; what can be shared is.

    Attributes:
        graph: gets nodes, at its head, and initializers.
        names: of its model.
        tensor: makes a tensor of an array.
    """

    graph: ir.Graph
    names: Names
    tensor: TensorMaker
    _known: dict[tuple[object, ...], ir.Value] = field(default_factory=dict)
    _nodes: list[ir.Node] = field(default_factory=list)

    def close(self) -> None:
        """Put the nodes of all weights at the head of the graph."""
        if self._nodes:
            self.graph.insert_before(self.graph[0], self._nodes)
        self._nodes = []

    # -------------------------------------------------------------- steps

    def reshaped(
        self, value: ir.Value, shape: Sequence[int], current: Sequence[int] | None = None
    ) -> ir.Value:
        """The same in another shape, if it has not got it."""
        if current is not None and tuple(shape) == tuple(current):
            return value
        assert value.dtype is not None
        to = self.shared("shape", np.array(shape, np.int64))
        return self.node("Reshape", [value, to], value.dtype)

    def codes(self, part: Field, codes: np.ndarray) -> ir.Value:
        """The digits of codes, int32 of shape [codes]; times their place."""
        index = self.bytes_of(part, codes)
        if part.digits == 1:
            # All 256 digits of a byte are the byte.
            return index
        digits = self.node("Gather", [self.digits(part), index], ir.DataType.INT32)
        return self.cut(digits, part, codes.size)

    def bytes_of(self, part: Field, codes: np.ndarray) -> ir.Value:
        """The bytes of a field as int32, to look up with."""
        stored = self.constant(part.pack(codes), _CODES)
        return self.node("Cast", [stored], ir.DataType.INT32, to=ir.DataType.INT32)

    def digits(self, part: Field) -> ir.Value:
        """The table of the digits of every byte, int32."""
        table = self.shared(f"digits{part.base}", part.table())
        return self.once("Cast", [table], ir.DataType.INT32, to=ir.DataType.INT32)

    def cut(self, digits: ir.Value, part: Field, count: int) -> ir.Value:
        """What bytes became, in one row, without what is behind the last code."""
        assert digits.dtype is not None
        flat = self.reshaped(digits, (-1,))
        if count % part.digits == 0:
            return flat
        ends = [self.shared("cut", np.array([n], np.int64)) for n in (0, count)]
        return self.node("Slice", [flat, *ends], digits.dtype)

    # -------------------------------------------------------------- parts

    def constant(self, array: np.ndarray, hint: str) -> ir.Value:
        """A new initializer."""
        name = self.names.new(hint)
        return add_initializer(self.graph, self.tensor(np.ascontiguousarray(array), name), name)

    def shared(self, hint: str, array: np.ndarray) -> ir.Value:
        """A small constant; the same for all that ask for an equal one."""
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._known:
            self._known[key] = self.constant(array, hint)
        return self._known[key]

    def once(
        self, op_type: str, inputs: Sequence[ir.Value], dtype: ir.DataType, **attributes: int
    ) -> ir.Value:
        """What a node makes; the same for all that ask for it."""
        key = (op_type, *map(id, inputs))
        if key not in self._known:
            self._known[key] = self.node(op_type, inputs, dtype, **attributes)
        return self._known[key]

    def node(
        self, op_type: str, inputs: Sequence[ir.Value], dtype: ir.DataType, **attributes: int
    ) -> ir.Value:
        """What a node makes that `close` will put into the graph."""
        # A graph gives names to nodes whose name is None.
        node = ir.node(op_type, inputs, attributes, name="")
        (output,) = node.outputs
        output.name = self.names.new(_MADE)
        output.type = ir.TensorType(dtype)
        # It can be inferred again; no file need state it.
        output.meta[INFERRED] = True
        self._nodes.append(node)
        return output

"""unpack-weights: write packed weights out again, as plain numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.content import read_array
from graphopt.contract import Change, Context, Effect, Pass
from graphopt.errors import GraphoptError, did_you_mean
from graphopt.kernel_operands import KernelWeight, kernel_weights
from graphopt.operators import all_graphs
from graphopt.packing import (
    coded_values,
    is_beside_codes,
    is_constant,
    is_packed,
    nodes_behind,
    packed_weights,
)
from graphopt.rewriting import Names, become_initializer, constant_tensor
from graphopt.runtime import evaluate
from graphopt_passes.quantize.plain_operands import why_codes_stay, write_plain
from graphopt_passes.simplify.chains import remove_if_unread


@dataclass(frozen=True)
class UnpackWeights(Pass):
    """Write packed weights out again, as plain numbers: to look at them, or to change them.

    What nodes widen from codes, codebooks and scales becomes one initializer of the same name, with
    the numbers that these nodes compute, bit for bit. The outputs stay, too, as deployed, where
    onnxruntime computes the same initializer at load. As written, its kernels know a constant
    weight ahead and may add up in another order.

    A DequantizeLinear of a weight beside activations of floating point goes as well; onnxruntime as
    deployed may have rounded these activations to take the weight in integers. Layers on integers
    stay so: where a weight meets an activation that is quantized, its codes become an initializer
    of the integers that DequantizeLinear reads.

    GatherBlockQuantized becomes a Gather of a table, bit for bit, and MatMulNBits a MatMul. A
    weight that is multiplied with at accuracy level 4 stays: that rounds activations, too.

    Attributes:
        only: names of the weights to unpack, as `graphopt inspect` tells them; none stands for all.
    """

    name: ClassVar[str] = "unpack-weights"
    effect: ClassVar[Effect] = Effect.ROUNDING

    only: tuple[str, ...] = ()

    def refuse(self, model: ir.Model, context: Context) -> str | None:
        """Refuse names that no packed weight has."""
        if not self.only:
            return None
        known = {name for value in _weights(model) for name in _names(value)}
        known |= {w.codes.name for w in kernel_weights(all_graphs(model)) if w.codes.name}
        unknown = next((name for name in self.only if name not in known), None)
        if unknown is None:
            return None
        return f"no packed weight is called {unknown!r}{did_you_mean(unknown, sorted(known))}"

    def apply(self, model: ir.Model, context: Context) -> Change:
        """Unpack one weight after the other, so that no more than one is held in memory."""
        unpacking = _Unpacking(model, context)
        for weight in kernel_weights(all_graphs(model)):
            if not self.only or weight.codes.name in self.only:
                unpacking.unpack_operand(weight)
        for value in list(_weights(model)):
            if not self.only or not _names(value).isdisjoint(self.only):
                for end in _ends(value):
                    unpacking.unpack(end)
        return unpacking.change


def _weights(model: ir.Model) -> Iterator[ir.Value]:
    for graph in all_graphs(model):
        yield from packed_weights(graph)


def _names(value: ir.Value) -> set[str]:
    """By which a weight may be meant: its own, or that of the integers that become it."""
    return {v.name for v in (value, *coded_values(value)) if v.name}


def _ends(value: ir.Value) -> list[ir.Value]:
    """What is to become an initializer: the weight, or the integers that a kernel takes."""
    if not is_packed(value):
        # A view of another weight, which is unpacked by now.
        return []
    if is_beside_codes(value):
        return [codes for codes in coded_values(value) if not is_constant(codes)]
    return [value]


class _Unpacking:
    """Unpacks weights of one model, and records it."""

    def __init__(self, model: ir.Model, context: Context) -> None:
        self.change = Change()
        self._opsets, self._context, self._names = model.opset_imports, context, Names(model)
        nodes = (node for graph in all_graphs(model) for node in graph)
        self._order = {node: place for place, node in enumerate(nodes)}

    def unpack(self, value: ir.Value) -> None:
        """Let an initializer take the place of what nodes make of constants."""
        node, name = value.producer(), value.name or ""
        if value.is_graph_output():
            self.change.skip(value, "it is an output of its graph, which a node must make")
            return
        nodes = sorted(nodes_behind(value) or (), key=self._order.__getitem__)
        try:
            (array,) = evaluate(nodes, [value], self._opsets)
        except GraphoptError as error:
            self.change.skip(value, f"onnxruntime cannot compute it ahead: {error}")
            return
        tensor = self._context.tensor(array, name, value.dtype)
        become_initializer(value, tensor)
        remove_if_unread(node)
        if node is not None and node.graph is not None:
            # A Split with another output that is read: onnxruntime crashes where one has no name.
            value.name = self._names.new(f"{name}_packed")
        self.change.count(f"weight unpacked to {tensor.dtype.name.lower()}")

    def unpack_operand(self, weight: KernelWeight) -> None:
        """Let standard operators take the place of those that read a weight in codes."""
        reason = why_codes_stay(weight)
        if reason is not None:
            self.change.skip(weight.codes, reason)
            return
        scales = self._computed(weight.scales)
        write_plain(weight, weight.numbers(scales), self._context, self._names)
        self.change.count(f"weight unpacked to {ir.DataType.from_numpy(scales.dtype).name.lower()}")

    def _computed(self, value: ir.Value) -> np.ndarray:
        """A constant, or what nodes make of constants."""
        tensor = constant_tensor(value)
        if tensor is not None:
            return read_array(tensor)
        nodes = sorted(nodes_behind(value) or (), key=self._order.__getitem__)
        (array,) = evaluate(nodes, [value], self._opsets)
        return array

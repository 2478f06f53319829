"""Channels divided by factors, and weights that take the factors back, rounded once at the end."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from graphopt.content import read_array
from graphopt.contract import Context
from graphopt.operators import is_onnx
from graphopt.rewriting import Names, add_initializer, constant_tensor, input_of
from graphopt_passes.quantize.flows import Flow, Offset, inputs_of
from graphopt_passes.quantize.layers import Layer

SMALLEST = 1e-30
LARGEST = 1e30
"""Between these magnitudes a weight loses nothing when it is rounded to float32."""


@dataclass(frozen=True, eq=False)
class Source:
    """What makes channels, by constants that can be divided.

    Attributes:
        node: makes them.
        value: what they are of.
        axis: of the channels in it.
        count: how many there are.
        layer: a product, whose rows and bias are divided; or None.
        constants: what else is divided.
    """

    node: ir.Node
    value: ir.Value
    axis: int
    count: int
    layer: Layer | None = None
    constants: tuple[Offset, ...] = ()


@dataclass
class Rescaling:
    """Factors so far, by what they apply to. The model itself stays as it is until `write`.

    Attributes:
        rows: what the outputs of products are divided by, float64 of shape [outputs].
        columns: what the inputs of products are divided by and their columns multiplied with.
        constants: what constants are divided by, by node and input, each to be broadcast.
    """

    rows: dict[ir.Node, np.ndarray] = field(default_factory=dict)
    columns: dict[ir.Node, np.ndarray] = field(default_factory=dict)
    constants: dict[tuple[ir.Node, int], np.ndarray] = field(default_factory=dict)
    _layers: dict[ir.Node, Layer] = field(default_factory=dict)

    def add(self, source: Source, flow: Flow, factors: np.ndarray) -> None:
        """Divide the channels of a source by factors.

        Args:
            source: what makes them.
            flow: of them.
            factors: positive, float64 of shape [channels].
        """
        if source.layer is not None:
            self._layers[source.node] = source.layer
            self.rows[source.node] = self.rows.get(source.node, 1.0) * factors
        for offset in (*source.constants, *flow.offsets):
            key = offset.node, offset.index
            self.constants[key] = self.constants.get(key, 1.0) * offset.aligned(factors)
        for sink in flow.sinks:
            node = sink.layer.node
            self._layers[node] = sink.layer
            self.columns[node] = self.columns.get(node, 1.0) * sink.channels.spread(factors)

    def matrix(self, layer: Layer) -> np.ndarray:
        """The weight with all factors, float64 of shape [group, outputs of the group, inputs]."""
        matrix = layer.matrix()
        if layer.node in self.columns:
            matrix = matrix * by_input(layer, self.columns[layer.node], matrix)
        if layer.node in self.rows:
            matrix = matrix / self.rows[layer.node].reshape(*matrix.shape[:2], 1)
        return matrix

    def of_inputs(self, layer: Layer) -> np.ndarray:
        """What the input channels of a product are divided by so far, of shape [inputs]."""
        return self.columns.get(layer.node, np.ones(inputs_of(layer)))

    # -------------------------------------------------------------- the model

    def write(self, model: ir.Model, context: Context) -> None:
        """Give the nodes new weights; constants that others read too stay for them."""
        names = Names(model)
        for node, layer in self._layers.items():
            # The bias first: the layer's own weight is read through the node.
            bias = layer.bias()
            if bias is not None and node in self.rows:
                value = input_of(node, 2)
                shape = constant_tensor(value).shape.numpy()  # type: ignore[union-attr]
                made = bias / self.rows[node]
                _replace(node, 2, made.reshape(shape if bias.size > 1 else -1), names, context)
            _replace(node, 1, layer.stored(self.matrix(layer)), names, context)
        for (node, index), factors in self.constants.items():
            tensor = constant_tensor(node.inputs[index])
            assert tensor is not None
            array = np.asarray(read_array(tensor), np.float64)
            _replace(node, index, array / factors, names, context)


def by_input(layer: Layer, factors: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Numbers for each input channel as they meet a matrix: [group, 1, inputs]."""
    apart = factors.reshape(layer.group, 1, -1)
    return np.repeat(apart, matrix.shape[2] // apart.shape[2], axis=2)


def is_safe(matrices: Iterable[np.ndarray]) -> bool:
    """Rounding the numbers to float32 loses nothing to the limits of that type."""
    for matrix in matrices:
        sizes = np.abs(matrix[matrix != 0])
        if sizes.size and not (sizes.min() > SMALLEST and sizes.max() < LARGEST):
            return False
    return True


def _replace(
    node: ir.Node, index: int, array: np.ndarray, names: Names, context: Context
) -> None:
    graph, old = node.graph, node.inputs[index]
    assert isinstance(graph, ir.Graph) and old is not None
    name = names.new(old.name or f"{node.name}_{index}")
    tensor = context.tensor(array.astype(np.float32), name)
    node.replace_input_with(index, add_initializer(graph, tensor, name))


def is_product(node: ir.Node) -> bool:
    """The node multiplies with a weight in a way that can be quantized."""
    return is_onnx(node, "Conv", "Gemm", "MatMul")

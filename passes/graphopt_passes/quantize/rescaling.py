"""Channels divided by factors, and weights that take the factors back, rounded once at the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from graphopt.content import read_array
from graphopt.contract import Context
from graphopt.rewriting import Names, add_initializer, constant_tensor
from graphopt_passes.quantize.flows import (
    Blocked,
    Channels,
    Flow,
    Offset,
    inputs_of,
    why_fixed,
)
from graphopt_passes.quantize.layers import Layer, layer_of
from graphopt_passes.simplify.chains import rank_of

SMALLEST, LARGEST = 1e-30, 1e30
"""The largest weight of a row stays between these, so that float32 holds all that count in it."""


@dataclass(frozen=True, eq=False)
class Source:
    """What makes channels, by constants that can be divided.

    Attributes:
        node: makes them.
        value: what they are of.
        channels: of the value, each at its own place.
        layer: a product, whose rows and bias are divided; or None.
        constants: what else is divided.
    """

    node: ir.Node
    value: ir.Value
    channels: Channels
    layer: Layer | None = None
    constants: tuple[Offset, ...] = ()

    @property
    def count(self) -> int:
        """How many channels there are."""
        return self.channels.origin.size


def product_source(node: ir.Node) -> Source:
    """A product as a source.

    Raises:
        Blocked: its weight or bias must stay.
    """
    reason = why_fixed(node)
    if reason is not None:
        raise Blocked(reason)
    layer, value = layer_of(node), node.outputs[0]
    tensor = constant_tensor(layer.weight)
    assert tensor is not None
    axis, rank = 1, rank_of(value)
    if node.op_type == "MatMul":
        if rank is None:
            raise Blocked("the rank of its output is not known")
        axis = rank - 1
    count = int(tensor.shape.numpy()[layer.axis])
    return Source(node, value, Channels(axis, np.arange(count)), layer)


Factors = dict[ir.Node, np.ndarray]


@dataclass(frozen=True)
class Rescaling:
    """Factors so far, by what they apply to. The model itself stays as it is until `write`.

    Attributes:
        rows: what the outputs of products are divided by, float64 of shape [outputs].
        columns: what the inputs of products are divided by and their columns multiplied with.
        constants: what constants are divided by, by node and input, each to be broadcast.
        values: what the channels of values on the way are divided by.
        layers: the products among those nodes.
    """

    rows: Factors = field(default_factory=dict)
    columns: Factors = field(default_factory=dict)
    constants: dict[tuple[ir.Node, int], np.ndarray] = field(default_factory=dict)
    values: dict[ir.Value, np.ndarray] = field(default_factory=dict)
    layers: dict[ir.Node, Layer] = field(default_factory=dict)

    def divided(self, source: Source, flow: Flow, factors: np.ndarray) -> Rescaling | None:
        """What it is when the channels of a source are divided by factors too.

        Args:
            source: what makes them.
            flow: of them.
            factors: positive, float64 of shape [channels].

        Returns:
            None where float32 could not hold a weight.
        """
        rows, columns = dict(self.rows), dict(self.columns)
        constants, values = dict(self.constants), dict(self.values)
        touched = [sink.layer for sink in flow.sinks]
        if source.layer is not None:
            touched.append(source.layer)
            rows[source.node] = rows.get(source.node, 1.0) * factors
        for offset in (*source.constants, *flow.offsets):
            key = offset.node, offset.index
            constants[key] = constants.get(key, 1.0) * offset.aligned(factors)
        for sink in flow.sinks:
            node = sink.layer.node
            columns[node] = columns.get(node, 1.0) * sink.channels.spread(factors)
        for stop in flow.stops:
            spread = stop.channels.spread(factors)
            values[stop.value] = values.get(stop.value, 1.0) * spread
        layers = {**self.layers, **{layer.node: layer for layer in touched}}
        after = Rescaling(rows, columns, constants, values, layers)
        safe = all(_is_safe(self.matrix(layer), after.matrix(layer)) for layer in touched)
        return after if safe else None

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

    def of_value(self, value: ir.Value, count: int) -> np.ndarray:
        """What the channels of a value on the way are divided by so far, of shape [count]."""
        return self.values.get(value, np.ones(count))

    # -------------------------------------------------------------- the model

    def write(self, model: ir.Model, context: Context) -> None:
        """Give the nodes new constants; those that others read too stay for them."""
        names = Names(model)

        def put(node: ir.Node, index: int, array: np.ndarray) -> None:
            graph, old = node.graph, node.inputs[index]
            assert isinstance(graph, ir.Graph) and old is not None
            name = names.new(old.name or f"{node.name}_{index}")
            tensor = context.tensor(array.astype(np.float32), name)
            node.replace_input_with(index, add_initializer(graph, tensor, name))

        for node, layer in self.layers.items():
            self._write_layer(node, layer, put)
        for (node, index), factors in self.constants.items():
            put(node, index, _array(node, index) / factors)

    def _write_layer(
        self, node: ir.Node, layer: Layer, put: Callable[[ir.Node, int, np.ndarray], None]
    ) -> None:
        bias = layer.bias()
        if bias is not None and node in self.rows:
            whole = bias / self.rows[node]
            # One number for all outputs becomes one for each.
            put(node, 2, whole.reshape(_array(node, 2).shape) if whole.size == bias.size else whole)
        put(node, 1, layer.stored(self.matrix(layer)))


def by_input(layer: Layer, factors: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Numbers for each input channel as they meet a matrix: [group, 1, inputs]."""
    apart = factors.reshape(layer.group, 1, -1)
    return np.repeat(apart, matrix.shape[2] // apart.shape[2], axis=2)


def column_maxima(layer: Layer, matrix: np.ndarray) -> np.ndarray:
    """The largest magnitude that each input channel meets in a matrix: [inputs of the layer]."""
    largest = np.abs(matrix).max(axis=1)
    return np.asarray(largest.reshape(inputs_of(layer), -1).max(axis=1))


def _array(node: ir.Node, index: int) -> np.ndarray:
    tensor = constant_tensor(node.inputs[index])
    assert tensor is not None
    return np.asarray(read_array(tensor), np.float64)


def _is_safe(before: np.ndarray, after: np.ndarray) -> bool:
    """No row leaves the range of magnitudes that float32 holds without loss."""
    was, now = (np.abs(matrix).max(axis=2) for matrix in (before, after))
    return not np.any(_is_inside(was) & ~_is_inside(now))


def _is_inside(sizes: np.ndarray) -> np.ndarray:
    return np.asarray((sizes > SMALLEST) & (sizes < LARGEST))

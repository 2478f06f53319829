"""What each layer of a model costs: multiply-accumulates, parameters, and zeros among its weights.

A layer is a node that multiplies and accumulates (see `graphopt.multiply_accumulates`) or holds
numbers of the model. The counts are for one run at given sizes of the inputs; bodies of Loop and
Scan count for one iteration, and both branches of an If.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from graphopt import microsoft_shapes
from graphopt.contract import Sample, describe
from graphopt.errors import SpecError, did_you_mean
from graphopt.kernel_operands import kernel_weights
from graphopt.loading import freeze_overridable_inputs
from graphopt.multiply_accumulates import holds_numbers, node_macs, operands_of
from graphopt.operators import ONNX_DOMAINS, all_graphs, subgraphs
from graphopt.packing import constants_behind, is_constant, is_packed, nodes_behind
from graphopt.rewriting import constant_tensor, static_shape
from graphopt.shape_facts import ShapeFacts
from graphopt.skeleton import has_long_vectors, infer_shapes
from graphopt.zeros import ZeroCounts, Zeros

FREE_SIZE = 1
"""What a dimension counts as where nobody says its size."""

NO_SIZES: Mapping[str, int] = MappingProxyType({})


@dataclass(frozen=True)
class LayerCost:
    """What one node costs in a run.

    Attributes:
        name: of the node, or of its first output.
        op_type: its operator, `domain.Op` outside the standard domain.
        macs: multiply-accumulates; a FLOP count is twice as much. None where a shape is not known
            or the operator is not looked into.
        parameters: numbers in the constants that it reads, packed or not; single numbers, scales
            and zero points do not count. What several nodes read counts for each.
        weights: of these, the numbers that are multiplied and accumulated: no biases, and none in
            a layer of other operators.
        zero_share: exact zeros among the weights; None where there are none, or where they are
            packed in a form that is not cheap to look into.
        body_of: the If, Loop or Scan in whose body the node is, by name; None in the main graph.
    """

    name: str
    op_type: str
    macs: int | None
    parameters: int
    weights: int
    zero_share: float | None
    body_of: str | None


def zero_share_of(layers: Iterable[LayerCost]) -> float | None:
    """Exact zeros among the weights of all layers of which they are known; None without any.

    A weight that several layers multiply with counts for each.
    """
    known = [(layer.zero_share, layer.weights) for layer in layers if layer.zero_share is not None]
    weights = sum(count for _, count in known)
    return sum(share * count for share, count in known) / weights if weights else None


# ------------------------------------------------------------------ sizes of the inputs


def free_sizes(model: ir.Model, sizes: Mapping[str, int] = NO_SIZES) -> dict[str, int]:
    """The dimensions of the inputs that the file leaves open, and what they count as.

    Args:
        model: not modified.
        sizes: of dimensions by name (`batch`), or by input and axis (`image[0]`), which goes
            before.

    Returns:
        A size for each dimension that has none in the file, by name, or by input and axis where it
        has no name or was given so; 1 for those that are not in `sizes`.

    Raises:
        SpecError: a size is of no such dimension, or below 0.
    """
    found, places, names = dict[str, int](), set[str](), set[str]()
    for value, axis, name in _free_axes(model):
        place = f"{value.name}[{axis}]"
        label = name if name is not None and place not in sizes else place
        found[label] = sizes.get(label, FREE_SIZE)
        places.add(place)
        names |= {name} if name is not None else set()
    for name, size in sizes.items():
        if name not in names | places:
            raise SpecError(f"no dimension is called {name!r}{did_you_mean(name, names | places)}")
        if not isinstance(size, int) or size < 0:
            raise SpecError(f"dimension {name} has size {size!r}; it must be a whole number from 0")
    return found


def sizes_of_sample(model: ir.Model, sample: Sample) -> dict[str, int]:
    """The sizes that a sample has where the file leaves them open, as `free_sizes` takes them."""
    found = dict[str, int]()
    for value, axis, name in _free_axes(model):
        array = sample.get(value.name or "")
        if array is None or axis >= array.ndim:
            continue
        size, place = array.shape[axis], f"{value.name}[{axis}]"
        # Two dimensions of one name may differ: exporters leave names to users.
        found[place if name is None or found.get(name, size) != size else name] = size
    return found


def _free_axes(model: ir.Model) -> Iterator[tuple[ir.Value, int, str | None]]:
    """Inputs without a default that have an axis of no stated size, and the name of that."""
    for value in model.graph.inputs:
        for axis, dim in enumerate(value.shape or ()):
            if not isinstance(dim, int) and not value.is_initializer():
                yield value, axis, dim.value or None


def _bind(model: ir.Model, sizes: Mapping[str, int]) -> None:
    """Let inputs, and what operators that onnx does not know make, have the sizes."""
    free = free_sizes(model, sizes)
    bound: dict[ir.Value, list[int | ir.SymbolicDim]] = {}
    for value, axis, name in _free_axes(model):
        dims = bound.setdefault(value, list(value.shape or ()))
        place = f"{value.name}[{axis}]"
        dims[axis] = free[place] if place in free else free[name or ""]
    for value, dims in bound.items():
        value.shape = ir.Shape(dims)
    for graph in all_graphs(model):
        for node in graph:
            if node.domain not in ONNX_DOMAINS:
                _bind_outputs(node, free)


def _bind_outputs(node: ir.Node, free: Mapping[str, int]) -> None:
    for value in node.outputs:
        if value.shape is not None and not value.shape.is_static():
            dims = [d if isinstance(d, int) else free.get(d.value or "", d) for d in value.shape]
            value.shape = ir.Shape(dims)


# ------------------------------------------------------------------ layers


def layers_of_model(
    model: ir.Model, sizes: Mapping[str, int] = NO_SIZES, counts: ZeroCounts | None = None
) -> tuple[LayerCost, ...]:
    """The layers of a model, outer graphs before their bodies, calls of functions inlined.

    Args:
        model: not modified.
        sizes: of dimensions that the file leaves open; see `free_sizes`. Others count 1.
        counts: of zeros in tensors of the model, where there are some already.

    Raises:
        SpecError: a size is of no such dimension, or below 0.
        ModelError: the external data of a weight cannot be read.
    """
    model = model.clone()
    # Inputs with a default count as what they are unless a caller gives another.
    freeze_overridable_inputs(model)
    _bind(model, sizes)
    if model.functions:
        InlinePass()(model)
    infer_shapes(model, follows_elements=not has_long_vectors(model))
    return tuple(_Layers(model, counts or ZeroCounts()))


def macs_of_nodes(
    model: ir.Model, sizes: Mapping[str, int] = NO_SIZES
) -> dict[ir.Node, int | None]:
    """The multiply-accumulates of the nodes of a model, those of bodies included.

    Args:
        model: not modified. Calls of its functions count as not known.
        sizes: of dimensions that the file leaves open; see `free_sizes`. Others count 1.

    Returns:
        By node of the model; None where they are not known.

    Raises:
        SpecError: a size is of no such dimension, or below 0.
    """
    copy = model.clone()
    freeze_overridable_inputs(copy)
    _bind(copy, sizes)
    infer_shapes(copy, follows_elements=not has_long_vectors(copy))
    layers = _Layers(copy, ZeroCounts())
    pairs = zip(_nodes(model), _nodes(copy), strict=True)
    return {node: layers.macs(bound) for (node, _), (bound, _) in pairs}


class _Layers:
    """The layers of a model whose sizes are bound and whose shapes were inferred."""

    def __init__(self, model: ir.Model, counts: ZeroCounts) -> None:
        self._model, self._facts, self._zeros = (
            model,
            ShapeFacts(model, microsoft_shapes.RULES),
            Zeros(model, counts),
        )
        self._coded = {
            node: weight for weight in kernel_weights(all_graphs(model)) for node in weight.nodes
        }
        # What nodes may make of constants alone. To look behind every value would take long.
        self._made: set[ir.Value] = set()

    def __iter__(self) -> Iterator[LayerCost]:
        for node, body_of in _nodes(self._model):
            if all(v is None or is_constant(v) or v in self._made for v in node.inputs):
                self._made.update(node.outputs)
            if self._is_step(node):
                continue
            layer = self._layer(node, body_of)
            if layer.macs != 0 or layer.parameters:
                yield layer

    def macs(self, node: ir.Node) -> int | None:
        """The multiply-accumulates of a node of the model."""
        return node_macs(node, self._shape_of)

    def _is_step(self, node: ir.Node) -> bool:
        """The node is a step from constants to a weight, and none of the layers that read it."""
        return any(v in self._made and nodes_behind(v) is not None for v in node.outputs[:1])

    def _layer(self, node: ir.Node, body_of: str | None) -> LayerCost:
        inputs = [(i, v) for i, v in enumerate(node.inputs) if v is not None]
        counted = {i: self._numbers(v) for i, v in inputs if holds_numbers(node, i)}
        numbers = {i: count for i, count in counted.items() if count > 1}
        operands = operands_of(node)
        multiplied = [i for i in operands if i in numbers]
        parameters, weights = sum(numbers.values()), sum(numbers[i] for i in multiplied)
        zeros = self._zeros_of([node.inputs[i] for i in multiplied])
        coded = self._coded.get(node)
        if coded is not None:
            parameters += coded.elements
            weights = coded.elements if operands else 0
            zeros = self._zeros.of_kernel_weight(coded) if operands else None
        return LayerCost(
            name=describe(node),
            op_type=node.op_type
            if node.domain in ONNX_DOMAINS
            else f"{node.domain}.{node.op_type}",
            macs=self.macs(node),
            parameters=parameters,
            weights=weights,
            zero_share=zeros / weights if zeros is not None and weights else None,
            body_of=body_of,
        )

    def _shape_of(self, value: ir.Value | None) -> tuple[int, ...] | None:
        shape = static_shape(value)
        if shape is None:
            # Where onnx's inference loses a size, arithmetic may still tell it.
            sizes = self._facts.shape(value) or ()
            shape = tuple(size for size in sizes if isinstance(size, int))
            if not sizes or len(shape) < len(sizes):
                return None
        return None if any(size < 0 for size in shape) else shape

    def _numbers(self, value: ir.Value) -> int:
        """How many numbers of the model are behind a value; 0 where it is no weight."""
        tensor = constant_tensor(value)
        if tensor is not None:
            return tensor.size if _is_number(tensor.dtype) else 0
        constants = constants_behind(value) if value in self._made else None
        if constants is None or value.dtype is None or not _is_number(value.dtype):
            return 0
        shape = static_shape(value)
        if is_packed(value) and shape is not None:
            return math.prod(shape)
        tensors = [constant_tensor(constant) for constant in constants]
        stored = sum(t.size for t in tensors if t is not None and _is_number(t.dtype))
        return stored if shape is None else min(stored, math.prod(shape))

    def _zeros_of(self, values: Iterable[ir.Value | None]) -> int | None:
        counts = [self._zeros.of_value(value) for value in values if value is not None]
        known = [count for count in counts if count is not None]
        return sum(known) if len(known) == len(counts) else None


def _nodes(model: ir.Model) -> Iterator[tuple[ir.Node, str | None]]:
    """All nodes, and what has them in its body; outer graphs first."""
    waiting = deque[tuple[ir.Graph, str | None]]([(model.graph, None)])
    while waiting:
        graph, body_of = waiting.popleft()
        for node in graph:
            yield node, body_of
            waiting.extend((body, describe(node)) for body in subgraphs(node))


def _is_number(dtype: ir.DataType) -> bool:
    """Floating point, or integers of at most 8 bits: no shape and no index."""
    if dtype in (ir.DataType.BOOL, ir.DataType.STRING):
        return False
    return dtype.is_floating_point() or dtype.bitwidth <= 8

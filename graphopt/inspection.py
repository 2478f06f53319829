"""What is in a model: operators, weights, duplicates, zeros, and what makes it hard to optimize.

Weights in external data are read in chunks, so that resident memory stays at a few megabytes
whatever the size of the model.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from graphopt.content import equal_groups
from graphopt.groups import analyze
from graphopt.layer_costs import NO_SIZES, LayerCost, free_sizes, layers_of_model
from graphopt.operators import (
    ONNX_DOMAINS,
    all_graphs,
    graphs_and_functions,
    is_onnx,
    is_random,
    node_count,
)
from graphopt.packed_sizes import PackedWeight, find_packed
from graphopt.packing import packed_weights
from graphopt.skeleton import has_long_vectors, infer_shapes, type_text
from graphopt.state import guess_state
from graphopt.zeros import FLOATS, ZeroCounts

LARGEST_COUNT = 10

INDICES_MAXIMUM = 1 << 22
"""Along the axes of weights; of more, groups would take too much memory."""


@dataclass(frozen=True)
class Port:
    """An input or output of the model.

    Attributes:
        name: of the value.
        dtype: element type, as ONNX calls it in lower case ("float", "int64"); the whole type
            for what is not a tensor.
        shape: dimensions; a name or None where any size goes; None when the rank is free.
    """

    name: str
    dtype: str
    shape: tuple[int | str | None, ...] | None


@dataclass(frozen=True)
class Weights:
    """All weights of one element type.

    Attributes:
        dtype: element type.
        tensors: how many tensors.
        elements: how many numbers in them.
        bytes: their size.
    """

    dtype: str
    tensors: int
    elements: int
    bytes: int


@dataclass(frozen=True)
class Weight:
    """One weight: an initializer, or the tensor of a Constant node.

    Attributes:
        name: of the value.
        dtype: element type.
        shape: dimensions.
        bytes: size.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class Duplicates:
    """Weights of the same element type, shape and bytes.

    Attributes:
        names: of all of them.
        saved_bytes: what storing them once would save. Tensors that are the same region of one
            data file are stored once already and save nothing.
    """

    names: tuple[str, ...]
    saved_bytes: int


@dataclass(frozen=True)
class Inspection:
    """What is in a model.

    Attributes:
        inputs: in order, those with a default value included.
        outputs: in order.
        opsets: version by domain.
        ir_version: of the file format.
        nodes: in the graph and its subgraphs, with the nodes of functions in the place of their
            calls; Constant nodes do not count.
        operators: how many nodes of each, `domain.Op` outside the standard domain, most first.
        functions: `domain.name` of the model's functions.
        subgraphs: how many graphs are nested in the main one.
        weights: by element type, most bytes first.
        weight_bytes: of all weights.
        largest: the largest weights, at most 10.
        packed: weights that are stored narrow and widened by nodes, in order; the constants that
            they hang on are in `weights` and `largest`, as they are stored.
        parameters: numbers in packed weights, and in all others of floating point or of at most 8
            bits.
        bits_per_weight: stored bits for each of these, on average; None when there are none.
        duplicates: groups of equal weights, largest saving first.
        zero_share: exact zeros (of either sign) among the floating-point weights of 8 bits or
            more; None when there are none.
        layers: what each node that multiplies and accumulates, or holds numbers, costs in a run.
        macs: multiply-accumulates of all layers of which they are known. A FLOP count is twice as
            much.
        sizes: of the dimensions of inputs that the file leaves open, as `layers` counts them.
        assumed: of these, the names of those that nobody gave a size, which count 1.
        random_operators: how many nodes of each that gives other results at every run.
        state: pairs of output and input that look like carried state.
        groups: channels, heads and hidden units that can only be removed together, as
            `graphopt.groups.Group.describe` gives them; those that cannot, with the reason.
            Empty where weights have very long axes.
    """

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    opsets: dict[str, int]
    ir_version: int
    nodes: int
    operators: dict[str, int]
    functions: tuple[str, ...]
    subgraphs: int
    weights: tuple[Weights, ...]
    weight_bytes: int
    largest: tuple[Weight, ...]
    packed: tuple[PackedWeight, ...]
    parameters: int
    bits_per_weight: float | None
    duplicates: tuple[Duplicates, ...]
    zero_share: float | None
    layers: tuple[LayerCost, ...]
    macs: int
    sizes: dict[str, int]
    assumed: tuple[str, ...]
    random_operators: dict[str, int]
    state: tuple[tuple[str, str], ...]
    groups: tuple[dict[str, Any], ...]


def inspect_model(model: ir.Model, sizes: Mapping[str, int] = NO_SIZES) -> Inspection:
    """Look into a model. It is not run, and nothing is changed.

    Args:
        model: not modified.
        sizes: of dimensions of inputs; see `graphopt.layer_costs.free_sizes`.

    Raises:
        SpecError: a size is of no such dimension, or below 0.
        ModelError: the external data of a weight cannot be read.
    """
    free = free_sizes(model, sizes)
    graphs = list(graphs_and_functions(model))
    nodes = [node for graph in graphs for node in graph]
    tensors = [
        (value.name or "", tensor) for graph in graphs for value, tensor in _weights_of(graph)
    ]
    packed, parameters, number_bytes = _numbers(model)
    # What reads weights in chunks comes first, and finds data files that are damaged.
    duplicates, counts = find_duplicates(tensors), ZeroCounts()
    zero_share = _zero_share([t for _, t in tensors], counts)
    layers = layers_of_model(model, sizes, counts)
    largest = sorted(tensors, key=lambda pair: -pair[1].nbytes)[:LARGEST_COUNT]
    return Inspection(
        inputs=tuple(map(_port, model.graph.inputs)),
        outputs=tuple(map(_port, model.graph.outputs)),
        opsets=dict(model.opset_imports),
        ir_version=model.ir_version,
        nodes=node_count(model),
        operators=_counted(n for n in nodes if not is_onnx(n, "Constant")),
        functions=tuple(f"{f.domain}.{f.name}" for f in model.functions.values()),
        subgraphs=sum(1 for _ in all_graphs(model)) - 1,
        weights=_by_dtype(tensors),
        weight_bytes=sum(t.nbytes for _, t in tensors),
        largest=tuple(Weight(name, _word(t.dtype), _dims(t), t.nbytes) for name, t in largest),
        packed=packed,
        parameters=parameters,
        bits_per_weight=8 * number_bytes / parameters if parameters else None,
        duplicates=duplicates,
        zero_share=zero_share,
        layers=layers,
        macs=sum(layer.macs or 0 for layer in layers),
        sizes=free,
        assumed=tuple(name for name in free if name not in sizes),
        random_operators=_counted(filter(is_random, nodes)),
        state=guess_state(model),
        groups=_groups(model),
    )


def _groups(model: ir.Model) -> tuple[dict[str, Any], ...]:
    weights = [value for graph in all_graphs(model) for value in graph.initializers.values()]
    shapes = [value.shape.numpy() for value in weights if value.shape is not None]
    if sum(sum(shape) for shape in shapes) > INDICES_MAXIMUM:
        return ()
    copy = model.clone()
    infer_shapes(copy, follows_elements=not has_long_vectors(copy))
    return tuple(analyze(copy).describe())


def _port(value: ir.Value) -> Port:
    tensor = isinstance(value.type, ir.TensorType)
    dtype = _word(value.type.dtype) if isinstance(value.type, ir.TensorType) else type_text(value)
    if not tensor or value.shape is None:
        return Port(value.name or "", dtype, None)
    dims = tuple(d if isinstance(d, int) else d.value for d in value.shape)
    return Port(value.name or "", dtype, dims)


def _word(dtype: ir.DataType) -> str:
    return dtype.name.lower()


def _dims(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    return tuple(tensor.shape.numpy())


def _counted(nodes: Iterable[ir.Node]) -> dict[str, int]:
    """How many of each operator, most first and by name among equals."""
    counts = Counter(
        n.op_type if n.domain in ONNX_DOMAINS else f"{n.domain}.{n.op_type}" for n in nodes
    )
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _weights_of(graph: ir.Graph) -> Iterator[tuple[ir.Value, ir.TensorProtocol]]:
    for value in graph.initializers.values():
        if value.const_value is not None:
            yield value, value.const_value
    for node in graph:
        tensor = node.attributes.get("value") if is_onnx(node, "Constant") else None
        if tensor is not None and tensor.type == ir.AttributeType.TENSOR and not tensor.is_ref():
            yield node.outputs[0], tensor.as_tensor()


def _numbers(model: ir.Model) -> tuple[tuple[PackedWeight, ...], int, int]:
    """Packed weights; and of all weights, packed or not, how many numbers and stored bytes."""
    if any(True for graph in graphs_and_functions(model) for _ in packed_weights(graph)):
        # What nodes make has a size only once shapes are inferred.
        model = model.clone()
        infer_shapes(model, follows_elements=not has_long_vectors(model))
    graphs = list(graphs_and_functions(model))
    packed = find_packed(graphs)
    plain = [
        tensor
        for graph in graphs
        for value, tensor in _weights_of(graph)
        if value not in packed.constants and _is_numeric(value, tensor.dtype)
    ]
    elements = sum(weight.elements for weight in packed.weights) + sum(t.size for t in plain)
    return packed.weights, elements, packed.constants_bytes + sum(t.nbytes for t in plain)


def _is_numeric(value: ir.Value, dtype: ir.DataType) -> bool:
    """Floating point, or integers of at most 8 bits, or a bias of int32: no shape and no index."""
    if dtype in (ir.DataType.BOOL, ir.DataType.STRING):
        return False
    if dtype.is_floating_point() or dtype.bitwidth <= 8:
        return True
    return any(is_onnx(use.node, "DequantizeLinear") and use.idx == 0 for use in value.uses())


def _by_dtype(tensors: Iterable[tuple[str, ir.TensorProtocol]]) -> tuple[Weights, ...]:
    groups: dict[ir.DataType, list[ir.TensorProtocol]] = defaultdict(list)
    for _, tensor in tensors:
        groups[tensor.dtype].append(tensor)
    rows = [
        Weights(_word(dtype), len(group), sum(t.size for t in group), sum(t.nbytes for t in group))
        for dtype, group in groups.items()
    ]
    return tuple(sorted(rows, key=lambda row: (-row.bytes, row.dtype)))


# ------------------------------------------------------------------ content


def find_duplicates(
    tensors: Iterable[tuple[str, ir.TensorProtocol]],
) -> tuple[Duplicates, ...]:
    """Groups of tensors with the same element type, shape and bytes, largest saving first.

    Only tensors that agree in type and shape are read at all.

    Raises:
        ModelError: the external data cannot be read.
    """
    found = []
    for same in equal_groups(tensors, lambda item: item[1]):
        stored = len({_place(tensor) for _, tensor in same})
        saved_bytes = (stored - 1) * same[0][1].nbytes
        if saved_bytes:
            found.append(Duplicates(tuple(name for name, _ in same), saved_bytes))
    return tuple(sorted(found, key=lambda d: (-d.saved_bytes, d.names)))


def _place(tensor: ir.TensorProtocol) -> tuple[object, ...]:
    """Where a tensor is stored: the same for two tensors that share their storage."""
    if isinstance(tensor, ir.ExternalTensor):
        return str(Path(tensor.path)), tensor.offset or 0
    return (id(tensor),)


def _zero_share(tensors: Iterable[ir.TensorProtocol], counts: ZeroCounts) -> float | None:
    """The share of exact zeros in the floating-point tensors."""
    floats = [tensor for tensor in tensors if tensor.dtype in FLOATS]
    elements = sum(tensor.size for tensor in floats)
    return sum(counts.equal(t, 0) for t in floats) / elements if elements else None

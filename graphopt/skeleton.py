"""The model without its weights, for the C++ tools of onnx: checker and shape inference.

Those tools take one serialized proto of at most 2 GiB and copy it several times. They never need
the values of large tensors, so they get a skeleton: large initializers of the main graph become
typed inputs. Its size, and the time to make it, do not depend on the size of the weights.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import onnx
import onnx_ir as ir

from graphopt.operators import ONNX_DOMAINS, graphs_and_functions
from graphopt.protos import is_map, nested_graphs

logger = logging.getLogger("graphopt")

LARGE_BYTES = 1024
"""Tensors above this size are left out of a skeleton; shape arithmetic is far smaller."""

STUB = "graphopt-stub"
"""Location of the external data of a stub. No such file exists."""

INFERRED = "graphopt.inferred"
"""Key in `Value.meta`: type and shape come from `infer_shapes`, not from the file."""

_SHAPE = "graphopt.shape"
"""Key in `Value.meta`: what `infer_shapes` found where the shape itself is what a file states."""


_MAPS = "graphopt.maps"
"""Key in `Graph.meta`: types that onnx-ir cannot hold, by the name of the input or output."""


def from_proto(proto: onnx.ModelProto) -> ir.Model:
    """The model of a proto, also one whose inputs and outputs are maps, as of a ZipMap.

    onnx-ir has no such type: the values have none, and `stubbed` puts it back.
    """
    maps = {}
    for info in (*proto.graph.input, *proto.graph.output):
        if is_map(info.type):
            maps[info.name] = onnx.TypeProto.FromString(info.type.SerializeToString())
            info.ClearField("type")
    for graph in nested_graphs(proto.graph):
        kept = [info for info in graph.value_info if not is_map(info.type)]
        if len(kept) < len(graph.value_info):
            del graph.value_info[:]
            graph.value_info.extend(kept)
    model = ir.from_proto(proto)
    if maps:
        model.graph.meta[_MAPS] = maps
    return model


def type_text(value: ir.Value) -> str:
    """The type of an input or output of a model, in words."""
    graph = value.graph
    maps = graph.meta.get(_MAPS, {}) if isinstance(graph, ir.Graph) else {}
    if value.type is None and value.name in maps:
        return "sequence of maps" if maps[value.name].HasField("sequence_type") else "map"
    return str(value.type)


@contextmanager
def _stubs(model: ir.Model, tensors: dict[str, ir.TensorProtocol]) -> Iterator[None]:
    values = {n: v for n, v in model.graph.initializers.items() if n in tensors}
    try:
        for name, value in values.items():
            tensor = tensors[name]
            shape = ir.Shape(tensor.shape.numpy())
            value.const_value = ir.ExternalTensor(
                STUB, 0, tensor.nbytes, tensor.dtype, shape=shape, name=name
            )
        yield
    finally:
        for name, value in values.items():
            value.const_value = tensors[name]


@contextmanager
def _inlined(model: ir.Model) -> Iterator[None]:
    """Hold small external tensors in memory: a proto in bytes has no folder to find them in."""
    graphs = list(graphs_and_functions(model))
    values = [
        (value, value.const_value)
        for graph in graphs
        for value in graph.initializers.values()
        if isinstance(value.const_value, ir.ExternalTensor) and value.const_value.location != STUB
    ]
    attributes = [
        (node, attribute)
        for graph in graphs
        for node in graph
        for attribute in node.attributes.values()
        if isinstance(attribute.value, ir.ExternalTensor)
    ]
    try:
        for value, tensor in values:
            value.const_value = _in_memory(tensor)
        for node, attribute in attributes:
            loaded = _in_memory(attribute.value)
            node.attributes[attribute.name] = ir.AttrTensor(attribute.name, loaded)
        yield
    finally:
        for value, tensor in values:
            value.const_value = tensor
        for node, attribute in attributes:
            node.attributes[attribute.name] = attribute


def _in_memory(tensor: ir.ExternalTensor) -> ir.Tensor[np.ndarray]:
    return ir.Tensor(np.array(tensor.numpy()), tensor.dtype, shape=tensor.shape, name=tensor.name)


def stubbed(model: ir.Model) -> tuple[onnx.ModelProto, dict[str, ir.TensorProtocol]]:
    """The model as a proto whose large initializers are stubs, and the tensors left out, by name.

    A stub is an external tensor at the location `STUB` with the true element type and dimensions.
    Initializers of subgraphs and tensors in attributes stay in the proto, external ones too.
    """
    tensors = {
        name: value.const_value
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
        and value.const_value.dtype != ir.DataType.STRING
        and value.const_value.nbytes > LARGE_BYTES
    }
    with _stubs(model, tensors), _inlined(model):
        proto = ir.to_proto(model)
    maps = model.graph.meta.get(_MAPS, {})
    for info in (*proto.graph.input, *proto.graph.output):
        if info.name in maps:
            info.type.CopyFrom(maps[info.name])
    return proto, tensors


def without_weights(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose large or external initializers of the main graph are inputs instead.

    So are those that a caller may override: what follows from their values does not always hold.
    """
    light = onnx.ModelProto()
    for field, content in proto.ListFields():
        if field.name != "graph":
            _copy_field(light, field, content)
    for field, content in proto.graph.ListFields():
        if field.name != "initializer":
            _copy_field(light.graph, field, content)
    inputs = {i.name for i in proto.graph.input}
    for tensor in proto.graph.initializer:
        if tensor.name in inputs:
            continue
        if tensor.data_location != onnx.TensorProto.EXTERNAL and tensor.ByteSize() <= LARGE_BYTES:
            light.graph.initializer.add().CopyFrom(tensor)
        else:
            light.graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            )
    return light


def _copy_field(message: onnx.ModelProto | onnx.GraphProto, field: object, content: object) -> None:
    name = field.name  # type: ignore[attr-defined]  # protobuf's descriptors are not typed
    target = getattr(message, name)
    if hasattr(target, "extend"):
        target.extend(content)
    elif hasattr(target, "CopyFrom"):
        target.CopyFrom(content)
    else:
        setattr(message, name, content)


def skeleton(model: ir.Model) -> onnx.ModelProto:
    """The model without its weights; see the head of this file."""
    return without_weights(stubbed(model)[0])


def why_invalid(model: ir.Model | onnx.ModelProto) -> str | None:
    """What the onnx checker has against the model, in its words; None when it accepts it."""
    light = without_weights(model) if isinstance(model, onnx.ModelProto) else skeleton(model)
    for graph in nested_graphs(light.graph):
        for value in (*graph.input, *graph.output):
            # The checker wants a shape, and onnxruntime does not. What it says is not looked at.
            if value.type.HasField("tensor_type"):
                value.type.tensor_type.shape.SetInParent()
    try:
        onnx.checker.check_model(light)
    except (onnx.checker.ValidationError, ValueError) as error:
        return str(error).strip()
    return None


def infer_shapes(model: ir.Model) -> None:
    """Set types and shapes of the values that nodes make, as far as onnx infers them.

    What the file states of such values is not believed: exporters leave the shapes of one traced
    example there. Only the outputs of operators that onnx does not know keep it. Values of which
    the file said nothing are marked with `INFERRED`, so that saving does not write what can be
    inferred again.

    Outputs of the model, and inputs and outputs of bodies, keep what the file states, as callers
    see it; what is inferred for them, and is all that a rewrite may rely on, `known_shape` tells.
    """
    light = skeleton(model)
    _forget_shapes(light.graph)
    _forget_claims(light.graph.output)
    try:
        inferred = onnx.shape_inference.infer_shapes(light, data_prop=True)
    except onnx.shape_inference.InferenceError as error:
        # Damaged models that onnxruntime may load all the same; passes leave alone what has no
        # shape.
        logger.debug("shapes cannot be inferred: %s", error)
        inferred = light
    _take_shapes(model.graph, inferred.graph)


def _forget_shapes(graph: onnx.GraphProto) -> None:
    foreign = {o for n in graph.node if n.domain not in ONNX_DOMAINS for o in n.output}
    kept = [info for info in graph.value_info if info.name in foreign]
    del graph.value_info[:]
    graph.value_info.extend(kept)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                _forget_shapes(attribute.g)
                _forget_claims((*attribute.g.input, *attribute.g.output))


def _forget_claims(infos: Iterable[onnx.ValueInfoProto]) -> None:
    for info in infos:
        if info.type.HasField("tensor_type"):
            info.type.tensor_type.ClearField("shape")


def _take_shapes(graph: ir.Graph, proto: onnx.GraphProto) -> None:
    infos = {info.name: info for info in proto.value_info}
    outputs = {info.name: info for info in proto.output}
    for node, node_proto in zip(graph, proto.node, strict=True):
        for value in node.outputs:
            if value.is_graph_output():
                value.meta[_SHAPE] = _shape_of(outputs.get(value.name or ""))
            else:
                _take_shape(value, infos.get(value.name or ""))
        for attribute in node_proto.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                body = node.attributes[attribute.name].as_graph()
                for value, info in zip(body.inputs, attribute.g.input, strict=True):
                    value.meta[_SHAPE] = _shape_of(info)
                _take_shapes(body, attribute.g)


def _take_shape(value: ir.Value, info: onnx.ValueInfoProto | None) -> None:
    value.meta.pop(_SHAPE, None)
    if value.type is None and value.shape is None:
        value.meta[INFERRED] = True
    if info is not None and not is_map(info.type):
        value.type = ir.serde.deserialize_type_proto_for_type(info.type)
    value.shape = _shape_of(info)


_INVENTED = re.compile(r"unk__\d+")
"""Names that onnx's shape inference gives to dimensions that it does not know."""


def _shape_of(info: onnx.ValueInfoProto | None) -> ir.Shape | None:
    if info is None or is_map(info.type):
        return None
    shape = ir.serde.deserialize_type_proto_for_shape(info.type)
    if shape is None:
        return None
    return ir.Shape(
        [
            None if isinstance(d, ir.SymbolicDim) and _INVENTED.fullmatch(d.value or "") else d
            for d in shape
        ]
    )


def known_shape(value: ir.Value | None) -> ir.Shape | None:
    """The shape of a value as far as it is known for certain; not what a file merely states."""
    if value is None:
        return None
    if _SHAPE in value.meta:
        known: ir.Shape | None = value.meta[_SHAPE]
        return known
    return value.shape


def state_shape(value: ir.Value, stated: ir.Shape | None) -> None:
    """Give a value a shape that is only stated; what is known of it stays known."""
    value.meta[_SHAPE] = known_shape(value)
    value.shape = stated

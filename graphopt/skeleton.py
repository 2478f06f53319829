"""The model without its weights, for the C++ tools of onnx: checker and shape inference.

Those tools take one serialized proto of at most 2 GiB and copy it several times. They never need
the values of large tensors, so they get a skeleton: large initializers of the main graph become
typed inputs. Its size, and the time to make it, do not depend on the size of the weights.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable

import onnx
import onnx_ir as ir

from graphopt.operators import ONNX_DOMAINS, all_graphs
from graphopt.protos import is_map, nested_graphs
from graphopt.serializing import LARGE_BYTES, MAPS, UNANNOTATED, Tell, everything, nothing, stubbed

logger = logging.getLogger("graphopt")

INFERRED = "graphopt.inferred"
"""Key in `Value.meta`: type and shape come from `infer_shapes`, not from the file."""

_SHAPE = "graphopt.shape"
"""Key in `Value.meta`: what `infer_shapes` found where the shape itself is what a file states."""


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
    for info in (*proto.graph.input, *proto.graph.output):
        if info.name in maps:
            info.type.CopyFrom(maps[info.name])
    if maps:
        model.graph.meta[MAPS] = maps
    if not proto.graph.quantization_annotation:
        model.graph.meta[UNANNOTATED] = True
    return model


def type_text(value: ir.Value) -> str:
    """The type of an input or output of a model, in words."""
    graph = value.graph
    maps = graph.meta.get(MAPS, {}) if isinstance(graph, ir.Graph) else {}
    if value.type is None and value.name in maps:
        return "sequence of maps" if maps[value.name].HasField("sequence_type") else "map"
    return str(value.type)


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
    _add_light(light.graph, proto.graph.initializer)
    return light


def _add_light(graph: onnx.GraphProto, tensors: Iterable[onnx.TensorProto]) -> None:
    """Add initializers to a graph, those that are large as inputs."""
    inputs = {i.name for i in graph.input}
    for tensor in tensors:
        if tensor.name in inputs:
            continue
        if tensor.data_location != onnx.TensorProto.EXTERNAL and tensor.ByteSize() <= LARGE_BYTES:
            graph.initializer.add().CopyFrom(tensor)
        else:
            graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            )


def _copy_field(message: onnx.ModelProto | onnx.GraphProto, field: object, content: object) -> None:
    name = field.name  # type: ignore[attr-defined]  # protobuf's descriptors are not typed
    target = getattr(message, name)
    if hasattr(target, "extend"):
        target.extend(content)
    elif hasattr(target, "CopyFrom"):
        target.CopyFrom(content)
    else:
        setattr(message, name, content)


def skeleton(model: ir.Model, tell: Tell = everything) -> onnx.ModelProto:
    """The model without its weights; see the head of this file, and `stubbed` for `tell`."""
    proto, _ = stubbed(model, tell)
    tensors = list(proto.graph.initializer)
    del proto.graph.initializer[:]
    _add_light(proto.graph, tensors)
    return proto


def _is_made_by_foreign(value: ir.Value) -> bool:
    node = value.producer()
    return node is not None and node.domain not in ONNX_DOMAINS


def why_invalid(model: ir.Model | onnx.ModelProto) -> str | None:
    """What the onnx checker has against the model, in its words; None when it accepts it."""
    if isinstance(model, onnx.ModelProto):
        light = without_weights(model)
    else:
        light = skeleton(model, nothing)
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


LONG_VECTOR = 1 << 18
"""onnx follows the elements of vectors one by one, floats too, and each takes 250 bytes."""


def has_long_vectors(model: ir.Model) -> bool:
    """A constant has one dimension and so many elements that following them takes much memory."""
    return any(
        value.shape is not None and len(value.shape) == 1 and tensor.size > LONG_VECTOR
        for graph in all_graphs(model)
        for value in graph.initializers.values()
        if (tensor := value.const_value) is not None
    )


def infer_shapes(model: ir.Model, follows_elements: bool = True) -> bool:
    """Set types and shapes of the values that nodes make, as far as onnx infers them.

    What the file states of such values is not believed: exporters leave the shapes of one traced
    example there. Only the outputs of operators that onnx does not know keep it. Values of which
    the file said nothing are marked with `INFERRED`, so that saving does not write what can be
    inferred again.

    Outputs of the model, and inputs and outputs of bodies, keep what the file states, as callers
    see it; what is inferred for them, and is all that a rewrite may rely on, `known_shape` tells.

    Args:
        model: gets the shapes.
        follows_elements: follow shapes that nodes compute; see `has_long_vectors` for the price.

    Returns:
        Whether a shape is another than it was.
    """
    light = skeleton(model, _is_made_by_foreign)
    _forget_shapes(light.graph)
    _forget_claims(light.graph.output)
    try:
        inferred = onnx.shape_inference.infer_shapes(light, data_prop=follows_elements)
    except onnx.shape_inference.InferenceError as error:
        # Damaged models that onnxruntime may load all the same; passes leave alone what has no
        # shape.
        logger.debug("shapes cannot be inferred: %s", error)
        inferred = light
    return _take_shapes(model.graph, inferred.graph, _Types())


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


class _Types(dict[bytes, tuple[ir.TypeProtocol | None, ir.Shape | None]]):
    """Types and shapes by their proto as bytes: a graph has few that differ. Shapes are frozen."""

    def __missing__(self, content: bytes) -> tuple[ir.TypeProtocol | None, ir.Shape | None]:
        proto = onnx.TypeProto.FromString(content)
        if is_map(proto):
            return self.setdefault(content, (None, None))
        kind = ir.serde.deserialize_type_proto_for_type(proto)
        return self.setdefault(content, (kind, _shape_of(proto)))


def _take_shapes(graph: ir.Graph, proto: onnx.GraphProto, types: _Types) -> bool:
    changed = False
    infos = {i.name: i.type.SerializeToString() for i in (*proto.value_info, *proto.output)}
    for node, node_proto in zip(graph, proto.node, strict=True):
        for value in node.outputs:
            content = infos.get(value.name or "")
            kind, shape = (None, None) if content is None else types[content]
            changed = changed or known_shape(value) != shape
            if value.is_graph_output():
                value.meta[_SHAPE] = shape
            else:
                _take_shape(value, kind, shape)
        for attribute in node_proto.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                body = node.attributes[attribute.name].as_graph()
                for value, info in zip(body.inputs, attribute.g.input, strict=True):
                    value.meta[_SHAPE] = types[info.type.SerializeToString()][1]
                changed |= _take_shapes(body, attribute.g, types)
    return changed


def _take_shape(value: ir.Value, kind: ir.TypeProtocol | None, shape: ir.Shape | None) -> None:
    value.meta.pop(_SHAPE, None)
    if value.type is None and value.shape is None:
        value.meta[INFERRED] = True
    if kind is not None:
        value.type = kind
    value.shape = shape


_INVENTED = re.compile(r"unk__\d+")
"""Names that onnx's shape inference gives to dimensions that it does not know."""


def _shape_of(proto: onnx.TypeProto) -> ir.Shape | None:
    shape = ir.serde.deserialize_type_proto_for_shape(proto)
    if shape is None:
        return None
    return ir.Shape(
        [
            None if isinstance(d, ir.SymbolicDim) and _INVENTED.fullmatch(d.value or "") else d
            for d in shape
        ],
        frozen=True,
    )


def known_shape(value: ir.Value | None) -> ir.Shape | None:
    """The shape of a value as far as it is known for certain; not what a file merely states."""
    if value is None:
        return None
    known: ir.Shape | None = value.meta.data.get(_SHAPE, value.shape)
    return known


def state_shape(value: ir.Value, stated: ir.Shape | None) -> None:
    """Give a value a shape that is only stated; what is known of it stays known."""
    value.meta[_SHAPE] = known_shape(value)
    value.shape = stated

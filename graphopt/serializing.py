"""Models as protos, without their large weights.

What `ir.to_proto` does, several times as fast on graphs of many nodes, and with stubs in the place
of what is large. `stored_size` reckons with the same parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import onnx
import onnx_ir as ir

from graphopt.operators import attributes_of, graphs_and_functions, subgraphs

LARGE_BYTES = 1024
"""Tensors above this size are left out of a skeleton; shape arithmetic is far smaller."""

STUB = "graphopt-stub"
"""Location of the external data of a stub. No such file exists."""

MAPS = "graphopt.maps"
"""Key in `Graph.meta`: types that onnx-ir cannot hold, by the name of the input or output."""

UNANNOTATED = "graphopt.unannotated"
"""Key in `Graph.meta`: no value has a quantization annotation."""

_PROTO = "graphopt.proto"
"""Key in `Attr.meta`: the attribute as a proto."""

_ANNOTATION = "quant_parameter_tensor_names"
"""Key in `Value.meta` under which onnx-ir keeps a quantization annotation."""

Tell = Callable[[ir.Value], bool]
"""Of which values, beside inputs and outputs, a graph is to state type and shape."""


def everything(value: ir.Value) -> bool:
    """State all types and shapes that are known."""
    return True


def nothing(value: ir.Value) -> bool:
    """State none."""
    return False


def stubbed(
    model: ir.Model, tell: Tell = everything
) -> tuple[onnx.ModelProto, dict[str, ir.TensorProtocol]]:
    """The model as a proto whose large initializers are stubs, and the tensors left out, by name.

    A stub is an external tensor at the location `STUB` with the true element type and dimensions.
    Initializers of subgraphs and tensors in attributes stay in the proto, external ones too.
    """
    with _inlined(model):
        proto = model_shell(model)
        return proto, _write_graph(model, proto.graph, tell)


def model_shell(model: ir.Model) -> onnx.ModelProto:
    """All of a model but what is in its main graph."""
    shell = ir.Model(
        ir.Graph((), (), nodes=(), name=model.graph.name, doc_string=model.graph.doc_string),
        ir_version=model.ir_version,
        producer_name=model.producer_name,
        producer_version=model.producer_version,
        domain=model.domain,
        model_version=model.model_version,
        doc_string=model.doc_string,
        functions=list(model.functions.values()),
        metadata_props=model.metadata_props,
        device_configurations=model.device_configurations,
    )
    shell.graph.opset_imports.update(model.opset_imports)
    shell.graph.metadata_props.update(model.graph.metadata_props)
    proto = ir.to_proto(shell)
    for imported in proto.opset_import:
        if not imported.domain:
            imported.ClearField("domain")
    return proto


def _write_graph(
    model: ir.Model, proto: onnx.GraphProto, tell: Tell
) -> dict[str, ir.TensorProtocol]:
    graph, tensors = model.graph, {}
    for value in graph.inputs:
        write_value(proto.input.add(), value)
    for name, value in graph.initializers.items():
        tensor = value.const_value
        if tensor is None:
            continue
        if is_large(tensor):
            tensors[name] = tensor
            tensor = stub_of(tensor)
        written = proto.initializer.add()
        write_tensor(written, tensor)
        written.name = name
    made = []
    for node in graph:
        write_node(proto.node.add(), node, model.ir_version, tell)
        made += [v for v in node.outputs if v.name and not v.is_graph_output()]
    for value in made:
        if tell(value) and (value.type or value.metadata_props or value.doc_string):
            write_value(proto.value_info.add(), value)
    for value in graph.outputs:
        write_value(proto.output.add(), value)
    if not graph.meta.get(UNANNOTATED):
        for value in (*graph.inputs, *graph.initializers.values(), *made, *graph.outputs):
            write_annotation(proto, value)
    return tensors


def is_large(tensor: ir.TensorProtocol) -> bool:
    """The tensor is left out of a skeleton."""
    if type(tensor) is ir.TensorProtoTensor and tensor.raw.ByteSize() <= LARGE_BYTES:
        # Told apart first: a tensor in a proto makes its shape anew each time.
        return False
    return tensor.dtype != ir.DataType.STRING and tensor.nbytes > LARGE_BYTES


def stub_of(tensor: ir.TensorProtocol) -> ir.ExternalTensor:
    """What stands for a large tensor."""
    shape = ir.Shape(tensor.shape.numpy())
    return ir.ExternalTensor(STUB, 0, tensor.nbytes, tensor.dtype, shape=shape, name="")


def write_tensor(proto: onnx.TensorProto, tensor: ir.TensorProtocol) -> None:
    """Write a tensor; a proto in bytes has no folder in which to find external data."""
    if isinstance(tensor, ir.ExternalTensor) and tensor.location != STUB:
        tensor = _in_memory(tensor)
    ir.serde.serialize_tensor_into(proto, tensor)


def write_value(proto: onnx.ValueInfoProto, value: ir.Value) -> None:
    """Write what a value is, also where onnx-ir has no type for it."""
    ir.serde.serialize_value_into(proto, value)
    graph = value.graph
    if value.type is None and isinstance(graph, ir.Graph):
        maps = graph.meta.get(MAPS, {})
        if value.name in maps:
            proto.type.CopyFrom(maps[value.name])


def is_written_plainly(node: ir.Node) -> bool:
    """The node has nothing but names and attributes that are no graphs."""
    if node.overload or node.doc_string or node.metadata_props or node.device_configurations:
        return False
    return not subgraphs(node)


def write_node(proto: onnx.NodeProto, node: ir.Node, ir_version: int, tell: Tell) -> None:
    """Write a node and the graphs in it."""
    if not is_written_plainly(node):
        ir.serde.serialize_node_into(proto, node, model_ir_version=ir_version)
        _forget_untold(proto, node, tell)
        return
    proto.op_type = node.op_type
    if node.domain:
        proto.domain = node.domain
    if node.name:
        proto.name = node.name
    proto.input.extend(["" if v is None else v.name or "" for v in node.inputs])
    outputs = [v.name or "" for v in node.outputs]
    while outputs and not outputs[-1]:
        outputs.pop()
    proto.output.extend(outputs)
    proto.attribute.extend([attribute_proto(attribute) for attribute in attributes_of(node)])


def attribute_proto(attribute: ir.Attr) -> onnx.AttributeProto:
    """The attribute as a proto, which is kept while it is small: an attribute never changes."""
    known: onnx.AttributeProto | None = attribute.meta.get(_PROTO)
    if known is not None:
        return known
    proto = onnx.AttributeProto()
    if attribute.is_ref():
        ir.serde.serialize_reference_attribute_into(proto, attribute)
    else:
        ir.serde.serialize_attribute_into(proto, attribute)
    if proto.ByteSize() <= LARGE_BYTES:
        attribute.meta[_PROTO] = proto
    return proto


def _forget_untold(proto: onnx.NodeProto, node: ir.Node, tell: Tell) -> None:
    protos = [g for a in proto.attribute for g in ([a.g] if a.HasField("g") else a.graphs)]
    for body_proto, body in zip(protos, subgraphs(node), strict=True):
        told = {v.name for inner in body for v in inner.outputs if tell(v)}
        kept = [info for info in body_proto.value_info if info.name in told]
        del body_proto.value_info[:]
        body_proto.value_info.extend(kept)
        for inner_proto, inner in zip(body_proto.node, body, strict=True):
            if subgraphs(inner):
                _forget_untold(inner_proto, inner, tell)


def write_annotation(proto: onnx.GraphProto, value: ir.Value) -> None:
    """Write the quantization annotation of a value, if it has one."""
    parameters = value.meta.get(_ANNOTATION)
    if parameters:
        annotation = proto.quantization_annotation.add(tensor_name=value.name)
        for key, name in parameters.items():
            annotation.quant_parameter_tensor_names.add(key=key, value=name)


@contextmanager
def _inlined(model: ir.Model) -> Iterator[None]:
    """Hold small external tensors in memory: a proto in bytes has no folder to find them in.

    Those of bodies and attributes, that is; the initializers of the main graph are written here.
    """
    graphs = list(graphs_and_functions(model))
    values = [
        (value, value.const_value)
        for graph in graphs[1:]
        for value in graph.initializers.values()
        if isinstance(value.const_value, ir.ExternalTensor)
    ]
    attributes = [
        (node, attribute)
        for graph in graphs
        for node in graph
        for attribute in attributes_of(node)
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

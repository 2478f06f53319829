"""raise-opset: convert the model to a newer version of the standard operators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import onnx
import onnx_ir as ir
from onnx import version_converter

from graphopt.contract import Bounds, Change, Context, Effect, Pass
from graphopt.operators import ONNX_DOMAINS, all_graphs, is_onnx, node_count, opset_of
from graphopt.protos import nested_graphs
from graphopt.rewriting import constant_tensor
from graphopt.skeleton import from_proto, known_shape, skeleton

SOFTMAX_OPSET = 13
SOFTMAXES = ("Softmax", "LogSoftmax", "Hardmax")
RESIZE_OPSET = 11
SCAN_OPSET = 9
MASK_OPSET = 12
"""Masks were numbers first, then booleans that stayed false; now they say what was kept."""


@dataclass(frozen=True)
class RaiseOpset(Pass):
    """Convert the model to a newer opset, if it has an older one; never to an older one.

    Old opsets are why quantized models do not load, and why operators appear in pieces that have
    a name today. onnx's own converter does the work, on a copy without the weights, so that their
    size does not matter.

    Attributes:
        opset: the version to reach; a model that has it or a later one stays as it is.
        grow: convert also where that takes more nodes than before, as for old softmaxes over
            several axes.
    """

    name: ClassVar[str] = "raise-opset"
    effect: ClassVar[Effect] = Effect.ROUNDING

    opset: Annotated[int, Bounds(7, 25)] = 17
    grow: bool = False

    def refuse(self, model: ir.Model, context: Context) -> str | None:
        """Functions carry opsets of their own and must be inlined first."""
        if model.functions and opset_of(model) < self.opset:
            return "the model has functions; run inline-functions before"
        return None

    def apply(self, model: ir.Model, context: Context) -> Change:
        """Convert, and give the converted graph the old weights."""
        change = Change()
        before = opset_of(model)
        if before >= self.opset:
            return change
        reason = _why_not(model, before, self.opset)
        if reason is not None:
            change.skip("the model", reason)
            return change
        light = skeleton(model)
        softmaxes = _hide_softmaxes(model, light) if before < SOFTMAX_OPSET <= self.opset else {}
        try:
            converted = version_converter.convert_version(light, self.opset)
        except (RuntimeError, version_converter.ConvertError) as error:
            change.skip("the model", f"onnx cannot convert it: {_first_line(error)}")
            return change
        _restore_softmaxes(converted, softmaxes)
        if before < RESIZE_OPSET <= self.opset:
            _keep_old_resizes(converted.graph, "ceil" if "ceil" in _roundings(model) else "floor")
        new = from_proto(converted)
        added = node_count(new) - node_count(model)
        if added > 0 and not self.grow:
            change.skip(
                "the model", f"opset {self.opset} takes {added} nodes more (grow allows it)"
            )
            return change
        _adopt(model, new.graph)
        change.count(f"opset raised from {before} to {self.opset}")
        return change


def _why_not(model: ir.Model, before: int, after: int) -> str | None:
    """What onnx's converter would get wrong without a word."""
    nodes = [node for graph in all_graphs(model) for node in graph]
    if before < SCAN_OPSET <= after and any(is_onnx(node, "Scan") for node in nodes):
        return "onnx cannot convert Scan, which lost its batch axis"
    if before < MASK_OPSET and any(map(_makes_mask, nodes)):
        return f"the mask of a Dropout, which is read, is another one before opset {MASK_OPSET}"
    if before < RESIZE_OPSET <= after:
        roundings = _roundings(model)
        if None in roundings:
            return "the scales of a nearest Resize are not constant: its rounding depends on them"
        if len(roundings) > 1:
            return "nearest Resizes go up and down, which takes two roundings"
    hardmaxes = [node for node in nodes if is_onnx(node, "Hardmax")]
    if before < SOFTMAX_OPSET <= after and not all(map(_is_over_one_axis, hardmaxes)):
        return "onnx cannot convert a Hardmax over several axes"
    return None


def _makes_mask(node: ir.Node) -> bool:
    if not is_onnx(node, "Dropout") or len(node.outputs) < 2:
        return False
    return bool(node.outputs[1].uses()) or node.outputs[1].is_graph_output()


def _roundings(model: ir.Model) -> set[str | None]:
    """How the nearest Resizes of opset 10 round; None where scales are not known.

    onnxruntime rounds up along axes that shrink, and down along those that grow.
    """
    found: set[str | None] = set()
    for graph in all_graphs(model):
        for node in graph:
            if not is_onnx(node, "Resize") or node.attributes.get_string("mode", "") == "linear":
                continue
            scales = constant_tensor(node.inputs[1])
            if scales is None:
                found.add(None)
            else:
                found.update("ceil" if s < 1 else "floor" for s in scales.numpy() if s != 1)
    return found


def _is_over_one_axis(node: ir.Node) -> bool:
    """All sizes after the axis of an old softmax are 1, as far as is known."""
    shape = known_shape(node.inputs[0])
    if shape is None:
        return False
    axis, dims = node.attributes.get_int("axis", 1), list(shape)
    return -len(dims) <= axis < len(dims) and all(d == 1 for d in dims[axis:][1:])


def _hide_softmaxes(model: ir.Model, light: onnx.ModelProto) -> dict[str, tuple[str, int]]:
    """Put Sigmoid, which never changes, in the place of softmaxes that need no conversion.

    Before opset 13 a softmax went over its axis and all that follow, as one. onnx's converter
    writes that as Shape, Flatten, Softmax and Reshape, although nothing changes where all sizes
    after the axis are 1.

    Returns:
        Operator and axis of those softmaxes, by the name of their output.
    """
    hidden = {}
    for node, proto in zip(model.graph, light.graph.node, strict=True):
        if is_onnx(node, *SOFTMAXES) and _is_over_one_axis(node):
            hidden[proto.output[0]] = (proto.op_type, node.attributes.get_int("axis", 1))
            proto.op_type = "Sigmoid"
            del proto.attribute[:]
    return hidden


def _restore_softmaxes(proto: onnx.ModelProto, hidden: dict[str, tuple[str, int]]) -> None:
    for node in proto.graph.node:
        if node.output and node.output[0] in hidden:
            node.op_type, axis = hidden[node.output[0]]
            node.attribute.append(onnx.helper.make_attribute("axis", axis))


def _keep_old_resizes(graph: onnx.GraphProto, rounding: str) -> None:
    """Say what Resize and Upsample did before opset 11 brought these attributes.

    Their defaults are others, and onnx's converter does not say it.
    """
    old = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": rounding}
    for inner in nested_graphs(graph):
        for node in inner.node:
            if node.op_type != "Resize" or node.domain not in ONNX_DOMAINS:
                continue
            stated = {attribute.name for attribute in node.attribute}
            for name, value in old.items():
                if name not in stated:
                    node.attribute.append(onnx.helper.make_attribute(name, value))


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def _adopt(model: ir.Model, new: ir.Graph) -> None:
    """Make the converted graph the model's, with its weights, metadata and descriptions."""
    old = model.graph
    inputs = {v.name for v in old.inputs}
    for value in list(new.inputs):
        weight = old.initializers.get(value.name or "")
        if weight is None or value.is_initializer():
            continue
        value.const_value = weight.const_value
        if value.name not in inputs:
            new.inputs.remove(value)
        new.register_initializer(value)
    for domain, version in old.opset_imports.items():
        if domain not in ONNX_DOMAINS:
            new.opset_imports[domain] = version
    for before, after in zip(old.outputs, new.outputs, strict=True):
        after.shape = before.shape
    new.name, new.doc_string = old.name, old.doc_string
    new.metadata_props.update(old.metadata_props)
    new.meta.update(old.meta)
    _keep_descriptions(model, new)
    model.graph = new
    imports = [onnx.helper.make_opsetid(d, v) for d, v in new.opset_imports.items()]
    needed = onnx.helper.find_min_ir_version_for(imports, ignore_unknown=True)
    model.ir_version = max(model.ir_version, needed)


def _keep_descriptions(model: ir.Model, new: ir.Graph) -> None:
    """Nodes and values that kept their name keep their doc strings, metadata and annotations."""
    olds = {o.name: o for g in all_graphs(model) for n in g for o in n.outputs if o.name}
    olds |= {v.name: v for v in (*model.graph.inputs, *model.graph.initializers.values()) if v.name}
    converted = ir.Model(new, ir_version=model.ir_version)
    for graph in all_graphs(converted):
        values = [*graph.inputs, *graph.initializers.values()]
        for node in graph:
            values += node.outputs
            old = olds.get(node.outputs[0].name or "") if node.outputs else None
            producer = old.producer() if old is not None else None
            if producer is not None and producer.op_type == node.op_type:
                node.name = node.name or producer.name
                node.doc_string = producer.doc_string
                node.metadata_props.update(producer.metadata_props)
        for value in values:
            known = olds.get(value.name or "")
            if known is not None:
                value.doc_string = known.doc_string
                value.metadata_props.update(known.metadata_props)
                value.meta.update(known.meta)

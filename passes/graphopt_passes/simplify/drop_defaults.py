"""drop-defaults: remove attributes that say what holds without them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx
import onnx_ir as ir

from graphopt.contract import Change, Context, Effect, Pass
from graphopt.operators import ONNX_DOMAINS, all_graphs, opset_of

_SPATIAL = frozenset(
    {"AveragePool", "Conv", "ConvInteger", "ConvTranspose", "LpPool", "MaxPool", "QLinearConv"}
)
_NEUTRAL = {"dilations": 1, "strides": 1, "pads": 0}
"""Attributes of the operators above that the schema gives no default, but its text does: a list of
this number, one for each axis or side."""


@dataclass(frozen=True)
class DropDefaults(Pass):
    """Remove attributes that are equal to their default, in subgraphs too.

    Exporters write `alpha = 1.0`, `group = 1` and `dilations = [1, 1]` at every node. The defaults
    are those of the operator's schema at the model's opset.
    """

    name: ClassVar[str] = "drop-defaults"
    effect: ClassVar[Effect] = Effect.EXACT

    def apply(self, model: ir.Model, context: Context) -> Change:
        """Drop what is equal to its default."""
        change = Change()
        opset = opset_of(model)
        for graph in all_graphs(model):
            for node in graph:
                if node.domain in ONNX_DOMAINS:
                    _drop(node, opset, change)
        return change


def _drop(node: ir.Node, version: int, change: Change) -> None:
    try:
        schema = onnx.defs.get_schema(node.op_type, version, "")
    except onnx.defs.SchemaError:
        change.skip(node, f"onnx has no schema of it at opset {version}")
        return
    for name, attribute in list(node.attributes.items()):
        known = schema.attributes.get(name)
        if known is None or attribute.is_ref():
            continue
        if _is_default(attribute, known.default_value) or _is_neutral(node, attribute):
            del node.attributes[name]
            change.count("default attribute dropped")


def _is_default(attribute: ir.Attr, default: onnx.AttributeProto) -> bool:
    if default.type == onnx.AttributeProto.UNDEFINED:
        return False
    same_type = attribute.type.value == default.type
    return same_type and attribute.value == ir.serde.deserialize_attribute(default).value


def _is_neutral(node: ir.Node, attribute: ir.Attr) -> bool:
    if node.op_type not in _SPATIAL or attribute.name not in _NEUTRAL:
        return False
    return all(number == _NEUTRAL[attribute.name] for number in attribute.as_ints())

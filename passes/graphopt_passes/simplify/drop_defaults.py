"""drop-defaults: remove attributes that say what holds without them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import onnx
import onnx_ir as ir

from graphopt.contract import Change, Context, Effect, Pass
from graphopt.operators import ONNX_DOMAINS, all_graphs, attributes_of, opset_of

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
                if node.attributes.data and node.domain in ONNX_DOMAINS:
                    _drop(node, opset, change)
        return change


def _drop(node: ir.Node, version: int, change: Change) -> None:
    defaults = _defaults(node.op_type, version)
    if defaults is None:
        change.skip(node, f"onnx has no schema of it at opset {version}")
        return
    for attribute in list(attributes_of(node)):
        if attribute.name not in defaults or attribute.is_ref():
            continue
        if _is_default(attribute, defaults[attribute.name]) or _is_neutral(node, attribute):
            del node.attributes[attribute.name]
            change.count("default attribute dropped")


@cache
def _defaults(op_type: str, version: int) -> Mapping[str, ir.Attr | None] | None:
    """The attributes of an operator, with their defaults where they have one."""
    try:
        schema = onnx.defs.get_schema(op_type, version, "")
    except onnx.defs.SchemaError:
        return None
    return {
        name: None
        if known.default_value.type == onnx.AttributeProto.UNDEFINED
        else ir.serde.deserialize_attribute(known.default_value)
        for name, known in schema.attributes.items()
    }


def _is_default(attribute: ir.Attr, default: ir.Attr | None) -> bool:
    if default is None or attribute.type is not default.type:
        return False
    return bool(attribute.value == default.value)


def _is_neutral(node: ir.Node, attribute: ir.Attr) -> bool:
    if node.op_type not in _SPATIAL or attribute.name not in _NEUTRAL:
        return False
    return all(number == _NEUTRAL[attribute.name] for number in attribute.as_ints())

"""shorten-names: give what lies inside a graph short names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import ClassVar

import onnx_ir as ir

from graphopt.contract import Change, Context, Effect, Pass
from graphopt.operators import graphs_and_functions

_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class ShortenNames(Pass):
    """Give values inside the graph short names, and take those of nodes away.

    A value is written with its name by the node that makes it and by each that reads it. In a small
    model of many nodes, "/backbone/stage2/stage2.0/branch1/Conv_output_0" takes more bytes than
    4-bit weights do. Inputs and outputs of the model keep their names; what tells nodes of the
    result from each other then are their operators and what they read.
    """

    name: ClassVar[str] = "shorten-names"
    effect: ClassVar[Effect] = Effect.EXACT

    def refuse(self, model: ir.Model, context: Context) -> str | None:
        """Refuse a model whose notes on quantization call values by their names."""
        annotated = (v for v in _values(model) if v.meta.get("quant_parameter_tensor_names"))
        return "its quantization annotations call values by their names" if any(annotated) else None

    def apply(self, model: ir.Model, context: Context) -> Change:
        """Shorten what is longer than the names of so many values need to be."""
        change = Change()
        inner = list(_inner_values(model))
        stated = {*model.graph.inputs, *model.graph.outputs}
        # So many names may be taken.
        length = len(_name(len(inner) + len(stated)))
        taken = {value.name for value in _values(model)}
        fresh = (name for name in map(_name, count()) if name not in taken)
        for value in inner:
            if len(value.name or "") > length:
                value.name = next(fresh)
                change.count("name shortened")
        for graph in graphs_and_functions(model):
            for node in graph:
                if node.name:
                    # A graph gives names to nodes whose name is None.
                    node.name = ""
                    change.count("name of a node dropped")
        return change


def _name(number: int) -> str:
    """The name of that number: an identifier, as ONNX asks for."""
    digits = ""
    while number:
        number, digit = divmod(number, len(_DIGITS))
        digits = _DIGITS[digit] + digits
    return f"v{digits}"


def _values(model: ir.Model) -> Iterator[ir.Value]:
    for graph in graphs_and_functions(model):
        yield from graph.inputs
        if isinstance(graph, ir.Graph):
            yield from graph.initializers.values()
        for node in graph:
            yield from node.outputs


def _inner_values(model: ir.Model) -> Iterator[ir.Value]:
    """All but the inputs and outputs of the model, and what is omitted; each once.

    Those of bodies and functions go by their place.
    """
    stated = {*model.graph.inputs, *model.graph.outputs}
    return (v for v in dict.fromkeys(_values(model)) if v.name and v not in stated)

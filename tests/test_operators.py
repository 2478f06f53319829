"""Facts about operators, and walks over the graphs of a model."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from graphopt.operators import WITH_BODIES, NodeIndex, all_graphs, census
from graphopt.testing import parse

NESTED = """
agraph (float[3] x, bool c) => (float[3] y)
{
    a = Exp(x)
    b = Neg(a)
    y = If(c) <
        then_branch = yes () => (float[3] p) { q = Neg(b)  p = Exp(q) },
        else_branch = no () => (float[3] r) { r = Exp(b) }
    >
}
"""


def outputs(nodes: list[ir.Node]) -> list[str | None]:
    return [node.outputs[0].name for node in nodes]


def test_the_operators_with_bodies_are_those_of_the_schemas() -> None:
    found = {
        schema.name
        for schema in onnx.defs.get_all_schemas_with_history()
        if schema.domain == ""
        and any(a.type.name in ("GRAPH", "GRAPHS") for a in schema.attributes.values())
    }

    assert found == WITH_BODIES


def test_an_index_has_the_nodes_of_all_graphs_in_order() -> None:
    model = parse(NESTED)
    index = NodeIndex(model)

    assert index.graphs == list(all_graphs(model))
    assert index.counts == census(model)
    everything = [node for graph in index.graphs for node in graph]
    assert index.of("Exp", "Neg") == [n for n in everything if n.op_type in ("Exp", "Neg")]
    assert outputs(index.of("Exp"))[0] == "a"
    assert index.of("Relu") == []


def test_an_index_leaves_out_operators_of_other_domains() -> None:
    model = parse(
        """
        <ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
        agraph (float[3] x) => (float[3] y) { a = com.microsoft.Gelu(x)  y = Gelu(a) }
        """
    )

    assert outputs(NodeIndex(model).of("Gelu")) == ["y"]

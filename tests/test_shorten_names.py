from __future__ import annotations

import onnx_ir as ir

from graphopt.saving import stored_bytes
from graphopt.skeleton import why_invalid
from graphopt.testing import apply_pass, assert_rewrites, assert_unchanged, parse
from graphopt_passes.simplify.drop_metadata import DropMetadata
from graphopt_passes.simplify.shorten_names import ShortenNames

LONG = """
    agraph (float[2,3] image) => (float[2,3] scores)
        <float[3] features_0_weight = {1.0, 2.0, 3.0}>
    {
        [backbone_0] features_0_output = Mul(image, features_0_weight)
        [backbone_1] scores = Add(features_0_output, features_0_weight)
    }
"""

BRANCHES = """
    agraph (bool condition, float[2] x) => (float[2] y) {
        everywhere = Neg(x)
        y = If (condition) <
            then_branch = g1 () => (float[2] then_output) { then_output = Abs(everywhere) },
            else_branch = g2 () => (float[2] else_output) {
                else_hidden = Relu(everywhere)
                else_output = Exp(else_hidden)
            }
        >
    }
"""


def names(model: ir.Model) -> list[str | None]:
    return [output.name for node in model.graph for output in node.outputs]


def test_values_inside_get_short_names() -> None:
    change = assert_rewrites(
        ShortenNames(),
        LONG,
        """
        agraph (float[2,3] image) => (float[2,3] scores)
            <float[3] v = {1.0, 2.0, 3.0}>
        {
            v1 = Mul(image, v)
            scores = Add(v1, v)
        }
        """,
    )
    assert change.counts == {"name shortened": 2, "name of a node dropped": 2}


def test_inputs_outputs_and_weights_keep_their_place() -> None:
    model = parse(LONG)
    apply_pass(ShortenNames(), model)

    assert [v.name for v in model.graph.inputs] == ["image"]
    assert [v.name for v in model.graph.outputs] == ["scores"]
    assert {name: v.name for name, v in model.graph.initializers.items()} == {"v": "v"}
    assert not any(node.name for node in model.graph)


def test_values_of_branches_hide_none_from_outside() -> None:
    model = parse(BRANCHES)
    apply_pass(ShortenNames(), model)

    inner = [
        value.name
        for node in model.graph
        for attribute in node.attributes.values()
        if attribute.type == ir.AttributeType.GRAPH
        for branch in attribute.as_graph()
        for value in branch.outputs
    ]
    outer = names(model)
    assert len(set(inner) | set(outer)) == len(inner) + len(outer)
    assert why_invalid(model) is None


def test_a_name_that_is_taken_is_not_given() -> None:
    model = parse("""
        agraph (float[2] v, float[2] v1) => (float[2] y) {
            a_long_name = Add(v, v1)
            y = Neg(a_long_name)
        }
    """)
    apply_pass(ShortenNames(), model)

    assert names(model) == ["v2", "y"]


def test_omitted_outputs_stay_omitted() -> None:
    text = "agraph (float[2] x) => (float[2] y) { a_long_name = Dropout(x) y = Neg(a_long_name) }"
    model = parse(text)
    dropout = model.graph[0]
    dropout.resize_outputs(2)
    dropout.outputs[1].name = ""
    apply_pass(ShortenNames(), model)

    assert [output.name for output in dropout.outputs] == ["v", ""]


def test_twice_is_once() -> None:
    model = parse(LONG)
    apply_pass(ShortenNames(), model)

    assert not apply_pass(ShortenNames(), model)


def test_short_names_stay() -> None:
    assert_unchanged(
        ShortenNames(), "agraph (float[2] x) => (float[2] y) { h = Abs(x) y = Neg(h) }"
    )


def test_names_that_are_called_by_are_left_alone() -> None:
    model = parse(LONG)
    hidden = model.graph[0].outputs[0]
    hidden.meta["quant_parameter_tensor_names"] = {"SCALE_TENSOR": "features_0_weight"}

    reason = ShortenNames().refuse(model, None)  # type: ignore[arg-type]
    assert reason == "its quantization annotations call values by their names"


def test_bytes_are_those_of_the_names() -> None:
    model = parse(LONG)
    apply_pass(DropMetadata(), model)
    before = stored_bytes(model)
    apply_pass(ShortenNames(), model)

    weight, hidden = len("features_0_weight") - 1, len("features_0_output") - 2
    # A node's name takes two more bytes, of its tag and of its length.
    nodes = 2 * (len("backbone_0") + 2)
    # The length of the graph, once below 128, takes a byte less.
    assert before - stored_bytes(model) == 3 * weight + 2 * hidden + nodes + 1


def test_names_of_inputs_take_some_of_the_shortest() -> None:
    """As many values as there are names of two characters, and some of these are taken."""
    steps = ["h0 = Add(v, v1)"] + [f"h{i + 1} = Neg(h{i})" for i in range(40)]
    text = f"agraph (float[2] v, float[2] v1) => (float[2] y) {{ {' '.join(steps)} y = Neg(h40) }}"
    model = parse(text.replace("h", "a_long_name_"))
    apply_pass(ShortenNames(), model)

    assert not apply_pass(ShortenNames(), model)

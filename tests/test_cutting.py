"""Parts of models compute what they compute in the whole."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.cutting import (
    cut_out,
    depend_on_inputs,
    given_like,
    part_of,
    reads,
    stretch_to,
    values_of,
)
from graphopt.runtime import Session
from graphopt.skeleton import why_invalid
from graphopt.testing import parse

MODEL = """
agraph (float[N, 4] x, bool c) => (float[N, 4] y, float[N, 4] z)
<float[4] w = {1.0, 2.0, 3.0, 4.0}, float[4] v = {0.5, 0.5, 0.5, 0.5}>
{
    a = Mul (x, w)
    b = If (c) <
        then_branch = f () => (float[N, 4] p) { p = Exp (a) },
        else_branch = g () => (float[N, 4] q) { q = Add (a, v) }
    >
    d = Sin (b)
    y = Add (d, a)
    z = Abs (a)
}
"""

X = np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4)


def whole() -> dict[str, np.ndarray]:
    """Every value of the model."""
    model = parse(MODEL)
    values = values_of(model.graph)
    model.graph.outputs.extend(values[name] for name in "abd")
    found = Session(model).run({"x": X, "c": np.asarray(False)})
    return {**found, "x": X, "c": np.asarray(False)}


def node(model: ir.Model, name: str) -> ir.Node:
    found = values_of(model.graph)[name].producer()
    assert found is not None
    return found


def test_a_node_reads_what_its_bodies_read() -> None:
    assert [value.name for value in reads(node(parse(MODEL), "b"))] == ["c", "a", "v"]


def test_a_stretch_ends_at_the_nearest_stops() -> None:
    model = parse(MODEL)
    values = values_of(model.graph)

    found = stretch_to([values["y"]], {values["a"], values["b"], values["x"]})

    assert {n.op_type for n in found.nodes} == {"Sin", "Add"}
    assert {value.name for value in found.sources} == {"a", "b"}


def test_what_is_cut_out_gives_the_values_of_the_whole() -> None:
    known = whole()
    given = {"a": given_like("a", known["a"]), "b": given_like("b", known["b"])}

    cut = cut_out(parse(MODEL), given, {"y": "result"})

    assert why_invalid(cut) is None
    assert [n.op_type for n in cut.graph] == ["Sin", "Add"]
    assert not cut.graph.initializers
    (result,) = Session(cut).run({name: known[name] for name in "ab"}).values()
    np.testing.assert_array_equal(result, known["y"])


def test_bodies_get_what_is_given_and_keep_their_constants() -> None:
    known = whole()

    cut = cut_out(parse(MODEL), {"a": given_like("other", known["a"])}, {"b": "b"})

    assert {i.name for i in cut.graph.inputs} == {"other", "c"}
    assert list(cut.graph.initializers) == ["v"]
    (result,) = Session(cut).run({"other": known["a"], "c": known["c"]}).values()
    np.testing.assert_array_equal(result, known["b"])


def test_a_value_can_be_computed_and_given_to_its_readers_at_once() -> None:
    known = whole()
    given = {"a": given_like("given", np.zeros_like(X))}

    cut = cut_out(parse(MODEL), given, {"a": "a", "z": "z"})

    found = Session(cut).run({"x": X, "given": np.full_like(X, -3)})
    np.testing.assert_array_equal(found["a"], known["a"])
    np.testing.assert_array_equal(found["z"], np.full_like(X, 3))


def test_one_input_can_stand_for_two_values() -> None:
    given = {name: given_like("both", X) for name in "ad"}

    cut = cut_out(parse(MODEL), given, {"y": "y"})

    assert [i.name for i in cut.graph.inputs] == ["both"]
    np.testing.assert_array_equal(Session(cut).run({"both": X})["y"], X + X)


def test_the_model_itself_stays_as_it_is() -> None:
    model = parse(MODEL)
    before = ir.to_proto(model).SerializeToString()

    cut_out(model, {"a": given_like("other", X)}, {"y": "other_y"})

    assert ir.to_proto(model).SerializeToString() == before


def test_what_follows_from_inputs_is_told_from_constants() -> None:
    text = """
    agraph (float[4] x) => (float[4] y)
    <float[4] w = {1.0, 2.0, 3.0, 4.0}>
    { folded = Exp (w)  size = Shape (x)  y = Mul (x, folded) }
    """
    graph = parse(text).graph

    assert {value.name for value in depend_on_inputs(graph)} == {"x", "size", "y"}


@pytest.mark.parametrize(
    ("nodes", "inputs", "outputs"),
    [
        ({"d"}, {"b"}, {"d"}),
        ({"b", "d"}, {"a", "c"}, {"d"}),
        ({"a", "y"}, {"x", "d"}, {"a", "y"}),
    ],
)
def test_a_part_has_what_others_read_of_it(
    nodes: set[str], inputs: set[str], outputs: set[str]
) -> None:
    known = whole()

    part = part_of(parse(MODEL), nodes, known)

    assert part is not None
    assert {value.name for value in part.graph.inputs} == inputs
    assert {value.name for value in part.graph.outputs} == outputs
    found = Session(part).run({name: known[name] for name in inputs})
    for name in outputs:
        np.testing.assert_array_equal(found[name], known[name])


def test_a_part_whose_inputs_are_not_known_is_none() -> None:
    assert part_of(parse(MODEL), {"d"}, {"x": X}) is None

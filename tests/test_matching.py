"""Values of two models that are the same, known again by what is left of them."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from graphopt.matching import match
from graphopt.skeleton import infer_shapes
from graphopt.testing import parse


def pairs(before: str, after: str) -> dict[str, tuple[str, str]]:
    """For each value of the second model its name in the first, and how it was known."""
    models = [parse(text) for text in (before, after)]
    for model in models:
        infer_shapes(model)
    return {pair.after: (pair.before, pair.how) for pair in match(*models)}


MODEL = """
agraph (float[2, 4] x) => (float[2, 4] y)
<float[4] w = {1.0, 2.0, 3.0, 4.0}>
{ a = Mul (x, w)  b = Relu (a)  c = Exp (b)  y = Neg (c) }
"""


def test_a_model_is_matched_with_itself_by_structure() -> None:
    found = pairs(MODEL, MODEL)

    assert found["x"] == ("x", "input")
    assert {name: how[0] for name, how in found.items()} == {n: n for n in "xabcy"}
    assert [found[n][1] for n in "abc"] == ["structure"] * 3


def test_values_with_other_names_are_matched_from_both_ends() -> None:
    after = """
    agraph (float[2, 4] x) => (float[2, 4] y)
    <float[4] w = {1.0, 2.0, 3.0, 4.0}>
    { p = Mul (x, w)  q = Abs (p)  r = Exp (q)  y = Neg (r) }
    """

    found = pairs(MODEL, after)

    assert found["p"] == ("a", "structure")
    assert found["q"] == ("b", "use")
    assert found["r"] == ("c", "use")


def test_a_fused_node_under_the_name_of_its_first_is_known_by_what_becomes_of_it() -> None:
    after = """
    agraph (float[2, 4] x) => (float[2, 4] y)
    <float[4] w = {1.0, 2.0, 3.0, 4.0}>
    { a = PRelu (x, w)  c = Exp (a)  y = Neg (c) }
    """

    assert pairs(MODEL, after)["a"] == ("b", "use")


def test_the_same_inside_a_model_whose_end_is_another() -> None:
    after = """
    agraph (float[2, 4] x) => (float[2, 4] y)
    <float[4] w = {1.0, 2.0, 3.0, 4.0}>
    { a = PRelu (x, w)  c = Exp (a)  y = Abs (c) }
    """

    assert pairs(MODEL, after)["a"] == ("b", "use")


def test_a_name_that_is_of_another_value_now_is_not_believed() -> None:
    after = MODEL.replace("b = Relu (a)  c = Exp (b)", "c = Relu (a)  b = Exp (c)").replace(
        "Neg (c)", "Neg (b)"
    )

    found = pairs(MODEL, after)

    assert (found["c"][0], found["b"][0]) == ("b", "c")


def test_what_is_dequantized_is_the_value_that_was_quantized() -> None:
    after = """
    agraph (float[2, 4] x) => (float[2, 4] y)
    <float[4] w = {1.0, 2.0, 3.0, 4.0}, float s = {0.1}, uint8 z = {0}>
    {
        a = Mul (x, w)  b = Relu (a)  k = QuantizeLinear (b, s, z)
        wide = DequantizeLinear (k, s, z)  d = Sin (wide)  c = Exp (d)  y = Neg (c)
    }
    """

    found = pairs(MODEL, after)

    assert found["b"][0] == "b"
    assert found["wide"] == ("b", "dequantized")
    assert "k" not in found


def test_nodes_of_an_operator_are_matched_by_their_order_where_there_are_as_many() -> None:
    before = """
    agraph (float[2, 4] x) => (float[2, 4] y)
    { a = Sin (x)  b = Exp (a)  c = Cos (b)  y = Neg (c) }
    """
    after = """
    agraph (float[2, 4] x) => (float[2, 4] y)
    { p = Abs (x)  q = Exp (p)  r = Tan (q)  y = Neg (r) }
    """

    assert pairs(before, after)["q"] == ("b", "place")


@pytest.mark.parametrize("shape", ["float[2, 5] x", "int64[2, 4] x", "float[8] x"])
def test_other_shapes_and_types_are_not_the_same_value(shape: str) -> None:
    before = "agraph (float[2, 4] x) => (float[2, 4] y) { a = Abs (x)  y = Neg (a) }"
    after = f"agraph ({shape}) => (float[2, 4] y) {{ a = Abs (x)  y = Neg (a) }}"

    assert "a" not in pairs(before, after)


def test_half_precision_is_the_same_value() -> None:
    before = "agraph (float[4] x) => (float[4] y) { a = Abs (x)  b = Sin (a) y = Neg (b) }"
    after = """
    agraph (float[4] x) => (float[4] y)
    { h = Cast <to = 10> (x)  a = Abs (h)  b = Sin (a) w = Cast <to = 1> (b)  y = Neg (w) }
    """

    found = pairs(before, after)

    assert found["a"] == ("a", "name")
    assert found["w"] == ("b", "use")


def test_what_does_not_follow_from_the_inputs_is_left_out() -> None:
    text = """
    agraph (float[4] x) => (float[4] y)
    <float[4] w = {1.0, 2.0, 3.0, 4.0}>
    { folded = Exp (w)  y = Mul (x, folded) }
    """

    assert set(pairs(text, text)) == {"x", "y"}


def test_bodies_are_a_part_of_how_a_value_is_computed() -> None:
    text = """
    agraph (float[2] x, bool c) => (float[2] y)
    {
        a = Abs (x)
        b = If (c) <then_branch = f () => (float[2] p) { p = Exp (a) },
                    else_branch = g () => (float[2] q) { q = Neg (a) }>
        y = Sin (b)
    }
    """
    same, other = pairs(text, text), pairs(text, text.replace("Exp", "Cos"))

    assert same["b"] == ("b", "structure")
    assert other["b"][1] != "structure"


def test_the_models_stay_as_they_are() -> None:
    first, second = parse(MODEL), parse(MODEL)
    texts = [ir.to_proto(model).SerializeToString() for model in (first, second)]

    match(first, second)

    assert [ir.to_proto(model).SerializeToString() for model in (first, second)] == texts

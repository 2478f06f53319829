from __future__ import annotations

from graphopt.testing import assert_rewrites, assert_unchanged, parse
from graphopt_passes.simplify.lift_constants import LiftConstants


def test_lifts_every_form_of_value() -> None:
    model = parse(
        """
        agraph (float[2] x) => (float[2] y)
        {
            a = Constant <value = float[2] {1.0, 2.0}> ()
            b = Constant <value_float: float = 3.0> ()
            c = Constant <value_floats: floats = [4.0, 5.0]> ()
            d = Constant <value_ints: ints = [2]> ()
            s = Add(x, a)
            t = Add(s, b)
            u = Add(t, c)
            y = Reshape(u, d)
        }
        """
    )

    change = assert_rewrites(
        LiftConstants(),
        model,
        """
        agraph (float[2] x) => (float[2] y)
        <float[2] a = {1.0, 2.0}, float b = {3.0}, float[2] c = {4.0, 5.0}, int64[1] d = {2}>
        {
            s = Add(x, a)
            t = Add(s, b)
            u = Add(t, c)
            y = Reshape(u, d)
        }
        """,
    )

    assert change.counts == {"Constant lifted": 4}
    assert set(model.graph.initializers) == {"a", "b", "c", "d"}


def test_lifts_into_the_subgraph_that_holds_the_node() -> None:
    model = parse(
        """
        agraph (bool c, float[2] x) => (float[2] y)
        {
            y = If(c) <
                then_branch = then () => (float[2] t) {
                    one = Constant <value = float[1] {1.0}> ()
                    t = Add(x, one)
                },
                else_branch = other () => (float[2] e) { e = Abs(x) }
            >
        }
        """
    )

    LiftConstants().apply(model, None)  # type: ignore[arg-type]  # it asks nothing of the context

    (branch,) = [n for n in model.graph if n.op_type == "If"]
    then = branch.attributes["then_branch"].as_graph()
    assert list(then.initializers) == ["one"]
    assert [n.op_type for n in then] == ["Add"]


def test_leaves_a_constant_that_is_an_output() -> None:
    change = assert_unchanged(
        LiftConstants(),
        """
        agraph (float[2] x) => (float[1] y, float[2] z)
        {
            y = Constant <value = float[1] {1.0}> ()
            z = Neg(x)
        }
        """,
    )

    assert [s.reason for s in change.skips] == [
        "its value is an output of the graph, which a node must make"
    ]

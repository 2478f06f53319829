from graphopt.testing import assert_rewrites, assert_unchanged, parse
from graphopt_passes.simplify.drop_unused import DropUnused


def test_removes_a_chain_that_no_output_reads_and_its_weights() -> None:
    change = assert_rewrites(
        DropUnused(),
        """
        agraph (float[2] x) => (float[2] y)
        <float[2] w = {1.0, 2.0}, float[2] lonely = {3.0, 4.0}>
        {
            a = Mul(x, w)
            b = Exp(a)
            y = Relu(x)
        }
        """,
        """
        agraph (float[2] x) => (float[2] y) { y = Relu(x) }
        """,
    )

    assert change.counts == {"node removed": 2, "initializer removed": 2}


def test_removes_unused_nodes_in_subgraphs() -> None:
    assert_rewrites(
        DropUnused(),
        """
        agraph (bool c, float[2] x) => (float[2] y)
        {
            y = If(c) <
                then_branch = then () => (float[2] t) { dead = Exp(x) t = Neg(x) },
                else_branch = other () => (float[2] e) { e = Abs(x) }
            >
        }
        """,
        """
        agraph (bool c, float[2] x) => (float[2] y)
        {
            y = If(c) <
                then_branch = then () => (float[2] t) { t = Neg(x) },
                else_branch = other () => (float[2] e) { e = Abs(x) }
            >
        }
        """,
    )


def test_keeps_a_node_that_only_a_subgraph_reads_and_unused_inputs() -> None:
    assert_unchanged(
        DropUnused(),
        """
        agraph (bool c, float[2] x, float[2] idle) => (float[2] y)
        {
            outer = Exp(x)
            y = If(c) <
                then_branch = then () => (float[2] t) { t = Neg(outer) },
                else_branch = other () => (float[2] e) { e = Abs(x) }
            >
        }
        """,
    )


def test_what_only_an_unused_body_reads_goes_with_it() -> None:
    before = """
        <ir_version: 8, opset_import: ["" : 17]>
        agraph (float[2] x, bool c) => (float[2] y)
        <float[2] w = {1.0, 2.0}>
        {
            z = If(c) <
                then_branch = then () => (float[2] t) { t = Mul(x, w) },
                else_branch = other () => (float[2] e) { e = Neg(x) }
            >
            y = Abs(x)
        }
        """
    after = """
        <ir_version: 8, opset_import: ["" : 17]>
        agraph (float[2] x, bool c) => (float[2] y) { y = Abs(x) }
        """

    assert_rewrites(DropUnused(), parse(before), parse(after))

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.contract import Context, Effect
from graphopt.skeleton import infer_shapes
from graphopt.testing import (
    apply_pass,
    assert_equivalent,
    assert_rewrites,
    assert_unchanged,
    parse,
)
from graphopt_passes.simplify.drop_identity import DropIdentity

SPECIAL = [0.0, -0.0, np.nan, np.inf, -np.inf, 1e-45, -1e-45, 3.4e38, -3.4e38, 1.5]
NEGATIVE_ZERO = np.array(-0.0, np.float32)


def model_of(node: str, shape: str, **constants: np.ndarray) -> ir.Model:
    """b = node(a) between two other nodes, so that both values are free to go."""
    inputs = "".join(f", {_type(array)} {name}" for name, array in constants.items())
    model = parse(
        f"agraph (float[{shape}] x{inputs}) => (float[] y) {{ a = Exp(x) {node} y = Log(b) }}",
        **constants,
    )
    infer_shapes(model)
    (before_last,) = model.graph[-1].inputs
    assert before_last is not None
    # The checker wants a rank, even where none can be inferred.
    model.graph.outputs[0].shape = before_last.shape or ir.Shape(["R"])
    return model


def _type(array: np.ndarray) -> str:
    names = {"float32": "float", "int64": "int64", "int32": "int32", "bool": "bool"}
    return f"{names[str(array.dtype)]}[{', '.join(map(str, array.shape))}]"


def ints(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


def floats(*numbers: float) -> np.ndarray:
    return np.array(numbers, np.float32)


@pytest.mark.parametrize(
    ("node", "shape", "constants"),
    [
        ("b = Identity(a)", "2, 3", {}),
        ("b = Dropout(a)", "2, 3", {}),
        ("b, mask = Dropout(a, r)", "2, 3", {"r": floats(0.5)[0]}),
        ("b = Cast<to=1>(a)", "2, 3", {}),
        ("b = CastLike(a, x)", "2, 3", {}),
        ("b = Transpose<perm=[0, 1]>(a)", "N, M", {}),
        ("b = Transpose(a)", "N", {}),
        ("b = Reshape(a, s)", "2, 3", {"s": ints(2, 3)}),
        ("b = Reshape(a, s)", "2, 3", {"s": ints(-1, 3)}),
        ("b = Reshape(a, s)", "N, M", {"s": ints(0, -1)}),
        ("b = Reshape(a, s)", "N, 0", {"s": ints(0, 0)}),
        ("b = Reshape<allowzero=1>(a, s)", "2, 0", {"s": ints(2, 0)}),
        ("s = Shape(a) b = Reshape(a, s)", "N, M", {}),
        ("b = Flatten(a)", "N, M", {}),
        ("b = Flatten<axis=0>(a)", "1, M", {}),
        ("b = Flatten<axis=-1>(a)", "N, M", {}),
        ("b = Squeeze(a)", "2, 3", {}),
        ("b = Unsqueeze(a, s)", "N, 3", {"s": ints()}),
        ("b = Expand(a, s)", "N, 3", {"s": ints(1, 3)}),
        ("b = Expand(a, s)", "N, M", {"s": ints(1)}),
        ("s = Shape(a) b = Expand(a, s)", "N, M", {}),
        ("b = Tile(a, s)", "N, M", {"s": ints(1, 1)}),
        ("b = Pad<mode=\"reflect\">(a, s)", "N, M", {"s": ints(0, 0, 0, 0)}),
        ("b = Slice(a, s, e)", "N, M", {"s": ints(0, 0), "e": ints(2**63 - 1, 2**31 - 1)}),
        ("b = Slice(a, s, e, d)", "N, 3", {"s": ints(-3), "e": ints(3), "d": ints(-1)}),
        ("b = Slice(a, s, e)", "0, 3", {"s": ints(0), "e": ints(0)}),
        ("b = Concat<axis=1>(a)", "N, M", {}),
        ("b = Max(a)", "N, M", {}),
        ("b = Min(a)", "N, M", {}),
        ("b = Sum(a)", "N, M", {}),
        ("b = Mean(a)", "N, M", {}),
        ("b = Split<axis=1, num_outputs=1>(a)", "N, M", {}),
        ("b = Resize(a, , k)", "N, M", {"k": floats(1, 1)}),
        ("b = Resize<mode=\"linear\">(a, , k)", "N, M", {"k": floats(1, 1)}),
        ("b = Resize(a, , , s)", "2, 3", {"s": ints(2, 3)}),
        ("b = Resize<axes=[1]>(a, , , s)", "N, 3", {"s": ints(3)}),
        ("b = Add(a, k)", "N, 3", {"k": floats(-0.0, -0.0, -0.0)}),
        ("b = Add(k, a)", "N, M", {"k": NEGATIVE_ZERO}),
        ("b = Sub(a, k)", "N, M", {"k": floats(0)}),
        ("b = Mul(k, a)", "N, 3", {"k": np.ones((1, 3), np.float32)}),
        ("b = Div(a, k)", "N, M", {"k": np.ones((1, 1), np.float32)}),
        ("b = Pow(a, k)", "N, M", {"k": ints(1)}),
        ("b = Clip(a, k, l)", "N, M", {"k": floats(-np.inf)[0], "l": floats(np.inf)[0]}),
    ],
)  # fmt: skip
def test_removes_what_passes_its_input_through(
    node: str, shape: str, constants: dict[str, np.ndarray]
) -> None:
    model = model_of(node, shape, **constants)
    before = model.clone()

    change = apply_pass(DropIdentity(), model)

    kinds = {n.op_type for n in model.graph} - {"Shape"}
    assert kinds == {"Exp", "Log"}, change.skips
    assert change.counts.total() == 1
    assert_equivalent(before, model, Effect.EXACT)


@pytest.mark.parametrize(
    ("node", "shape", "constants"),
    [
        ("b, mask = Dropout(a) c = Not(mask) d = Cast<to=1>(c) e = Add(b, d)", "2, 3", {}),
        ("b = Dropout(a, r, t)", "2, 3", {"r": floats(0.5)[0], "t": np.array(True)}),
        ("c = Cast<to=10>(a) b = Cast<to=1>(c)", "2, 3", {}),
        ("b = Transpose(a)", "2, 2", {}),
        ("b = Transpose<perm=[1, 0]>(a)", "2, 2", {}),
        ("b = Reshape(a, s)", "N, M", {"s": ints(-1, 3)}),
        ("b = Reshape(a, s)", "2, 3", {"s": ints(3, 2)}),
        ("b = Reshape(a, s)", "N, M, 2", {"s": ints(0, 2, -1)}),
        ("b = Reshape<allowzero=1>(a, s)", "0, 3", {"s": ints(3, 0)}),
        ("b = Flatten(a)", "N, M, 2", {}),
        ("b = Flatten<axis=0>(a)", "2, M", {}),
        ("b = Squeeze(a)", "1, 3", {}),
        ("b = Squeeze(a)", "N, 3", {}),
        ("b = Expand(a, s)", "N, 3", {"s": ints(2, 3)}),
        ("b = Expand(a, s)", "1, 3", {"s": ints(1, 1, 3)}),
        ("b = Tile(a, s)", "2, 3", {"s": ints(1, 2)}),
        ("b = Pad(a, s)", "2, 3", {"s": ints(0, 1, 0, 0)}),
        ("b = Slice(a, s, e)", "N, M", {"s": ints(0), "e": ints(1000)}),
        ("b = Slice(a, s, e, k, k)", "2, 3", {"s": ints(-1), "e": ints(-9), "k": ints(-1)}),
        ("b = Concat<axis=0>(a, x)", "2, 3", {}),
        ("b, c = Split<axis=0, num_outputs=2>(a)", "2, 3", {}),
        ("b = Resize(a, , k)", "2, 3", {"k": floats(1, 1.1)}),
        ("b = Resize<mode=\"cubic\">(a, , k)", "2, 3", {"k": floats(1, 1)}),
        ("b = Add(a, k)", "2, 3", {"k": floats(0.0)}),
        ("b = Add(a, k)", "1, 3", {"k": np.full((2, 3), -0.0, np.float32)}),
        ("b = Add(a, k)", "N, 3", {"k": np.full((1, 1, 3), -0.0, np.float32)}),
        ("b = Sub(a, k)", "2, 3", {"k": floats(-0.0)}),
        ("b = Sub(k, a)", "2, 3", {"k": floats(0)}),
        ("b = Mul(a, k)", "N, 3", {"k": floats(1, 1, 2)}),
        ("b = Mul(a, k)", "N, M", {"k": floats(1, 1, 1)}),
        ("b = Div(k, a)", "2, 3", {"k": floats(1)}),
        ("b = Pow(k, a)", "2, 3", {"k": floats(1)}),
        ("b = Clip(a)", "2, 3", {}),
        ("b = Clip(a, k)", "2, 3", {"k": floats(-np.inf)[0]}),
        ("b = Clip(a, k, l)", "2, 3", {"k": floats(-3e38)[0], "l": floats(3e38)[0]}),
        ("c = Reciprocal(a) b = Reciprocal(c)", "2, 3", {}),
    ],
)  # fmt: skip
def test_leaves_alone_what_may_change_something(
    node: str, shape: str, constants: dict[str, np.ndarray]
) -> None:
    change = assert_unchanged(DropIdentity(), model_of(node, shape, **constants))

    assert not change.counts


@pytest.mark.parametrize(
    ("node", "constant"),
    [
        ("y = Mul(x, k)", floats(1)),
        ("y = Div(x, k)", floats(1)),
        ("y = Pow(x, k)", floats(1)),
        ("y = Add(x, k)", floats(-0.0)),
        ("y = Sub(x, k)", floats(0.0)),
    ],
)
def test_neutral_constants_keep_every_bit_of_special_values(
    node: str, constant: np.ndarray
) -> None:
    text = "agraph (float[N] z, float[1] k) => (float[N] w) { x = Neg(z) %s w = Neg(y) }"
    model = parse(text % node, k=constant)
    before = model.clone()

    assert apply_pass(DropIdentity(), model)

    samples = [{"z": np.tile(np.array(SPECIAL, np.float32), n)} for n in (1, 5)]
    assert_equivalent(before, model, Effect.EXACT, samples)


def test_adding_positive_zero_is_not_exact_and_stays() -> None:
    text = (
        "agraph (float[N] x) => (float[N] y) <float zero = {0.0}> { a = Neg(x) y = Add(a, zero) }"
    )
    without = "agraph (float[N] x) => (float[N] y) { y = Neg(x) }"

    change = assert_unchanged(DropIdentity(), text)

    assert [skip.reason for skip in change.skips] == ["adding +0.0 turns -0.0 into 0.0"]
    with pytest.raises(AssertionError, match="not bit-identical"):
        sample = {"x": np.zeros(3, np.float32)}
        assert_equivalent(parse(text), parse(without), Effect.EXACT, [sample])


def test_unbounded_clip_makes_infinity_finite_and_stays() -> None:
    text = "agraph (float[N] x) => (float[N] y) { a = Neg(x) y = Clip(a) }"
    without = "agraph (float[N] x) => (float[N] y) { y = Neg(x) }"

    assert_unchanged(DropIdentity(), text)

    with pytest.raises(AssertionError, match="infinity"):
        sample = {"x": floats(np.inf, 1)}
        assert_equivalent(parse(text), parse(without), Effect.EXACT, [sample])


def test_integers_and_booleans_have_neutral_elements_too() -> None:
    assert_rewrites(
        DropIdentity(),
        """
        agraph (int64[N] x, bool[N] c) => (int64[N] y, bool[N] d)
        <int64 zero = {0}, int64[1] one = {1}, bool yes = {1}, bool no = {0}>
        {
            a = Neg(x)
            b = Add(zero, a)
            e = Mul(b, one)
            f = Div(e, one)
            g = Clip(f)
            y = Sub(g, zero)
            h = Not(c)
            i = And(h, yes)
            j = Or(no, i)
            d = Xor(j, no)
        }
        """,
        """
        agraph (int64[N] x, bool[N] c) => (int64[N] y, bool[N] d)
        <int64 zero = {0}, int64[1] one = {1}, bool yes = {1}, bool no = {0}>
        { y = Neg(x) d = Not(c) }
        """,
    )


def test_removes_pairs_that_undo_each_other_and_repetitions() -> None:
    change = assert_rewrites(
        DropIdentity(),
        """
        agraph (float[N] x, bool[N] c) => (float[N] y, bool[N] d)
        {
            a = Exp(x) b = Neg(a) e = Neg(b) f = Relu(e) g = Relu(f) y = Floor(g)
            h = Not(c) i = Not(h) d = Not(i)
        }
        """,
        """
        agraph (float[N] x, bool[N] c) => (float[N] y, bool[N] d)
        { a = Exp(x) f = Relu(a) y = Floor(f) d = Not(c) }
        """,
    )

    assert change.counts == {"Neg removed": 2, "Relu removed": 1, "Not removed": 2}


def test_first_of_a_pair_stays_for_other_readers() -> None:
    assert_rewrites(
        DropIdentity(),
        "agraph (float[N] x) => (float[N] y, float[N] z)"
        " { a = Exp(x) b = Neg(a) c = Neg(b) y = Sqrt(c) z = Abs(b) }",
        "agraph (float[N] x) => (float[N] y, float[N] z)"
        " { a = Exp(x) b = Neg(a) y = Sqrt(a) z = Abs(b) }",
    )


def test_output_takes_over_the_value_before_the_identity_with_its_name() -> None:
    assert_rewrites(
        DropIdentity(),
        "agraph (float[N] x) => (float[N] y) { a = Exp(x) b = Identity(a) y = Identity(b) }",
        "agraph (float[N] x) => (float[N] y) { y = Exp(x) }",
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "agraph (float[N] x) => (float[N] y) { y = Identity(x) }",
            "it brings an input of the graph to an output of the graph",
        ),
        (
            "agraph (float[N] x) => (float[1] y, float[N] z) <float[1] w = {1.0}>"
            " { y = Identity(w) z = Exp(x) }",
            "it brings a constant to an output of the graph",
        ),
        (
            "agraph (float[N] x) => (float[N] y, float[N] z) { y = Exp(x) z = Identity(y) }",
            "the graph outputs both its input and its output",
        ),
        (
            "agraph (bool c, float[2] x) => (float[2] y) { a = Exp(x) y = If(c) <"
            " then_branch = then () => (float[2] t) { t = Identity(a) },"
            " else_branch = other () => (float[2] e) { e = Neg(a) }> }",
            "it brings a value of an outer graph to an output of the subgraph",
        ),
    ],
)
def test_keeps_an_identity_that_an_output_needs(text: str, reason: str) -> None:
    change = assert_unchanged(DropIdentity(), text)

    assert [skip.reason for skip in change.skips] == [reason]


def test_of_two_outputs_with_the_same_value_one_identity_stays() -> None:
    assert_rewrites(
        DropIdentity(),
        "agraph (float[N] x) => (float[N] y, float[N] z)"
        " { a = Exp(x) y = Identity(a) z = Identity(a) }",
        "agraph (float[N] x) => (float[N] y, float[N] z) { y = Exp(x) z = Identity(y) }",
    )


def test_reaches_into_subgraphs() -> None:
    assert_rewrites(
        DropIdentity(),
        """
        agraph (bool c, float[2] x) => (float[2] y)
        {
            a = Identity(x)
            y = If(c) <
                then_branch = then () => (float[2] t) { u = Exp(a) t = Identity(u) },
                else_branch = other () => (float[2] e) { v = Identity(a) e = Neg(v) }
            >
        }
        """,
        """
        agraph (bool c, float[2] x) => (float[2] y)
        {
            y = If(c) <
                then_branch = then () => (float[2] t) { t = Exp(x) },
                else_branch = other () => (float[2] e) { e = Neg(x) }
            >
        }
        """,
    )


def test_initializer_that_is_also_an_input_is_not_neutral() -> None:
    model = parse("agraph (float[N] x, float[1] k) => (float[N] y) { a = Exp(x) y = Mul(a, k) }")
    value = model.graph.inputs[1]
    value.const_value = ir.tensor(floats(1), name="k")
    model.graph.register_initializer(value)

    assert_unchanged(DropIdentity(), model)


def test_identity_of_a_sequence_goes() -> None:
    assert_rewrites(
        DropIdentity(),
        "agraph (float[2] x) => (float[N] y) <int64 i = {0}>"
        " { s = SequenceConstruct(x, x) t = Identity(s) y = SequenceAt(t, i) }",
        "agraph (float[2] x) => (float[N] y) <int64 i = {0}>"
        " { s = SequenceConstruct(x, x) y = SequenceAt(s, i) }",
    )


def test_operator_of_the_same_name_in_another_domain_stays() -> None:
    model = parse(
        """
        <ir_version: 10, opset_import: ["" : 21, "custom" : 1]>
        agraph (float[2] x) => (float[2] y) { a = Exp(x) y = custom.Identity(a) }
        """
    )

    assert not DropIdentity().apply(model, Context(lambda: model))


def test_refuses_opsets_in_which_operators_mean_something_else() -> None:
    model = parse(
        '<ir_version: 3, opset_import: ["" : 6]> agraph (float[2] x) => (float[2] y) { y = Exp(x) }'
    )

    assert "raise it first" in (DropIdentity().refuse(model, Context(lambda: model)) or "")

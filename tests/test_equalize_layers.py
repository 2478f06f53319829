from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from linear_layers import normal
from observed import error_of_codes, observer

from graphopt.contract import Sample
from graphopt.testing import apply_pass, assert_equivalent, assert_rewrites, assert_unchanged, parse
from graphopt_passes.quantize.equalize_layers import EqualizeLayers

CONV = "float[N,3,8,8] x, float[1] w1, float[1] b1, float[1] w2"


def uneven(seed: int, *shape: int) -> np.ndarray:
    """Weights whose outputs are of sizes from 1/16 to 16."""
    sizes = 4.0 ** np.linspace(-2, 2, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    weights: np.ndarray = (normal(seed, *shape) * sizes).astype(np.float32)
    return weights


def two_layers(between: str, more: str = "", opset: int = 21, **weights: np.ndarray) -> ir.Model:
    """A Conv that makes `c`, some nodes that make `d` of it, and a Conv that makes `y`."""
    given = {"w1": uneven(1, 6, 3, 3, 3), "b1": normal(2, 6), "w2": normal(3, 4, 6, 1, 1)}
    text = f"""
    <ir_version: 10, opset_import: ["" : {opset}]>
    agraph ({CONV}{"".join(f", float[1] {name}" for name in weights if name not in given)})
        => (float[N,4,H,W] y{more})
    {{ c = Conv <pads = [1, 1, 1, 1]> (x, w1, b1) {between} y = Conv(d, w2) }}
    """
    return parse(text, **(given | weights))


def reasons(model: ir.Model) -> list[str]:
    return [skip.reason for skip in assert_unchanged(EqualizeLayers(), model).skips]


def weights_of(model: ir.Model, op_type: str = "Conv") -> list[np.ndarray]:
    nodes = [node for node in model.graph if node.op_type == op_type]
    return [node.inputs[1].const_value.numpy() for node in nodes]  # type: ignore[union-attr]


def assert_equalizes(model: ir.Model, samples: list[Sample] | None = None) -> None:
    """What the first layer has for a channel is as large as what the second has for it."""
    before = model.clone()
    change = apply_pass(EqualizeLayers(), model)
    assert change, change.skips
    assert_equivalent(before, model, samples=samples)
    assert_unchanged(EqualizeLayers(), model)


def test_divides_rows_and_multiplies_columns() -> None:
    change = assert_rewrites(
        EqualizeLayers(),
        """
        agraph (float[N,1] x) => (float[N,1] y)
        <float[1,2] w1 = {8.0, -2.0}, float[2] b1 = {2.0, 4.0}, float[2,1] w2 = {2.0, 8.0}>
        {
            c = Gemm(x, w1, b1)
            d = Relu(c)
            y = MatMul(d, w2)
        }
        """,
        """
        agraph (float[N,1] x) => (float[N,1] y)
        <float[1,2] w1 = {4.0, -4.0}, float[2] b1 = {1.0, 8.0}, float[2,1] w2 = {4.0, 4.0},
         float[1,2] u = {8.0, -2.0}, float[2] v = {2.0, 4.0}, float[2,1] w = {2.0, 8.0}>
        {
            c = Gemm(x, w1, b1)
            d = Relu(c)
            y = MatMul(d, w2)
        }
        """,
    )

    assert change.counts == {"Gemm levelled with what follows": 1}


def test_a_depthwise_layer_between_two_gets_the_cube_root() -> None:
    """Nagel et al. 2019: c = (r1 r2 r3)^(1/3), and all three come to be c."""
    w1, w2, w3 = uneven(1, 6, 3, 1, 1), uneven(2, 6, 1, 3, 3)[::-1], normal(3, 4, 6, 1, 1)
    model = parse(
        """
        agraph (float[N,3,5,5] x, float[1] a, float[1] b, float[1] c) => (float[N,4,3,3] y)
        {
            p = Conv(x, a) q = Relu(p)
            r = Conv <group = 6> (q, b) s = Relu(r)
            y = Conv(s, c)
        }
        """,
        a=w1,
        b=w2,
        c=w3,
    )

    assert_equalizes(model)

    sizes = [np.abs(w).max(axis=(1, 2, 3)) for w in (w1, w2)] + [np.abs(w3).max(axis=(0, 2, 3))]
    expected = np.cbrt(np.prod(sizes, axis=0))
    made = weights_of(model)
    for found in (
        np.abs(made[0]).max(axis=(1, 2, 3)),
        np.abs(made[1]).max(axis=(1, 2, 3)),
        np.abs(made[2]).max(axis=(0, 2, 3)),
    ):
        assert np.log2(found / expected) == pytest.approx(0, abs=0.1)


BETWEEN = {
    "nothing": "d = Identity(c)",
    "Relu": "d = Relu(c)",
    "LeakyRelu": "d = LeakyRelu <alpha = 0.2> (c)",
    "PRelu": "d = PRelu(c, k)",
    "Abs": "d = Abs(c)",
    "Clip at 0": "z = Constant <value_float = 0.0> () d = Clip(c, z)",
    "MaxPool": "d = MaxPool <kernel_shape = [2, 2]> (c)",
    "AveragePool": "d = AveragePool <kernel_shape = [2, 2], pads = [1, 1, 0, 0]> (c)",
    "GlobalAveragePool": "d = GlobalAveragePool(c)",
    "Pad": "p = Constant <value_ints = [0, 0, 1, 1, 0, 0, 1, 1]> () d = Pad(c, p)",
    "Pad by reflection": (
        'p = Constant <value_ints = [0, 0, 1, 1, 0, 0, 1, 1]> () d = Pad <mode = "reflect"> (c, p)'
    ),
    "Resize": (
        "f = Constant <value_floats = [1.0, 1.0, 2.0, 2.0]> ()"
        ' d = Resize <mode = "linear"> (c, , f)'
    ),
    "Transpose": (
        "e = Transpose <perm = [0, 2, 3, 1]> (c) f = Relu(e)"
        " d = Transpose <perm = [0, 3, 1, 2]> (f)"
    ),
    "Reshape": (
        "s = Constant <value_ints = [0, 6, 64]> () t = Constant <value_ints = [0, 6, 4, 16]> ()"
        " e = Reshape(c, s) d = Reshape(e, t)"
    ),
    "Add": "d = Add(c, k)",
    "Sub": "d = Sub(k, c)",
    "Mul": "d = Mul(c, k)",
    "Gather": "i = Constant <value_ints = [5, 3, 1, 0, 2, 4]> () d = Gather <axis = 1> (c, i)",
    "Concat": (
        "s = Constant <value_ints = [4, 2]> () e, f = Split <axis = 1> (c, s)"
        " d = Concat <axis = 1> (f, e)"
    ),
    "Slice": (
        "o = Constant <value_ints = [1]> () z = Constant <value_ints = [0]> ()"
        " three = Constant <value_ints = [3]> () six = Constant <value_ints = [6]> ()"
        " e = Slice(c, z, three, o) f = Slice(c, three, six, o) d = Concat <axis = 1> (f, e)"
    ),
    "another value": "g = Sigmoid(x) m = MaxPool <kernel_shape=[8,8]> (g)"
    " o = ReduceMax <keepdims = 1> (m) d = Mul(c, o)",
    "its shape": "s = Shape(c) e = Relu(c) d = Reshape(e, s)",
}


@pytest.mark.parametrize("between", BETWEEN)
def test_follows_channels_through(between: str) -> None:
    constants = (
        {"k": normal(4, 6, 1, 1)} if "k)" in BETWEEN[between] or "(k" in BETWEEN[between] else {}
    )
    model = two_layers(BETWEEN[between], **constants)

    assert_equalizes(model)

    first, second = weights_of(model)
    sizes = np.sort(np.abs(first).max(axis=(1, 2, 3)))
    assert np.sort(np.abs(second).max(axis=(0, 2, 3))) == pytest.approx(sizes, rel=0.05)


@pytest.mark.parametrize("trans", [0, 1])
def test_follows_channels_into_rows(trans: int) -> None:
    weight = normal(3, 6 * 64, 5)
    model = parse(
        f"""
        agraph ({CONV}) => (float[N,5] y)
        {{
            c = Conv <pads = [1, 1, 1, 1]> (x, w1, b1) d = Relu(c)
            e = Flatten(d) y = Gemm <transB = {trans}> (e, w2)
        }}
        """,
        w1=uneven(1, 6, 3, 3, 3),
        b1=normal(2, 6),
        w2=weight.T.copy() if trans else weight,
    )

    assert_equalizes(model)


def test_follows_channels_through_a_chain_of_matmuls_with_biases() -> None:
    model = parse(
        """
        agraph (float[2,N,4] x, float[1] a, float[1] k, float[1] b) => (float[2,N,5] y)
        { p = MatMul(x, a) q = Add(k, p) r = Relu(q) y = MatMul(r, b) }
        """,
        a=np.ascontiguousarray(uneven(1, 6, 4).T),
        k=normal(2, 6),
        b=normal(3, 6, 5),
    )

    assert_equalizes(model)


def test_two_products_that_read_a_value_share_its_factors() -> None:
    model = two_layers(
        "d = Relu(c) z = Conv(d, w3)", ", float[N,2,H,W] z", w3=uneven(5, 6, 6, 1, 1)[:2]
    )

    assert_equalizes(model)


@pytest.mark.parametrize("group", [2, 3])
def test_keeps_groups_apart(group: int) -> None:
    model = two_layers("d = Relu(c)", w2=normal(3, 6, 6 // group, 1, 1))
    node = next(n for n in model.graph if n.inputs[0] is not None and n.inputs[0].name == "d")
    node.attributes.add(ir.AttrInt64("group", group))
    model.graph.outputs[0].shape = None

    assert_equalizes(model)


def test_dead_channels_keep_their_numbers() -> None:
    w1, w2 = uneven(1, 6, 3, 3, 3), normal(3, 4, 6, 1, 1)
    w1[2], w2[:, 4] = 0, 0
    model = two_layers("d = Relu(c)", w1=w1, w2=w2)

    assert_equalizes(model)

    first, second = weights_of(model)
    for old, new, axis in ((w1, first, 0), (w2, second, 1)):
        kept = [i for i in range(6) if np.array_equal(old.take(i, axis), new.take(i, axis))]
        assert kept == [2, 4]


def test_equalizes_in_the_body_of_an_if() -> None:
    model = parse(
        """
        agraph (bool k, float[3,4] x, float[4,6] a, float[6,4] b) => (float[3,4] y)
        {
            y = If(k) <
                then_branch = then () => (float[3,4] t) {
                    p = MatMul(x, a) q = Relu(p) t = MatMul(q, b)
                },
                else_branch = other () => (float[3,4] e) { e = Identity(x) }
            >
        }
        """,
        a=np.ascontiguousarray(uneven(1, 6, 4).T),
        b=normal(2, 6, 4),
    )

    assert_equalizes(model, [{"k": np.array(True), "x": normal(3, 3, 4)}])


# ------------------------------------------------------------------ what stays


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        ("d = Sigmoid(c)", "Sigmoid reads it"),
        (
            "z = Constant <value_float = 0.0> () s = Constant <value_float = 6.0> ()"
            " d = Clip(c, z, s)",
            "Clip reads it, with a limit that all channels share",
        ),
        (
            "z = Constant <value_float = -1.0> () d = Clip(c, z)",
            "Clip reads it, with a limit that all channels share",
        ),
        ("d = Add(c, c)", "Add reads it twice"),
        ("d = Mul(c, c)", "Mul reads it twice"),
        ("e = Relu(c) d = Add(c, e)", "Add reads it twice"),
        ("e = GlobalMaxPool(x) f = ReduceMax(e) d = Add(c, f)", "Add adds another value to it"),
        ("d = Div(k, c)", "Div divides by it"),
        (
            "p = Constant <value_ints = [0, 0, 1, 1, 0, 0, 1, 1]> ()"
            " v = Constant <value_float = 1.0> () d = Pad(c, p, v)",
            "Pad reads it, and fills with another number than 0",
        ),
        ("d = Transpose <perm = [0, 2, 1, 3]> (c)", "y reads it along another axis"),
    ],
)
def test_leaves_what_does_not_follow(between: str, reason: str) -> None:
    constants = {"k": normal(4, 6, 1, 1)} if "(k" in between else {}
    model = two_layers(
        between, w2=normal(3, 4, 8 if "Transpose" in between else 6, 1, 1), **constants
    )
    assert reason in reasons(model)


def test_leaves_a_value_that_another_node_reads_too() -> None:
    model = two_layers("d = Relu(c) z = Tanh(d)", ", float[N,6,8,8] z")
    assert reasons(model)[0] == "Tanh reads it"


def test_leaves_an_output() -> None:
    model = two_layers("d = Relu(c)", ", float[N,6,8,8] d")
    assert reasons(model) == ["d is an output of the graph", "y is an output of the graph"]


def test_leaves_what_a_body_reads() -> None:
    model = two_layers(
        "d = Relu(c) k = Constant <value_float = 1.0> () t = Cast <to = 9> (k)"
        " z = If(t) <then_branch = th () => (float[N,6,8,8] p) { p = Neg(d) },"
        " else_branch = el () => (float[N,6,8,8] q) { q = Identity(d) }>",
        ", float[N,6,8,8] z",
    )
    assert reasons(model)[0] == "a body of If, Loop or Scan reads it"


def test_leaves_shared_weights() -> None:
    model = two_layers("e = Conv(x, w1) d = Relu(c) z = Neg(e)", ", float[N,6,6,6] z")
    assert reasons(model)[:2] == ["the weight is shared", "the weight is shared"]
    model = two_layers("d = Relu(c) z = Conv(d, w2)", ", float[N,4,8,8] z")
    assert "z reads it, and the weight is shared" in reasons(model)


def test_leaves_what_a_caller_can_override() -> None:
    model = two_layers("d = Relu(c)")
    model.graph.inputs.append(model.graph.initializers["w2"])
    assert "y reads it, and the weight is not constant" in reasons(model)
    model = two_layers("d = Relu(c)")
    model.graph.inputs.append(model.graph.initializers["b1"])
    assert reasons(model)[0] == "the bias is not one constant for each output"


def test_leaves_packed_weights() -> None:
    model = parse(
        """
        agraph (float[N,4] x, int8[1] v, float s, float[1] w) => (float[N,5] y)
        { u = DequantizeLinear(v, s) c = MatMul(x, u) y = MatMul(c, w) }
        """,
        v=(normal(1, 4, 6) * 50).astype(np.int8),
        s=np.array(0.01, np.float32),
        w=normal(2, 6, 5),
    )
    assert reasons(model)[0] == "the weight is packed"


def test_leaves_other_element_types() -> None:
    model = parse(
        "agraph (float16[N,4] x, float16[1] v, float16[1] w) => (float16[N,5] y)"
        "{ c = MatMul(x, v) y = MatMul(c, w) }",
        v=normal(1, 4, 6, dtype=np.float16),
        w=normal(2, 6, 5, dtype=np.float16),
    )
    assert reasons(model) == ["the weight is of type FLOAT16"] * 2


def test_leaves_what_float32_would_not_hold() -> None:
    w1, w2 = np.full((6, 3, 3, 3), 1e29, np.float32), np.full((4, 6, 1, 1), 1e-29, np.float32)
    w1[0], w2[:, 0] = 1e-29, 1e35
    model = two_layers("d = Relu(c)", w1=w1, w2=w2)
    apply_pass(EqualizeLayers(), model)
    assert all(np.isfinite(w).all() for w in weights_of(model))


def test_leaves_layers_that_are_even() -> None:
    w1, w2 = np.full((6, 3, 3, 3), 0.5, np.float32), np.full((4, 6, 1, 1), 0.4, np.float32)
    assert_unchanged(EqualizeLayers(), two_layers("d = Relu(c)", w1=w1, w2=w2))


def test_refuses_old_opsets() -> None:
    model = two_layers("d = Relu(c)", opset=10)
    with pytest.raises(AssertionError, match="opset 10 is older than 11"):
        apply_pass(EqualizeLayers(), model)


# ------------------------------------------------------------------ with samples


def images(count: int, seed: int = 9) -> list[Sample]:
    return [{"x": normal(seed + i, 1, 3, 8, 8)} for i in range(count)]


def equalized(model: ir.Model, samples: list[Sample]) -> tuple[float, float, float]:
    """The error of codes before and after; and how often the pass changed something again."""
    before = error_of_codes(model, samples)
    original = model.clone()
    change = apply_pass(EqualizeLayers(), model, observer=observer(model, samples))
    assert_equivalent(original, model, samples=samples)
    again = apply_pass(EqualizeLayers(), model.clone(), observer=observer(model, samples))
    assert not again, again.counts
    return before, error_of_codes(model, samples), sum(change.counts.values())


def test_samples_say_what_pays() -> None:
    model = two_layers(
        "e = Relu(c) f = Conv <group = 6> (e, w3) d = Relu(f)", w3=uneven(5, 6, 1, 3, 3)[::-1]
    )
    before, after, times = equalized(model, images(8))
    assert times == 2
    assert after < 0.7 * before


@pytest.mark.parametrize("between", ["LeakyRelu", "MaxPool", "Concat", "Add", "Mul"])
def test_samples_say_what_pays_through(between: str) -> None:
    """Where a value on the way has codes of its own, its range counts as well."""
    text = BETWEEN[between].replace("(c", "(g").replace("k, c", "k, g")
    constants = {"k": normal(4, 6, 1, 1)} if "k)" in text else {}
    bias = normal(2, 6)
    bias[:3] = -40
    model = two_layers(f"g = Identity(c) {text}", b1=bias, **constants)
    before, after, _ = equalized(model, images(8))
    assert after < 1.1 * before


def test_what_samples_say_is_not_worth_it_stays() -> None:
    model = two_layers(
        "d = Relu(c)",
        w1=np.ones((6, 3, 3, 3), np.float32),
        w2=np.ones((4, 6, 1, 1), np.float32),
        b1=np.ones(6, np.float32),
    )
    context = observer(model, images(8))
    change = apply_pass(EqualizeLayers(), model, observer=context)
    assert not change
    assert "% of the error would go" in change.skips[-1].reason


def test_a_few_rows_say_nothing() -> None:
    model = two_layers("e = Relu(c) d = GlobalAveragePool(e)")
    change = apply_pass(EqualizeLayers(), model, observer=observer(model, images(4)))
    assert change.skips[-1].reason == "the samples hold 4 rows of what it makes; it takes 16"


def test_bodies_stay_where_there_are_samples() -> None:
    model = parse(
        """
        agraph (float[3,4] x, bool k, float[4,6] a, float[6,4] b) => (float[3,4] y)
        {
            y = If(k) <
                then_branch = then () => (float[3,4] t) { p = MatMul(x, a) t = MatMul(p, b) },
                else_branch = other () => (float[3,4] e) { e = Identity(x) }
            >
        }
        """,
        a=normal(1, 4, 6),
        b=normal(2, 6, 4),
    )
    samples: list[Sample] = [{"x": normal(3, 3, 4), "k": np.array(True)}]
    change = apply_pass(EqualizeLayers(), model, observer=observer(model, samples))
    assert {s.reason for s in change.skips} == {"what goes on in a body cannot be observed"}


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_weights_that_are_not_finite_stay(number: float) -> None:
    w2 = normal(3, 4, 6, 1, 1)
    w2[1, 2] = number
    model = two_layers("d = Relu(c)", w2=w2)
    change = apply_pass(EqualizeLayers(), model.clone(), observer=observer(model, images(8)))
    assert not change
    assert change.skips[-1].reason == "its weights are not finite"
    apply_pass(EqualizeLayers(), model)
    assert np.array_equal(np.isfinite(weights_of(model)[1]), np.isfinite(w2))

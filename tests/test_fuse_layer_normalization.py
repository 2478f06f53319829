from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from written_out import assert_fuses, attributes, model, operators, reasons

from graphopt.testing import apply_pass, assert_equivalent, assert_rewrites, parse
from graphopt_passes.fuse.fuse_layer_normalization import FuseLayerNormalization

RANDOM = np.random.default_rng(7)
ARRAYS = {
    "last": np.int64([-1]),
    "same": np.int64([2]),
    "two": np.int64([1, 2]),
    "first": np.int64([0]),
    "g": RANDOM.standard_normal(8).astype(np.float32),
    "b": RANDOM.standard_normal(8).astype(np.float32),
}
NUMBERS = "square=2 eps=0.00001 one=1"

START = "m = ReduceMean(x, last) d = Sub(x, m) "
ROOT = START + "q = Pow(d, square) v = ReduceMean(q, same) w = Add(v, eps) r = Sqrt(w) "
FOLDED = ROOT + "i = Reciprocal(r) "
TORCH = ROOT + "t = Div(d, r) u = Mul(t, g) y = Add(u, b)"

WITH_BOTH = [
    TORCH,
    START + "q = Mul(d, d) v = ReduceMean(q, last) w = Add(eps, v) r = Sqrt(w) "
    "t = Div(d, r) u = Mul(g, t) y = Add(b, u)",
    ROOT + "i = Reciprocal(r) t = Mul(d, i) u = Mul(t, g) y = Add(u, b)",
    ROOT + "i = Div(one, r) j = Mul(g, i) u = Mul(d, j) y = Add(u, b)",
    # TensorFlow.
    ROOT
    + "i = Reciprocal(r) f = Mul(i, g) u = Mul(x, f) n = Mul(m, f) o = Sub(b, n) y = Add(u, o)",
    ROOT
    + "i = Reciprocal(r) f = Mul(g, i) u = Mul(f, x) n = Mul(f, m) o = Sub(b, n) y = Add(o, u)",
    # The same subtraction twice, as PyTorch writes it.
    START + "c = Sub(x, m) q = Mul(c, c) v = ReduceMean(q, last) w = Add(v, eps) r = Sqrt(w) "
    "t = Div(d, r) u = Mul(t, g) y = Add(u, b)",
]


def layer(body: str, **options: str | int) -> ir.Model:
    return model(body, NUMBERS, **options, **ARRAYS)  # type: ignore[arg-type]


def test_becomes_one_node() -> None:
    head = """
    agraph (float[N,2] x) => (float[N,2] y)
    <int64[1] axes = {1}, float two = {2}, float eps = {0.5},
     float[2] g = {3, 4}, float[2] b = {5, 6}>
    """
    assert_rewrites(
        FuseLayerNormalization(),
        head
        + """
        {
            m = ReduceMean(x, axes)
            d = Sub(x, m)
            q = Pow(d, two)
            v = ReduceMean(q, axes)
            w = Add(v, eps)
            r = Sqrt(w)
            n = Div(d, r)
            s = Mul(n, g)
            y = Add(s, b)
        }
        """,
        head + "{ y = LayerNormalization <axis = -1, epsilon = 0.5> (x, g, b) }",
    )


@pytest.mark.parametrize("body", WITH_BOTH)
def test_fuses_every_way_with_scale_and_bias(body: str) -> None:
    changed = layer(body)
    assert_fuses(FuseLayerNormalization(), changed, "LayerNormalization")
    assert attributes(changed) == {"axis": -1, "epsilon": pytest.approx(1e-5)}
    (node,) = changed.graph
    assert [v.name for v in node.inputs if v is not None] == ["x", "g", "b"]


@pytest.mark.parametrize(
    ("end", "bias"),
    [
        ("t = Div(d, r) y = Mul(t, g)", False),
        ("i = Reciprocal(r) f = Mul(i, g) y = Mul(d, f)", False),
        ("y = Div(d, r)", False),
        ("t = Div(d, r) y = Add(t, b)", True),
        ("i = Reciprocal(r) u = Mul(x, i) n = Mul(m, i) o = Sub(b, n) y = Add(u, o)", True),
    ],
)
def test_fuses_without_scale_or_bias(end: str, bias: bool) -> None:
    changed = layer(ROOT + end)
    assert_fuses(FuseLayerNormalization(), changed, "LayerNormalization")
    (node,) = changed.graph
    assert len(node.inputs) == 2 + bias


def test_fuses_axes_of_an_attribute() -> None:
    body = TORCH.replace("ReduceMean(x, last)", "ReduceMean <axes = [-1]> (x)")
    body = body.replace("ReduceMean(q, same)", "ReduceMean <axes = [2]> (q)")
    assert_fuses(FuseLayerNormalization(), layer(body, opset=17), "LayerNormalization")


def test_fuses_several_axes_with_a_scale_that_is_spread() -> None:
    body = TORCH.replace("last", "two").replace("same", "two")
    changed = layer(body)
    assert_fuses(FuseLayerNormalization(), changed, "LayerNormalization")
    (node,) = changed.graph
    assert node.attributes["axis"].value == -2
    assert [tuple(v.shape or ()) for v in node.inputs[1:] if v is not None] == [(3, 8), (3, 8)]


def test_fuses_a_scale_of_more_dimensions_and_of_one_number() -> None:
    text = """
    agraph (float[N,4,8] x) => (float[N,4,8] y)
    <int64[1] last = {-1}, float two = {2}, float[1] eps = {0.5},
     float[1,1,8] g = {1, 2, 3, 4, 5, 6, 7, 8}, float[1,1] b = {7}>
    {
        m = ReduceMean(x, last) d = Sub(x, m) q = Pow(d, two) v = ReduceMean(q, last)
        w = Add(v, eps) r = Sqrt(w) t = Div(d, r) u = Mul(t, g) y = Add(u, b)
    }
    """
    assert_fuses(FuseLayerNormalization(), parse(text), "LayerNormalization")


def test_fuses_a_scale_that_is_computed() -> None:
    body = "h = Neg(g) " + TORCH.replace("Mul(t, g)", "Mul(t, h)")
    assert_fuses(FuseLayerNormalization(), layer(body), "Neg", "LayerNormalization")


HALF = """
<ir_version: 10, opset_import: ["" : 21]>
agraph (float16[N,8] x, float16[8] g, float16[8] b) => (float16[N,8] y)
<int64[1] last = {-1}, float two = {2}, float eps = {0.00001}>
{
    c = Cast <to = 1> (x)
    m = ReduceMean(c, last) d = Sub(c, m) q = Pow(d, two) v = ReduceMean(q, last)
    w = Add(v, eps) r = Sqrt(w) t = Div(d, r)
    h = Cast <to = 10> (t)
    END
}
"""


@pytest.mark.parametrize("end", ["u = Mul(h, g) y = Add(u, b)", "y = Mul(g, h)", "y = Identity(h)"])
def test_fuses_float32_between_casts_of_float16(end: str) -> None:
    arrays = {name: ARRAYS[name].astype(np.float16) for name in "gb"}
    changed = parse(HALF.replace("END", end), **arrays)
    last = ["Identity"] if "Identity" in end else []
    assert_fuses(FuseLayerNormalization(), changed, "LayerNormalization", *last)


def test_leaves_casts_to_other_types() -> None:
    text = HALF.replace("END", "y = Identity(h)").replace("float16[N,8] y", "double[N,8] y")
    arrays = {name: ARRAYS[name].astype(np.float16) for name in "gb"}
    changed = parse(text.replace("to = 10", "to = 11"), **arrays)
    change = apply_pass(FuseLayerNormalization(), changed)
    assert operators(changed) == ["Cast", "LayerNormalization", "Cast", "Identity"]
    assert [s.reason for s in change.skips] == []


def test_leaves_double_for_its_digits() -> None:
    unchanged = layer(ROOT + "y = Div(d, r)", kind="double")
    reason = "it computes with numbers of type DOUBLE"
    assert reasons(FuseLayerNormalization(), unchanged) == [reason]


@pytest.mark.parametrize(
    ("old", "new", "reasons_wanted"),
    [
        ("ReduceMean(x, last)", "ReduceMean(x, two)", ["its means run over different axes"]),
        ("Add(v, eps)", "Add(v, g)", ["its epsilon is not one constant number"]),
        ("Pow(d, square)", "Pow(x, square)", []),
        ("Pow(d, square)", "Pow(d, one)", []),
        ("Div(d, r)", "Div(x, r)", []),
    ],
)
def test_leaves_what_computes_something_else(old: str, new: str, reasons_wanted: list[str]) -> None:
    unchanged = layer(TORCH.replace(old, new))
    assert reasons(FuseLayerNormalization(), unchanged) == reasons_wanted


def test_leaves_means_that_drop_their_axes() -> None:
    text = TORCH.replace("ReduceMean(x, last)", "ReduceMean <keepdims = 0> (x, last)")
    unchanged = layer(text, shape="8,8")
    unchanged.graph.initializers["same"].const_value = ir.tensor(np.int64([1]))
    assert reasons(FuseLayerNormalization(), unchanged) == ["ReduceMean drops its axes"]


def test_leaves_other_axes_than_the_last() -> None:
    unchanged = layer(TORCH.replace("last", "first").replace("same", "first"))
    reason = "it runs over axes [0], which are not the last of 3"
    assert reasons(FuseLayerNormalization(), unchanged) == [reason]


def test_leaves_sizes_that_are_not_known() -> None:
    unchanged = layer(TORCH, shape="2,3,N")
    reason = "the sizes of the axes that it runs over are not known"
    assert reasons(FuseLayerNormalization(), unchanged) == [reason]


def test_leaves_a_large_scale_of_ones_unstored() -> None:
    unchanged = layer(ROOT + "y = Div(d, r)", shape="1,1,20000")
    reason = "it has no scale, and one of shape [20000] is large"
    assert reasons(FuseLayerNormalization(), unchanged) == [reason]


def test_fuses_before_what_is_no_scale_and_no_bias() -> None:
    changed = layer(ROOT + "t = Div(d, r) u = Mul(t, x) y = Add(u, b)")
    assert_fuses(FuseLayerNormalization(), changed, "LayerNormalization", "Mul", "Add")


def test_leaves_what_is_read_within() -> None:
    unchanged = layer(TORCH + " z = Neg(r)", outputs="float[2,3,1] z")
    reason = "other nodes read r, which Sqrt makes within"
    assert reasons(FuseLayerNormalization(), unchanged) == [reason]


def test_leaves_an_epsilon_that_a_caller_can_override() -> None:
    unchanged = layer(TORCH)
    unchanged.graph.inputs.append(unchanged.graph.initializers["eps"])
    reason = "its epsilon is not one constant number"
    assert reasons(FuseLayerNormalization(), unchanged) == [reason]


def test_leaves_opsets_without_it() -> None:
    body = (ROOT + "y = Div(d, r)").replace("(x, last)", " <axes = [-1]> (x)")
    old = layer(body.replace("(q, same)", " <axes = [-1]> (q)"), opset=16)
    assert reasons(FuseLayerNormalization(), old) == ["opset 16 is older than 17; raise it first"]


def test_keeps_large_means_and_empty_batches() -> None:
    text = """
    agraph (float[N,8] x) => (float[N,8] y) <int64[1] last = {-1}, float two = {2}, float eps = {1}>
    { m = ReduceMean(x, last) d = Sub(x, m) q = Mul(d, d) v = ReduceMean(q, last)
      w = Add(v, eps) r = Sqrt(w) y = Div(d, r) }
    """
    changed = parse(text)
    assert apply_pass(FuseLayerNormalization(), changed)
    rows = (RANDOM.integers(0, 9, (4, 8)) + 1000).astype(np.float32)
    samples = [{"x": rows}, {"x": rows[:0]}, {"x": np.full((1, 8), 1e4, np.float32)}]
    assert_equivalent(parse(text), changed, samples=samples)

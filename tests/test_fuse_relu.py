from __future__ import annotations

import numpy as np
import pytest
from written_out import assert_fuses, attributes, model, reasons

from graphopt.contract import Context
from graphopt.operators import is_onnx
from graphopt.testing import apply_pass, assert_equivalent, assert_rewrites
from graphopt_passes.fuse.fuse_relu import FuseRelu

NUMBERS = "zero=0 slope=0.1 minus=-0.1 one=1 two=2"

LEAKY = [
    "m = Mul(x, slope) y = Max(x, m)",
    "m = Mul(slope, x) y = Max(m, x)",
    "m = Mul(x, slope) g = Greater(x, zero) y = Where(g, x, m)",
    "m = Mul(x, slope) g = GreaterOrEqual(x, zero) y = Where(g, x, m)",
    "m = Mul(x, slope) g = Less(x, zero) y = Where(g, m, x)",
    "m = Mul(x, slope) g = Less(zero, x) y = Where(g, x, m)",
    "m = Mul(x, slope) g = Greater(zero, x) y = Where(g, m, x)",
    "y = PRelu(x, slope)",
    "p = Relu(x) n = Neg(x) q = Relu(n) m = Mul(slope, q) y = Sub(p, m)",
    "p = Relu(x) n = Neg(x) q = Relu(n) m = Mul(q, minus) y = Add(m, p)",
]


def test_becomes_one_node() -> None:
    assert_rewrites(
        FuseRelu(),
        "agraph (float[N,8] x) => (float[N,8] y) <float z = {0}> { y = Max(z, x) }",
        "agraph (float[N,8] x) => (float[N,8] y) <float z = {0}> { y = Relu(x) }",
    )


@pytest.mark.parametrize("kind", ["float", "float16"])
@pytest.mark.parametrize("body", LEAKY)
def test_fuses_leaky_relu_in_every_way(body: str, kind: str) -> None:
    changed = model(body, NUMBERS, kind=kind)
    assert_fuses(FuseRelu(), changed, "LeakyRelu")
    assert attributes(changed) == {"alpha": pytest.approx(0.1, rel=1e-3)}


def test_keeps_infinity_and_nan() -> None:
    special = np.float32([np.inf, -np.inf, np.nan, 0.0, -0.0, 1e-40, -3.0, 3.0])
    for body in [*LEAKY, "y = Max(x, zero)"]:
        changed = model(body, NUMBERS, shape="8")
        before = changed.clone()
        assert apply_pass(FuseRelu(), changed)
        assert_equivalent(before, changed, samples=[{"x": special}])


def test_fuses_a_slope_of_one_number_in_more_dimensions() -> None:
    changed = model("y = PRelu(x, k)", k=np.float32([[0.25]]))
    assert_fuses(FuseRelu(), changed, "LeakyRelu")


def test_leaves_a_slope_per_channel() -> None:
    unchanged = model("y = PRelu(x, k)", k=np.ones(8, np.float32))
    assert reasons(FuseRelu(), unchanged) == []


@pytest.mark.parametrize(("slope", "text"), [("two", "2"), ("minus", "-0.1"), ("zero", "0")])
def test_leaves_the_larger_of_other_slopes(slope: str, text: str) -> None:
    unchanged = model(f"m = Mul(x, {slope}) y = Max(x, m)", NUMBERS)
    assert reasons(FuseRelu(), unchanged) == [f"max(x, {text} x) is not LeakyRelu"]


def test_leaves_integers() -> None:
    unchanged = model("y = Max(x, zero)", "zero=0", kind="int32")
    assert reasons(FuseRelu(), unchanged) == ["it computes with numbers of type INT32"]


def test_leaves_double_of_which_onnxruntime_has_no_leaky_relu() -> None:
    unchanged = model(LEAKY[0], NUMBERS, kind="double")
    assert reasons(FuseRelu(), unchanged) == ["it computes with numbers of type DOUBLE"]

    assert_fuses(FuseRelu(), model("y = Max(x, zero)", NUMBERS, kind="double"), "Relu")


def test_leaves_what_makes_a_number_of_nan() -> None:
    unchanged = model("g = Greater(x, zero) y = Where(g, x, zero)", NUMBERS)
    assert reasons(FuseRelu(), unchanged) == []


def test_leaves_the_largest_of_three() -> None:
    assert reasons(FuseRelu(), model("y = Max(x, zero, one)", NUMBERS)) == []


def test_leaves_what_is_read_within() -> None:
    unchanged = model(LEAKY[0] + " z = Relu(m)", NUMBERS, outputs="float[2,3,8] z")
    assert reasons(FuseRelu(), unchanged) == ["other nodes read m, which Mul makes within"]


def test_leaves_a_constant_that_a_caller_can_override() -> None:
    unchanged = model("y = Max(x, zero)", "zero=0")
    unchanged.graph.inputs.append(unchanged.graph.initializers["zero"])
    assert reasons(FuseRelu(), unchanged) == []


def test_leaves_operators_of_other_domains() -> None:
    unchanged = model("y = Max(x, zero)", "zero=0")
    (node,) = unchanged.graph
    node.domain = "local"
    assert not is_onnx(node, "Max")
    assert not FuseRelu().apply(unchanged, Context(lambda: unchanged))

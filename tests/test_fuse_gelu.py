from __future__ import annotations

import pytest
from written_out import assert_fuses, attributes, model, operators, reasons

from graphopt.testing import apply_pass, assert_rewrites, parse
from graphopt_passes.fuse.fuse_gelu import FuseGelu

NUMBERS = (
    "root=1.41421356 inverse=0.70710678 one=1 half=0.5 two=2 three=3 "
    "k=0.044715 s=0.79788456 f=0.0356774081"
)

BY_ERF = [
    "a = Div(x, root) e = Erf(a) p = Add(e, one) m = Mul(x, p) y = Mul(m, half)",
    "a = Mul(inverse, x) e = Erf(a) p = Add(one, e) m = Mul(p, half) y = Mul(m, x)",
    "a = Mul(x, inverse) h = Mul(half, x) e = Erf(a) p = Add(e, one) y = Mul(h, p)",
    "a = Div(x, root) e = Erf(a) p = Add(e, one) m = Mul(p, x) y = Div(m, two)",
    "h = Div(x, two) a = Div(x, root) e = Erf(a) p = Add(e, one) y = Mul(p, h)",
    "a = Div(x, root) e = Erf(a) h = Mul(e, half) p = Add(h, half) y = Mul(x, p)",
]

BY_TANH = [
    "c = Pow(x, three) d = Mul(c, k) a = Add(x, d) b = Mul(a, s) t = Tanh(b) p = Add(t, one) "
    "m = Mul(x, p) y = Mul(m, half)",
    "c = Mul(x, x) d = Mul(c, x) e = Mul(k, d) a = Add(e, x) b = Mul(s, a) t = Tanh(b) "
    "p = Add(one, t) h = Mul(half, x) y = Mul(h, p)",
    "c = Mul(x, k) d = Mul(c, x) a = Add(d, one) e = Mul(x, s) b = Mul(e, a) t = Tanh(b) "
    "p = Add(t, one) m = Mul(x, p) y = Mul(m, half)",
    "c = Pow(x, two) d = Mul(c, f) a = Add(s, d) b = Mul(x, a) t = Tanh(b) "
    "h = Mul(t, half) p = Add(h, half) y = Mul(x, p)",
]


def test_becomes_one_node() -> None:
    assert_rewrites(
        FuseGelu(),
        """
        agraph (float[N,8] x) => (float[N,8] y)
        <float root = {1.41421356}, float one = {1}, float half = {0.5}>
        {
            a = Div(x, root)
            e = Erf(a)
            p = Add(e, one)
            m = Mul(x, p)
            y = Mul(m, half)
        }
        """,
        """
        agraph (float[N,8] x) => (float[N,8] y)
        <float root = {1.41421356}, float one = {1}, float half = {0.5}>
        { y = Gelu(x) }
        """,
    )


@pytest.mark.parametrize("body", BY_ERF)
def test_fuses_erf_in_every_order(body: str) -> None:
    changed = model(body, NUMBERS)
    assert_fuses(FuseGelu(), changed, "Gelu")
    assert attributes(changed) == {}


@pytest.mark.parametrize("body", BY_TANH)
def test_fuses_tanh_in_every_order(body: str) -> None:
    changed = model(body, NUMBERS)
    assert_fuses(FuseGelu(), changed, "Gelu")
    assert attributes(changed) == {"approximate": "tanh"}


def test_fuses_what_is_itself_a_product() -> None:
    body = "w = Mul(x, two) " + BY_ERF[0].replace("x", "w")
    assert_fuses(FuseGelu(), model(body, NUMBERS), "Mul", "Gelu")


def test_fuses_half_precision_by_erf_only() -> None:
    changed = model(BY_ERF[0], NUMBERS, kind="float16")
    assert_fuses(FuseGelu(), changed, "Gelu")

    unchanged = model(BY_TANH[0], NUMBERS, kind="float16")
    assert reasons(FuseGelu(), unchanged) == ["onnxruntime takes Gelu of float16 apart"]


@pytest.mark.parametrize("name", ["root=1.4143", "one=1.001", "half=0.4999"])
def test_leaves_other_numbers(name: str) -> None:
    numbers = " ".join([n for n in NUMBERS.split() if n.split("=")[0] != name.split("=")[0]])
    assert reasons(FuseGelu(), model(BY_ERF[0], f"{numbers} {name}")) == []


def test_leaves_two_different_values() -> None:
    body = "z = Relu(x) " + BY_ERF[0].replace("Mul(x, p)", "Mul(z, p)")
    assert reasons(FuseGelu(), model(body, NUMBERS)) == []


def test_leaves_what_is_read_within() -> None:
    read = model(BY_ERF[0] + " z = Relu(p)", NUMBERS, outputs="float[2,3,8] z")
    assert reasons(FuseGelu(), read) == ["other nodes read p, which Add makes within"]

    output = model(BY_ERF[0], NUMBERS, outputs="float[2,3,8] e")
    assert reasons(FuseGelu(), output) == ["e, which Erf makes within, is an output"]


def test_leaves_what_a_constant_may_enlarge() -> None:
    text = """
    agraph (float[N] x) => (float[A,B,N] y)
    <float[1,1,1] root = {1.41421356}, float one = {1}, float half = {0.5}>
    { a = Div(x, root) e = Erf(a) p = Add(e, one) m = Mul(x, p) y = Mul(m, half) }
    """
    reason = "a constant of 3 dimensions may add some to the result"
    assert reasons(FuseGelu(), parse(text)) == [reason]


def test_leaves_opsets_without_gelu() -> None:
    old = model(BY_ERF[0], NUMBERS, opset=19)
    assert reasons(FuseGelu(), old) == ["opset 19 is older than 20; raise it first"]


def test_fuses_in_the_body_of_an_if() -> None:
    body = f"""
        y = If(k0) <
            then_branch = then () => (float[2,3,8] t) {{ {BY_ERF[0].replace("y =", "t =")} }},
            else_branch = other () => (float[2,3,8] u) {{ u = Relu(x) }}
        >
    """
    changed = model(body, NUMBERS, inputs="bool k0")
    change = apply_pass(FuseGelu(), changed)
    assert change.counts == {"Gelu fused": 1}
    assert operators(changed) == ["If"]

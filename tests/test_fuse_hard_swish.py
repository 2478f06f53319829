from __future__ import annotations

import pytest
from written_out import assert_fuses, attributes, model, reasons

from graphopt.testing import assert_rewrites
from graphopt_passes.fuse.fuse_hard_swish import FuseHardSwish

NUMBERS = "zero=0 three=3 six=6 sixth=0.16666667 one=1 half=0.5 fifth=0.2 minus=-0.5"

SWISH = [
    "a = Add(x, three) c = Clip(a, zero, six) m = Mul(x, c) y = Div(m, six)",
    "a = Add(three, x) c = Clip(a, zero, six) m = Div(c, six) y = Mul(m, x)",
    "a = Add(x, three) c = Clip(a, zero, six) m = Mul(sixth, x) y = Mul(c, m)",
    "a = Add(x, three) r = Relu(a) c = Min(r, six) m = Mul(c, sixth) y = Mul(x, m)",
    "a = Add(x, three) r = Max(zero, a) c = Min(six, r) m = Mul(c, x) y = Mul(m, sixth)",
    "m = Mul(x, sixth) a = Add(m, half) c = Clip(a, zero, one) y = Mul(x, c)",
    "m = Div(x, six) a = Add(half, m) c = Clip(a, zero, one) y = Mul(c, x)",
    "c = HardSigmoid <alpha = 0.16666667, beta = 0.5> (x) y = Mul(x, c)",
]

SIGMOID = [
    ("a = Add(x, three) c = Clip(a, zero, six) y = Div(c, six)", 1 / 6, 0.5),
    ("a = Add(x, three) c = Clip(a, zero, six) y = Mul(sixth, c)", 1 / 6, 0.5),
    ("m = Mul(x, fifth) a = Add(m, half) y = Clip(a, zero, one)", 0.2, 0.5),
    ("m = Mul(x, minus) a = Add(m, half) y = Clip(a, zero, one)", -0.5, 0.5),
    ("a = Add(x, half) y = Clip(a, zero, one)", 1.0, 0.5),
]


def test_becomes_one_node() -> None:
    numbers = "<float three = {3}, float zero = {0}, float six = {6}>"
    assert_rewrites(
        FuseHardSwish(),
        f"""
        agraph (float[N,8] x) => (float[N,8] y) {numbers}
        {{ a = Add(x, three) c = Clip(a, zero, six) m = Mul(x, c) y = Div(m, six) }}
        """,
        f"agraph (float[N,8] x) => (float[N,8] y) {numbers} {{ y = HardSwish(x) }}",
    )


@pytest.mark.parametrize("body", SWISH)
def test_fuses_hard_swish_in_every_order(body: str) -> None:
    assert_fuses(FuseHardSwish(), model(body, NUMBERS), "HardSwish")


@pytest.mark.parametrize(("body", "alpha", "beta"), SIGMOID)
def test_fuses_hard_sigmoid(body: str, alpha: float, beta: float) -> None:
    changed = model(body, NUMBERS)
    assert_fuses(FuseHardSwish(), changed, "HardSigmoid")
    assert attributes(changed) == {"alpha": pytest.approx(alpha), "beta": pytest.approx(beta)}


@pytest.mark.parametrize("body", SWISH)
def test_fuses_half_precision(body: str) -> None:
    assert_fuses(FuseHardSwish(), model(body, NUMBERS, kind="float16"), "HardSwish")


def test_leaves_a_number_that_half_precision_tells_from_six() -> None:
    body, numbers = SWISH[0].replace("six", "more"), NUMBERS + " more=6.02"
    (reason,) = reasons(FuseHardSwish(), model(body, numbers, kind="float16"))
    assert reason == "x * clip(x + 3, 0, 6.01953) * 0.166126 is not HardSwish"


def test_leaves_double_of_which_onnxruntime_has_no_kernel() -> None:
    unchanged = model(SWISH[0], NUMBERS, kind="double")
    assert reasons(FuseHardSwish(), unchanged) == ["it computes with numbers of type DOUBLE"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("a = Add(x, three) c = Clip(a, zero, six) y = Mul(x, c)",
         "x * clip(x + 3, 0, 6) * 1 is not HardSwish"),
        ("a = Add(x, three) c = Clip(a, zero, three) y = Mul(x, c)",
         "x * clip(x + 3, 0, 3) * 1 is not HardSwish"),
        ("c = HardSigmoid(x) y = Mul(x, c)", "its HardSigmoid has alpha 0.2 and beta 0.5"),
        ("a = Add(x, three) c = Clip(a, zero, six) y = Mul(c, half)",
         "it is clipped to 3, not to 1"),
    ],
)  # fmt: skip
def test_leaves_other_numbers(body: str, reason: str) -> None:
    assert reason in reasons(FuseHardSwish(), model(body, NUMBERS))


def test_leaves_what_is_clipped_elsewhere() -> None:
    body = "a = Add(x, three) c = Clip(a, minus, six) m = Mul(x, c) y = Div(m, six)"
    assert reasons(FuseHardSwish(), model(body, NUMBERS)) == []


def test_leaves_what_is_read_within() -> None:
    body = SWISH[0] + " z = Relu(c)"
    unchanged = model(body, NUMBERS, outputs="float[2,3,8] z")
    assert reasons(FuseHardSwish(), unchanged)[0] == "other nodes read c, which Clip makes within"


def test_leaves_opsets_without_hard_swish() -> None:
    old = model(SWISH[0], NUMBERS, opset=13)
    assert reasons(FuseHardSwish(), old) == ["opset 13 is older than 14; raise it first"]

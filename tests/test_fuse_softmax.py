from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from written_out import assert_fuses, attributes, model, operators, reasons

from graphopt.testing import apply_pass, assert_equivalent, assert_rewrites, parse
from graphopt_passes.fuse.fuse_softmax import FuseSoftmax

AXES = {
    "last": np.int64([-1]),
    "same": np.int64([2]),
    "other": np.int64([1]),
    "two": np.int64([1, 2]),
}
SHIFTED = "m = ReduceMax(x, last) s = Sub(x, m) e = Exp(s) "


def softmax(body: str, **options: str) -> ir.Model:
    return model(body, "one=1", **options, **AXES)  # type: ignore[arg-type]


def test_becomes_one_node() -> None:
    assert_rewrites(
        FuseSoftmax(),
        """
        agraph (float[N,8] x) => (float[N,8] y) <int64[1] axes = {1}>
        {
            m = ReduceMax(x, axes)
            s = Sub(x, m)
            e = Exp(s)
            t = ReduceSum(e, axes)
            y = Div(e, t)
        }
        """,
        """
        agraph (float[N,8] x) => (float[N,8] y) <int64[1] axes = {1}>
        { y = Softmax <axis = 1> (x) }
        """,
    )


@pytest.mark.parametrize("kind", ["float", "float16", "double"])
@pytest.mark.parametrize(
    "body",
    [
        SHIFTED + "t = ReduceSum(e, same) y = Div(e, t)",
        SHIFTED + "t = ReduceSum(e, last) r = Reciprocal(t) y = Mul(r, e)",
        "e = Exp(x) t = ReduceSum(e, same) r = Div(one, t) y = Mul(e, r)",
    ],
)
def test_fuses_softmax_in_every_way(body: str, kind: str) -> None:
    changed = softmax(body, kind=kind)
    assert_fuses(FuseSoftmax(), changed, "Softmax")
    assert attributes(changed) == {"axis": 2}


def test_fuses_log_softmax_with_its_axis() -> None:
    changed = model("s = Softmax <axis = 1> (x) y = Log(s)")
    assert_fuses(FuseSoftmax(), changed, "LogSoftmax")
    assert attributes(changed) == {"axis": 1}

    changed = model("s = Softmax(x) y = Log(s)")
    assert_fuses(FuseSoftmax(), changed, "LogSoftmax")
    assert attributes(changed) == {"axis": -1}


def test_keeps_rows_of_infinity_and_nan() -> None:
    inf, nan = np.inf, np.nan
    rows = np.float32([[1, -inf], [-inf, -inf], [inf, 1], [inf, -inf], [nan, 1], [3e38, -3e38]])
    text = """
    agraph (float[6,2] x) => (float[6,2] y) <int64[1] last = {-1}>
    { m = ReduceMax(x, last) s = Sub(x, m) e = Exp(s) t = ReduceSum(e, last) y = Div(e, t) }
    """
    changed = parse(text)
    assert apply_pass(FuseSoftmax(), changed)
    assert_equivalent(parse(text), changed, samples=[{"x": rows}])


def test_a_maximum_along_another_axis_is_still_subtracted() -> None:
    body = "m = ReduceMax(x, other) s = Sub(x, m) e = Exp(s) t = ReduceSum(e, last) y = Div(e, t)"
    changed = softmax(body)
    before = changed.clone()

    change = apply_pass(FuseSoftmax(), changed)

    assert operators(changed) == ["ReduceMax", "Sub", "Softmax"]
    assert change.counts == {"Softmax fused": 1}
    assert_equivalent(before, changed)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("e = Exp(x) t = ReduceSum(e, two) y = Div(e, t)",
         "ReduceSum does not run along one constant axis"),
        ("e = Exp(x) t = ReduceSum(e) y = Div(e, t)",
         "ReduceSum does not run along one constant axis"),
        ("e = Exp(x) t = ReduceSum <keepdims = 0> (e, two) y = Div(e, t)",
         "ReduceSum does not run along one constant axis"),
        ("e = Exp(x) t = ReduceSum <keepdims = 0> (e, other) u = Exp(t) y = Div(e, u)", None),
        ("e = Exp(x) f = Exp(e) t = ReduceSum(e, last) y = Div(f, t)", None),
    ],
)  # fmt: skip
def test_leaves_other_sums(body: str, reason: str | None) -> None:
    found = reasons(FuseSoftmax(), softmax(body))
    assert found == ([] if reason is None else [reason])


def test_leaves_a_sum_that_drops_its_axis() -> None:
    text = """
    agraph (float[8,8] x) => (float[8,8] y) <int64[1] last = {-1}>
    { e = Exp(x) t = ReduceSum <keepdims = 0> (e, last) y = Div(e, t) }
    """
    assert reasons(FuseSoftmax(), parse(text)) == ["ReduceSum drops the axis"]


def test_leaves_a_sum_that_is_read_elsewhere() -> None:
    body = "e = Exp(x) t = ReduceSum(e, last) y = Div(e, t) z = Log(t)"
    unchanged = softmax(body, outputs="float[2,3,1] z")
    reason = "other nodes read t, which ReduceSum makes within"
    assert reasons(FuseSoftmax(), unchanged) == [reason]


def test_leaves_opsets_with_another_softmax() -> None:
    old = model("s = Softmax(x) y = Log(s)", opset=12)
    assert reasons(FuseSoftmax(), old) == ["opset 12 is older than 13; raise it first"]

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from written_out import assert_fuses, attributes, model, reasons

from graphopt.testing import assert_rewrites, parse
from graphopt_passes.fuse.fuse_rms_normalization import FuseRmsNormalization

SCALE = np.random.default_rng(7).standard_normal(8).astype(np.float32)
ROOT = "q = Pow(x, square) v = ReduceMean(q, last) w = Add(v, eps) r = Sqrt(w) "

WITH_SCALE = [
    ROOT + "t = Div(x, r) y = Mul(t, g)",
    ROOT + "i = Reciprocal(r) t = Mul(x, i) y = Mul(g, t)",
    ROOT + "i = Div(one, r) t = Mul(x, i) y = Mul(g, t)",
    ROOT + "i = Reciprocal(r) f = Mul(i, g) y = Mul(x, f)",
    ROOT.replace("Pow(x, square)", "Mul(x, x)") + "t = Div(x, r) y = Mul(t, g)",
]


def layer(body: str, opset: int = 23, **options: str) -> ir.Model:
    numbers = "square=2 eps=0.00001 one=1"
    constants = {"g": SCALE, "last": np.int64([-1]), "first": np.int64([0])}
    return model(body, numbers, opset=opset, **options, **constants)  # type: ignore[arg-type]


def test_becomes_one_node() -> None:
    head = """
    <ir_version: 11, opset_import: ["" : 23]>
    agraph (float[N,2] x) => (float[N,2] y)
    <int64[1] axes = {1}, float two = {2}, float eps = {0.5}, float[2] g = {3, 4}>
    """
    assert_rewrites(
        FuseRmsNormalization(),
        head
        + """
        {
            q = Pow(x, two)
            v = ReduceMean(q, axes)
            w = Add(v, eps)
            r = Sqrt(w)
            i = Reciprocal(r)
            n = Mul(x, i)
            y = Mul(n, g)
        }
        """,
        head + "{ y = RMSNormalization <axis = -1, epsilon = 0.5> (x, g) }",
    )


@pytest.mark.parametrize("body", WITH_SCALE)
def test_fuses_every_way(body: str) -> None:
    changed = layer(body)
    assert_fuses(FuseRmsNormalization(), changed, "RMSNormalization")
    assert attributes(changed) == {"axis": -1, "epsilon": pytest.approx(1e-5)}


def test_fuses_without_scale() -> None:
    changed = layer(ROOT + "y = Div(x, r)")
    assert_fuses(FuseRmsNormalization(), changed, "RMSNormalization")
    assert [v.shape for (node,) in [changed.graph] for v in node.inputs[1:] if v] == [(8,)]


def test_fuses_float32_between_casts_of_float16() -> None:
    text = """
    <ir_version: 11, opset_import: ["" : 23]>
    agraph (float16[N,8] x, float16[8] g) => (float16[N,8] y)
    <int64[1] last = {-1}, float two = {2}, float eps = {0.00001}>
    {
        c = Cast <to = 1> (x)
        q = Pow(c, two) v = ReduceMean(q, last) w = Add(v, eps) r = Sqrt(w)
        i = Reciprocal(r) t = Mul(c, i)
        h = Cast <to = 10> (t)
        y = Mul(g, h)
    }
    """
    changed = parse(text, g=SCALE.astype(np.float16))
    assert_fuses(FuseRmsNormalization(), changed, "RMSNormalization")


def test_leaves_other_axes_than_the_last() -> None:
    unchanged = layer(WITH_SCALE[0].replace("last", "first"))
    reason = "it runs over axes [0], which are not the last of 3"
    assert reasons(FuseRmsNormalization(), unchanged) == [reason]


def test_leaves_what_divides_another_value() -> None:
    body = "h = Neg(x) " + ROOT + "t = Div(h, r) y = Mul(t, g)"
    assert reasons(FuseRmsNormalization(), layer(body)) == []


def test_leaves_what_is_read_within() -> None:
    unchanged = layer(WITH_SCALE[0] + " z = Neg(v)", outputs="float[2,3,1] z")
    reason = "other nodes read v, which ReduceMean makes within"
    assert reasons(FuseRmsNormalization(), unchanged) == [reason]


def test_leaves_opsets_without_it() -> None:
    old = layer(WITH_SCALE[0], opset=21)
    assert reasons(FuseRmsNormalization(), old) == ["opset 21 is older than 23; raise it first"]

"""Names in bodies: what hides an outer value must not catch what a rewrite lets the body read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import graphopt
from graphopt.loading import open_model
from graphopt.operators import node_count
from graphopt.runtime import Session
from graphopt.testing import parse

INPUT_HIDES = """
agraph (float[3] x, int64 n) => (float[3] y)
{{
    s = Exp(x)
    {outer}
    l = Loop(n, "", x) <body = body (int64 i, bool c, float[3] s) => (bool d, float[3] t) {{
        d = Identity(c)
        {inner}
    }}>
    y = Add(l, s)
}}
"""
LOOPS = {
    "identity": ("k = Identity(s)", "t = Add(s, k)"),
    "common subexpression": ("", "e = Exp(x)  t = Add(s, e)"),
}


@pytest.mark.parametrize("kind", LOOPS)
def test_an_input_of_a_body_that_hides_an_outer_value(kind: str) -> None:
    """No sample goes round the loop, so the gate could not tell."""
    outer, inner = LOOPS[kind]
    text = INPUT_HIDES.format(outer=outer, inner=inner).replace('Loop(n, "", x)', "Loop(n, , x)")
    model = parse(text)
    idle = [{"x": np.float32([1, 2, 3]), "n": np.array(0)}]

    run = graphopt.optimize(parse(text), samples=idle, benchmark=False)

    busy = {"x": np.float32([1, 2, 3]), "n": np.array(2)}
    assert np.array_equal(Session(model).run(busy)["y"], Session(run.model).run(busy)["y"])
    assert any("hid an outer value" in note for note in run.notes)


def test_an_initializer_of_a_body_that_hides_an_outer_one() -> None:
    text = """
    agraph (bool c, float[3] x) => (float[3] y)
    <float[3] v = {1.0, 2.0, 3.0}>
    {
        a = Mul(x, v)
        b = If(c) <
            then_branch = then () => (float[3] t)
            <float[3] v = {2.0, 4.0, 6.0}, float[3] u = {1.0, 2.0, 3.0}>
            { m = Mul(a, u)  t = Add(m, v) },
            else_branch = other () => (float[3] e) { e = Abs(a) }
        >
        y = Neg(b)
    }
    """
    x = np.float32([1, 2, 3])
    other = [{"c": np.array(False), "x": x}]

    run = graphopt.optimize(parse(text), samples=other, benchmark=False)

    result = Session(run.model).run({"c": np.array(True), "x": x})["y"]
    a = x * np.float32([1, 2, 3])
    assert np.array_equal(result, -(a * np.float32([1, 2, 3]) + np.float32([2, 4, 6])))


def test_siblings_may_share_names() -> None:
    source = open_model(
        parse(
            """
            agraph (bool c, float[3] x) => (float[3] y)
            {
                y = If(c) <
                    then_branch = then () => (float[3] t) { k = Neg(x)  t = Exp(k) },
                    else_branch = other () => (float[3] t) { k = Abs(x)  t = Exp(k) }
                >
            }
            """
        )
    )

    assert source.notes == ()


def test_calls_of_a_function_count_as_what_they_run() -> None:
    model = parse(
        """
        <ir_version: 10, opset_import: ["" : 21, "local" : 1]>
        agraph (float[2] x) => (float[2] y) { a = local.f (x)  b = local.f (a)  y = Neg(b) }
        <domain: "local", opset_import: ["" : 21]>
        f (p) => (r) { k = Constant <value_float: float = 2.0> ()  q = Mul(p, k)  r = Exp(q) }
        """
    )

    assert node_count(model) == 5


TWICE_HIDDEN = """
agraph (bool c, bool inside, float[3] x) => (float[3] y)
<float[3] k = {1.0, 1.0, 1.0}>
{
    y = If (c) <
        then_branch = outer () => (float[3] a) <float[3] k = {10.0, 10.0, 10.0}> {
            a = If (inside) <
                then_branch = inner () => (float[3] b)
                <float[3] k = {100.0, 100.0, 100.0}> { b = Add(x, k) },
                else_branch = rest () => (float[3] d) { d = Sub(x, k) }
            >
        },
        else_branch = other () => (float[3] e) { e = Abs(x) }
    >
}
"""


def test_what_cannot_be_read_for_certain_is_refused(tmp_path: Path) -> None:
    """onnxruntime takes the outer of two that hide a third; ONNX allows none of it."""
    path = tmp_path / "m.onnx"
    header = '<ir_version: 10, opset_import: ["" : 17]>'
    onnx.save(onnx.parser.parse_model(header + TWICE_HIDDEN), path)
    samples = [{"c": np.array(True), "inside": np.array(True), "x": np.float32([1, 2, 3])}]

    with pytest.raises(graphopt.ModelError, match=r"cannot be read for certain \(2 values in"):
        graphopt.optimize(path, samples=samples, benchmark=False)


HIDDEN_IN_BOTH = """
agraph (bool c, float[3] x) => (float[3] y, float[3] z)
<float[3] k = {7.0, 7.0, 7.0}>
{
    y = If (c) <
        then_branch = t () => (float[3] a) <float[3] k = {1.0, 1.0, 1.0}> { a = Add(x, k) },
        else_branch = e () => (float[3] b) <float[3] k = {2.0, 2.0, 2.0}> { b = Add(x, k) }
    >
    o = Constant <value = float[3] {1.0, 2.0, 3.0}> ()
    m = Add(x, k)
    z = Add(m, o)
}
"""


@pytest.mark.parametrize("verb", ["load", "inspect", "validate", "benchmark", "optimize"])
def test_a_model_in_memory_is_never_modified(verb: str) -> None:
    """Renaming a value renames its tensor, which clones share, and the proto below it."""
    proto = onnx.parser.parse_model('<ir_version: 10, opset_import: ["" : 17]>' + HIDDEN_IN_BOTH)
    model = ir.from_proto(proto)
    before, written = proto.SerializeToString(), ir.to_proto(model).SerializeToString()

    match verb:
        case "load":
            graphopt.load(model)
        case "inspect":
            graphopt.inspect(model)
        case "validate":
            graphopt.validate(model, model, random_samples=1)
        case "benchmark":
            graphopt.benchmark([model], random_samples=1)
        case "optimize":
            graphopt.optimize(model, random_samples=2, benchmark=False)

    assert proto.SerializeToString() == before
    assert ir.to_proto(model).SerializeToString() == written

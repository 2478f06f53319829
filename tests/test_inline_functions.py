from __future__ import annotations

import onnx_ir as ir

from graphopt.contract import Context
from graphopt.testing import assert_rewrites, assert_unchanged
from graphopt_passes.simplify.inline_functions import InlineFunctions

WITH_FUNCTIONS = """
<ir_version: 10, opset_import: ["" : 21, "local" : 1]>
agraph (float[2] x) => (float[2] y) { y = local.twice <by: float = 3.0> (x) }
<domain: "local", opset_import: ["" : 21, "local" : 1]>
twice <by> (a) => (c) { b = local.scaled <by: float = @by> (a)  c = Add(b, b) }
<domain: "local", opset_import: ["" : 21]>
scaled <by> (a) => (c) { k = Constant <value_float: float = @by> ()  c = Mul(a, k) }
"""


def test_inlines_nested_calls_and_their_attributes() -> None:
    model = ir.from_onnx_text(WITH_FUNCTIONS)

    change = assert_rewrites(
        InlineFunctions(),
        model,
        """
        agraph (float[2] x) => (float[2] y)
        {
            k = Constant <value_float: float = 3.0> ()
            b = Mul(x, k)
            y = Add(b, b)
        }
        """,
    )

    assert change.counts == {"function inlined": 2}
    assert not model.functions


def test_leaves_a_model_without_functions() -> None:
    assert_unchanged(InlineFunctions(), "agraph (float[2] x) => (float[2] y) { y = Neg(x) }")


def test_refuses_functions_of_another_opset() -> None:
    model = ir.from_onnx_text(
        """
        <ir_version: 8, opset_import: ["" : 17, "local" : 1]>
        agraph (float[2] x) => (float[2] y) { y = local.f (x) }
        <domain: "local", opset_import: ["" : 11]>
        f (a) => (c) { c = Softmax (a) }
        """
    )

    reason = InlineFunctions().refuse(model, Context(lambda: model))

    assert reason == "function f is of opset 11, the model of 17"

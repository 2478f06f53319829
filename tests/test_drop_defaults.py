from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.testing import apply_pass, assert_equivalent, assert_rewrites, assert_unchanged, parse
from graphopt_passes.simplify.drop_defaults import DropDefaults

CONV = """
agraph (float[1, 2, 5, 5] x, float[3, 2, 3, 3] w) => (float[1, 3, N, M] y)
{{ y = Conv <{}> (x, w) }}
"""
WEIGHT = np.random.default_rng(0).standard_normal((3, 2, 3, 3)).astype(np.float32)


def conv(attributes: str) -> ir.Model:
    return parse(CONV.format(attributes), w=WEIGHT)


def test_drops_the_defaults_of_a_convolution() -> None:
    change = assert_rewrites(
        DropDefaults(),
        conv(
            'kernel_shape = [3, 3], group: int = 1, auto_pad: string = "NOTSET", '
            "strides = [1, 1], dilations = [1, 1], pads = [0, 0, 0, 0]"
        ),
        conv("kernel_shape = [3, 3]"),
    )

    assert change.counts == {"default attribute dropped": 5}


def test_drops_the_defaults_of_a_gemm() -> None:
    assert_rewrites(
        DropDefaults(),
        "agraph (float[2, 3] x, float[4, 3] w) => (float[2, 4] y) "
        "{ y = Gemm <alpha: float = 1.0, beta: float = 1.0, transA: int = 0, transB: int = 1> "
        "(x, w) }",
        "agraph (float[2, 3] x, float[4, 3] w) => (float[2, 4] y) "
        "{ y = Gemm <transB: int = 1> (x, w) }",
    )


def test_keeps_what_differs_from_its_default() -> None:
    assert_unchanged(
        DropDefaults(),
        conv("kernel_shape = [3, 3], strides = [1, 2], dilations = [2, 1], pads = [0, 1, 0, 0]"),
    )


def test_the_default_is_that_of_the_models_opset() -> None:
    """Softmax: axis 1 before opset 13, -1 since."""
    text = """
    <ir_version: 4, opset_import: ["" : {opset}]>
    agraph (float[2, 3, 4] x) => (float[2, 3, 4] y) {{ y = Softmax <axis: int = {axis}> (x) }}
    """
    for opset, axis, dropped in ((11, 1, True), (11, -1, False), (17, -1, True), (17, 1, False)):
        model = parse(text.format(opset=opset, axis=axis))
        before = model.clone()

        assert bool(apply_pass(DropDefaults(), model)) == dropped
        assert_equivalent(before, model)


def test_other_domains_are_left_alone() -> None:
    assert_unchanged(
        DropDefaults(),
        parse(
            """
            <ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
            agraph (float[2, 3] x, float[3, 4] w) => (float[2, 4] y)
            { y = com.microsoft.FusedMatMul <alpha: float = 1.0> (x, w) }
            """
        ),
    )

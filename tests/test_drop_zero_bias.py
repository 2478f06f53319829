from __future__ import annotations

import numpy as np
import pytest

from graphopt.testing import assert_rewrites, assert_unchanged, parse
from graphopt_passes.simplify.drop_zero_bias import DropZeroBias

WEIGHT = np.random.default_rng(0).standard_normal((3, 2, 3, 3)).astype(np.float32)

CONV = """
agraph (float[1, 2, 5, 5] x, float[3, 2, 3, 3] w) => (float[1, 3, 3, 3] y)
<float[3] zeros = {{0.0, -0.0, 0.0}}, float zero = {{0.0}}, int64[1] three = {{3}},
 float[3] some = {{0.0, 1.0, 0.0}}>
{{ {bias} y = Conv(x, w, b) }}
"""


@pytest.mark.parametrize(
    "bias", ["b = Identity(zeros)", "b = Add(zeros, zeros)", "b = Expand(some, three)"]
)
def test_what_is_not_zero_for_certain_stays(bias: str) -> None:
    assert_unchanged(DropZeroBias(), parse(CONV.format(bias=bias), w=WEIGHT))


def test_drops_a_bias_of_zeros_of_either_sign() -> None:
    text = CONV.format(bias="").replace("Conv(x, w, b)", "Conv(x, w, zeros)")

    change = assert_rewrites(
        DropZeroBias(),
        parse(text, w=WEIGHT),
        parse(text.replace("Conv(x, w, zeros)", "Conv(x, w)"), w=WEIGHT),
    )

    assert change.counts == {"zero bias of Conv dropped": 1}


@pytest.mark.parametrize("bias", ["b = Expand(zero, three)", "b = ConstantOfShape(three)"])
def test_drops_a_bias_that_nodes_make_of_zero(bias: str) -> None:
    text = CONV.format(bias=bias)

    assert_rewrites(
        DropZeroBias(),
        parse(text, w=WEIGHT),
        parse(text.replace("Conv(x, w, b)", "Conv(x, w)"), w=WEIGHT),
    )


@pytest.mark.parametrize(("opset", "dropped"), [(9, False), (11, True)])
def test_gemm_needs_its_bias_before_opset_11(opset: int, dropped: bool) -> None:
    model = parse(
        f"""
        <ir_version: 4, opset_import: ["" : {opset}]>
        agraph (float[2, 2] x) => (float[2, 2] y)
        <float[2, 2] w = {{1.0, 2.0, 3.0, 4.0}}, float[2] zeros = {{0.0, 0.0}}>
        {{ y = Gemm(x, w, zeros) }}
        """
    )
    if not dropped:
        assert_unchanged(DropZeroBias(), model)
        return
    expected = model.clone()
    expected.graph[0].resize_inputs(2)
    assert_rewrites(DropZeroBias(), model, expected)


def test_overridable_zeros_stay() -> None:
    model = parse(
        "agraph (float[1, 2, 5, 5] x, float[3, 2, 3, 3] w, float[3] b) => (float[1, 3, 3, 3] y) "
        "{ y = Conv(x, w, b) }",
        w=WEIGHT,
        b=np.zeros(3, np.float32),
    )
    model.graph.inputs.append(model.graph.initializers["b"])

    assert_unchanged(DropZeroBias(), model)


LSTM = """
<ir_version: 8, opset_import: ["" : 17]>
agraph (float[T, N, 4] x, float[1, 12, 4] w, float[1, 12, 3] r, float[1, 24] b)
    => (float[T, 1, N, 3] y)
<int64[1] one = {{1}}, int64[1] three = {{3}}, float[1, 24] zeros = {{{zeros}}}>
{{
    n = Shape<start = 1, end = 2>(x)
    s = Concat<axis = 0>(one, n, three)
    h = ConstantOfShape{value}(s)
    y = LSTM<hidden_size = 3>({inputs})
}}
"""


def lstm(inputs: str, value: str = "") -> str:
    return LSTM.format(inputs=inputs, value=value, zeros=", ".join(["0.0"] * 24))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("x, w, r, b, , h, h", "x, w, r, b"),
        ("x, w, r, zeros", "x, w, r"),
        ("x, w, r, zeros, , h, h", "x, w, r"),
    ],
)
def test_drops_a_state_or_bias_of_zeros_of_a_recurrent_node(before: str, after: str) -> None:
    assert_rewrites(DropZeroBias(), parse(lstm(before)), parse(lstm(after)))


def test_another_state_stays() -> None:
    assert_unchanged(DropZeroBias(), parse(lstm("x, w, r, b, , h, h", "<value = float[1] {0.5}>")))

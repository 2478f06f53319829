from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.testing import apply_pass, assert_equivalent, assert_unchanged, parse
from graphopt_passes.quantize.flatten_convs import FlattenConvs


def classifier(
    places: str = "1, 1",
    conv: str = "Conv (x, w, b)",
    after: str = "y = Softmax <axis = 1> (c)",
    weight: tuple[int, ...] = (5, 8, 1, 1),
    batch: str = "N",
    y: str = "N, S, A, B",
) -> ir.Model:
    sizes = ", ".join(map(str, weight))
    text = f"""
    <ir_version: 8, opset_import: ["" : 17]>
    agraph (float[{batch}, 8, {places}] x, float[{sizes}] w, float[5] b, float[5, 3] v)
        => (float[{y}] y)
    {{
        c = {conv}
        {after}
    }}
    """
    random = np.random.default_rng(5)
    return parse(
        text,
        w=random.standard_normal(weight).astype(np.float32),
        b=random.standard_normal(5).astype(np.float32),
        v=random.standard_normal((5, 3)).astype(np.float32),
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch": "3"},
        {"conv": "Conv (x, w)"},
        {"after": "y = Relu(c)"},
        {"after": "s = Sigmoid(c) y = Mul(s, c)"},
    ],
    ids=str,
)
def test_a_last_conv_on_one_place_becomes_a_gemm(options: dict[str, str]) -> None:
    model = classifier(**options)  # type: ignore[arg-type]
    before = model.clone()

    change = apply_pass(FlattenConvs(), model)

    assert change.counts == {"Conv on one place became Gemm": 1}
    assert [node.op_type for node in model.graph][:3] == ["Flatten", "Gemm", "Reshape"]
    assert_equivalent(before, model)
    assert not apply_pass(FlattenConvs(), model)


@pytest.mark.parametrize(
    "options",
    [
        {"places": "2, 1"},
        {"places": "H, W"},
        {"places": "3, 3", "weight": (5, 8, 3, 3)},
        {"conv": "Conv <pads = [0, 1, 0, 1]> (x, w, b)"},
        {"conv": "Conv <group = 2> (x, w)", "weight": (4, 4, 1, 1)},
    ],
    ids=str,
)
def test_leaves_other_convs(options: dict[str, object]) -> None:
    assert not assert_unchanged(FlattenConvs(), classifier(**options)).skips  # type: ignore[arg-type]


def test_leaves_a_conv_before_another_product() -> None:
    model = classifier(after="f = Flatten(c) y = MatMul(f, v)", y="N, S")
    skips = assert_unchanged(FlattenConvs(), model).skips
    assert [skip.reason for skip in skips] == ["another product comes after it"]

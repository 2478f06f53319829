"""Weights in number formats are, as onnxruntime widens them, what the format says they are."""

from __future__ import annotations

from typing import get_args, get_type_hints

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from on_codes import normal

from graphopt.contract import Context
from graphopt.packing import packed_weights
from graphopt.registry import pass_class
from graphopt.skeleton import infer_shapes
from graphopt.spec import parse_pipeline
from graphopt.testing import apply_pass, parse
from graphopt_passes.quantize.convert_numbers import ConvertNumbers
from graphopt_passes.quantize.number_formats import FORMATS, encode
from graphopt_passes.quantize.number_weights import convert_weights


def converted(model: ir.Model, name: str) -> ir.Model:
    infer_shapes(model)
    convert_weights(model, Context(lambda: model), FORMATS[name])
    return model


def folded(model: ir.Model, name: str, folder: object) -> np.ndarray:
    """What onnxruntime makes of a weight at load."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = f"{folder}/optimized.onnx"
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    ort.InferenceSession(proto.SerializeToString(), options)
    weights = onnx.load(options.optimized_model_filepath).graph.initializer
    return onnx.numpy_helper.to_array(next(w for w in weights if w.name == name))


@pytest.mark.parametrize("name", sorted(FORMATS))
@pytest.mark.parametrize(
    ("body", "shape", "shared"),
    [
        ("(float[1,32,6,6] x) => (float[N,C,H,W] y) { y = Conv(x, w) }", (40, 32, 3, 3), (1, 2, 3)),
        ("(float[2,96] x) => (float[N,M] y) { y = MatMul(x, w) }", (96, 50), (0,)),
        ("(float[2,96] x) => (float[N,M] y) { y = Gemm<transB = 1>(x, w) }", (50, 96), (1,)),
    ],
    ids=["Conv", "MatMul", "Gemm"],
)
def test_it_is_what_the_format_says(
    name: str, body: str, shape: tuple[int, ...], shared: tuple[int, ...], tmp_path: object
) -> None:
    weight = normal(0, *shape)
    dims = ",".join(map(str, shape))
    model = parse(f"agraph {body}".replace(") =>", f", float[{dims}] w) =>", 1), w=weight)

    made = folded(converted(model, name), "w", tmp_path)

    encoded = encode(weight, FORMATS[name], shared)
    if encoded.factor is None:
        np.testing.assert_array_equal(made, encoded.numbers())
    else:
        # Its one factor is multiplied into the codebook before the scales.
        np.testing.assert_allclose(made, encoded.numbers(), rtol=1e-6)
    assert len(list(packed_weights(model.graph))) == 1


def test_the_bytes_are_those_of_the_format() -> None:
    model = parse(
        "agraph (float[2,256] x, float[256,512] w) => (float[N,M] y) { y = MatMul(x, w) }",
        w=normal(0, 256, 512),
    )
    size = len(ir.to_proto(converted(model, "mxfp4")).SerializeToString())

    codes_and_scales = 256 * 512 // 2 + 8 * 512
    assert codes_and_scales < size < codes_and_scales + 3000


def test_a_float16_weight_stays_one(tmp_path: object) -> None:
    weight = normal(0, 64, 32).astype(np.float16)
    model = parse(
        "agraph (float16[2,64] x, float16[64,32] w) => (float16[N,M] y) { y = MatMul(x, w) }",
        w=weight,
    )
    value = next(iter(packed_weights(converted(model, "int8").graph)))

    assert value.dtype == ir.DataType.FLOAT16


def test_every_format_can_be_asked_for() -> None:
    choices = get_args(get_type_hints(ConvertNumbers)["format"])
    assert set(choices) == {"float16", "bfloat16", *FORMATS}
    for name in FORMATS:
        assert parse_pipeline(f"convert-numbers{{format={name}}}", pass_class)


def test_the_pass_stores_weights_in_it() -> None:
    model = parse(
        "agraph (float[2,96] x, float[96,50] w) => (float[N,M] y) { y = MatMul(x, w) }",
        w=normal(0, 96, 50),
    )
    change = apply_pass(ConvertNumbers(format="nf4"), model)

    assert change.counts == {"weight of MatMul stored as nf4": 1}
    assert ConvertNumbers(format="nf4").narrow() is None
    model.opset_imports[""] = 11
    assert ConvertNumbers(format="nf4").refuse(model, Context(lambda: model))


def test_what_is_no_weight_stays() -> None:
    model = parse(
        "agraph (float[64,64] x, float[64,64] w) => (float[64,64] y) { y = Add(x, w) }",
        w=normal(0, 64, 64),
    )
    infer_shapes(model)
    change = convert_weights(model, Context(lambda: model), FORMATS["nf4"])

    assert not change
    assert "not as a weight" in change.skips[0].reason

"""The zeros of weights: plain, in codes, and packed in every other form."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from packed_models import FORMS, Form

from graphopt.content import CHUNK_BYTES
from graphopt.encoding import Encoding
from graphopt.layer_costs import LayerCost, layers_of_model
from graphopt.rewriting import Names, tensor_of
from graphopt.testing import parse
from graphopt.zeros import COMPUTED_MAXIMUM, count_equal


def _only(model: ir.Model) -> LayerCost:
    (layer,) = [layer for layer in layers_of_model(model) if layer.op_type == "MatMul"]
    return layer


@pytest.mark.parametrize("name", FORMS)
def test_a_packed_weight_counts_as_the_plain_one(name: str) -> None:
    form: Form = FORMS[name]
    narrow = form.narrow((64, 96), seed=1)
    book = np.where(np.arange(narrow.levels) == 1, 0, narrow.codebook)
    narrow = type(narrow)(narrow.codes, np.float32(book), narrow.scales, narrow.offsets)
    text = "agraph (float[4, 64] x, float[64, 96] w) => (float[4, 96] y) { y = MatMul(x, w) }"
    plain = parse(text, w=np.asarray(narrow.numbers(), np.float32))
    packed = parse(text)
    (weight,) = (v for v in packed.graph.inputs if v.name == "w")
    packed.graph.inputs.remove(weight)
    encoding = Encoding(packed.graph, Names(packed), tensor_of)
    weight.replace_all_uses_with(encoding.weight(narrow, ir.DataType.FLOAT, "w"))
    encoding.close()

    assert len(packed.graph) > 1
    assert layers_of_model(packed) == (_only(plain),)
    assert _only(plain).parameters == 64 * 96


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int4", "uint4", "int2"])
@pytest.mark.parametrize("zero_point", ["none", "one", "channels"])
def test_codes_count_through_dequantize_linear(dtype: str, zero_point: str) -> None:
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    random = np.random.default_rng(3)
    codes = random.integers(0, 2, (5, 7)).astype(kind)
    points = {"none": [0] * 7, "one": [1] * 7, "channels": [0, 1] * 3 + [0]}[zero_point]
    last = "" if zero_point == "none" else ", z"
    model = parse(
        f"""
        <ir_version: 13, opset_import: ["" : 25]>
        agraph (float[4, 7] x, {dtype}[5, 7] c, float[7] s, {dtype}[7] z) => (float[4, 5] y)
        {{
            w = DequantizeLinear<axis = 1>(c, s{last})
            t = Transpose(w)
            y = MatMul(x, t)
        }}
        """,
        c=codes,
        s=np.ones(7, np.float32),
        z=np.array(points).astype(kind),
    )

    (layer,) = layers_of_model(model)

    expected = np.mean(codes.astype(int) == np.array(points))
    assert (layer.macs, layer.parameters) == (4 * 5 * 7, 35)
    assert layer.zero_share == pytest.approx(float(expected), abs=1e-12)


def test_a_scale_of_zero_makes_zeros() -> None:
    model = parse(
        """
        agraph (float[4, 5] x, int8[5, 2] c, float[2] s) => (float[4, 2] y)
        { w = DequantizeLinear<axis = 1>(c, s) y = MatMul(x, w) }
        """,
        c=np.ones((5, 2), np.int8),
        s=np.float32([0, 1]),
    )

    assert _only(model).zero_share == 0.5


@pytest.mark.parametrize(("inputs", "share"), [(64, 1 / 16), (48, None)])
def test_codes_that_a_kernel_reads(inputs: int, share: float | None) -> None:
    blocks = -(-inputs // 32)
    every = np.arange(256, dtype=np.uint8)
    model = parse(
        f"""
        <ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
        agraph (float[3, {inputs}] x, uint8[16, {blocks}, 16] w, float[{16 * blocks}] s)
            => (float[3, 16] y)
        {{
            y = com.microsoft.MatMulNBits
                <K = {inputs}, N = 16, bits = 4, block_size = 32>(x, w, s)
        }}
        """,
        w=np.resize(every, (16, blocks, 16)),
        s=np.ones(16 * blocks, np.float32),
    )

    assert layers_of_model(model) == (
        LayerCost(
            "y",
            "com.microsoft.MatMulNBits",
            3 * inputs * 16,
            inputs * 16,
            inputs * 16,
            share,
            None,
        ),
    )


def test_large_packed_weights_are_not_computed() -> None:
    rows = COMPUTED_MAXIMUM // 64 + 1
    model = parse(
        f"""
        agraph (float[1, {rows}] x, uint8[{rows}, 64] c, float[256] b) => (float[1, 64] y)
        {{ i = Cast<to = 6>(c) w = Gather(b, i) y = MatMul(x, w) }}
        """,
        c=np.zeros((rows, 64), np.uint8),
        b=np.zeros(256, np.float32),
    )

    assert (_only(model).parameters, _only(model).zero_share) == (rows * 64, None)


# ------------------------------------------------------------------ tensors


@pytest.mark.parametrize("shift", [0, 2, 4100])
def test_zeros_in_external_data_that_begins_anywhere(tmp_path: Path, shift: int) -> None:
    array = np.zeros(CHUNK_BYTES // 8 + 1000)
    array[::3] = 1
    (tmp_path / "w.data").write_bytes(b"\1" * shift + array.tobytes())
    tensor = ir.ExternalTensor(
        "w.data", shift, array.nbytes, ir.DataType.DOUBLE,
        shape=ir.Shape(array.shape), name="w", base_dir=tmp_path,
    )  # fmt: skip

    assert count_equal(tensor, 0) == np.count_nonzero(array == 0)


@pytest.mark.parametrize("count", range(1, 9))
@pytest.mark.parametrize("dtype", [ml_dtypes.int4, ml_dtypes.uint4, ml_dtypes.int2])
def test_codes_behind_the_last_one_do_not_count(count: int, dtype: type) -> None:
    array = np.array([0, 1] * 4)[:count].astype(dtype)

    assert count_equal(ir.tensor(array), 0) == -(-count // 2)
    assert count_equal(ir.tensor(array), 1) == count // 2

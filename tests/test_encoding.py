"""What the encoder writes is what onnxruntime makes of it, at load, in the bytes that it claims."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt.code_fields import bits_per_code, fields_of, unpack
from graphopt.contract import Context
from graphopt.encoding import NODES_BYTES, Encoding, Narrow, spread, why_too_large
from graphopt.packing import is_packed, packed_weights
from graphopt.rewriting import Names
from graphopt.testing import parse
from graphopt_passes.simplify.fold_constants import FoldConstants

LEVELS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 13, 16, 24, 32, 64, 100, 128, 250, 256)


def random_narrow(levels: int, shape: tuple[int, ...] = (6, 5, 7), **parts: object) -> Narrow:
    rng = np.random.default_rng(levels)
    codes = rng.integers(0, levels, shape).astype(np.uint8)
    book = rng.normal(size=levels).astype(np.float32)
    return Narrow(**{"codes": codes, "codebook": book, **parts})  # type: ignore[arg-type]


def written(*narrows: Narrow, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Model:
    """A model that outputs its input, plus each weight in an output of its own."""
    kind = dtype.name.lower()
    dims = ",".join(map(str, narrows[0].codes.shape))
    outputs = ", ".join(f"{kind}[{dims}] y{i}" for i in range(len(narrows)))
    body = " ".join(f"y{i} = Max(x, x)" for i in range(len(narrows)))
    model = parse(f"agraph ({kind}[{dims}] x) => ({outputs}) {{ {body} }}")
    encoding = Encoding(model.graph, Names(model), lambda a, name: ir.Tensor(a, name=name))
    readers = list(model.graph)
    for number, (narrow, reader) in enumerate(zip(narrows, readers, strict=True)):
        reader.replace_input_with(1, encoding.weight(narrow, dtype, f"weight{number}"))
    encoding.close()
    return model


def run(model: ir.Model, tmp_path: Path, optimized: bool = True) -> tuple[list[np.ndarray], int]:
    """The outputs for the lowest input, and how many nodes onnxruntime runs."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = (
        level.ORT_ENABLE_BASIC if optimized else level.ORT_DISABLE_ALL
    )
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    session = ort.InferenceSession(proto.SerializeToString(), options)
    source = session.get_inputs()[0]
    dtype = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}
    low = np.full(source.shape, -100, dtype.get(source.type, np.float64))
    outputs = session.run(None, {source.name: low})
    return outputs, len(onnx.load(tmp_path / "optimized.onnx").graph.node)


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("blocks", [None, (1, 1, 1), (6, 1, 1), (2, 5, 1), (3, 1, 7), (6, 5, 7)])
def test_onnxruntime_folds_to_the_numbers(
    levels: int, blocks: tuple[int, ...] | None, tmp_path: Path
) -> None:
    parts = {}
    if blocks is not None:
        parts = {"scales": np.random.default_rng(1).normal(size=blocks).astype(np.float32)}
        parts["offsets"] = parts["scales"] * 2
    narrow = random_narrow(levels, **parts)
    model = written(narrow)

    (output,), nodes = run(model, tmp_path)
    np.testing.assert_array_equal(output, narrow.numbers())
    assert nodes == 1

    (output,), nodes = run(model, tmp_path, optimized=False)
    np.testing.assert_array_equal(output, narrow.numbers())
    assert nodes == len(model.graph)


@pytest.mark.parametrize("levels", [3, 8, 16, 256])
def test_each_group_of_rows_has_its_codebook(levels: int, tmp_path: Path) -> None:
    books = np.random.default_rng(2).normal(size=(3, levels)).astype(np.float32)
    narrow = random_narrow(levels, codebook=books, scales=np.full((6, 1, 1), 2.0, np.float16))

    (output,), nodes = run(written(narrow), tmp_path)

    expected = 2 * books[np.repeat(np.arange(3), 2)[:, None, None], narrow.codes]
    np.testing.assert_array_equal(output, expected)
    np.testing.assert_array_equal(narrow.numbers(), expected)
    assert nodes == 1


@pytest.mark.parametrize("dtype", ["int8", "float16", "float64"])
def test_other_types(dtype: str, tmp_path: Path) -> None:
    book = np.linspace(-100, 100, 16).astype("float32" if dtype == "float64" else dtype)
    narrow = random_narrow(16, codebook=book)

    (output,), nodes = run(written(narrow, dtype=ir.DataType.from_numpy(np.dtype(dtype))), tmp_path)

    np.testing.assert_array_equal(output, book[narrow.codes])
    assert output.dtype == dtype
    assert nodes == 1


@pytest.mark.parametrize(
    "dtype", [np.float16, ml_dtypes.float8_e8m0fnu, ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16]
)
def test_narrow_scales(dtype: np.dtype, tmp_path: Path) -> None:
    scales = np.exp2(np.arange(6, dtype=np.float32) - 3).astype(dtype).reshape(6, 1, 1)
    narrow = random_narrow(16, scales=scales)
    model = written(narrow)

    (output,), nodes = run(model, tmp_path)

    np.testing.assert_array_equal(output, narrow.numbers())
    assert nodes == 1


def test_a_float16_weight_with_scales(tmp_path: Path) -> None:
    scales = np.linspace(0.1, 3, 6, dtype=np.float32).reshape(6, 1, 1)
    narrow = random_narrow(8, scales=scales)

    (output,), nodes = run(written(narrow, dtype=ir.DataType.FLOAT16), tmp_path)

    np.testing.assert_array_equal(output, narrow.numbers().astype(np.float16))
    assert nodes <= 3  # onnxruntime computes Max in float32.


def test_the_sum_of_two(tmp_path: Path) -> None:
    model = written(random_narrow(2))
    (reader,) = [node for node in model.graph if node.op_type == "Max"]
    encoding = Encoding(model.graph, Names(model), lambda a, name: ir.Tensor(a, name=name))
    both = [random_narrow(2, scales=np.full((6, 1, 1), scale, np.float32)) for scale in (1.0, 0.25)]
    reader.replace_input_with(1, encoding.total(both, ir.DataType.FLOAT, "both"))
    encoding.close()

    (output,), nodes = run(model, tmp_path)

    np.testing.assert_array_equal(output, both[0].numbers() + both[1].numbers())
    assert nodes == 1


@given(st.integers(1, 256), st.integers(0, 70))
def test_codes_come_back_from_their_bytes(levels: int, count: int) -> None:
    codes = np.random.default_rng(levels).integers(0, levels, count).astype(np.uint8)
    fields = fields_of(levels)

    packed = [field.pack(codes) for field in fields]

    assert [len(p) for p in packed] == [field.stored_bytes(count) for field in fields]
    np.testing.assert_array_equal(unpack(fields, packed, count), codes)


def test_bits() -> None:
    expected = {2: 1, 3: 1.6, 4: 2, 8: 3, 16: 4, 32: 5, 64: 6, 128: 7, 256: 8}
    assert {levels: round(bits_per_code(levels), 9) for levels in expected} == expected
    every = [bits_per_code(levels) for levels in range(1, 257)]
    assert every == sorted(every)


@pytest.mark.parametrize("levels", [2, 3, 8, 16, 32, 64, 256])
def test_the_file_is_what_the_arithmetic_says(levels: int) -> None:
    narrow = random_narrow(levels, (64, 96), scales=np.ones((64, 3), np.float16))
    tables = sum(field.table().nbytes for field in narrow.fields if field.digits > 1)

    empty = len(ir.to_proto(written(random_narrow(1, (1, 1)))).SerializeToString())
    size = len(ir.to_proto(written(narrow)).SerializeToString())
    codes = round(64 * 96 * bits_per_code(levels) / 8)

    assert narrow.stored_bytes == pytest.approx(codes + levels * 4 + 64 * 3 * 2, abs=3)
    fields = len(narrow.fields)
    assert size - tables - empty <= narrow.stored_bytes + NODES_BYTES + 150 * (fields - 1) + 100
    assert size - tables >= narrow.stored_bytes
    assert narrow.bits_per_weight == 8 * narrow.stored_bytes / (64 * 96)


def test_weights_share_tables_and_equal_codebooks() -> None:
    book = np.linspace(-1, 1, 16, dtype=np.float32)
    alone = written(random_narrow(16, codebook=book))
    both = written(random_narrow(16, codebook=book), random_narrow(16, (6, 5, 14), codebook=book))

    # Codes, and the shape: all else is there already.
    assert len(both.graph.initializers) == len(alone.graph.initializers) + 2
    # Max, Cast, Gather and Reshape.
    assert len(both.graph) == len(alone.graph) + 4


@pytest.mark.parametrize("levels", [2, 8, 16, 256])
def test_what_is_written_is_packed_and_stays_so(levels: int) -> None:
    model = written(random_narrow(levels, (16, 8, 7), scales=np.ones((16, 1, 1), np.float32)))

    assert [value.name for value in packed_weights(model.graph)] == ["weight0"]
    (reader,) = [node for node in model.graph if node.op_type == "Max"]
    assert all(is_packed(o) for node in model.graph if node is not reader for o in node.outputs)


def test_dequantized_codes_are_packed() -> None:
    model = written(random_narrow(16, (16, 8), codebook=np.arange(16, dtype=np.int8)), dtype=I8)
    codes = model.graph[-1].inputs[1]
    scale = ir.Value(name="scale", const_value=ir.tensor(np.float32(0.5)), type=FLOAT)
    model.graph.register_initializer(scale)
    node = ir.node("DequantizeLinear", [codes, scale])
    model.graph.append(node)

    assert is_packed(node.outputs[0])


I8, FLOAT = ir.DataType.INT8, ir.TensorType(ir.DataType.FLOAT)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"codebook": np.zeros((1, 1, 2), np.float32)}, "is of shape"),
        ({"codebook": np.zeros((4, 2), np.float32)}, "6 rows are no 4 equal groups"),
        ({"codebook": np.zeros(257, np.float32)}, "from 1 to 256 levels"),
        ({"scales": np.ones((4, 1, 1), np.float32)}, "blocks of shape"),
        ({"scales": np.ones(6, np.float32)}, "blocks of shape"),
        (
            {"scales": np.ones((6, 1, 1)), "offsets": np.ones((1, 1, 1))},
            "scales and offsets are of one shape",
        ),
        (
            {"codebook": np.zeros(2, np.int8), "scales": np.ones((1, 1, 1))},
            "int8 numbers get their scales",
        ),
    ],
)
def test_parts_that_do_not_fit(parts: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        random_narrow(2, **parts)


def test_blocks_are_spread() -> None:
    blocks = np.array([[1, 2], [3, 4]], np.float16)
    np.testing.assert_array_equal(
        spread(blocks, (4, 2)), np.array([[1, 2], [1, 2], [3, 4], [3, 4]], np.float32)
    )


def test_what_onnxruntime_would_not_fold_is_told() -> None:
    assert why_too_large(1 << 28, ir.DataType.FLOAT) is None
    reason = why_too_large((1 << 28) + 1, ir.DataType.FLOAT)
    assert reason is not None and "at every inference" in reason
    assert why_too_large(1 << 29, ir.DataType.INT8) is None


def test_fold_constants_leaves_it() -> None:
    model = written(random_narrow(8, (16, 8, 7)))
    before = len(model.graph)
    FoldConstants().apply(model, Context(lambda: model))
    assert len(model.graph) == before

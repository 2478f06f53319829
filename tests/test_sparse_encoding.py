"""What is written without its zeros comes back bit for bit, as one initializer, in fewer bytes."""

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

from graphopt.code_fields import unpack
from graphopt.encoding import Encoding, Narrow, sparse_codes
from graphopt.packing import is_packed, packed_weights
from graphopt.rewriting import Names
from graphopt.sparse_encoding import (
    LONGEST,
    MASK,
    Placement,
    Sparse,
    narrowest_type,
    placements,
    sparse_of,
)
from graphopt.testing import parse

FULL = 1 << 10
"""Of shape [1024], which fills all bytes of a mask."""


def pruned(density: float, *shape: int, seed: int = 0) -> np.ndarray:
    """float32 with about so many numbers that are not zero, the last one always zero."""
    rng = np.random.default_rng(seed)
    array = np.where(rng.random(shape) < density, rng.standard_normal(shape), 0.0)
    array.reshape(-1)[-1:] = 0.0
    return array.astype(np.float32)


def reader(dtype: ir.DataType, shape: tuple[int, ...]) -> ir.Model:
    """A model that outputs its input twice; a weight is to be the second."""
    kind, dims = dtype.name.lower(), ",".join(map(str, shape))
    rows = ",".join(map(str, (2 * shape[0], *shape[1:])))
    return parse(f"agraph ({kind}[{dims}] x) => ({kind}[{rows}] y) {{ y = Concat<axis=0>(x, x) }}")


def encoding_of(model: ir.Model) -> Encoding:
    return Encoding(model.graph, Names(model), lambda array, name: ir.Tensor(array, name=name))


def written(sparse: Sparse, dtype: ir.DataType) -> ir.Model:
    """A model that outputs a weight that is stored without its zeros."""
    model = reader(dtype, sparse.shape)
    encoding = encoding_of(model)
    model.graph[0].replace_input_with(1, encoding.sparse(sparse, dtype, "weight"))
    encoding.close()
    return model


def in_codes(narrow: Narrow, dtype: ir.DataType) -> ir.Model:
    model = reader(dtype, narrow.codes.shape)
    encoding = encoding_of(model)
    model.graph[0].replace_input_with(1, encoding.weight(narrow, dtype, "weight"))
    encoding.close()
    return model


def computed(model: ir.Model, folder: Path) -> np.ndarray:
    """The weight, of which onnxruntime makes an initializer at load, and the same when it does not.

    As bits, so that zeros of both signs and kinds of NaN are told apart.
    """
    proto, found = ir.to_proto(model), []
    onnx.checker.check_model(proto, full_check=True)
    level = ort.GraphOptimizationLevel
    for chosen in (level.ORT_ENABLE_ALL, level.ORT_DISABLE_ALL):
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = chosen
        options.optimized_model_filepath = str(folder / f"{chosen.name}.onnx")
        session = ort.InferenceSession(proto.SerializeToString(), options)
        (source,) = session.get_inputs()
        dtype = ir.DataType[source.type[len("tensor(") : -1].upper()].numpy()
        (output,) = session.run(None, {"x": np.zeros(source.shape, dtype)})
        found.append(bits(output[len(output) // 2 :]))
    folded = onnx.load(folder / "ORT_ENABLE_ALL.onnx").graph
    assert [node.op_type for node in folded.node] == ["Concat"]
    assert len(folded.initializer) == 1
    np.testing.assert_array_equal(*found)
    return found[0]


def bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")


def sparse(array: np.ndarray) -> Sparse:
    found = sparse_of(array)
    assert found is not None
    return found


# ------------------------------------------------------------------ in the graph


@pytest.mark.parametrize("shape", [(9, 7, 13), (FULL,), (5000,), (4, 3)])
@pytest.mark.parametrize("density", [0.0, 0.002, 0.02, 0.1, 0.2, 0.3, 0.6, 1.0])
def test_onnxruntime_folds_to_one_initializer(
    density: float, shape: tuple[int, ...], tmp_path: Path
) -> None:
    array = pruned(density, *shape)
    model = written(sparse(array), ir.DataType.FLOAT)

    np.testing.assert_array_equal(computed(model, tmp_path), bits(array))


@pytest.mark.parametrize("place", [0, 1, 255, 256, 65535, 65536, 199_999])
def test_a_single_number(place: int, tmp_path: Path) -> None:
    array = np.zeros(200_000, np.float32)
    array[place] = 0.1
    found = sparse(array)

    assert found.stored_bytes < 300
    np.testing.assert_array_equal(
        computed(written(found, ir.DataType.FLOAT), tmp_path), bits(array)
    )


@pytest.mark.parametrize("density", [0.003, 0.05, 0.3])
@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int8])
def test_other_types(dtype: type, density: float, tmp_path: Path) -> None:
    array = (100 * pruned(density, 40, 31)).astype(dtype)
    model = written(sparse(array), ir.DataType.from_numpy(np.dtype(dtype)))

    np.testing.assert_array_equal(computed(model, tmp_path), bits(array))


@pytest.mark.parametrize("density", [0.003, 0.05, 0.3])
def test_numbers_that_are_halves_are_stored_so(density: float, tmp_path: Path) -> None:
    for half in (np.float16, ml_dtypes.bfloat16):
        array = pruned(density, 40, 31).astype(half).astype(np.float32)
        array[0, 0] = 1.0 if half == np.float16 else 2.0**100
        found = sparse(array)

        assert found.numbers.dtype == half
        model = written(found, ir.DataType.FLOAT)
        np.testing.assert_array_equal(computed(model, tmp_path), bits(array))


@pytest.mark.parametrize("density", [0.003, 0.3])
def test_zeros_of_the_other_sign_infinities_and_kinds_of_nan(
    density: float, tmp_path: Path
) -> None:
    special = np.array([0x80000000, 0x7F800000, 0xFF800000, 0x7FC00001, 0xFFC00000, 1], np.uint32)
    array = pruned(density, 60, 31).view(np.uint32)
    array[0, : len(special)] = special
    array = array.view(np.float32)

    found = computed(written(sparse(array), ir.DataType.FLOAT), tmp_path)

    np.testing.assert_array_equal(found, bits(array))


@pytest.mark.parametrize("density", [0.0, 0.004, 0.05, 0.3])
@pytest.mark.parametrize("levels", [1, 2, 3, 5, 16, 17, 100, 256])
@pytest.mark.parametrize("scale_type", [None, np.float16])
def test_codes_without_the_one_that_most_are(
    levels: int, density: float, scale_type: type | None, tmp_path: Path
) -> None:
    rng = np.random.default_rng(levels)
    common = levels // 2
    codes = np.where(rng.random((48, 67)) < density, rng.integers(0, levels, (48, 67)), common)
    book = np.linspace(-1, 1, levels).astype(np.float32)
    book[common] = 0.0
    scales = None if scale_type is None else rng.normal(size=(48, 1)).astype(scale_type)
    narrow = Narrow(codes.astype(np.uint8), book, scales)
    model = in_codes(narrow, ir.DataType.FLOAT)

    np.testing.assert_array_equal(computed(model, tmp_path), bits(narrow.numbers()))
    found = sparse_codes(narrow)
    assert (found is not None) == ("CumSum" in [node.op_type for node in model.graph])
    assert found is not None or density > 0.01 or levels < 3


@pytest.mark.parametrize("levels", [16, 255])
def test_codes_of_int8(levels: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(levels)
    book = np.arange(levels).astype(np.int8) - np.int8(8)
    codes = np.where(rng.random((48, 67)) < 0.2, rng.integers(0, levels, (48, 67)), 8)
    narrow = Narrow(codes.astype(np.uint8), book)

    assert sparse_codes(narrow) is not None
    found = computed(in_codes(narrow, ir.DataType.INT8), tmp_path)
    np.testing.assert_array_equal(found, bits(narrow.numbers()))


def test_groups_of_codebooks_are_written_whole() -> None:
    codes = np.zeros((64, 64), np.uint8)

    assert sparse_codes(Narrow(codes, np.zeros((2, 16), np.float32))) is None


@pytest.mark.parametrize("density", [0.0, 0.002, 0.02, 0.1, 0.3])
@pytest.mark.parametrize("size", [300, 5000, 200_000])
def test_every_step_is_packed(density: float, size: int) -> None:
    model = written(sparse(pruned(density, size)), ir.DataType.FLOAT)

    made = [node.outputs[0] for node in model.graph if node is not model.graph[-1]]
    assert all(map(is_packed, made)), [v.producer() for v in made if not is_packed(v)]
    assert [value.name for value in packed_weights(model.graph)] == ["weight"]


def test_positions_of_tokens_are_no_packed_weight() -> None:
    model = parse(
        """
        agraph (float[90,8] x, int64[90] m, int64 zero, float[91,8] e) => (float[90,8] y)
        { c = CumSum(m, zero) p = Mul(c, m) t = Gather(e, p) y = Add(x, t) }
        """,
        m=np.arange(90) % 7 // 3,
        zero=np.int64(0),
        e=pruned(0.5, 91, 8),
    )

    assert not any(is_packed(output) for node in model.graph for output in node.outputs)


@pytest.mark.parametrize("shape", [(100, 200), (100, 201)])
@pytest.mark.parametrize("density", [0.0, 0.003, 0.02, 0.1, 0.3])
def test_the_file_is_what_the_arithmetic_says(density: float, shape: tuple[int, ...]) -> None:
    """For the second of two weights: the first has brought what they share."""
    found, sizes = sparse(pruned(density, *shape)), []
    for count in (1, 2):
        model = reader(ir.DataType.FLOAT, shape)
        encoding = encoding_of(model)
        for number in range(count):
            encoding.sparse(found, ir.DataType.FLOAT, f"weight{number}")
        encoding.close()
        sizes.append(len(ir.to_proto(model).SerializeToString()))

    assert abs(sizes[1] - sizes[0] - found.stored_bytes) < 80


@pytest.mark.parametrize("density", [0.0, 0.004, 0.05, 0.3])
@pytest.mark.parametrize("levels", [2, 3, 16, 17, 256])
def test_codes_take_fewer_bytes_where_it_is_said(levels: int, density: float) -> None:
    rng = np.random.default_rng(levels)
    codes = np.where(rng.random((128, 320)) < density, rng.integers(0, levels, (128, 320)), 0)
    narrow = Narrow(codes.astype(np.uint8), np.arange(levels, dtype=np.float32))
    found, sizes = sparse_codes(narrow), []
    for count in (1, 2):
        model = reader(ir.DataType.FLOAT, codes.shape)
        encoding = encoding_of(model)
        for number in range(count):
            encoding.weight(narrow, ir.DataType.FLOAT, f"weight{number}")
        encoding.close()
        sizes.append(len(ir.to_proto(model).SerializeToString()))

    size = sizes[1] - sizes[0]
    expected = narrow.stored_bytes if found is None else found.stored_bytes
    # The codebook is there already; further fields take nodes in both forms.
    assert 0 < size - (expected - 4 * levels) < 700
    assert found is None or size < narrow.stored_bytes


# ------------------------------------------------------------------ places


def placed(placement: Placement) -> np.ndarray:
    """Where the codes of a placement say that its numbers are."""
    field, codes = placement.field, placement.codes
    if field is not None:
        codes = unpack([field], [field.pack(codes)], codes.size)
    return np.flatnonzero(codes) if placement.is_mask else np.cumsum(codes.astype(np.int64))


@given(
    st.integers(0, 3 * LONGEST),
    st.floats(0, 1).map(lambda share: share**4),
    st.integers(0, 1 << 30),
)
def test_places_come_back_from_their_codes(count: int, density: float, seed: int) -> None:
    is_stored = np.random.default_rng(seed).random(count) < density

    for placement in placements(is_stored):
        where = placed(placement)
        np.testing.assert_array_equal(where, placement.positions)
        assert np.all(np.diff(where) > 0)
        assert np.isin(np.flatnonzero(is_stored), where).all()


def test_there_is_a_way_to_place_numbers_unless_there_are_none() -> None:
    assert placements(np.zeros(0, bool)) == []
    assert [p.field for p in placements(np.ones(9, bool))] == [MASK]
    assert all(p.positions.tolist() == [0] for p in placements(np.zeros(9, bool)))


def test_the_smallest_form_is_chosen() -> None:
    forms = {}
    for density in (0.5, 0.2, 0.15, 0.05, 0.001):
        field = sparse(pruned(density, 400, 1000)).placement.field
        forms[density] = field.base if field is not None else None
    assert forms == {0.5: 2, 0.2: 2, 0.15: 2, 0.05: 256, 0.001: None}


def test_what_has_no_zeros_is_not_sparse() -> None:
    assert sparse_of(np.ones((8, 8), np.float32)) is None
    assert sparse_of(np.full((8, 8), -0.0, np.float32)) is None
    assert sparse_of(np.zeros((0, 8), np.float32)) is None


@pytest.mark.parametrize(
    ("numbers", "kind"),
    [
        ([1.5, -0.0, 2.0**-24], np.float16),
        ([2.0**100, 1.0], ml_dtypes.bfloat16),
        ([0.1], np.float32),
        ([65536.0, 1 + 2**-10], np.float32),
        ([np.nan, 1.0], np.float32),
        ([np.inf, 1.0], np.float32),
    ],
)
def test_the_narrowest_type(numbers: list[float], kind: type) -> None:
    assert narrowest_type(np.array(numbers, np.float32)) == np.dtype(kind)


def test_doubles_become_floats_and_integers_stay() -> None:
    assert narrowest_type(np.array([0.1])) == np.float64
    assert narrowest_type(np.array([np.float64(np.float32(0.1))])) == np.float32
    assert narrowest_type(np.array([1], np.int8)) == np.int8


def test_what_onnxruntime_would_not_fold_is_told() -> None:
    huge = Sparse(Placement((1 << 28) + 1, np.zeros(1, np.int64), None), np.zeros(1), (1,))
    model = reader(ir.DataType.FLOAT, (1,))

    with pytest.raises(ValueError, match="at every inference"):
        encoding_of(model).sparse(huge, ir.DataType.FLOAT, "w")

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from graphopt.content import CHUNK_BYTES, chunks
from graphopt.errors import ModelError
from graphopt.inspection import Duplicates, Port, Weight, Weights, inspect_model
from graphopt.state import guess_state
from graphopt.testing import parse

ONES = np.ones((4, 4), np.float32)
SPARSE = np.float32([[0, -0.0, 1, 2], [3, 0, 0, 0]])


def _model() -> ir.Model:
    return parse(
        """
        <ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1, "own" : 1]>
        agraph (float[N, 4] x, bool c, float[4, 4] a, float[4, 4] b, float[2, 4] s, int8[6] i)
            => (float[N, 4] y, float[A, B] r)
        {
            k = Constant<value = float[2] {1.0, 0.0}>()
            g = com.microsoft.Gelu(x)
            h = MatMul(g, a)
            t = MatMul(h, b)
            y = own.Twice(t)
            r = If(c) <
                then_branch = then () => (float[2, 4] u)
                    <float[2] q = {1.0, 0.0}> { u = RandomNormalLike(s) },
                else_branch = other () => (float[2, 4] v) { v = Relu(s) }
            >
        }
        <domain: "own", opset_import: ["" : 21]>
        Twice (p) => (o) { o = Add(p, p) }
        """,
        a=ONES,
        b=ONES.copy(),
        s=SPARSE,
        i=np.arange(6, dtype=np.int8),
    )


def test_the_interface_and_the_versions() -> None:
    found = inspect_model(_model())

    assert found.inputs == (Port("x", "float", ("N", 4)), Port("c", "bool", ()))
    assert found.outputs == (Port("y", "float", ("N", 4)), Port("r", "float", ("A", "B")))
    assert found.opsets == {"": 21, "com.microsoft": 1, "own": 1}
    assert found.ir_version == 10


def test_nodes_are_counted_in_subgraphs_and_functions_too() -> None:
    found = inspect_model(_model())

    assert list(found.operators.items()) == [
        ("MatMul", 2),
        ("Add", 1),
        ("If", 1),
        ("RandomNormalLike", 1),
        ("Relu", 1),
        ("com.microsoft.Gelu", 1),
        ("own.Twice", 1),
    ]
    # The call of own.Twice stands for the Add in it, which is listed too.
    assert found.nodes == sum(found.operators.values()) - 1
    assert found.subgraphs == 2
    assert found.functions == ("own.Twice",)
    assert found.random_operators == {"RandomNormalLike": 1}


def test_weights_by_type_and_the_largest() -> None:
    found = inspect_model(_model())

    assert found.weights == (Weights("float", 5, 44, 176), Weights("int8", 1, 6, 6))
    assert found.weight_bytes == 182
    assert found.largest[:3] == (
        Weight("a", "float", (4, 4), 64),
        Weight("b", "float", (4, 4), 64),
        Weight("s", "float", (2, 4), 32),
    )


def test_no_more_than_ten_weights_are_listed() -> None:
    names = [f"w{i}" for i in range(12)]
    arrays = {name: np.ones(i + 1, np.float32) for i, name in enumerate(names)}
    inputs = ", ".join(f"float[{i + 1}] {name}" for i, name in enumerate(names))

    found = inspect_model(parse(f"agraph ({inputs}) => (float[1] y) {{ y = Neg(w0) }}", **arrays))

    assert [w.name for w in found.largest] == names[:1:-1]


def test_equal_weights_and_what_sharing_them_would_save() -> None:
    found = inspect_model(_model())

    # The Constant node and the initializer of the branch are equal as well.
    assert found.duplicates == (Duplicates(("a", "b"), 64), Duplicates(("k", "q"), 8))


@pytest.mark.parametrize(
    "other",
    [
        np.ones((4, 4), np.int32),
        np.ones((2, 8), np.float32),
        np.float32([[1] * 4] * 3 + [[1, 1, 1, 2]]),
    ],
)
def test_other_types_shapes_and_values_are_no_duplicates(other: np.ndarray) -> None:
    kind = ir.DataType.from_numpy(other.dtype).name.lower()
    dims = ", ".join(map(str, other.shape))
    text = f"agraph (float[4, 4] a, {kind}[{dims}] b) => (float[4, 4] y) {{ y = Neg(a) }}"

    assert inspect_model(parse(text, a=ONES, b=other)).duplicates == ()


def test_zeros_of_both_signs_count_and_whole_numbers_do_not() -> None:
    assert inspect_model(_model()).zero_share == (5 + 2) / 44
    whole = parse("agraph (int8[2] a) => (int8[2] y) { y = Identity(a) }", a=np.zeros(2, np.int8))
    assert inspect_model(whole).zero_share is None


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
def test_zeros_of_narrow_types_count(dtype: type) -> None:
    array = np.array([0, -0.0, 1, 0.5], dtype)
    kind = ir.DataType.from_numpy(array.dtype).name.lower()
    text = f"agraph ({kind}[4] a) => ({kind}[4] y) {{ y = Identity(a) }}"

    assert inspect_model(parse(text, a=array)).zero_share == 0.5


def test_goes_to_json_and_back() -> None:
    found = json.loads(json.dumps(dataclasses.asdict(inspect_model(_model()))))

    assert found["inputs"][0] == {"name": "x", "dtype": "float", "shape": ["N", 4]}
    assert found["operators"]["MatMul"] == 2


def test_looks_at_models_without_weights_and_at_odd_types() -> None:
    model = parse(
        """
        agraph (seq(float[N]) x, string[2] s) => (seq(float[N]) y, string[2] t)
        <string[2] w = {"a", "b"}, string[2] v = {"a", "b"}>
        { y = Identity(x) t = Identity(s) }
        """
    )
    found = inspect_model(model)

    assert found.inputs[0].shape is None
    assert found.inputs[0].dtype.startswith("Seq")
    assert [set(d.names) for d in found.duplicates] == [{"v", "w"}]
    assert inspect_model(parse("agraph (float x) => (float y) { y = Neg(x) }")).weights == ()


# ------------------------------------------------------------------ external data


def _saved(folder: Path) -> ir.Model:
    ir.save(_model(), folder / "m.onnx", external_data="m.data", size_threshold_bytes=0)
    return ir.load(folder / "m.onnx")


def test_external_data_gives_the_same(tmp_path: Path) -> None:
    assert inspect_model(_saved(tmp_path)) == inspect_model(_model())


def test_tensors_that_are_one_region_of_a_file_save_nothing(tmp_path: Path) -> None:
    model = _saved(tmp_path)
    first = model.graph.initializers["a"].const_value
    assert isinstance(first, ir.ExternalTensor)
    model.graph.initializers["b"].const_value = ir.ExternalTensor(
        first.location, first.offset, first.length, first.dtype,
        shape=ir.Shape([4, 4]), name="b", base_dir=tmp_path,
    )  # fmt: skip

    assert [set(d.names) for d in inspect_model(model).duplicates] == [{"k", "q"}]


def test_chunks_are_the_bytes_of_the_tensor(tmp_path: Path) -> None:
    array = np.random.default_rng(1).standard_normal(3_000_000).astype(np.float32)
    (tmp_path / "w.data").write_bytes(b"head" + array.tobytes())
    tensor = ir.ExternalTensor(
        "w.data", 4, array.nbytes, ir.DataType.FLOAT,
        shape=ir.Shape(array.shape), name="w", base_dir=tmp_path,
    )  # fmt: skip

    for one in (tensor, ir.tensor(array)):
        sizes, raw = [], bytearray()
        for chunk in chunks(one):
            sizes.append(chunk.size)
            raw += chunk.tobytes()
        assert raw == array.tobytes()
        assert max(sizes) <= CHUNK_BYTES


def test_chunks_of_half_bytes_and_nothing() -> None:
    packed = ir.tensor(np.array([1, 2, 3], ml_dtypes.int4))

    assert b"".join(c.tobytes() for c in chunks(packed)) == packed.tobytes()
    assert list(chunks(ir.tensor(np.ones((0, 3), np.float32)))) == []


def test_missing_and_short_external_data_is_an_error(tmp_path: Path) -> None:
    model = _saved(tmp_path)
    data = tmp_path / "m.data"
    data.write_bytes(data.read_bytes()[:70])
    with pytest.raises(ModelError, match=r"m\.data ended while tensor '\w' was read"):
        inspect_model(model)

    data.unlink()
    with pytest.raises(ModelError, match=r"m\.data, with tensor '\w', is gone"):
        inspect_model(model)


_INSPECT = """
import sys
from pathlib import Path
import onnx_ir as ir
from graphopt.inspection import inspect_model

def peak_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))

model = ir.load(sys.argv[1])
before_bytes = peak_bytes()
found = inspect_model(model)
assert found.zero_share == 1 and found.duplicates[0].saved_bytes == 100_000_000
print(peak_bytes() - before_bytes)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_memory_does_not_grow_with_the_weights(tmp_path: Path) -> None:
    model = parse(
        "agraph (float[25000000] a, float[25000000] b) => (float[25000000] y) { y = Add(a, b) }",
        a=np.zeros(25_000_000, np.float32),
        b=np.zeros(25_000_000, np.float32),
    )
    ir.save(model, tmp_path / "m.onnx", external_data="m.data")

    done = subprocess.run(
        [sys.executable, "-c", _INSPECT, str(tmp_path / "m.onnx")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip

    assert int(done.stdout) < 30e6


# ------------------------------------------------------------------ state


def _with_names(
    pairs: list[tuple[str, str]], dims: str = "[1, 8]", kind: str = "float"
) -> ir.Model:
    """A model of one input and output beside the given outputs and inputs."""
    model = parse(
        f"agraph (float[1, 8] x, {', '.join(f'{kind}{dims} i{n}' for n in range(len(pairs)))}) "
        f"=> (float[1, 8] y, {', '.join(f'{kind}{dims} o{n}' for n in range(len(pairs)))}) "
        f"{{ y = Neg(x) {' '.join(f'o{n} = Neg(i{n})' for n in range(len(pairs)))} }}"
    )
    for value, (_, name) in zip(model.graph.inputs[1:], pairs, strict=True):
        value.name = name
    for value, (name, _) in zip(model.graph.outputs[1:], pairs, strict=True):
        value.name = name
    return model


@pytest.mark.parametrize(
    "pairs",
    [
        [("stateN", "state")],
        [("state_out", "state_in")],
        [("new_state", "state")],
        [("hn", "h0"), ("cn", "c0")],
        [("h_n", "h_0"), ("c_n", "c_0")],
        [("h_out", "h_in"), ("c_out", "c_in")],
        [("present_x", "past_x")],
        [("present_0", "past_0"), ("present_1", "past_1")],
        [
            ("present.0.key", "past_key_values.0.key"),
            ("present.0.value", "past_key_values.0.value"),
        ],
        [("hidden_state_next", "hidden_state_prev")],
        [("conv_cache_out", "conv_cache"), ("tra_cache_out", "tra_cache")],
        [("nextMemory", "prevMemory")],
    ],
)
def test_recognizes_carried_state_by_name(pairs: list[tuple[str, str]]) -> None:
    assert guess_state(_with_names(pairs)) == tuple(pairs)


@pytest.mark.parametrize(
    "pair",
    [
        ("y1", "x1"),
        ("image_out", "image_in"),
        ("audio_output", "audio_input"),
        ("output", "input"),
        ("mask", "state"),
        ("hn", "c0"),
        ("present_1", "past_0"),
        ("next_token", "token"),
    ],
)
def test_leaves_other_names_alone(pair: tuple[str, str]) -> None:
    assert guess_state(_with_names([pair])) == ()


def test_types_ranks_and_sizes_must_agree_as_far_as_they_are_known() -> None:
    def model(output: str, source: str) -> ir.Model:
        text = f"agraph ({source} state, float x) => ({output} stateN) {{ stateN = Odd(state, x) }}"
        return parse(text)

    assert guess_state(model("float[A, B, C]", "float[2, N, 128]")) == (("stateN", "state"),)
    assert guess_state(model("float[2, M, 128]", "float[2, N, 64]")) == ()
    assert guess_state(model("float[2, N]", "float[2, N, 64]")) == ()
    assert guess_state(model("float16[2]", "float[2]")) == ()


def test_what_has_two_partners_is_left_out() -> None:
    model = _with_names([("state_out", "state"), ("other", "state_in")])

    assert guess_state(model) == ()

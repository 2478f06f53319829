from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from graphopt.errors import ModelError, RuntimeUnavailable, SampleError
from graphopt.runtime import Reference, Session, check_provider, evaluate, version
from graphopt.testing import parse

EVERY_REFERENCE = pytest.mark.parametrize("reference", Reference)

TYPES = {
    "float": np.float32,
    "float16": np.float16,
    "double": np.float64,
    "bool": np.bool_,
    "int8": np.int8,
    "uint8": np.uint8,
    "int64": np.int64,
    "uint64": np.uint64,
    "bfloat16": ml_dtypes.bfloat16,
    "float8e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8e5m2": ml_dtypes.float8_e5m2,
}


def _same(first: np.ndarray, second: np.ndarray) -> bool:
    same_form = first.dtype == second.dtype and first.shape == second.shape
    return same_form and np.array_equal(first, second)


@EVERY_REFERENCE
def test_runs_a_model_as_written_and_as_deployed(reference: Reference) -> None:
    session = Session(
        parse("agraph (float[N] x, float y) => (float[N] z) { z = Add(x, y) }"), reference
    )

    assert (session.inputs, session.outputs) == (["x", "y"], ["z"])
    outputs = session.run({"x": np.float32([1, 2]), "y": np.array(3, np.float32)})
    assert outputs["z"].tolist() == [4, 5]


@EVERY_REFERENCE
@pytest.mark.parametrize("count", [3, 5000])
@pytest.mark.parametrize("kind", TYPES)
def test_initializers_of_every_type_small_and_large(
    kind: str, count: int, reference: Reference
) -> None:
    array = (np.arange(count) % 3).astype(TYPES[kind])
    text = f"agraph (bool c, {kind}[{count}] w) => ({kind}[{count}] y) {{ y = Identity(w) }}"

    outputs = Session(parse(text, w=array), reference).run({"c": np.array(True)})

    assert _same(outputs["y"], array)


@EVERY_REFERENCE
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("shape", [(), (0,), (2, 3)])
def test_inputs_and_outputs_of_every_type(
    kind: str, shape: tuple[int, ...], reference: Reference
) -> None:
    array = np.ones(shape, TYPES[kind])
    dims = f"[{', '.join(map(str, shape))}]" if shape else ""
    text = f"agraph ({kind}{dims} x) => ({kind}{dims} y) {{ y = Identity(x) }}"

    outputs = Session(parse(text), reference).run({"x": array})

    assert _same(outputs["y"], array)


@pytest.mark.parametrize("kind", ["int4", "uint4"])
def test_outputs_of_half_a_byte(kind: str) -> None:
    number = ir.DataType[kind.upper()].value
    text = f"agraph (float[3] x) => ({kind}[3] y) {{ y = Cast<to={number}>(x) }}"

    outputs = Session(parse(text)).run({"x": np.float32([1, 2, 7])})

    assert outputs["y"].dtype == getattr(ml_dtypes, kind)
    assert outputs["y"].astype(int).tolist() == [1, 2, 7]


@EVERY_REFERENCE
@pytest.mark.parametrize(
    "words", [["a", "é"], [b"a", "é".encode()], np.array(["a", "é"]), np.array([b"a", b"e"])]
)
def test_strings_as_inputs_and_initializers(words: object, reference: Reference) -> None:
    given = np.array(words, object) if isinstance(words, list) else np.asarray(words)
    model = parse(
        """
        agraph (string[2] x) => (string[2] y, string[2] z)
        <string[2] w = {"b", "c"}>
        { y = Identity(x) z = Identity(w) }
        """
    )

    outputs = Session(model, reference).run({"x": given})

    expected = [w.decode() if isinstance(w, bytes) else w for w in given.tolist()]
    assert outputs["y"].tolist() == expected
    assert outputs["z"].tolist() == ["b", "c"]


def test_as_written_large_weights_are_read_where_they_lie() -> None:
    weight = np.ones(1 << 20, np.float32)
    size = weight.size
    text = f"agraph (float x, float[{size}] w) => (float[{size}] y) {{ y = Mul(x, w) }}"
    session = Session(parse(text, w=weight), Reference.AS_WRITTEN)

    # The new number shows only if onnxruntime reads this array and not a copy of it.
    weight[:] = 5

    assert session.run({"x": np.array(2, np.float32)})["y"][-1] == 10


@EVERY_REFERENCE
def test_the_model_given_is_left_as_it_was(reference: Reference) -> None:
    model = parse(
        "agraph (float x, float[5000] w) => (float[5000] y) { y = Mul(x, w) }",
        w=np.ones(5000, np.float32),
    )
    tensor = model.graph.initializers["w"].const_value

    Session(model, reference)

    assert model.graph.initializers["w"].const_value is tensor


_EXTERNAL = """
agraph (bool c, int64[2] shape, float[6] small, float[2000] large, bfloat16[2000] narrow)
    => (float[2, 3] y, float[2000] z, float[2000] v)
{
    y = Reshape(small, shape)
    v = Cast<to=1>(narrow)
    z = If(c) <
        then_branch = then () => (float[2000] t) { t = Add(large, v) },
        else_branch = other () => (float[2000] e) { e = Neg(large) }
    >
}
"""


def _external(folder: Path, least_bytes: int) -> Path:
    model = parse(
        _EXTERNAL,
        shape=np.array([2, 3]),
        small=np.arange(6, dtype=np.float32),
        large=np.arange(2000, dtype=np.float32),
        narrow=np.ones(2000, ml_dtypes.bfloat16),
    )
    path = folder / "model.onnx"
    ir.save(model, path, external_data="model.data", size_threshold_bytes=least_bytes)
    return path


@EVERY_REFERENCE
@pytest.mark.parametrize(("in_memory", "least_bytes"), [(True, 0), (True, 100), (False, 100)])
def test_external_data_small_and_large(
    in_memory: bool, least_bytes: int, reference: Reference, tmp_path: Path
) -> None:
    path = _external(tmp_path, least_bytes)
    session = Session(ir.load(path) if in_memory else path, reference)

    outputs = session.run({"c": np.array(True)})

    assert outputs["y"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert outputs["z"][-1] == 2000
    assert session.run({"c": np.array(False)})["z"][-1] == -1999


def test_external_data_in_a_constant_node_and_a_subgraph(tmp_path: Path) -> None:
    array = np.arange(6, dtype=np.float32)
    (tmp_path / "w.data").write_bytes(array.tobytes())
    model = parse(
        """
        agraph (bool c) => (float[6] y)
        {
            k = Constant<value = float[6] {0, 0, 0, 0, 0, 0}>()
            y = If(c) <
                then_branch = then () => (float[6] t) <float[6] w = {0, 0, 0, 0, 0, 0}>
                    { t = Add(k, w) },
                else_branch = other () => (float[6] e) { e = Neg(k) }
            >
        }
        """
    )
    tensor = ir.ExternalTensor(
        "w.data", 0, 24, ir.DataType.FLOAT, shape=ir.Shape([6]), name="w", base_dir=tmp_path
    )
    constant, choice = model.graph
    constant.attributes["value"] = ir.AttrTensor("value", tensor)
    inner = choice.attributes["then_branch"].as_graph()
    inner.initializers["w"].const_value = tensor

    outputs = Session(model).run({"c": np.array(True)})

    assert outputs["y"].tolist() == (2 * array).tolist()
    assert inner.initializers["w"].const_value is tensor
    assert constant.attributes["value"].as_tensor() is tensor


@EVERY_REFERENCE
def test_an_initializer_that_is_an_input_is_a_default(reference: Reference) -> None:
    model = parse("agraph (float x, float[2000] w) => (float[2000] y) { y = Mul(x, w) }")
    default = model.graph.inputs[1]
    default.const_value = ir.tensor(np.ones(2000, np.float32), name="w")
    model.graph.register_initializer(default)
    session = Session(model, reference)
    x = np.array(2, np.float32)

    assert session.inputs == ["x"]
    assert session.run({"x": x})["y"][0] == 2
    assert session.run({"x": x, "w": np.full(2000, 3, np.float32)})["y"][0] == 6


@EVERY_REFERENCE
def test_an_initializer_that_is_an_output(reference: Reference) -> None:
    text = "agraph (float x, float[2000] w) => (float y, float[2000] w) { y = Neg(x) }"
    model = parse(text, w=np.ones(2000, np.float32))

    assert Session(model, reference).run({"x": np.array(1, np.float32)})["w"].sum() == 2000


# ------------------------------------------------------------------ outputs that are not tensors


@EVERY_REFERENCE
def test_a_sequence_becomes_one_output_per_element(reference: Reference) -> None:
    model = parse(
        """
        agraph (float[4] x) => (seq(float[N]) parts, float[4] y)
        {
            parts = SplitToSequence(x, sizes)
            sizes = Constant<value_ints=[1, 3]>()
            y = Neg(x)
        }
        """
    )
    model.graph.sort()

    outputs = Session(model, reference).run({"x": np.float32([1, 2, 3, 4])})

    assert {name: a.tolist() for name, a in outputs.items()} == {
        "parts[0]": [1],
        "parts[1]": [2, 3, 4],
        "y": [-1, -2, -3, -4],
    }


def test_an_empty_optional_is_no_output() -> None:
    model = parse(
        """
        agraph (float[2] x) => (optional(float[2]) none, optional(float[2]) some)
        { none = Optional<type = float[2]>() some = Optional(x) }
        """
    )

    outputs = Session(model).run({"x": np.float32([1, 2])})

    assert {name: a.tolist() for name, a in outputs.items()} == {"some": [1, 2]}


def test_an_empty_tensor_keeps_its_shape() -> None:
    model = parse("agraph (float[N, 3] x) => (float[3, N] y) { y = Transpose(x) }")

    assert Session(model).run({"x": np.ones((0, 3), np.float32)})["y"].shape == (3, 0)


# ------------------------------------------------------------------ bind


@pytest.mark.parametrize("kind", ["float", "bfloat16", "string"])
def test_a_bound_run_raises_what_the_run_raises(kind: str) -> None:
    session = Session(parse(f"agraph ({kind}[2] x) => ({kind}[2] y) {{ y = Identity(x) }}"))
    good: dict[str, np.ndarray] = {
        "float": np.ones(2, np.float32),
        "bfloat16": np.ones(2, ml_dtypes.bfloat16),
        "string": np.array(["a", "b"], object),
    }

    session.bind({"x": good[kind]})()
    with pytest.raises(Exception, match=r"(?i)rank|dimension"):
        session.bind({"x": np.stack([good[kind]] * 2)})()


def test_bytes_without_a_type_are_of_the_type_of_the_input() -> None:
    session = Session(parse("agraph (bfloat16[2] x) => (bfloat16[2] y) { y = Identity(x) }"))
    array = np.array([1, 2.5], ml_dtypes.bfloat16)

    assert _same(session.run({"x": array.view("V2")})["y"], array)


# ------------------------------------------------------------------ errors


def test_an_unknown_operator_is_named() -> None:
    with pytest.raises(ModelError, match="No Op registered for Foo") as caught:
        Session(parse("agraph (float x) => (float y) { y = Foo(x) }"))

    assert "ONNXRuntimeError" not in str(caught.value)


def test_a_missing_file_and_a_file_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "junk.onnx").write_bytes(b"junk")

    for name in ("nowhere.onnx", "junk.onnx"):
        with pytest.raises(ModelError, match=name):
            Session(tmp_path / name)


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({}, "x.* missing"),
        ({"x": np.ones(2)}, r"expected: \(tensor\(float\)\)"),
        ({"x": np.ones(3, np.float32)}, "index: 0 Got: 3 Expected: 2"),
        ({"x": np.ones(2, np.float32), "q": np.ones(2, np.float32)}, "q"),
    ],
)
def test_inputs_that_do_not_fit(feeds: dict[str, np.ndarray], message: str) -> None:
    session = Session(parse("agraph (float[2] x) => (float[2] y) { y = Neg(x) }"))

    with pytest.raises(SampleError, match=message):
        session.run(feeds)


def test_providers_that_are_not_there() -> None:
    with pytest.raises(RuntimeUnavailable, match="there is no provider 'tpu'; use cpu or cuda"):
        check_provider("tpu")
    check_provider("cpu")


def test_cuda_without_a_gpu_is_unavailable() -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")

    with pytest.raises(RuntimeUnavailable, match=r"provider 'cuda' is not available: .*\[gpu\]"):
        Session(parse("agraph (float x) => (float y) { y = Neg(x) }"), provider="cuda")


def test_onnxruntime_tools_in_the_process_is_an_error() -> None:
    code = (
        "import sys, types\n"
        "sys.modules['onnxruntime_tools'] = types.ModuleType('onnxruntime_tools')\n"
        "from graphopt.runtime import check_provider\n"
        "from graphopt.errors import RuntimeUnavailable\n"
        "try:\n    check_provider('cpu')\n"
        "except RuntimeUnavailable as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert "onnxruntime_tools is loaded" in done.stdout


def test_tells_the_version() -> None:
    assert version() is not None


# ------------------------------------------------------------------ evaluate


def _constant(array: np.ndarray) -> ir.Value:
    tensor = (
        ir.StringTensor(array.reshape(-1).tolist(), shape=ir.Shape(array.shape))
        if array.dtype.kind == "O"
        else ir.tensor(array)
    )
    value = ir.Value(name="c", type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape))
    value.const_value = tensor
    ir.Graph([], [], nodes=[], initializers=[value])
    return value


def _evaluate(op_type: str, *arrays: np.ndarray, **attributes: object) -> list[np.ndarray]:
    node = ir.node(op_type, [_constant(a) for a in arrays], attributes)  # type: ignore[arg-type]
    for index, output in enumerate(node.outputs):
        output.name = f"o{index}"
    return evaluate([node], node.outputs, {"": 21})


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("shape", [(), (0, 2), (3,)])
def test_evaluates_constants_of_every_type(kind: str, shape: tuple[int, ...]) -> None:
    array = np.ones(shape, TYPES[kind])

    (result,) = _evaluate("Identity", array)

    assert _same(result, array)


def test_evaluates_half_bytes() -> None:
    (result,) = _evaluate("Cast", np.array([-8, 7, 1], ml_dtypes.int4), to=1)

    assert result.tolist() == [-8, 7, 1]


def test_evaluates_strings_to_strings() -> None:
    (result,) = _evaluate("Identity", np.array([b"a", "é".encode()], object))

    assert result.tolist() == ["a", "é"]


def test_bytes_that_are_no_text_are_an_error_and_not_garbled() -> None:
    with pytest.raises(SampleError, match="utf-8"):
        _evaluate("Identity", np.array([b"\xff"], object))


def test_evaluates_a_chain_with_left_out_inputs_and_unnamed_outputs() -> None:
    data, high = _constant(np.float32([1, 5, 7])), _constant(np.array(3, np.float32))
    clip = ir.node("Clip", [data, None, high])
    one = _constant(np.ones(3, np.float32))
    norm = ir.node("LayerNormalization", [clip.outputs[0], one], {"epsilon": 0.0}, num_outputs=3)
    for value, name in zip((*clip.outputs, *norm.outputs), ("a", "b", "", "c"), strict=True):
        value.name = name

    results = evaluate([clip, norm], [clip.outputs[0], norm.outputs[2]], {"": 21})

    assert results[0].tolist() == [1, 3, 3]
    assert results[1] == pytest.approx(1 / np.std([1, 3, 3]))


def test_evaluating_what_has_no_kernel_or_fails_is_an_error() -> None:
    with pytest.raises(ModelError, match="Foo"):
        _evaluate("Foo", np.ones(3, np.float32))
    with pytest.raises(SampleError):
        _evaluate("Reshape", np.ones(3, np.float32), np.array([2]))

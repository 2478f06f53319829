"""Models in and out: what loading accepts and keeps, and what saving promises."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest

import graphopt
import graphopt_models
from graphopt import loading, saving
from graphopt.runtime import Session
from graphopt.skeleton import infer_shapes

ort = pytest.importorskip("onnxruntime")

HEAD = '<ir_version: 10, opset_import: ["" : 18]>'
RELU = "agraph (float[n, 3] x) => (float[n, 3] y) { y = Relu(x) }"


def parse(text: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(HEAD + text)


def add_weight(proto: onnx.ModelProto, name: str, array: np.ndarray) -> onnx.TensorProto:
    proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    tensor: onnx.TensorProto = proto.graph.initializer[-1]
    return tensor


def move_out(tensor: onnx.TensorProto, file: Path, offset: int = 0, **more: str) -> None:
    """Put the bytes of the tensor into a file of their own, from `offset` on."""
    raw = tensor.raw_data
    with open(file, "r+b" if file.exists() else "wb") as data:
        data.seek(offset)
        data.write(raw)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    entries = {"location": file.name, "offset": str(offset), "length": str(len(raw)), **more}
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)


def two_layers(seed: int = 0, width: int = 64) -> onnx.ModelProto:
    """A model with two weights of `width` squared float32 each."""
    generator = np.random.default_rng(seed)
    proto = parse(
        f"agraph (float[n, {width}] x) => (float[n, {width}] y)"
        " { a = MatMul(x, w1)  b = Tanh(a)  y = MatMul(b, w2) }"
    )
    for name in ("w1", "w2"):
        add_weight(proto, name, generator.standard_normal((width, width), np.float32) / width)
    return proto


def write_external(folder: Path, seed: int = 0, name: str = "m.onnx") -> Path:
    """`two_layers` with its weights in two files, one of them not from the start."""
    proto = two_layers(seed)
    for number, tensor in enumerate(proto.graph.initializer):
        move_out(tensor, folder / f"{name}.part{number}", offset=4096 * number)
    path = folder / name
    path.write_bytes(proto.SerializeToString())
    return path


def outputs(model: Path | bytes, x: np.ndarray) -> list[np.ndarray]:
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    results: list[np.ndarray] = session.run(None, {"x": x})
    return results


def rows(width: int = 64) -> np.ndarray:
    return np.linspace(-1, 1, 2 * width, dtype=np.float32).reshape(2, width)


def initializer(model: ir.Model, name: str) -> np.ndarray:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()


def saved(model: ir.Model, path: Path, external_data: bool | None = None) -> onnx.ModelProto:
    """The model after a save, read back by onnx itself, external data included."""
    graphopt.save(model, path, external_data=external_data)
    return onnx.load(path)


# ------------------------------------------------------------------ external data


def test_external_data_in_several_files_at_offsets_is_read_where_it_lies(tmp_path: Path) -> None:
    path = write_external(tmp_path)

    source = loading.open_model(path)

    for tensor in two_layers().graph.initializer:
        expected = onnx.numpy_helper.to_array(tensor)
        np.testing.assert_array_equal(initializer(source.model, tensor.name), expected)
        assert isinstance(
            source.model.graph.initializers[tensor.name].const_value, ir.ExternalTensor
        )
    sizes = [file.stat().st_size for file in tmp_path.iterdir()]
    assert len(sizes) == 3
    assert source.stored_bytes == sum(sizes)


def test_external_data_without_offset_and_length_is_read(tmp_path: Path) -> None:
    proto = two_layers()
    tensor = proto.graph.initializer[0]
    expected = onnx.numpy_helper.to_array(tensor)
    move_out(tensor, tmp_path / "w.bin")
    del tensor.external_data[1:]
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())

    model = graphopt.load(tmp_path / "m.onnx")

    np.testing.assert_array_equal(initializer(model, "w1"), expected)


def test_external_data_in_a_folder_below_and_behind_a_link_inside_is_read(tmp_path: Path) -> None:
    proto = two_layers()
    (tmp_path / "below").mkdir()
    move_out(proto.graph.initializer[0], tmp_path / "below" / "w.bin")
    proto.graph.initializer[0].external_data[0].value = "below/link.bin"
    (tmp_path / "below" / "link.bin").symlink_to("w.bin")
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())

    model = graphopt.load(tmp_path / "m.onnx")

    expected = onnx.numpy_helper.to_array(two_layers().graph.initializer[0])
    np.testing.assert_array_equal(initializer(model, "w1"), expected)


def in_a_branch(folder: Path) -> Path:
    """External data of an initializer and of a Constant in a subgraph, and in a function."""
    proto = onnx.parser.parse_model(
        """
        <ir_version: 10, opset_import: ["" : 18, "own" : 1]>
        agraph (float[600] x) => (float[600] y)
        {
            c = Constant<value = bool {1}>()
            f = own.shift(x)
            y = If(c) <
                then_branch = g () => (float[600] t) {
                    k = Constant<value = float[1] {0}>()
                    s = Add(f, w)
                    t = Add(s, k)
                },
                else_branch = h () => (float[600] e) { e = Neg(f) }
            >
        }
        <domain: "own", opset_import: ["" : 18]>
        shift (p) => (q) { k = Constant<value = float[1] {0}>()  q = Add(p, k) }
        """
    )
    branch = next(a.g for a in proto.graph.node[2].attribute if a.name == "then_branch")
    for number, place in enumerate([branch.initializer.add(), *constants(branch.node)]):
        fill(place, ("w", "k")[number], 100.0 * (number + 1))
        move_out(place, folder / "w.bin", offset=4096 * number)
    (place,) = constants(proto.functions[0].node)
    fill(place, "k", 1000.0)
    move_out(place, folder / "w.bin", offset=8192)
    (folder / "m.onnx").write_bytes(proto.SerializeToString())
    return folder / "m.onnx"


def constants(nodes: Iterable[onnx.NodeProto]) -> list[onnx.TensorProto]:
    return [node.attribute[0].t for node in nodes if node.op_type == "Constant"]


def fill(tensor: onnx.TensorProto, name: str, value: float) -> None:
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.full(600, value, np.float32), name))


def test_external_data_in_subgraphs_and_functions_survives_a_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    source = in_a_branch(tmp_path / "in")
    monkeypatch.chdir(source.parent)

    model = graphopt.load("m.onnx")
    monkeypatch.chdir(tmp_path)
    graphopt.save(model, "out.onnx")

    (result,) = outputs(tmp_path / "out.onnx", np.zeros(600, np.float32))
    np.testing.assert_array_equal(result, np.full(600, 1300, np.float32))


def test_a_change_of_the_working_directory_after_loading_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_external(tmp_path)
    monkeypatch.chdir(tmp_path)

    model = graphopt.load("m.onnx")
    monkeypatch.chdir("/")

    expected = onnx.numpy_helper.to_array(two_layers().graph.initializer[1])
    np.testing.assert_array_equal(initializer(model, "w2"), expected)
    graphopt.save(model, tmp_path / "o.onnx")
    np.testing.assert_array_equal(
        outputs(tmp_path / "o.onnx", rows())[0], outputs(tmp_path / "m.onnx", rows())[0]
    )


# ------------------------------------------------------------------ what loading changes, and tells


FLAT = np.array([1, 4], np.int64)
PAIRS = np.array([[0, 1], [1, 1]], np.int64)


@pytest.mark.parametrize("indices", [FLAT, PAIRS], ids=["flat", "pairs"])
def test_sparse_initializers_are_made_dense_and_told(indices: np.ndarray) -> None:
    proto = parse("agraph (float[2, 3] x) => (float[2, 3] y) { y = Add(x, s) }")
    proto.graph.sparse_initializer.add().CopyFrom(sparse("s", indices))

    source = loading.open_model(proto)

    np.testing.assert_array_equal(initializer(source.model, "s"), [[0, 5, 0], [0, 7, 0]])
    assert source.notes == ("1 sparse tensors are stored dense",)


def sparse(name: str, indices: np.ndarray) -> onnx.SparseTensorProto:
    values = onnx.numpy_helper.from_array(np.array([5, 7], np.float32), name)
    places = onnx.numpy_helper.from_array(indices, "indices")
    return onnx.helper.make_sparse_tensor(values, places, [2, 3])


def test_sparse_constants_are_made_dense_in_functions_too(tmp_path: Path) -> None:
    proto = onnx.parser.parse_model(
        """
        <ir_version: 10, opset_import: ["" : 18, "own" : 1]>
        agraph (float[2, 3] x) => (float[2, 3] y) { a = Constant()  b = Add(x, a)  y = own.more(b) }
        <domain: "own", opset_import: ["" : 18]>
        more (p) => (q) { k = Constant()  q = Add(p, k) }
        """
    )
    for node in (proto.graph.node[0], proto.functions[0].node[0]):
        attribute = onnx.helper.make_attribute("sparse_value", sparse("", FLAT))
        node.attribute.append(attribute)

    source = loading.open_model(proto)
    graphopt.save(source.model, tmp_path / "m.onnx")

    (result,) = outputs(tmp_path / "m.onnx", np.zeros((2, 3), np.float32))
    np.testing.assert_array_equal(result, [[0, 10, 0], [0, 14, 0]])
    assert source.notes == ("2 sparse tensors are stored dense",)


def test_training_info_is_dropped_on_request_only() -> None:
    proto = parse(RELU)
    proto.training_info.add()

    with pytest.raises(graphopt.ModelError, match="--drop-training-info"):
        graphopt.load(proto)
    source = loading.open_model(proto, drop_training_info=True)

    assert source.notes == ("training_info was dropped",)
    assert len(proto.training_info) == 1


@pytest.mark.parametrize("nested", [False, True], ids=["main graph", "subgraph"])
def test_unsorted_nodes_are_sorted_and_told(nested: bool, tmp_path: Path) -> None:
    chain = "{ y = Neg(b)  b = Exp(a)  a = Neg(x) }"
    text = f"agraph (float[2] x) => (float[2] y) {chain}"
    if nested:
        text = (
            "agraph (float[2] x) => (float[2] z) { c = Constant<value = bool {1}>()  z = If(c) <"
            f" then_branch = g () => (float[2] y) {chain},"
            " else_branch = h () => (float[2] e) { e = Neg(x) } > }"
        )

    source = loading.open_model(parse(text))
    graphopt.save(source.model, tmp_path / "m.onnx")

    assert source.notes == ("nodes were not in topological order; they are now",)
    assert source.invalid is None
    (result,) = outputs(tmp_path / "m.onnx", np.array([0, 1], np.float32))
    np.testing.assert_allclose(result, [-1, -np.exp(-1)], rtol=1e-6)


def test_unsorted_nodes_are_sorted_where_the_checker_stumbles_over_something_else() -> None:
    proto = parse("agraph (float[2] x) => (float[2] y) { y = Neg(a)  a = Neg(x) }")
    proto.graph.value_info.add(name="a")

    source = loading.open_model(proto)

    assert [node.outputs[0].name for node in source.model.graph] == ["a", "y"]
    assert source.notes == ("nodes were not in topological order; they are now",)
    assert source.invalid is None


def test_dimensions_of_minus_one_are_free() -> None:
    proto = parse(RELU)
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -1

    source = loading.open_model(proto)

    assert source.notes == ("dimensions of inputs or outputs that were negative are free now",)
    shape = source.model.graph.inputs[0].shape
    assert shape is not None
    assert list(shape) == [ir.SymbolicDim(None), 3]


def test_the_opset_of_microsoft_is_stated_where_it_is_missing() -> None:
    proto = parse("agraph (float[2] x) => (float[2] y) { y = com.microsoft.Gelu(x) }")

    source = loading.open_model(proto)
    run = graphopt.optimize(proto, passes="drop-unused", benchmark=False)

    assert source.model.opset_imports == {"": 18, "com.microsoft": 1}
    assert source.invalid is None
    assert "opset 1 of com.microsoft was used but not stated; it is now" in run.notes


def test_a_pass_may_add_an_initializer_to_a_model_from_when_each_was_an_input() -> None:
    proto = parse(
        "agraph (float[2] x) => (float[2] y) { c = Constant<value = float {2}>()  y = Mul(x, c) }"
    )
    proto.ir_version = 3

    run = graphopt.optimize(proto, passes="lift-constants", benchmark=False)

    assert [step.verdict for step in run.steps] == ["kept"]


def old_model() -> onnx.ModelProto:
    """IR version 3, where every initializer had to be an input."""
    proto = parse("agraph (float[2] x, float[2] w) => (float[2] y) { y = Add(x, w) }")
    proto.ir_version = 3
    proto.opset_import[0].version = 8
    add_weight(proto, "w", np.array([1, 2], np.float32))
    return proto


def test_an_old_model_with_initializers_as_inputs_survives_as_it_is(tmp_path: Path) -> None:
    proto = saved(graphopt.load(old_model()), tmp_path / "m.onnx")

    assert proto.ir_version == 3
    assert [i.name for i in proto.graph.input] == ["x", "w"]
    onnx.checker.check_model(proto)


def test_initializers_that_are_inputs_become_constants_on_request(tmp_path: Path) -> None:
    model = graphopt.load(old_model())

    frozen = loading.freeze_overridable_inputs(model)

    assert frozen == ["w"]
    proto = saved(model, tmp_path / "m.onnx")
    assert [i.name for i in proto.graph.input] == ["x"]
    assert proto.ir_version == 4
    onnx.checker.check_model(proto)
    (result,) = outputs(tmp_path / "m.onnx", np.array([1, 1], np.float32))
    np.testing.assert_array_equal(result, [2, 3])
    assert loading.freeze_overridable_inputs(model) == []


def test_the_argument_is_not_modified(tmp_path: Path) -> None:
    proto = old_model()
    proto.graph.sparse_initializer.add().CopyFrom(sparse("s", FLAT))
    proto.training_info.add()
    before = proto.SerializeToString()
    given = ir.from_proto(two_layers())
    given_before = ir.to_proto(given).SerializeToString()

    for model in (proto, before, given):
        loaded = graphopt.load(model, drop_training_info=True)
        loading.freeze_overridable_inputs(loaded)
        infer_shapes(loaded)
        loaded.graph.name = "changed"
        graphopt.save(loaded, tmp_path / "m.onnx", external_data=True)

    assert proto.SerializeToString() == before
    assert ir.to_proto(given).SerializeToString() == given_before


def test_saving_does_not_modify_the_model(tmp_path: Path) -> None:
    model = graphopt.load(two_layers())
    before = ir.to_proto(model).SerializeToString()

    graphopt.save(model, tmp_path / "m.onnx", external_data=True)

    assert ir.to_proto(model).SerializeToString() == before


def test_a_model_of_another_kind_is_refused() -> None:
    with pytest.raises(graphopt.ModelError, match="not a list"):
        graphopt.load([1, 2])  # type: ignore[arg-type]


def test_external_data_without_a_file_is_refused(tmp_path: Path) -> None:
    content = write_external(tmp_path).read_bytes()

    with pytest.raises(graphopt.ModelError, match="give the path of the file"):
        graphopt.load(content)


# ------------------------------------------------------------------ hashes


def test_the_hash_of_a_single_file_is_that_of_its_bytes(tmp_path: Path) -> None:
    content = two_layers().SerializeToString()
    (tmp_path / "m.onnx").write_bytes(content)

    expected = hashlib.sha256(content).hexdigest()
    assert loading.open_model(tmp_path / "m.onnx").sha256() == expected
    assert loading.open_model(content).sha256() == expected


def test_a_model_that_was_given_away_is_made_again_as_it_was() -> None:
    proto = parse("agraph (float[2] x) => (float[2] y) <float[2] w = {1, 2}> { y = Add(x, w) }")
    source = loading.open_model(proto)

    modified = source.give_away()
    modified.graph.initializers["w"].name = "other"

    assert list(source.model.graph.initializers) == ["w"]
    assert list(source.model.clone().graph.initializers) == ["w"]


def test_the_hash_covers_external_data(tmp_path: Path) -> None:
    path = write_external(tmp_path)
    first = loading.open_model(path).sha256()
    assert loading.open_model(path).sha256() == first

    with open(tmp_path / "m.onnx.part1", "r+b") as data:
        data.seek(4096)
        data.write(b"\x01")

    assert loading.open_model(path).sha256() != first


# ------------------------------------------------------------------ what a save keeps


def annotated() -> onnx.ModelProto:
    proto = onnx.parser.parse_model(
        """
        <ir_version: 10, opset_import: ["" : 18, "own" : 1],
         producer_name: "tester", producer_version: "1.2", domain: "example", model_version: 7,
         doc_string: "a model">
        agraph (float[n, 3] x) => (float[n, 3] y)
        <float[n, 3] a>
        { a = Relu(x)  b = own.twice(a)  y = Abs(b) }
        <domain: "own", opset_import: ["" : 18]>
        twice (p) => (q) { q = Add(p, p) }
        """
    )
    proto.metadata_props.add(key="author", value="somebody")
    proto.graph.doc_string = "a graph"
    proto.graph.metadata_props.add(key="graph", value="too")
    proto.graph.node[0].doc_string = "a node"
    proto.graph.node[0].metadata_props.add(key="node", value="too")
    note = proto.graph.quantization_annotation.add(tensor_name="a")
    note.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="scale")
    add_weight(proto, "scale", np.float32(0.5).reshape(()))
    return proto


def test_everything_that_a_file_says_is_still_there_after_a_save(tmp_path: Path) -> None:
    proto = annotated()

    result = saved(graphopt.load(proto), tmp_path / "m.onnx")

    for field in ("producer_name", "producer_version", "domain", "model_version", "doc_string"):
        assert getattr(result, field) == getattr(proto, field)
    assert list(result.metadata_props) == list(proto.metadata_props)
    assert result.graph.doc_string == "a graph"
    assert list(result.graph.metadata_props) == list(proto.graph.metadata_props)
    assert result.graph.node[0].doc_string == "a node"
    assert list(result.graph.node[0].metadata_props) == list(proto.graph.node[0].metadata_props)
    annotations = list(result.graph.quantization_annotation)
    assert annotations == list(proto.graph.quantization_annotation)
    assert [f.name for f in result.functions] == ["twice"]
    assert [i.name for i in result.graph.value_info] == ["a"]
    (there,) = outputs(tmp_path / "m.onnx", np.ones((1, 3), np.float32))
    np.testing.assert_array_equal(there, np.full((1, 3), 2))


def test_inferred_types_are_not_written(tmp_path: Path) -> None:
    model = graphopt.load(annotated())

    infer_shapes(model)

    assert next(v for v in model.graph.node(1).outputs).name == "b"
    proto = saved(model, tmp_path / "m.onnx")
    assert [i.name for i in proto.graph.value_info] == ["a"]


def narrow(dtype: object, count: int = 3000) -> np.ndarray:
    """Random bits as an element type, an odd number of elements, NaN included."""
    generator = np.random.default_rng(1)
    plain = generator.integers(0, 256, 2 * count, dtype=np.uint8)
    kind = np.dtype(dtype)  # type: ignore[call-overload]
    if kind.name in ("int4", "uint4", "float4_e2m1fn"):
        return (plain % 16).astype(np.uint8)[: count | 1].astype(np.int8).astype(kind)
    return plain.view(kind)[: count | 1]


NARROW = {
    name: getattr(ml_dtypes, name)
    for name in ("bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz",
                 "int4", "uint4", "float4_e2m1fn")
}  # fmt: skip


@pytest.mark.parametrize("external_data", [False, True], ids=["inline", "external"])
@pytest.mark.parametrize("dtype", NARROW.values(), ids=NARROW)
def test_narrow_weights_keep_every_bit(dtype: object, external_data: bool, tmp_path: Path) -> None:
    tensor = ir.Tensor(narrow(dtype), name="w")
    expected = tensor.tobytes()
    model = ir.from_proto(parse(RELU))
    model.ir_version = 11
    model.graph.initializers["w"] = ir.Value(name="w", const_value=tensor)
    model.graph.initializers["w"].dtype = tensor.dtype
    model.graph.initializers["w"].shape = ir.Shape(tensor.shape.numpy())

    graphopt.save(model, tmp_path / "m.onnx", external_data=external_data)
    back = graphopt.load(tmp_path / "m.onnx").graph.initializers["w"].const_value

    assert back is not None
    assert isinstance(back, ir.ExternalTensor) == external_data
    assert back.tobytes() == expected
    assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)


@pytest.mark.parametrize("external_data", [False, True], ids=["inline", "external"])
def test_weights_without_fixed_size_and_without_elements_survive(
    external_data: bool, tmp_path: Path
) -> None:
    proto = two_layers()
    add_weight(proto, "words", np.array(["a", "ü" * 2000, ""], object))
    add_weight(proto, "empty", np.zeros((0, 3), np.float32))
    add_weight(proto, "scalar", np.array(3, np.int64))

    graphopt.save(graphopt.load(proto), tmp_path / "m.onnx", external_data=external_data)
    back = graphopt.load(tmp_path / "m.onnx")

    assert initializer(back, "words").tolist() == [b"a", ("ü" * 2000).encode(), b""]
    assert initializer(back, "empty").shape == (0, 3)
    assert initializer(back, "scalar").shape == ()
    assert initializer(back, "scalar") == 3
    assert len(outputs(tmp_path / "m.onnx", rows())) == 1


# ------------------------------------------------------------------ saving


@pytest.mark.parametrize("external_data", [False, True], ids=["inline", "external"])
def test_onnxruntime_loads_what_is_saved(external_data: bool, tmp_path: Path) -> None:
    proto = two_layers()
    path = tmp_path / "m.onnx"

    size = saving.save(graphopt.load(proto), path, external_data=external_data)

    expected = outputs(proto.SerializeToString(), rows())
    np.testing.assert_array_equal(outputs(path, rows()), expected)
    assert size == sum(file.stat().st_size for file in tmp_path.iterdir())
    assert len(list(tmp_path.iterdir())) == 1 + external_data


@pytest.mark.parametrize("external_data", [False, True], ids=["inline", "external"])
def test_the_same_model_gives_the_same_bytes(external_data: bool, tmp_path: Path) -> None:
    contents = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        path = tmp_path / name / "m.onnx"
        graphopt.save(graphopt.load(two_layers()), path, external_data=external_data)
        contents.append({file.name: file.read_bytes() for file in path.parent.iterdir()})

    assert contents[0] == contents[1]


@pytest.mark.parametrize("external_data", [False, True], ids=["inline", "external"])
def test_a_model_that_is_loaded_and_saved_again_keeps_its_bytes(
    external_data: bool, tmp_path: Path
) -> None:
    path = tmp_path / "m.onnx"
    graphopt.save(graphopt.load(two_layers()), path, external_data=external_data)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    graphopt.save(graphopt.load(path), path)

    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("width", [1, 5, 16, 17, 64, 181, 182, 400])
def test_stored_bytes_is_the_size_of_the_file(width: int, tmp_path: Path) -> None:
    model = graphopt.load(two_layers(width=width))

    size = saving.save(model, tmp_path / "m.onnx")

    assert size == (tmp_path / "m.onnx").stat().st_size
    assert saving.stored_bytes(model) == size


def test_stored_bytes_of_the_digits_model_is_the_size_of_its_saved_file(tmp_path: Path) -> None:
    model = graphopt.load(graphopt_models.DIGITS_CNN)

    saving.save(model, tmp_path / "m.onnx")

    assert saving.stored_bytes(model) == (tmp_path / "m.onnx").stat().st_size


def test_stored_bytes_with_external_data_is_nearly_the_size_of_the_files(tmp_path: Path) -> None:
    model = graphopt.load(write_external(tmp_path))

    size = saving.save(model, tmp_path / "o.onnx")

    assert abs(saving.stored_bytes(model) - size) < 200


def test_the_data_file_is_named_by_its_content(tmp_path: Path) -> None:
    for name, seed in (("a.onnx", 0), ("b.onnx", 0), ("c.onnx", 1)):
        graphopt.save(graphopt.load(two_layers(seed)), tmp_path / name, external_data=True)

    names = {file.name.split(".")[0]: file.name.split(".")[2] for file in tmp_path.glob("*.data")}

    assert names["a"] == names["b"] != names["c"]
    assert all(len(digest) == 12 for digest in names.values())


FOREIGN = [
    "m.onnx.data",
    "m.onnx.part0",
    "m.onnx.0123.data",
    "m.onnx.0123456789ab.data.bak",
    "x.m.onnx.0123456789ab.data",
    "other.onnx.0123456789ab.data",
    ".other.onnx.1.data.tmp",
]


def test_a_save_removes_older_data_of_the_same_output_and_nothing_else(tmp_path: Path) -> None:
    for name in FOREIGN:
        (tmp_path / name).write_bytes(b"precious")
    path = tmp_path / "m.onnx"
    graphopt.save(graphopt.load(two_layers(0)), path, external_data=True)
    (old,) = tmp_path.glob("m.onnx.????????????.data")

    graphopt.save(graphopt.load(two_layers(1)), path, external_data=True)

    (new,) = tmp_path.glob("m.onnx.????????????.data")
    assert new != old
    assert all((tmp_path / name).read_bytes() == b"precious" for name in FOREIGN)
    assert len(list(tmp_path.iterdir())) == len(FOREIGN) + 2

    graphopt.save(graphopt.load(two_layers(1)), path, external_data=False)

    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([*FOREIGN, "m.onnx"])


def test_what_a_killed_save_left_behind_is_removed(tmp_path: Path) -> None:
    for kind in ("graph", "data"):
        (tmp_path / f".m.onnx.999999999.{kind}.tmp").write_bytes(b"left over")
        (tmp_path / f".m.onnx.{os.getppid()}.{kind}.tmp").write_bytes(b"of a process that lives")
        (tmp_path / f".n.onnx.999999999.{kind}.tmp").write_bytes(b"of another output")

    graphopt.save(graphopt.load(two_layers()), tmp_path / "m.onnx")

    left = sorted(file.name for file in tmp_path.iterdir())
    assert left == [".n.onnx.999999999.data.tmp", ".n.onnx.999999999.graph.tmp", "m.onnx"]


def refuse(path: Path) -> None:
    assert path.is_file()
    raise graphopt.ModelError("does not load")


@pytest.mark.parametrize("old_external", [False, True], ids=["old inline", "old external"])
@pytest.mark.parametrize("external_data", [False, True], ids=["inline", "external"])
@pytest.mark.parametrize("seed", [0, 1], ids=["same", "other"])
def test_a_model_that_fails_its_check_does_not_replace_the_old_one(
    old_external: bool, external_data: bool, seed: int, tmp_path: Path
) -> None:
    path = tmp_path / "m.onnx"
    graphopt.save(graphopt.load(two_layers(0)), path, external_data=old_external)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    with pytest.raises(graphopt.ModelError, match="does not load"):
        saving.save(
            graphopt.load(two_layers(seed)), path, external_data=external_data, verify=refuse
        )

    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_the_check_is_given_a_file_that_loads(tmp_path: Path) -> None:
    seen = []

    def check(path: Path) -> None:
        seen.append(outputs(path, rows())[0])

    saving.save(graphopt.load(two_layers()), tmp_path / "m.onnx", external_data=True, verify=check)

    np.testing.assert_array_equal(seen, outputs(two_layers().SerializeToString(), rows()))


SAVE_ON_A_FULL_DISK = """
    import resource, signal, sys
    import graphopt
    model = graphopt.load(sys.argv[1])
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]), resource.RLIM_INFINITY))
    try:
        graphopt.save(model, sys.argv[2], external_data=sys.argv[3] == "external")
    except graphopt.ModelError as error:
        sys.exit(str(error))
"""


@pytest.mark.parametrize(
    ("how", "limit"), [("inline", 20_000), ("external", 20_000), ("external", 0)]
)
def test_a_full_disk_leaves_the_old_model_and_no_rubbish(
    how: str, limit: int, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    new = write_external(tmp_path / "in", seed=1)
    path = tmp_path / "out" / "m.onnx"
    graphopt.save(graphopt.load(two_layers(0)), path, external_data=True)
    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}

    code = textwrap.dedent(SAVE_ON_A_FULL_DISK)
    done = subprocess.run(
        [sys.executable, "-c", code, str(new), str(path), how, str(limit)],
        capture_output=True,
        text=True,
    )

    assert done.returncode == 1
    assert done.stderr == (
        f"cannot write {path}: the disk is full; what was there before is unharmed\n"
    )
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == before


def test_a_model_can_be_saved_over_the_file_that_its_own_weights_are_in(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    graphopt.save(graphopt.load(two_layers()), path, external_data=True)
    expected = outputs(path, rows())[0]
    model = graphopt.load(path)
    first, second = (model.graph.initializers[name] for name in ("w1", "w2"))
    assert isinstance(second.const_value, ir.ExternalTensor)
    first.const_value = ir.Tensor(initializer(model, "w1") * np.float32(0.5))

    (old_data,) = tmp_path.glob("*.data")
    graphopt.save(model, path)

    # The model in memory still reads the old file, which goes with the next save.
    assert len(list(tmp_path.iterdir())) == 3
    graphopt.save(model, tmp_path / "other.onnx")
    graphopt.save(graphopt.load(path), path)
    assert not old_data.exists()
    onnx.checker.check_model(path)
    half = outputs(path, rows() * 2)[0]
    np.testing.assert_allclose(half, expected, rtol=1e-5)
    w2 = onnx.numpy_helper.to_array(two_layers().graph.initializer[1])
    np.testing.assert_array_equal(initializer(graphopt.load(path), "w2"), w2)


def test_a_run_can_be_saved_over_the_file_that_the_given_model_reads(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    graphopt.save(graphopt.load(two_layers()), path, external_data=True)
    given = graphopt.load(path)

    run = graphopt.optimize(given, passes="drop-unused", benchmark=False)
    run.model.graph.initializers["w1"].const_value = ir.tensor(np.zeros((64, 64), np.float32))
    run.model.graph.initializers["w2"].const_value = ir.tensor(np.zeros((64, 64), np.float32))
    run.save(path)
    graphopt.save(given, tmp_path / "given.onnx")

    assert not initializer(graphopt.load(path), "w1").any()
    w1 = onnx.numpy_helper.to_array(two_layers().graph.initializer[0])
    np.testing.assert_array_equal(initializer(graphopt.load(tmp_path / "given.onnx"), "w1"), w1)


def test_weights_whose_file_is_gone_are_named(tmp_path: Path) -> None:
    model = graphopt.load(write_external(tmp_path))
    (tmp_path / "m.onnx.part1").unlink()

    with pytest.raises(graphopt.ModelError, match=r"m\.onnx\.part1.*is gone"):
        graphopt.save(model, tmp_path / "o.onnx")

    assert sorted(f.name for f in tmp_path.iterdir()) == ["m.onnx", "m.onnx.part0"]


def test_saves_to_one_target_at_a_time_leave_one_whole_model(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    models = [graphopt.load(two_layers(seed)) for seed in range(4)]
    expected = [outputs(two_layers(seed).SerializeToString(), rows())[0] for seed in range(4)]
    failures: list[BaseException] = []

    def save_often(model: ir.Model) -> None:
        try:
            for _ in range(15):
                graphopt.save(model, path, external_data=True)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=save_often, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert failures == []
    assert len(list(tmp_path.iterdir())) == 2
    result = outputs(path, rows())[0]
    assert any(np.array_equal(result, one) for one in expected)


def test_a_graph_whose_weights_are_too_large_goes_external(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "INLINE_LIMIT_BYTES", 30_000)

    graphopt.save(graphopt.load(two_layers(width=61)), tmp_path / "small.onnx")
    graphopt.save(graphopt.load(two_layers(width=62)), tmp_path / "large.onnx")

    assert len(list(tmp_path.glob("small*"))) == 1
    assert len(list(tmp_path.glob("large*"))) == 2


def test_the_data_of_the_model_itself_is_not_overwritten(tmp_path: Path) -> None:
    graphopt.save(graphopt.load(two_layers(width=61)), tmp_path / "a.onnx", external_data=True)
    (data,) = tmp_path.glob("*.data")
    given = ir.load(tmp_path / "a.onnx")

    for model in (given, graphopt.load(tmp_path / "a.onnx")):
        with pytest.raises(graphopt.ModelError, match="weights of the model itself are in"):
            graphopt.save(model, data)
    with pytest.raises(graphopt.ModelError, match="weights of the model itself are in"):
        graphopt.optimize(given, benchmark=False).save(data)


def test_an_ir_model_with_damaged_external_data_is_an_error(tmp_path: Path) -> None:
    graphopt.save(graphopt.load(two_layers(width=61)), tmp_path / "a.onnx", external_data=True)
    (data,) = tmp_path.glob("*.data")
    given = ir.load(tmp_path / "a.onnx")
    data.write_bytes(data.read_bytes()[:-100])

    with pytest.raises(graphopt.ModelError, match="is too short"):
        graphopt.optimize(given, benchmark=False)

    data.unlink()
    with pytest.raises(graphopt.ModelError, match="no such file"):
        graphopt.optimize(given, benchmark=False)


def test_a_link_is_followed(tmp_path: Path) -> None:
    model = graphopt.load(two_layers(width=61))
    (tmp_path / "real").mkdir()
    link = tmp_path / "link.onnx"
    link.symlink_to(tmp_path / "real" / "m.onnx")

    graphopt.save(model, link, external_data=True)

    assert link.is_symlink()
    assert len(list((tmp_path / "real").glob("m.onnx*"))) == 2
    Session(link.resolve())

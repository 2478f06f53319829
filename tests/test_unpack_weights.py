from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from optimized import kernels
from packed_models import (
    FORMS,
    INTEGERS,
    READERS,
    WEIGHTS_ONLY,
    Form,
    integer_model,
    pack_all,
    packed_integers,
    packed_reader,
)

import graphopt
from graphopt.contract import Context, Effect
from graphopt.encoding import Encoding, Narrow
from graphopt.operators import all_graphs
from graphopt.packing import is_packed, packed_weights
from graphopt.random_samples import random_samples
from graphopt.rewriting import Names
from graphopt.runtime import Session
from graphopt.scratch import Scratch
from graphopt.testing import (
    apply_pass,
    assert_equivalent,
    assert_unchanged,
    canonical,
    parse,
)
from graphopt_passes.quantize.unpack_weights import UnpackWeights

PASS = UnpackWeights()
CODES = np.arange(-32, 32, dtype=np.int8).reshape(4, 16)
SCALES = np.float32([[0.5], [1.0], [2.0], [0.25]])


def unpacked(model: ir.Model) -> ir.Model:
    """The model after the pass, as the pipeline leaves it; the gate has no say."""
    run = graphopt.optimize(model, passes=[PASS], validate=False, benchmark=False)
    (step,) = run.steps
    assert step.verdict == "kept", step.reason
    return run.model


def weights(model: ir.Model) -> dict[str, np.ndarray]:
    return {
        name: value.const_value.numpy()
        for graph in all_graphs(model)
        for name, value in graph.initializers.items()
        if value.const_value is not None
    }


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for graph in all_graphs(model) for node in graph]


def assert_same_as_deployed(before: ir.Model, after: ir.Model) -> None:
    """Bit for bit."""
    first, second = Session(before), Session(after)
    for sample in random_samples(before, 3):
        outputs = second.run(sample)
        assert all(outputs[n].tobytes() == a.tobytes() for n, a in first.run(sample).items())


def with_weight(narrow: Narrow, dtype: ir.DataType) -> ir.Model:
    """A model that adds a packed weight to its input."""
    kind, dims = dtype.name.lower(), ",".join(map(str, narrow.codes.shape))
    model = parse(f"agraph ({kind}[{dims}] x) => ({kind}[{dims}] y) {{ y = Add(x, x) }}")
    encoding = Encoding(model.graph, Names(model), lambda a, name: ir.Tensor(a, name=name))
    reader = model.graph[0]
    reader.replace_input_with(1, encoding.weight(narrow, dtype, "w"))
    encoding.close()
    return model


def test_codes_that_nodes_widen_become_numbers() -> None:
    model = parse(
        """
        agraph (float[N,4] x, int8[4,16] q, float[4,1] s) => (float[N,16] y)
        { c = Cast<to = 1>(q) w = Mul(c, s) y = MatMul(x, w) }
        """,
        q=CODES,
        s=SCALES,
    )
    expected = parse(
        "agraph (float[N,4] x, float[4,16] w) => (float[N,16] y) { y = MatMul(x, w) }",
        w=CODES * SCALES,
    )

    result = unpacked(model)

    assert canonical(result) == canonical(expected)
    assert list(result.graph.initializers) == ["w"]
    assert_same_as_deployed(model, result)


@pytest.mark.parametrize(
    "text",
    [
        "agraph (float[N,4] x, float[4,16] w) => (float[N,16] y) { y = MatMul(x, w) }",
        "agraph (float[N,4] x, float[4,16] w) => (float[N,16] y)"
        " { t = Transpose(w) u = Transpose(t) y = MatMul(x, u) }",
    ],
)
def test_leaves_what_is_not_packed(text: str) -> None:
    assert not assert_unchanged(PASS, parse(text, w=np.ones((4, 16), np.float32))).skips


@pytest.mark.parametrize("form", FORMS)
def test_the_numbers_are_those_that_were_packed(form: str) -> None:
    narrow = FORMS[form].narrow((32, 24), 0)
    model = with_weight(narrow, ir.DataType.FLOAT)

    result = weights(unpacked(model))

    assert result.keys() == {"w"}
    assert result["w"].tobytes() == narrow.numbers().tobytes()
    assert result["w"].dtype == np.float32


@pytest.mark.parametrize("dtype", ["FLOAT16", "DOUBLE", "BFLOAT16"])
def test_other_types(dtype: str) -> None:
    narrow = FORMS["16 levels"].narrow((32, 24), 0)
    kind = ir.DataType[dtype]
    model = with_weight(narrow, kind)

    change = apply_pass(PASS, model)

    assert dict(change.counts) == {f"weight unpacked to {dtype.lower()}": 1}
    wanted = narrow.numbers().astype(kind.numpy())
    assert weights(model)["w"].tobytes() == wanted.tobytes()


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e8m0fnu, ml_dtypes.float8_e4m3fn])
def test_narrow_scales(dtype: np.dtype) -> None:
    narrow = FORMS["no scales"].narrow((8, 24), 0)
    scales = np.exp2(np.arange(8, dtype=np.float32) - 3).astype(dtype).reshape(8, 1)
    narrow = Narrow(narrow.codes, narrow.codebook, scales)
    model = with_weight(narrow, ir.DataType.FLOAT)
    if dtype is ml_dtypes.float8_e8m0fnu:
        model.opset_imports[""], model.ir_version = 24, 12

    apply_pass(PASS, model)

    assert weights(model)["w"].tobytes() == narrow.numbers().tobytes()


@pytest.mark.parametrize("reader", READERS)
def test_outputs_stay_and_nothing_is_left_behind(reader: str) -> None:
    model = packed_reader(reader, FORMS["offsets" if reader == "MatMul" else "8 levels"])

    result = unpacked(model)

    assert_equivalent(model, result)
    assert_same_as_deployed(model, result)
    assert not [v for graph in all_graphs(result) for v in packed_weights(graph)]
    assert all(v.uses() for graph in all_graphs(result) for v in graph.initializers.values())
    assert not {array.dtype.name for array in weights(result).values()} & {"int8", "uint8"}
    assert not set(operators(result)) & {"Cast", "DequantizeLinear", "Reshape"}
    assert_unchanged(PASS, result)


@pytest.mark.parametrize("levels", [3, 16, 256])
@pytest.mark.parametrize("reader", INTEGERS)
def test_layers_on_integers_stay(reader: str, levels: int, tmp_path: Path) -> None:
    model = packed_integers(reader, levels)

    result = unpacked(model)

    assert_equivalent(model, result, Effect.EXACT)
    assert operators(result) == operators(integer_model(reader))
    assert kernels(result, tmp_path) == kernels(model, tmp_path)
    large = [array for array in weights(result).values() if array.size > 256]
    assert [array.dtype for array in large] == [np.int8]
    assert len(np.unique(large[0])) <= levels
    assert_unchanged(PASS, result)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "int8"])
@pytest.mark.parametrize("reader", WEIGHTS_ONLY)
def test_weights_that_meet_floats_become_floats(reader: str, packed: bool) -> None:
    model = packed_integers(reader, 8) if packed else integer_model(reader)

    result = unpacked(model)

    assert_equivalent(model, result)
    assert "DequantizeLinear" not in operators(result)
    assert {array.dtype.name for array in weights(result).values()} == {"float32"}


def test_a_weight_with_readers_of_both_kinds_stays_in_integers() -> None:
    model = parse(
        """
        agraph (float[4,4] x, int8[4,16] q) => (float[4,16] y) <float s = {0.5}, int8 z = {0}>
        {
            h = QuantizeLinear(x, s, z) i = DequantizeLinear(h, s, z)
            t = Identity(q) w = DequantizeLinear(q, s, z)
            a = MatMul(i, w) r = Relu(x) b = MatMul(r, w) y = Add(a, b)
        }
        """,
        q=CODES,
    )
    assert_unchanged(PASS, model)


def test_weights_in_bodies_are_unpacked_there() -> None:
    model = parse(
        """
        agraph (float[4,16] x, bool c) => (float[4,16] y)
        {
            y = If(c) <
                then_branch = then () => (float[4,16] a) <float[4,16] w = {1, 2, 3, 4, 5, 6, 7, 8,
                    1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3,
                    4, 5, 6, 7, 8, 1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4, 5, 6,
                    7, 8}> { a = Add(x, w) },
                else_branch = other () => (float[4,16] b) { b = Relu(x) }
            >
        }
        """
    )
    assert pack_all(model, Form(16), 64) == ["w"]

    result = unpacked(model)

    assert_equivalent(model, result)
    (body,) = [graph for graph in all_graphs(result) if "w" in graph.initializers]
    assert body.name == "then"
    assert len(body) == 1


def test_a_tied_head_stays_tied() -> None:
    result = unpacked(packed_reader("tied", FORMS["16 levels"]))

    assert operators(result) == ["Gather", "Transpose", "MatMul"]
    assert weights(result).keys() == {"E"}


def test_what_a_graph_gives_out_stays_made_by_a_node() -> None:
    model = parse(
        "agraph (float[4,16] x, int8[4,16] q) => (float[4,16] y, float[4,16] w)"
        " { w = Cast<to = 1>(q) y = Add(x, w) }",
        q=CODES,
    )

    (skip,) = assert_unchanged(PASS, model).skips

    assert (skip.node, skip.reason) == (
        "w",
        "it is an output of its graph, which a node must make",
    )


def test_what_onnxruntime_cannot_compute_stays() -> None:
    model = parse(
        "agraph (float[4,16] x, float8e4m3fn[4,16] q) => (float[4,16] y)"
        " { d = Add(q, q) w = Cast<to = 1>(d) y = Add(x, w) }",
        q=np.ones((4, 16), ml_dtypes.float8_e4m3fn),
    )
    change = PASS.apply(model, Context(lambda: model))

    assert not change
    assert change.skips[0].reason.startswith("onnxruntime cannot compute it ahead: ")


# ------------------------------------------------------------------ some of them


def test_only_what_is_asked_for() -> None:
    model = packed_reader("LSTM", FORMS["16 levels"])

    change = apply_pass(UnpackWeights(only=("W",)), model)

    assert change.counts.total() == 1
    assert [v.name for v in packed_weights(model.graph)] == ["R"]


def test_integers_may_be_called_by_the_name_of_either_form() -> None:
    for name in ("C", "w"):
        model = packed_integers("QLinearConv", 16)
        assert apply_pass(UnpackWeights(only=(name,)), model).counts.total() == 1


def test_one_part_of_a_split_alone() -> None:
    model = packed_reader("Split, MatMul", FORMS["16 levels"])
    before = model.clone()

    apply_pass(UnpackWeights(only=("n",)), model)

    # onnxruntime crashes on a Split with an output that has no name.
    assert_equivalent(before, model)
    (split,) = [node for node in model.graph if node.op_type == "Split"]
    assert all(output.name for output in split.outputs)
    assert is_packed(split.outputs[1])


def test_refuses_names_that_no_packed_weight_has() -> None:
    model = packed_reader("LSTM", FORMS["16 levels"])
    reason = UnpackWeights(only=("W", "Rr")).refuse(model, Context(lambda: model))

    assert reason == "no packed weight is called 'Rr'; did you mean 'R'?"
    assert str(UnpackWeights(only=("W",))) == "unpack-weights{only=(W)}"


# ------------------------------------------------------------------ memory


def test_large_weights_go_to_the_scratch_file() -> None:
    model = with_weight(FORMS["16 levels"].narrow((1024, 512), 0), ir.DataType.FLOAT)
    packed = model.clone()

    apply_pass(PASS, model, scratch=Scratch())

    assert isinstance(model.graph.initializers["w"].const_value, ir.ExternalTensor)
    assert_equivalent(packed, model)


def test_the_model_that_was_packed_comes_back() -> None:
    """Where its numbers are those of a codebook, packing and unpacking lose nothing."""
    narrow = FORMS["3 levels"].narrow((64, 96), 0)
    original = parse(
        "agraph (float[4,64] x, float[64,96] w) => (float[4,96] y) { y = MatMul(x, w) }",
        w=narrow.numbers(),
    )
    model = original.clone()
    value = model.graph.initializers.pop("w")
    value.name = None
    encoding = Encoding(model.graph, Names(model), lambda a, name: ir.Tensor(a, name=name))
    value.replace_all_uses_with(encoding.weight(narrow, ir.DataType.FLOAT, "w"))
    encoding.close()

    assert canonical(unpacked(model)) == canonical(original)

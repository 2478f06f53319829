"""What inspect says of packed weights is what the encoder claims, and what explain sees."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from optimized import kernels
from packed_models import (
    FORMS,
    INTEGERS,
    READERS,
    SHAPES,
    WEIGHTS_ONLY,
    Form,
    integer_model,
    pack_all,
    packed_integers,
    packed_reader,
)

import graphopt
from graphopt.inspection import inspect_model
from graphopt.json_report import inspection_to_json, to_text
from graphopt.packed_sizes import PackedWeight, find_packed
from graphopt.report import render_inspection, to_terminal_text
from graphopt.skeleton import infer_shapes
from graphopt.testing import parse

LEVELS = {2: 1.0, 3: 1.6, 4: 2.0, 8: 3.0, 16: 4.0, 32: 5.0, 64: 6.0, 256: 8.0}
"""And the bits of a code."""


def only(model: ir.Model) -> PackedWeight:
    (weight,) = inspect_model(model).packed
    return weight


@pytest.mark.parametrize("levels", LEVELS)
def test_the_bits_are_those_that_the_encoder_claims(levels: int) -> None:
    form = Form(levels, scale="float32")
    found = only(packed_reader("MatMul", form))
    narrow = form.narrow(SHAPES["M"], 0)
    tables = sum(field.table().nbytes for field in narrow.fields if field.digits > 1)
    small = found.stored_bytes - narrow.stored_bytes - tables

    assert (found.name, found.dtype, found.shape) == ("M", "float", SHAPES["M"])
    assert found.levels == levels
    assert found.code_bits == pytest.approx(LEVELS[levels], abs=0.01)
    # The shape, and where digits end.
    assert 0 <= small <= 48
    assert found.bits_per_weight == pytest.approx(8 * found.stored_bytes / found.elements, 1e-3)
    assert found.memory_bytes == 4 * narrow.codes.size
    assert found.widened == "at load"


@pytest.mark.parametrize(("form", "bits"), [("groups", 4), ("offsets", 2), ("no scales", 4)])
def test_scales_and_codebooks_are_no_codes(form: str, bits: int) -> None:
    found = only(packed_reader("MatMul", FORMS[form]))

    assert found.code_bits == bits
    # Which of two codebooks it is, is added to the code.
    assert found.levels == (None if form == "groups" else FORMS[form].levels)


def test_codes_without_a_codebook() -> None:
    model = parse(
        "agraph (float[N,8] x, int8[8,16] q, float[1,16] s) => (float[N,16] y)"
        " { c = Cast<to = 1>(q) w = Mul(c, s) y = MatMul(x, w) }",
        q=np.ones((8, 16), np.int8),
        s=np.ones((1, 16), np.float32),
    )

    assert only(model) == PackedWeight(
        name="w",
        dtype="float",
        shape=(8, 16),
        stored_bytes=128 + 64,
        bits_per_weight=12.0,
        code_bits=8.0,
        levels=None,
        memory_bytes=512,
        widened="at load",
    )


def test_what_weights_share_is_divided_by_their_numbers() -> None:
    model = packed_reader("LSTM", FORMS["3 levels"])
    found = inspect_model(model)

    assert [(w.name, w.shape) for w in found.packed] == [("W", SHAPES["W"]), ("R", SHAPES["R"])]
    # All of the file but the nodes.
    assert sum(w.stored_bytes for w in found.packed) == pytest.approx(found.weight_bytes, abs=1)
    table_bits = 8 * 243 * 5 / found.parameters
    for weight in found.packed:
        # The rest is codebook, scale and shape, which each has for itself.
        assert 1.6 + table_bits < weight.bits_per_weight < 1.6 + table_bits + 0.2


def test_parts_of_a_split_are_weights_of_their_own() -> None:
    found = inspect_model(packed_reader("Split, MatMul", FORMS["16 levels"]))

    assert [(w.name, w.code_bits) for w in found.packed] == [("n", 4.0), ("o", 4.0)]
    assert found.parameters == found.packed[0].elements * 2


def test_the_transposed_table_of_a_tied_head_is_no_second_weight() -> None:
    found = inspect_model(packed_reader("tied", FORMS["16 levels"]))

    assert [w.name for w in found.packed] == ["E"]
    assert found.parameters == found.packed[0].elements


def test_weights_in_bodies_are_found() -> None:
    assert only(packed_reader("If", FORMS["16 levels"])).name == "M"


def test_averages_are_over_packed_weights_and_others() -> None:
    found = inspect_model(packed_reader("MatMul, Mul, Add", FORMS["16 levels"]))
    plain = inspect_model(
        parse(
            "agraph (float[8] x, float[8] w) => (float[8] y) { y = Add(x, w) }", w=np.ones(8, "f")
        )
    )

    (packed,) = found.packed
    assert found.parameters == packed.elements + 96
    stored_bytes = packed.stored_bytes + 4 * 96
    assert found.bits_per_weight == pytest.approx(8 * stored_bytes / found.parameters, 1e-3)
    assert (plain.packed, plain.parameters, plain.bits_per_weight) == ((), 8, 32.0)
    assert inspect_model(parse("agraph (float x) => (float y) { y = Neg(x) }")).parameters == 0


def test_shapes_are_no_parameters_and_biases_are() -> None:
    model = parse(
        """
        agraph (float[2,8] x, int32[8] q, float s) => (float[4,4] y)
        <int64[2] shape = {4, 4}, bool[8] mask = {1, 1, 1, 1, 0, 0, 0, 0}>
        { b = DequantizeLinear(q, s) a = Where(mask, x, b) y = Reshape(a, shape) }
        """,
        q=np.ones(8, np.int32),
        s=np.float32(0.1),
    )
    found = inspect_model(model)

    assert (found.packed, found.parameters, found.bits_per_weight) == ((), 9, 32.0)


def test_a_shape_that_is_not_known_is_no_weight() -> None:
    model = parse(
        "agraph (float[N,M] x, int8[8,16] q, int64[2] s) => (float[N,M] y)"
        " { c = Cast<to = 1>(q) w = Reshape(c, s) y = Add(x, w) }",
        q=np.ones((8, 16), np.int8),
        s=np.int64([8, 16]),
    )
    assert [w.name for w in inspect_model(model).packed] == ["w"]

    model.graph.inputs.append(model.graph.initializers["s"])
    found = inspect_model(model)
    assert [w.name for w in found.packed] == ["c"]


def test_the_model_stays_as_it_is() -> None:
    model = packed_reader("tied", FORMS["16 levels"])
    for node in model.graph:
        node.outputs[0].shape = None
    inspect_model(model)

    assert all(node.outputs[0].shape is None for node in model.graph)


# ------------------------------------------------------------------ when


def dequantizes_in_every_run(model: ir.Model, folder: Path) -> bool:
    """Onnxruntime runs a DequantizeLinear beside that of the output."""
    of_outputs = any(node.op_type == "QuantizeLinear" for node in model.graph)
    return kernels(model, folder)["DequantizeLinear"] > of_outputs


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "int8"])
@pytest.mark.parametrize("reader", [*INTEGERS, *WEIGHTS_ONLY])
def test_what_is_foretold_of_integers_is_what_onnxruntime_does(
    reader: str, packed: bool, tmp_path: Path
) -> None:
    model = packed_integers(reader, 16) if packed else integer_model(reader)
    found = only(model)

    wanted = "in every run" if dequantizes_in_every_run(model, tmp_path) else "by the kernel"
    assert found.widened == wanted
    if wanted == "by the kernel":
        assert (found.dtype, found.memory_bytes) == ("int8", found.elements)
        assert found.name in SHAPES
    else:
        assert (found.dtype, found.memory_bytes) == ("float", 5 * found.elements)
    assert found.code_bits == (4 if packed else 8)


@pytest.mark.parametrize("reader", READERS)
def test_what_is_foretold_of_floats_is_what_onnxruntime_does(reader: str, tmp_path: Path) -> None:
    model = packed_reader(reader, FORMS["16 levels"])

    assert {w.widened for w in inspect_model(model).packed} == {"at load"}
    looked_up = int("Gather" in reader or "tied" in reader)
    left = kernels(model, tmp_path)
    assert (left["Cast"], left["Gather"]) == (0, looked_up)


@pytest.mark.parametrize(("rows", "widened"), [(1 << 14, "at load"), (1 << 15, "in every run")])
def test_what_is_too_large_to_fold_is_widened_in_every_run(rows: int, widened: str) -> None:
    model = parse(
        f"agraph (float[N,{rows}] x, int8[{rows},16384] q) => (float[N,16384] y)"
        " { w = Cast<to = 1>(q) y = MatMul(x, w) }"
    )
    codes = model.graph.inputs.pop()
    codes.const_value = ir.ExternalTensor(
        "never read", 0, rows << 14, ir.DataType.INT8, shape=ir.Shape([rows, 1 << 14]), name="q"
    )
    model.graph.register_initializer(codes)
    infer_shapes(model)

    (found,) = find_packed([model.graph]).weights

    assert found.widened == widened
    kept_bytes = found.stored_bytes if widened == "in every run" else 0
    assert found.memory_bytes == 4 * (rows << 14) + kept_bytes


# ------------------------------------------------------------------ shown


def test_the_largest_are_shown_and_all_together() -> None:
    names = [f"w{n}" for n in range(12)]
    products = " ".join(f"a{n + 1} = MatMul(a{n}, {name})" for n, name in enumerate(names))
    model = parse(
        f"agraph (float[4,16] x, {', '.join(f'float[16,16] {name}' for name in names)})"
        f" => (float[4,16] y) {{ a0 = Relu(x) {products} y = Relu(a12) }}",
        **{name: np.zeros((16, 16), np.float32) for name in names},
    )
    assert len(pack_all(model, Form(16, "none"))) == 12
    found, tried = graphopt.inspect(model)

    lines = to_terminal_text(render_inspection(found, tried), 200, False).splitlines()

    shown = [line for line in lines if line.startswith("packed")]
    assert len(shown) == 10
    assert re.fullmatch(
        r"packed +w0: float\[16, 16\], \d\.\d\d bits each \(16 levels, 4-bit codes\), \d+ bytes, "
        r"1,024 in memory, widened at load",
        shown[0],
    )
    after = lines[lines.index(shown[-1]) + 1]
    assert after.strip().startswith("all 12: 3,072 numbers, ")
    assert any(re.fullmatch(r"parameters +3,072, \d\.\d\d bits each", line) for line in lines)


def test_all_are_in_the_json() -> None:
    found, tried = graphopt.inspect(packed_reader("LSTM", FORMS["16 levels"]))

    told = json.loads(to_text(inspection_to_json(found, tried)))

    assert told["schema_version"] == 1
    assert told["parameters"] == found.parameters
    assert told["bits_per_weight"] == found.bits_per_weight
    assert [weight["name"] for weight in told["packed"]] == ["W", "R"]
    assert told["packed"][0].keys() == {
        "name", "dtype", "shape", "stored_bytes", "bits_per_weight", "code_bits", "levels",
        "memory_bytes", "zero_share", "widened",
    }  # fmt: skip

"""Tables that are looked up in codes: against what the codes stand for, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from observed import observer
from optimized import kernels

import graphopt
from graphopt.contract import Change, Context, Effect
from graphopt.inspection import inspect_model
from graphopt.kernel_operands import KernelWeight, kernel_weights
from graphopt.operators import all_graphs
from graphopt.registry import parse_passes, pass_class, pass_names
from graphopt.runtime import Reference, Session
from graphopt.skeleton import infer_shapes
from graphopt.testing import apply_pass, assert_unchanged, canonical, parse
from graphopt_passes.quantize.kernel_nodes import packed_blocks, packed_rows
from graphopt_passes.quantize.quantize_weights import QuantizeWeights
from graphopt_passes.quantize.unpack_weights import UnpackWeights

KERNEL = QuantizeWeights(bits=4, block=32, form="kernel", accuracy_level=4)
UNPACK = UnpackWeights()
LOSSLESS = [
    name
    for name in pass_names()
    if pass_class(name).effect is not Effect.LOSSY and name != "unpack-weights"
]
IDS = np.array([[0, 3, -1], [159, -160, 3]], np.int64)


def numbers(*shape: int, seed: int = 0, dtype: type = np.float32) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def looked_up(*shape: int, dtype: type = np.float32, axis: int = 0) -> ir.Model:
    """A model of one lookup."""
    kind = "float" if dtype is np.float32 else "float16"
    dims = ",".join(map(str, shape))
    return parse(
        f"agraph (int64[A,B] ids, {kind}[{dims}] table) => ({kind}[A,B,C] y) {{"
        f" y = Gather<axis = {axis}>(table, ids) }}",
        table=numbers(*shape, dtype=dtype),
    )


HEADS = {
    "MatMul": "t = Transpose<perm = [1,0]>(table) y = MatMul(e, t)",
    "Gemm": "f = Reshape(e, s) y = Gemm<transB = 1>(f, table, b)",
    "two": "t = Transpose<perm = [1,0]>(table) z = MatMul(e, t) v = Neg(e) w = MatMul(v, t)"
    " y = Add(z, w)",
}


def tied(head: str = "MatMul", rows: int = 160, inputs: int = 64, kind: str = "float") -> ir.Model:
    """A language model of nothing but its table, which is looked up and multiplied with."""
    dtype = np.float32 if kind == "float" else np.float16
    return parse(
        f"agraph (int64[A,B] ids, {kind}[{rows},{inputs}] table, {kind}[{rows}] b, int64[2] s)"
        f" => ({kind} y, {kind}[A,B,{inputs}] e) {{ e = Gather(table, ids) {HEADS[head]} }}",
        table=numbers(rows, inputs, dtype=dtype),
        b=numbers(rows, dtype=dtype),
        s=np.array([-1, inputs]),
    )


def only(model: ir.Model) -> KernelWeight:
    (weight,) = kernel_weights(all_graphs(model))
    return weight


def array_of(value: ir.Value) -> np.ndarray:
    """Of a constant, or of one that a Cast widens."""
    node = value.producer()
    if node is not None:
        assert node.op_type == "Cast" and node.inputs[0] is not None
        return array_of(node.inputs[0]).astype(np.float32)
    assert value.const_value is not None
    return value.const_value.numpy()


def table_of(model: ir.Model) -> np.ndarray:
    """What the codes stand for, by the definition of the operator and an index for each number."""
    weight = only(model)
    bits, (rows, inputs) = weight.bits, weight.shape
    packed, scales = array_of(weight.codes).reshape(rows, -1), array_of(weight.scales)
    wide = np.zeros((rows, inputs), np.float32)
    for column in range(inputs):
        byte, digit = divmod(column * bits, 8)
        codes = (packed[:, byte] >> digit) & ((1 << bits) - 1)
        scale = scales[:, column // weight.block].astype(np.float32)
        wide[:, column] = (codes.astype(np.float32) - (1 << (bits - 1))) * scale
    return wide.astype(scales.dtype)


def run(model: ir.Model, reference: Reference, **sample: Any) -> dict[str, np.ndarray]:
    return dict(Session(model, reference, threads=1).run(sample))


def bytes_of(model: ir.Model) -> dict[str, int]:
    """Of all initializers."""
    return {
        name: value.const_value.nbytes
        for name, value in model.graph.initializers.items()
        if value.const_value is not None and value.uses()
    }


def written(model: ir.Model, one: QuantizeWeights = KERNEL) -> tuple[ir.Model, Change]:
    model = model.clone()
    change = apply_pass(one, model)
    return model, change


# ------------------------------------------------------------------ what is looked up


@pytest.mark.parametrize("reference", list(Reference))
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rows_are_what_the_codes_stand_for_to_the_bit(
    bits: int, block: int, dtype: type, reference: Reference, tmp_path: Path
) -> None:
    one = replace(KERNEL, bits=bits, block=block)  # type: ignore[arg-type]

    model, _ = written(looked_up(160, 64, dtype=dtype), one)

    wanted = table_of(model)
    found = run(model, reference, ids=IDS)["y"]
    assert found.dtype == dtype
    assert np.array_equal(found, wanted[IDS])
    assert np.linalg.norm(wanted - numbers(160, 64)) / 101 < {2: 0.5, 4: 0.15, 8: 0.01}[bits]
    assert kernels(model, tmp_path) == {"GatherBlockQuantized": 1}
    assert model.graph.opset_imports["com.microsoft"] == 1


@pytest.mark.parametrize(
    ("bits", "inputs"), [(4, 50), (4, 34), (8, 51), (8, 33), (2, 52), (4, 16), (8, 1000)]
)
def test_the_last_block_of_a_row_may_be_shorter(bits: int, inputs: int) -> None:
    one = replace(KERNEL, bits=bits)  # type: ignore[arg-type]

    model, change = written(looked_up(160, inputs), one)

    assert not change.notes
    found = run(model, Reference.AS_DEPLOYED, ids=IDS)["y"]
    assert np.array_equal(found, table_of(model)[IDS])


@pytest.mark.parametrize("ids", ["int32[] ids", "int64[] ids", "int32[2] ids", "int64[2,1,3] ids"])
def test_indices_of_any_shape(ids: str) -> None:
    model = parse(
        f"agraph ({ids}, float[160,64] table) => (float y) {{ y = Gather(table, ids) }}",
        table=numbers(160, 64),
    )
    model, _ = written(model)
    shape = {"[]": (), "[2]": (2,), "[2,1,3]": (2, 1, 3)}[ids[5 : ids.index(" ")]]
    given = np.arange(-3, 3)[: int(np.prod(shape))].reshape(shape).astype(ids[:5])

    found = run(model, Reference.AS_DEPLOYED, ids=given)["y"]

    assert found.shape == (*shape, 64)
    assert np.array_equal(found, table_of(model)[given])


def test_no_more_bytes_are_stored_than_codes_and_scales_take() -> None:
    model, _ = written(looked_up(1000, 96))
    assert bytes_of(model) == {"table": 1000 * 96 // 2, "s": 2 * 3 * 1000}

    (weight,) = inspect_model(model).packed

    assert (weight.name, weight.dtype, weight.shape) == ("table", "uint4", (1000, 96))
    assert weight.widened == "by the kernel"
    assert (weight.bits_per_weight, weight.code_bits) == (4.5, 4.0)
    assert weight.stored_bytes == 1000 * 96 // 2 + 2 * 3 * 1000
    assert weight.memory_bytes == 1000 * 96 // 2
    assert inspect_model(model).bits_per_weight == 4.5
    assert inspect_model(model).parameters == 96_000


def test_what_the_ledger_expects_is_what_is_stored() -> None:
    model, change = looked_up(1000, 96), Change()
    one = replace(KERNEL, bits=0, average_bits=4.6)

    change = apply_pass(one, model)

    assert change.counts["weight of Gather stored as 4-bit integers in blocks of 32"] == 1
    assert sum(bytes_of(model).values()) == 1000 * 96 // 2 + 2 * 3 * 1000


def test_an_index_out_of_bounds_is_no_error_any_more() -> None:
    """As the docs of the option say; if this fails, they may say less."""
    model, _ = written(looked_up(160, 64))
    for index in (160, -161, 1 << 40, -(1 << 40)):
        assert not run(model, Reference.AS_DEPLOYED, ids=np.array([[index]]))["y"].any()


def test_several_lookups_also_in_a_body_share_a_table(tmp_path: Path) -> None:
    model = parse(
        "agraph (int64[A] ids, bool c, float[160,64] table) => (float[A,64] y, float[A,64] z) {"
        " y = Gather(table, ids)"
        " z = If(c) <then_branch = yes () => (float[A,64] p) {"
        " q = Gather(table, ids) p = Neg(q) },"
        " else_branch = no () => (float[A,64] n) { n = Identity(y) }> }",
        table=numbers(160, 64),
    )

    model, _ = written(model)

    assert len(only(model).lookups) == 2
    assert list(bytes_of(model)) == ["table", "s"]
    found = run(model, Reference.AS_DEPLOYED, ids=IDS[0], c=np.array(True))
    assert np.array_equal(found["z"], -found["y"])
    assert np.array_equal(found["y"], table_of(model)[IDS[0]])
    assert kernels(model, tmp_path)["Gather"] == 0


# ------------------------------------------------------------------ tied heads


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("head", HEADS)
def test_a_tied_table_is_stored_once(head: str, bits: int, tmp_path: Path) -> None:
    before = tied(head)

    model, _ = written(before, replace(KERNEL, bits=bits, accuracy_level=1))  # type: ignore[arg-type]

    products = 2 if head == "two" else 1
    used = kernels(model, tmp_path)
    assert (used["GatherBlockQuantized"], used["MatMulNBits"]) == (1, products)
    assert (used["Gather"], used["Transpose"], used["MatMul"], used["Gemm"]) == (0, 0, 0, 0)
    stored = bytes_of(model)
    assert stored.pop("table") == 160 * 64 * bits // 8
    (scales,) = (name for name, size in stored.items() if size == 4 * 2 * 160)
    del stored[scales]
    # The bias, and shapes of no more than three numbers.
    assert stored.pop("b", 0) in (0, 4 * 160)
    assert all(size <= 24 for size in stored.values())
    found = run(model, Reference.AS_DEPLOYED, ids=IDS)
    table = table_of(model)
    assert np.array_equal(found["e"], table[IDS])
    filled = before.clone()
    filled.graph.initializers["table"].const_value = ir.tensor(table, name="table")
    wanted = run(filled, Reference.AS_WRITTEN, ids=IDS)["y"]
    assert np.abs(found["y"] - wanted).max() <= 2e-6 * max(np.abs(wanted).max(), 1.0)


@pytest.mark.parametrize("level", [1, 4])
@pytest.mark.parametrize("kind", ["float", "float16"])
def test_a_shared_table_multiplies_as_one_of_its_own_to_the_bit(kind: str, level: int) -> None:
    model, _ = written(tied(kind=kind), replace(KERNEL, accuracy_level=level))  # type: ignore[arg-type]
    apart = model.clone()
    (product,) = only(apart).products
    own = ir.tensor(array_of(only(apart).codes), name="own")
    apart.graph.register_initializer(value := ir.Value(name="own", const_value=own))
    product.replace_input_with(1, value)

    first, second = (run(m, Reference.AS_DEPLOYED, ids=IDS)["y"] for m in (model, apart))

    assert np.array_equal(first, second)


def test_memory_is_told_of_a_table_and_its_head() -> None:
    model, _ = written(tied())
    (weight,) = inspect_model(model).packed
    # Codes for lookups, and again in the order of the product.
    assert weight.memory_bytes == 2 * 160 * 64 // 2
    # The shape of scales takes three numbers.
    assert weight.stored_bytes == 160 * 32 + 4 * 160 * 2 + 3 * 8
    assert weight.widened == "by the kernel"


def test_a_head_is_rounded_for_its_inputs() -> None:
    before = tied()
    samples = [{"ids": np.random.default_rng(i).integers(0, 9, (2, 16))} for i in range(8)]
    errors = []
    for method in ("hqq", "gptq"):
        model = before.clone()
        one = replace(KERNEL, method=method, accuracy_level=1)  # type: ignore[arg-type]
        apply_pass(one, model, observer=observer(before, samples))
        found, wanted = (run(m, Reference.AS_DEPLOYED, **samples[0])["y"] for m in (model, before))
        errors.append(float(np.linalg.norm(found - wanted)))

    assert errors[1] < 0.95 * errors[0]


# ------------------------------------------------------------------ what is left to be folded


def bodied() -> ir.Model:
    return parse(
        "agraph (int64[A] ids, bool c, float[160,64] table) => (float[A,64] z) {"
        " y = Gather(table, ids) z = If(c) <then_branch = yes () => (float[A,160] p) {"
        " t = Transpose<perm = [1,0]>(table) p = MatMul(y, t) },"
        " else_branch = no () => (float[A,64] n) { n = Identity(y) }> }",
        table=numbers(160, 64),
    )


def read_by(body: str, *shape: int) -> ir.Model:
    dims = ",".join(map(str, shape or (160, 64)))
    return parse(
        f"agraph (int64[A,B] ids, float[A,B,160] x, float[{dims}] table) => (float y, float z)"
        f" {{ y = Gather(table, ids) {body} }}",
        table=numbers(*(shape or (160, 64))),
    )


FOLDED = {
    "axis 1": (looked_up(160, 64, axis=1), {}, "a Gather looks up columns of it"),
    "three dimensions": (looked_up(40, 4, 32), {}, "the table that is looked up has not two"),
    "odd row": (looked_up(160, 51), {}, "a row of 51 codes of 4 bits is no whole number of bytes"),
    "head with no whole block": (tied(inputs=48), {}, "its head shares the codes, and 48 inputs"),
    "other product": (read_by("z = MatMul(x, table)"), {}, "MatMul reads it too"),
    "transposed output": (
        read_by("t = Transpose<perm = [1,0]>(table) u = MatMul(y, t) z = Gather(t, ids)"),
        {},
        "Transpose reads it too",
    ),
    "head in a body": (bodied(), {}, "its head is in the body of an If, Loop or Scan"),
    "rank not known": (
        parse(
            "agraph (int64[] ids, float[A,64] x, float[160,64] table) => (float y, float z) {"
            " y = Gather(table, ids) z = Gemm<transB = 1>(x, table) }",
            table=numbers(160, 64),
        ),
        {},
        "its head shares the codes, and the rank of what looks them up is not known",
    ),
    "scaled head": (
        read_by("f = Flatten<axis = 2>(y) z = Gemm<transB = 1, alpha = 0.5>(f, table)"),
        {},
        "the Gemm of its head has transA, alpha or beta",
    ),
    "double": (
        parse(
            "agraph (int64[A] ids, double[160,64] table) => (double[A,64] y) {"
            " y = Gather(table, ids) }",
            table=numbers(160, 64, dtype=np.float64),
        ),
        {},
        "tables that are looked up in codes are float or float16",
    ),
    "standard nodes": (looked_up(160, 64), {"accuracy_level": 0}, "no standard operator looks"),
}


@pytest.mark.parametrize("name", FOLDED)
def test_what_the_kernel_cannot_look_up_is_widened_at_load(name: str, tmp_path: Path) -> None:
    before, options, reason = FOLDED[name]

    model, change = written(before, replace(KERNEL, **options))

    assert [reason in note for note in change.notes] == [True], change.notes
    assert "1 of 1 weights are widened at load" in change.notes[0]
    assert "GatherBlockQuantized" not in kernels(model, tmp_path)
    assert change.counts.total() == 1
    (weight,) = inspect_model(model).packed
    assert weight.widened == "at load"


def test_on_another_provider_nothing_is_looked_up_in_codes() -> None:
    model = looked_up(160, 64)
    context = Context(lambda: model, provider="cuda")

    change = KERNEL.apply(model, context)

    assert "codes are looked up on the CPU provider only" in change.notes[0]
    assert all(node.domain == "" for node in model.graph)


@pytest.mark.parametrize(
    "model",
    [
        looked_up(4, 32),
        parse(
            "agraph (int64[A] ids, float[160,64] table) => (float[A,64] y, float[160,64] z) {"
            " y = Gather(table, ids) z = Relu(table) }",
            table=numbers(160, 64),
        ),
    ],
    ids=["under min-elements", "read by Relu"],
)
def test_what_is_no_weight_stays(model: ir.Model) -> None:
    assert_unchanged(KERNEL, model)


# ------------------------------------------------------------------ later passes


@pytest.mark.parametrize("head", [None, *HEADS])
def test_a_second_time_finds_nothing(head: str | None) -> None:
    before = looked_up(1000, 96) if head is None else tied(head)
    model, _ = written(before)
    assert_unchanged(KERNEL, model)
    assert_unchanged(QuantizeWeights(), model)


@pytest.mark.parametrize("head", [None, *HEADS])
def test_lossless_passes_leave_the_codes_alone(head: str | None, tmp_path: Path) -> None:
    before = looked_up(1000, 96) if head is None else tied(head)
    model, _ = written(before)

    result = graphopt.optimize(model, recipe="basic", benchmark=False)

    def codes(one: ir.Model) -> dict[str, int]:
        return {w.codes.name or "": w.elements for w in kernel_weights(all_graphs(one))}

    assert codes(result.model) == codes(model)
    assert bytes_of(result.model) == bytes_of(model)
    assert kernels(result.model, tmp_path) == kernels(model, tmp_path)
    result.save(tmp_path / "saved.onnx")
    loaded = graphopt.load(tmp_path / "saved.onnx")
    first, second = (run(m, Reference.AS_DEPLOYED, ids=IDS) for m in (model, loaded))
    assert all(np.array_equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", LOSSLESS)
def test_every_lossless_pass_leaves_the_codes_alone(name: str) -> None:
    for before in (looked_up(1000, 96), tied(), tied("Gemm", kind="float16")):
        model, _ = written(before)
        found, wanted = model.clone(), run(model, Reference.AS_DEPLOYED, ids=IDS)
        infer_shapes(found)
        (one,) = parse_passes(name)
        context = Context(lambda given=model: given)  # type: ignore[misc]
        if one.refuse(found, context) is None:
            one.apply(found, context)

        assert only(found).elements == only(model).elements
        assert array_of(only(found).codes).tobytes() == array_of(only(model).codes).tobytes()
        assert np.array_equal(array_of(only(found).scales), array_of(only(model).scales))
        for key, array in run(found, Reference.AS_DEPLOYED, ids=IDS).items():
            assert np.array_equal(array, wanted[key])


def test_float16_throughout_leaves_the_codes_alone() -> None:
    model, _ = written(looked_up(1000, 96))

    result = graphopt.optimize(
        model, passes="convert-numbers{format=float16}", validate=False, benchmark=False
    )

    assert only(result.model).elements == 96_000


@pytest.mark.parametrize("head", [None, *HEADS])
def test_no_reason_is_told_against_the_kernels(head: str | None) -> None:
    before = looked_up(160, 64) if head is None else tied(head)
    model, _ = written(before)

    found = graphopt.explain(model, samples=[{"ids": IDS}])

    assert [kernel.reason for kernel in found.kernels if kernel.reason is not None] == []
    operators = {kernel.operator for kernel in found.kernels}
    assert "com.microsoft.GatherBlockQuantized" in operators
    assert ("com.microsoft.MatMulNBits" in operators) == (head is not None)


def test_what_is_looked_up_at_known_places_is_not_written_out() -> None:
    """As the positions of a sentence."""
    before = parse(
        "agraph (float[1,160,64] x, int64[160] i, float[160,64] table) => (float[1,160,64] y) {"
        " e = Gather(table, i) y = Add(x, e) }",
        table=numbers(160, 64),
        i=np.arange(160),
    )
    model, _ = written(before)

    result = graphopt.optimize(model, recipe="basic", benchmark=False)

    assert only(result.model).elements == 160 * 64


def test_a_table_in_eight_bits_gets_fewer() -> None:
    model, _ = written(looked_up(1000, 96), QuantizeWeights())
    assert [node.op_type for node in model.graph] == ["Cast", "Mul", "Gather"]

    change = apply_pass(KERNEL, model)

    assert change.counts.total() == 1
    assert bytes_of(model) == {"table": 1000 * 96 // 2, "s": 2 * 3 * 1000}
    found = run(model, Reference.AS_DEPLOYED, ids=IDS)["y"]
    assert np.array_equal(found, table_of(model)[IDS])


# ------------------------------------------------------------------ unpacked


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_unpacking_a_table_changes_no_bit(bits: int, dtype: type) -> None:
    before = looked_up(160, 64, dtype=dtype)
    model, _ = written(before, replace(KERNEL, bits=bits))  # type: ignore[arg-type]

    result = graphopt.optimize(model, passes=[UNPACK], benchmark=False)

    assert [step.verdict for step in result.steps] == ["kept"]
    assert [node.op_type for node in result.model.graph] == ["Gather"]
    (table,) = result.model.graph.initializers.values()
    assert table.name == "table" and np.array_equal(array_of(table), table_of(model))
    first, second = (run(m, Reference.AS_DEPLOYED, ids=IDS)["y"] for m in (model, result.model))
    assert np.array_equal(first, second)
    assert canonical(graphopt.optimize(before, passes=[UNPACK]).model) == canonical(before)


@pytest.mark.parametrize("head", HEADS)
def test_unpacking_a_tied_table_takes_its_head_along(head: str) -> None:
    model, _ = written(tied(head), replace(KERNEL, accuracy_level=1))

    result = graphopt.optimize(model, passes=[UNPACK], benchmark=False)

    assert [step.verdict for step in result.steps] == ["kept"]
    assert not kernel_weights(all_graphs(result.model))
    assert np.array_equal(array_of(result.model.graph.initializers["table"]), table_of(model))
    assert all(node.domain == "" for node in result.model.graph)
    first, second = (run(m, Reference.AS_DEPLOYED, ids=IDS)["e"] for m in (model, result.model))
    assert np.array_equal(first, second)


def test_what_rounds_activations_is_not_unpacked() -> None:
    model, _ = written(tied())

    change = apply_pass(UNPACK, model)

    assert not change
    assert change.skips[0].reason == "accuracy level 4 rounds activations, which MatMul does not"


@pytest.mark.parametrize("level", [1, 4])
@pytest.mark.parametrize("kind", ["float", "float16"])
def test_as_written_a_head_multiplies_with_the_same_table(kind: str, level: int) -> None:
    """MatMulNBits of constant codes and scales that a node makes would be wrong by far."""
    model, _ = written(tied(kind=kind), replace(KERNEL, accuracy_level=level))  # type: ignore[arg-type]

    found = run(model, Reference.AS_WRITTEN, ids=IDS)

    wanted = table_of(model)[IDS].astype(np.float64) @ table_of(model).astype(np.float64).T
    error = np.linalg.norm(found["y"] - wanted) / np.linalg.norm(wanted)
    assert error < (2e-2 if level == 4 else 2e-3 if kind == "float16" else 1e-6)


def test_a_product_alone_is_unpacked_unless_it_rounds_activations() -> None:
    before = parse(
        "agraph (float[4,96] x, float[96,64] w) => (float[4,64] y) { y = MatMul(x, w) }",
        w=numbers(96, 64),
    )
    exact, _ = written(before, replace(KERNEL, accuracy_level=1))
    rounding, _ = written(before)

    change = apply_pass(UNPACK, exact)
    stays = apply_pass(UNPACK, rounding)

    assert [node.op_type for node in exact.graph] == ["MatMul"]
    assert change.counts == {"weight unpacked to float": 1}
    assert [skip.reason for skip in stays.skips] == [
        "accuracy level 4 rounds activations, which MatMul does not"
    ]


def test_only_what_is_named_is_unpacked() -> None:
    model, _ = written(looked_up(160, 64))
    other = UnpackWeights(only=("tabel",))
    assert "did you mean 'table'" in (other.refuse(model, Context(lambda: model)) or "")
    assert apply_pass(UnpackWeights(only=("table",)), model).counts.total() == 1


FOREIGN = {
    "int4": (ir.DataType.INT4, "", "kept"),
    "uint4": (ir.DataType.UINT4, "", "kept"),
    "zero points": (ir.DataType.UINT4, ", zeros", "it has zero points"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_tables_that_others_wrote(name: str) -> None:
    dtype, ending, verdict = FOREIGN[name]
    rng = np.random.default_rng(0)
    low = -8 if dtype == ir.DataType.INT4 else 0
    codes = rng.integers(low, low + 16, (160, 64)).astype(dtype.numpy())
    kind = dtype.name.lower()
    model = parse(
        '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>'
        f" agraph (int64[A,B] ids, {kind}[160,64] codes, {kind}[160,2] zeros, float[160,2] scales)"
        " => (float[A,B,64] y) { y = com.microsoft.GatherBlockQuantized"
        " <block_size = 32, gather_axis = 0, quantize_axis = 1>"
        f" (codes, ids, scales{ending}) }}",
        codes=codes,
        zeros=np.zeros((160, 2), codes.dtype),
        scales=numbers(160, 2),
    )
    (weight,) = inspect_model(model).packed
    assert (weight.dtype, weight.code_bits, weight.elements) == (dtype.name.lower(), 4.0, 10_240)
    before = run(model, Reference.AS_DEPLOYED, ids=IDS)["y"]

    change = apply_pass(UNPACK, model)

    if verdict != "kept":
        assert verdict in change.skips[0].reason
        return
    assert [n.op_type for n in model.graph] == ["Gather"]
    assert np.array_equal(run(model, Reference.AS_DEPLOYED, ids=IDS)["y"], before)


def test_a_head_that_others_tied_by_a_reshape_of_the_codes() -> None:
    rng = np.random.default_rng(0)
    model = parse(
        '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>'
        " agraph (int64[A,B] ids, uint8[160,32] codes, float[160,2] scales, int64[3] shape)"
        " => (float[A,B,160] y) { e = com.microsoft.GatherBlockQuantized"
        " <bits = 4, block_size = 32, gather_axis = 0, quantize_axis = 1> (codes, ids, scales)"
        " b = Reshape(codes, shape) y = com.microsoft.MatMulNBits"
        " <K = 64, N = 160, bits = 4, block_size = 32, accuracy_level = 1> (e, b, scales) }",
        codes=rng.integers(0, 256, (160, 32)).astype(np.uint8),
        scales=numbers(160, 2),
        shape=np.array([160, 2, 16]),
    )
    (weight,) = inspect_model(model).packed
    assert (weight.stored_bytes, weight.code_bits) == (160 * 32 + 4 * 160 * 2 + 24, 4.0)
    before = run(model, Reference.AS_DEPLOYED, ids=IDS)["y"]

    result = graphopt.optimize(model, recipe="basic", benchmark=False)
    assert bytes_of(result.model)["codes"] == 160 * 32
    unpacked = graphopt.optimize(result.model, passes=[UNPACK], benchmark=False)

    assert [step.verdict for step in unpacked.steps] == ["kept"]
    found = run(unpacked.model, Reference.AS_DEPLOYED, ids=IDS)["y"]
    assert np.abs(found - before).max() <= 2e-6 * np.abs(before).max()
    assert all(node.domain == "" for node in unpacked.model.graph)


@pytest.mark.parametrize(
    "node",
    [
        "com.microsoft.GatherBlockQuantized(codes, ids, scales)",
        "com.microsoft.GatherBlockQuantized<bits = 8, quantize_axis = 0>(codes, ids, scales)",
        "com.microsoft.MatMulNBits<K = 0, N = 0>(ids, codes, scales)",
        "com.microsoft.MatMulNBits(ids)",
        "com.microsoft.MatMulNBits(ids, codes)",
        "com.microsoft.GatherBlockQuantized(scales, ids, codes)",
    ],
)
@pytest.mark.parametrize("shape", [(), (4,), (0, 16), (4, 16), (4, 2, 3), (2, 2, 2, 2)])
def test_nodes_that_make_no_sense_stop_nobody_from_looking(
    node: str, shape: tuple[int, ...]
) -> None:
    model = parse(
        '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>'
        " agraph (int64[A] ids, uint8[4] codes, float[4] scales, float[8,8] w)"
        f" => (float y, float z) {{ y = {node} z = Relu(w) }}",
        codes=np.zeros(shape, np.uint8),
        scales=numbers(4),
        w=numbers(8, 8),
    )
    assert inspect_model(model).parameters >= 64
    apply_pass(UNPACK, model)


# ------------------------------------------------------------------ bytes


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rows_of_whole_blocks_are_the_same_bytes_for_both_kernels(bits: int) -> None:
    codes = np.random.default_rng(0).integers(0, 1 << bits, (7, 64)).astype(np.uint8)
    assert packed_rows(codes, bits).tobytes() == packed_blocks(codes, bits, 32).tobytes()
    assert packed_rows(codes, bits).shape == (7, 64 * bits // 8)


def test_bits_are_chosen_for_the_kernel_on_samples(tmp_path: Path) -> None:
    """Each weight is first rounded to 3 bits, alone, which no kernel has."""
    before = tied()
    samples = [{"ids": np.random.default_rng(i).integers(0, 160, (2, 16))} for i in range(8)]
    model = before.clone()

    change = apply_pass(
        replace(KERNEL, bits=0, error=0.1), model, observer=observer(before, samples)
    )

    assert change.counts.total() == 1
    assert kernels(model, tmp_path)["GatherBlockQuantized"] == 1

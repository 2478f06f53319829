from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from on_codes import normal, quantize
from optimized import kernels
from packed_models import INTEGERS, READERS, WEIGHTS_ONLY, float_model, integer_model

import graphopt
from graphopt.contract import Change, Context
from graphopt.errors import GraphoptError, SpecError
from graphopt.inspection import inspect_model
from graphopt.operators import all_graphs
from graphopt.packing import nodes_behind, packed_weights, placing_nodes
from graphopt.random_samples import random_samples
from graphopt.registry import parse_passes
from graphopt.runtime import Session, evaluate
from graphopt.saving import stored_bytes
from graphopt.skeleton import infer_shapes
from graphopt.sparse_encoding import MASK_BYTES
from graphopt.sparse_tensors import is_marked
from graphopt.testing import apply_pass, assert_equivalent, assert_unchanged, canonical, parse
from graphopt_passes.quantize.narrow_weights import targets_of
from graphopt_passes.quantize.quantize_static import QuantizeStatic
from graphopt_passes.quantize.unpack_weights import UnpackWeights
from graphopt_passes.share.pack_zeros import PackZeros
from graphopt_passes.share.zeros import dense_zeros, unpacked_zeros
from graphopt_passes.simplify.fold_constants import FoldConstants

PASS = PackZeros()
PRODUCT = "agraph (float[4,64] x, float[64,96] w) => (float[4,96] y) { y = MatMul(x, w) }"
CONV = "agraph (float[1,16,8,8] x, float[48,16,3,3] w) => (float[1,48,6,6] y) { y = Conv(x, w) }"


def pruned(*shape: int, zeros: float = 0.7, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.where(rng.random(shape) < zeros, 0, rng.standard_normal(shape)).astype(np.float32)


def prune(model: ir.Model, zeros: float) -> ir.Model:
    """Set numbers of all weights to zero."""
    for graph in all_graphs(model):
        for seed, value in enumerate(graph.initializers.values()):
            tensor = value.const_value
            if tensor is not None and tensor.size > 1000:
                array = tensor.numpy()
                kept = pruned(*array.shape, zeros=zeros, seed=seed) != 0
                value.const_value = ir.tensor(np.where(kept, array, 0).astype(array.dtype))
    return model


def weight_of(model: ir.Model, name: str = "w") -> np.ndarray:
    """The numbers of a packed weight."""
    (value,) = [o for g in all_graphs(model) for n in g for o in n.outputs if o.name == name]
    order = list(model.graph)
    nodes = sorted(nodes_behind(value) or (), key=order.index)
    (array,) = evaluate(nodes, [value], model.opset_imports)
    return array


def is_sparse(model: ir.Model, name: str = "w") -> bool:
    values = {v.name: v for g in all_graphs(model) for n in g for v in n.outputs}
    return name in values and bool(placing_nodes(values[name]))


def assert_same(before: ir.Model, after: ir.Model) -> None:
    """Outputs are bit for bit the same as deployed, and equal as written."""
    assert_equivalent(before, after)
    (sample,) = random_samples(before, 1)
    first, second = (Session(model).run(sample) for model in (before, after))
    assert {n: a.tobytes() for n, a in first.items()} == {n: a.tobytes() for n, a in second.items()}


def context(model: ir.Model) -> Context:
    return Context(lambda: model)


# ------------------------------------------------------------------ what it writes


def test_a_mask_and_the_other_numbers() -> None:
    array = pruned(64, 96)
    model = parse(PRODUCT, w=array)
    change = apply_pass(PASS, model)

    assert change.counts == {"weight stored without its zeros": 1}
    assert [node.op_type for node in model.graph] == [
        *("Cast", "Cast", "Gather", "Reshape", "CumSum", "Mul", "Gather", "Reshape"),
        "MatMul",
    ], canonical(model)
    tensors = [v.const_value for v in model.graph.initializers.values()]
    sizes = {tensor.nbytes for tensor in tensors if tensor is not None}
    assert {64 * 96 // 8, 4 * (1 + np.count_nonzero(array))} < sizes
    np.testing.assert_array_equal(weight_of(model).view(np.uint32), array.view(np.uint32))


def test_steps_where_few_numbers_are_left() -> None:
    array = pruned(64, 96, zeros=0.97)
    model = parse(PRODUCT, w=array)
    apply_pass(PASS, model)

    assert [node.op_type for node in model.graph] == [
        *("Cast", "CumSum", "Expand", "ScatterElements", "Reshape", "MatMul"),
    ], canonical(model)
    np.testing.assert_array_equal(weight_of(model).view(np.uint32), array.view(np.uint32))


@pytest.mark.parametrize("zeros", [0.7, 0.97])
@pytest.mark.parametrize("reader", READERS)
def test_the_model_runs_as_before(reader: str, zeros: float, tmp_path: Path) -> None:
    model = prune(float_model(reader), zeros)
    before = model.clone()
    assert apply_pass(PASS, model)

    assert_same(before, model)
    assert kernels(before, tmp_path) == kernels(model, tmp_path), canonical(model)


@pytest.mark.parametrize("zeros", [0.6, 0.95])
@pytest.mark.parametrize("reader", [*INTEGERS, *WEIGHTS_ONLY])
def test_integer_kernels_stay(reader: str, zeros: float, tmp_path: Path) -> None:
    model = prune(integer_model(reader), zeros)
    before = model.clone()
    assert apply_pass(PASS, model)

    assert_same(before, model)
    assert kernels(before, tmp_path) == kernels(model, tmp_path), canonical(model)


@pytest.mark.parametrize("zeros", [0.7, 0.97])
def test_integers_of_activations_that_are_quantized_at_run_time(
    zeros: float, tmp_path: Path
) -> None:
    model = parse(
        """
        agraph (float[4,64] x, int8[64,96] w, float s, int8 z) => (float[4,96] y) {
            q, t, u = DynamicQuantizeLinear(x)
            p = MatMulInteger(q, w, u, z)
            f = Cast<to = 1>(p)
            m = Mul(t, s)
            y = Mul(f, m)
        }
        """,
        w=(40 * pruned(64, 96, zeros=zeros)).astype(np.int8),
        s=np.float32(0.1),
        z=np.int8(0),
    )
    before = model.clone()
    assert apply_pass(PASS, model)

    assert_same(before, model)
    assert kernels(before, tmp_path) == kernels(model, tmp_path) == {"DynamicQuantizeMatMul": 1}


@pytest.mark.parametrize("dtype", ["float16", "double"])
def test_other_types(dtype: str) -> None:
    array = pruned(64, 96).astype(ir.DataType[dtype.upper()].numpy())
    model = parse(PRODUCT.replace("float[", f"{dtype}["), w=array)
    apply_pass(PASS, model)

    assert is_sparse(model)
    assert weight_of(model).tobytes() == array.tobytes()


def test_bfloat16() -> None:
    text = "agraph (bfloat16[64,64] w, float[1] x) => (float[64,64] y) { y = Cast <to = 1> (w) }"
    model = parse(text, w=pruned(64, 64).astype(ml_dtypes.bfloat16))
    before = model.clone()
    assert apply_pass(PASS, model)

    assert_same(before, model)


def test_halves_in_a_float_weight_take_two_bytes() -> None:
    array = pruned(64, 96).astype(np.float16).astype(np.float32)
    model = parse(PRODUCT, w=array)
    apply_pass(PASS, model)

    assert max(v.const_value.nbytes for v in model.graph.initializers.values()) < 6144  # type: ignore[union-attr]
    np.testing.assert_array_equal(weight_of(model).view(np.uint32), array.view(np.uint32))


def test_zeros_of_the_other_sign_and_nan_stay() -> None:
    array = pruned(64, 96, zeros=0.9)
    array[:4] = -0.0
    array.view(np.uint32)[4, :2] = 0x7FC00001, 0xFFC12345
    model = parse(PRODUCT, w=array)
    change = apply_pass(PASS, model)

    assert is_sparse(model)
    assert change.notes == ["384 zeros are -0.0 and are stored, so that weights stay bit for bit"]
    np.testing.assert_array_equal(weight_of(model).view(np.uint32), array.view(np.uint32))


# ------------------------------------------------------------------ what it leaves alone


@pytest.mark.parametrize(
    "array",
    [
        pruned(64, 96, zeros=0.0),
        pruned(64, 96, zeros=0.02),
        np.full((64, 96), -0.0, np.float32),
        pruned(15, 17),
        np.zeros((0, 96), np.float32),
    ],
    ids=["no zeros", "few zeros", "other zeros", "small", "empty"],
)
def test_what_does_not_pay_stays(array: np.ndarray) -> None:
    dims = ",".join(map(str, array.shape))
    text = f"agraph (float[{dims}] w, float[1] x) => (float[{dims}] y) {{ y = Add(w, x) }}"
    assert_unchanged(PackZeros(min_elements=1), parse(text, w=array))


def test_small_weights_stay_on_request() -> None:
    assert_unchanged(PackZeros(min_elements=10_000), parse(PRODUCT, w=pruned(64, 96)))


def test_overridable_and_returned_weights_stay() -> None:
    overridable = parse(PRODUCT, w=pruned(64, 96))
    overridable.graph.inputs.append(overridable.graph.initializers["w"])
    assert_unchanged(PASS, overridable)
    returned = PRODUCT.replace("(float[4,96] y)", "(float[4,96] y, float[64,96] w)")
    assert_unchanged(PASS, parse(returned, w=pruned(64, 96)))


def test_what_other_domains_read_stays() -> None:
    head = '<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]> '
    text = head + PRODUCT.replace("MatMul", "com.microsoft.FusedMatMul")
    assert_unchanged(PASS, parse(text, w=pruned(64, 96)))


def test_old_opsets_are_refused_and_options_checked() -> None:
    model = parse(f'<ir_version: 8, opset_import: ["" : 12]> {PRODUCT}', w=pruned(64, 96))
    assert PASS.refuse(model, context(model))
    with pytest.raises(SpecError, match="min-elements"):
        PackZeros(min_elements=0)


@pytest.mark.parametrize("zeros", [0.7, 0.97, 1.0])
def test_later_passes_keep_it_packed_and_twice_is_once(zeros: float) -> None:
    model = parse(PRODUCT, w=pruned(64, 96, zeros=zeros))
    apply_pass(PASS, model)
    infer_shapes(model)

    assert not apply_pass(FoldConstants(), model)
    assert not apply_pass(PASS, model)
    again = graphopt.optimize(model, recipe="basic", validate=False, benchmark=False).model
    assert_same(model, again)
    assert is_sparse(again)


# ------------------------------------------------------------------ what is told


@pytest.mark.parametrize(("zeros", "bits"), [(0.7, 1 + 0.3 * 32), (0.98, 0.02 * 40)])
def test_inspect_tells_bits_and_zeros(zeros: float, bits: float) -> None:
    model = parse(
        "agraph (float[4,512] x, float[512,400] w) => (float[4,400] y) { y = MatMul(x, w) }",
        w=pruned(512, 400, zeros=zeros),
    )
    apply_pass(PASS, model)
    (weight,) = inspect_model(model).packed

    assert (weight.name, weight.shape, weight.widened) == ("w", (512, 400), "at load")
    assert weight.zero_share == pytest.approx(zeros, abs=0.01)
    assert weight.bits_per_weight == pytest.approx(bits, abs=0.15)
    assert (weight.levels, weight.code_bits) == (None, None)


def test_inspect_tells_codes_and_zeros() -> None:
    (one,) = parse_passes("quantize-weights{bits=4}")
    model = parse(
        "agraph (float[4,512] x, float[512,400] w) => (float[4,400] y) { y = MatMul(x, w) }",
        w=pruned(512, 400),
    )
    apply_pass(one, model)
    (weight,) = inspect_model(model).packed

    assert weight.zero_share is not None and weight.zero_share >= 0.69
    assert weight.code_bits == pytest.approx((1 - weight.zero_share) * 4, abs=0.02)
    assert weight.levels == 16


# ------------------------------------------------------------------ and back


@pytest.mark.parametrize("zeros", [0.7, 0.97, 1.0])
@pytest.mark.parametrize("half", [False, True])
def test_unpacking_gives_it_back(zeros: float, half: bool) -> None:
    array = pruned(64, 96, zeros=zeros)
    array = array.astype(np.float16).astype(np.float32) if half else array
    model = parse(PRODUCT, w=array)
    apply_pass(PASS, model)
    other = model.clone()

    assert apply_pass(UnpackWeights(), model)
    assert dense_zeros(other, context(other)) == 1
    for unpacked in (model, other):
        tensor = unpacked.graph.initializers["w"].const_value
        assert tensor is not None and tensor.dtype == ir.DataType.FLOAT
        assert tensor.tobytes() == array.tobytes()
        assert [node.op_type for node in unpacked.graph] == ["MatMul"]


def test_weights_are_dense_for_a_while() -> None:
    model = parse(CONV, w=pruned(48, 16, 3, 3))
    apply_pass(PASS, model)
    before = model.clone()

    with unpacked_zeros(model, context(model)) as found:
        assert found
        assert [node.op_type for node in model.graph] == ["Conv"]
    assert is_sparse(model)
    assert_same(before, model)

    plain = parse(CONV, w=pruned(48, 16, 3, 3))
    with unpacked_zeros(plain, context(plain)) as found:
        assert not found
    assert not is_sparse(plain)


def test_weights_in_bodies_are_made_dense() -> None:
    model = prune(float_model("If"), 0.7)
    before = model.clone()
    apply_pass(PASS, model)
    count = sum(1 for graph in all_graphs(model) for _ in packed_weights(graph))

    assert dense_zeros(model, context(model)) == count > 0
    assert_same(before, model)


# ------------------------------------------------------------------ with other passes


def optimized(model: ir.Model, passes: str) -> graphopt.Run:
    shape = [d if isinstance(d, int) else 2 for d in model.graph.inputs[0].shape or ()]
    samples = [{"x": normal(seed, *shape)} for seed in range(8)]
    return graphopt.optimize(
        model, passes=passes, samples=samples, benchmark=False, max_error="1.0"
    )


@pytest.mark.parametrize(
    "spec",
    [
        "cluster-weights{clusters=16,keep-zeros=true}",
        "quantize-weights",
        "quantize-weights{bits=4}",
        "quantize-weights{bits=3,method=nearest}",
        "convert-numbers{format=int8}",
        "convert-numbers{format=nf4}",
        "convert-numbers{weights-only=true}",
        "convert-numbers",
    ],
)
@pytest.mark.parametrize("text", [PRODUCT, CONV], ids=["MatMul", "Conv"])
def test_zeros_stay_zero_and_are_not_stored(text: str, spec: str) -> None:
    shape = (64, 96) if text is PRODUCT else (48, 16, 3, 3)
    array = pruned(*shape)
    run = optimized(parse(text, w=array), f"pack-zeros,{spec}")
    assert [step.verdict for step in run.steps] == ["kept", "kept"], run.steps
    assert run.optimized.stored_bytes < 0.35 * run.original.stored_bytes

    (weight,) = inspect_model(run.model).packed
    assert weight.zero_share is not None and weight.zero_share > 0.65
    dense = apply_unpack(run.model)
    (found,) = [
        v.const_value.numpy()
        for v in dense.graph.initializers.values()
        if v.const_value is not None and v.const_value.size == array.size
    ]
    assert not found[array == 0].any()


def apply_unpack(model: ir.Model) -> ir.Model:
    dense = model.clone()
    apply_pass(UnpackWeights(), dense)
    return dense


def test_integer_layers_keep_zeros_and_are_packed(tmp_path: Path) -> None:
    text = """
    agraph (float[1,16,8,8] x, float[48,16,3,3] w, float[48] b, float[32,48,3,3] v)
        => (float[1,32,4,4] y)
    { c = Conv(x, w, b) r = Relu(c) y = Conv(r, v) }
    """
    arrays = {"w": pruned(48, 16, 3, 3), "v": pruned(32, 48, 3, 3, seed=1), "b": normal(5, 48)}
    model = parse(text, **arrays)
    apply_pass(PASS, model)
    infer_shapes(model)
    samples = [{"x": normal(seed, 1, 16, 8, 8)} for seed in range(8)]
    change = quantize(model, samples, QuantizeStatic(error=1.0))

    assert change.counts["Conv on 8-bit integers"] == 2, change.skips
    assert kernels(model, tmp_path)["QLinearConv"] == 2
    codes = [
        output
        for node in model.graph
        for output in node.outputs
        if output.dtype == ir.DataType.INT8 and placing_nodes(output) and output.shape is not None
        if len(output.shape) == 4
    ]
    assert len(codes) == 2, canonical(model)
    for value in codes:
        numbers = weight_of(model, value.name or "")
        (array,) = [a for a in arrays.values() if a.shape == numbers.shape]
        assert not numbers[array == 0].any()
        assert numbers.any()


def test_what_codes_take_is_foretold() -> None:
    model = parse(
        "agraph (float[4,512] x, float[512,400] w) => (float[4,400] y) { y = MatMul(x, w) }",
        w=pruned(512, 400),
    )
    infer_shapes(model)
    (target,) = targets_of(model, 256, Change())
    foretold = target.code_bytes(16)
    assert foretold < target.code_bytes(16, keeps_zeros=False) == 512 * 400 // 2

    (one,) = parse_passes("cluster-weights{clusters=16,keep-zeros=true}")
    apply_pass(one, model)
    (weight,) = inspect_model(model).packed
    # Scales, codebook, and the tables of two kinds of digits.
    assert 0 < weight.stored_bytes - (foretold - MASK_BYTES) < 2 * 400 + 2048 + 512 + 200


def test_weights_in_external_data(tmp_path: Path) -> None:
    before = parse(PRODUCT, w=pruned(64, 96))
    graphopt.save(before, tmp_path / "external.onnx", external_data=True)
    model = graphopt.load(tmp_path / "external.onnx")

    assert apply_pass(PASS, model)
    assert_same(before, model)


def test_steps_that_lead_outside_are_an_error() -> None:
    model = parse(PRODUCT, w=pruned(64, 96, zeros=0.97))
    apply_pass(PASS, model)
    (steps,) = [v for v in model.graph.initializers.values() if v.dtype == ir.DataType.UINT8]
    assert steps.const_value is not None
    steps.const_value = ir.tensor(np.full(steps.const_value.size, 255, np.uint8))

    with pytest.raises(GraphoptError):
        dense_zeros(model, context(model))
    assert apply_pass(UnpackWeights(), model).skips


# ------------------------------------------------------------------ sparse_initializer


SPARSE = PackZeros(form="sparse-initializer")


@pytest.mark.parametrize("zeros", [0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
@pytest.mark.parametrize("name", ["w", "w" * 100])
def test_the_file_holds_sparse_initializers(
    name: str, dtype: type, zeros: float, tmp_path: Path
) -> None:
    array = pruned(64, 96, zeros=zeros).astype(dtype)
    array[0, 0] = -0.0
    kind = ir.DataType.from_numpy(np.dtype(dtype)).name.lower()
    text = PRODUCT.replace("float[", f"{kind}[").replace("] w)", f"] {name})")
    model = parse(text.replace("(x, w)", f"(x, {name})"), **{name: array})
    before = model.clone()
    assert apply_pass(SPARSE, model)

    assert len(model.graph) == 1
    path = tmp_path / "sparse.onnx"
    size = graphopt.save(model, path)
    assert size == path.stat().st_size == stored_bytes(model) < stored_bytes(before)
    graph = onnx.load(path).graph
    assert [one.values.name for one in graph.sparse_initializer] == [name]
    assert not graph.initializer
    loaded = graphopt.load(path)
    tensor = loaded.graph.initializers[name].const_value
    assert tensor is not None and tensor.tobytes() == array.tobytes()
    feeds = {"x": normal(1, 4, 64).astype(dtype)}
    found = ort.InferenceSession(path).run(None, feeds)[0]
    expected = ort.InferenceSession(ir.to_proto(before).SerializeToString()).run(None, feeds)[0]
    assert found.tobytes() == expected.tobytes()


def test_only_what_is_smaller_is_marked_and_only_once() -> None:
    assert_unchanged(SPARSE, parse(PRODUCT, w=pruned(64, 96, zeros=0.2)))
    assert_unchanged(SPARSE, parse(PRODUCT, w=pruned(64, 96, zeros=0.0)))
    model = parse(PRODUCT, w=pruned(64, 96))
    clone = model.clone()
    assert apply_pass(SPARSE, model)
    assert not apply_pass(SPARSE, model)
    assert stored_bytes(clone) > stored_bytes(model)


def test_the_gate_passes_and_data_files_do_not_hold_them(tmp_path: Path) -> None:
    model = parse(PRODUCT, w=pruned(64, 96, zeros=0.9))
    run = optimized(model, "pack-zeros{form=sparse-initializer}")
    assert [step.verdict for step in run.steps] == ["kept"]
    path = tmp_path / "sparse.onnx"
    run.save(path)
    assert path.stat().st_size == run.optimized.stored_bytes < run.original.stored_bytes / 2

    graphopt.save(run.model, tmp_path / "external.onnx", external_data=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["external.onnx", "sparse.onnx"]


def test_a_weight_that_changes_is_written_dense() -> None:
    model = parse(PRODUCT, w=pruned(64, 96, zeros=0.9))
    apply_pass(SPARSE, model)
    assert apply_pass(PASS, model)
    assert is_sparse(model)
    assert not any(is_marked(v.const_value) for v in model.graph.initializers.values())

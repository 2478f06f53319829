"""quantize-weights in 6 bits and fewer, widened at load or read by a kernel."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from observed import observer
from optimized import kernels
from test_quantize_weights import PASS, numbers

import graphopt
from graphopt.code_fields import fields_of
from graphopt.contract import Context
from graphopt.packing import is_packed
from graphopt.runtime import Reference, Session
from graphopt.testing import apply_pass, assert_unchanged, parse
from graphopt_passes.quantize.quantize_weights import QuantizeWeights

# ------------------------------------------------------------------ few bits


FEW = QuantizeWeights(bits=4, block=32)
KERNEL = QuantizeWeights(bits=4, block=32, form="kernel")


def linear(body: str, *, opset: int = 21, **shapes: tuple[int, ...]) -> ir.Model:
    """A model of x, float[4, 96], and weights of these shapes."""
    weights = {name: numbers(*s, seed=i) / 10 for i, (name, s) in enumerate(shapes.items())}
    stated = "".join(f", float[{','.join(map(str, s))}] {n}" for n, s in shapes.items())
    header = f'<ir_version: 10, opset_import: ["" : {opset}]>'
    return parse(
        f"{header} agraph (float[4,96] x{stated}) => (float[N,M] y) {{ {body} }}", **weights
    )


def correlated(count: int = 12) -> list[dict[str, np.ndarray]]:
    mix = numbers(96, 96, seed=9) * np.exp(numbers(96, seed=8))
    return [{"x": numbers(4, 96, seed=100 + i) @ mix} for i in range(count)]


def run(model: ir.Model, sample: dict[str, np.ndarray], reference: Reference) -> np.ndarray:
    return Session(model, reference, threads=1).run(sample)["y"]


def relative(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize(("bits", "limit"), [(2, 0.6), (3, 0.25), (4, 0.12), (5, 0.06), (6, 0.03)])
def test_fewer_bits_take_their_bytes_and_no_more_error(bits: int, limit: float) -> None:
    model = linear("y = MatMul(x, w)", w=(96, 64))
    before = model.clone()

    change = apply_pass(QuantizeWeights(bits=bits, block=32), model)  # type: ignore[arg-type]

    assert dict(change.counts) == {
        f"weight of MatMul stored as {bits}-bit integers in blocks of 32": 1
    }
    arrays = [v.const_value for v in model.graph.initializers.values() if v.uses()]
    sizes = sorted((t.nbytes for t in arrays if t is not None), reverse=True)
    codes = [field.stored_bytes(96 * 64) for field in fields_of(1 << bits)]
    scales = 3 * 64 * 2
    assert sum(codes) == 96 * 64 * bits // 8
    for kept in (*codes, scales):
        sizes.remove(kept)
    error = relative(
        run(model, correlated()[0], Reference.AS_WRITTEN),
        run(before, correlated()[0], Reference.AS_WRITTEN),
    )
    assert error < limit


def test_eight_bits_in_blocks_are_closer_than_by_channel() -> None:
    model = linear("y = MatMul(x, w)", w=(96, 64))
    wanted = run(model, correlated()[0], Reference.AS_WRITTEN)
    errors = []
    for one in (PASS, QuantizeWeights(block=32)):
        packed = model.clone()
        apply_pass(one, packed)
        errors.append(relative(run(packed, correlated()[0], Reference.AS_WRITTEN), wanted))

    assert errors[1] < errors[0]


def test_with_samples_the_fit_beats_nearest_and_half_quadratic() -> None:
    model, samples = linear("y = MatMul(x, w)", w=(96, 64)), correlated(100)
    errors = {}
    for method in ("nearest", "hqq", "gptq", "auto"):
        packed = model.clone()
        apply_pass(
            QuantizeWeights(bits=3, block=32, method=method),  # type: ignore[arg-type]
            packed,
            observer=observer(model, samples),
        )
        errors[method] = relative(
            run(packed, correlated(101)[-1], Reference.AS_WRITTEN),
            run(model, correlated(101)[-1], Reference.AS_WRITTEN),
        )

    assert errors["auto"] == errors["gptq"] < 0.7 * min(errors["nearest"], errors["hqq"])


def test_mixed_bits_keep_the_average_and_give_more_where_it_counts() -> None:
    body = "a = MatMul(x, w) b = MatMul(x, v) c = Mul(b, s) y = Add(a, c)"
    model = linear(body, w=(96, 64), v=(96, 64), s=(64,))
    model.graph.initializers["s"].const_value = ir.tensor(np.full(64, 0.02, np.float32), name="s")
    samples = correlated()

    change = apply_pass(
        QuantizeWeights(bits=0, average_bits=4.5, block=32),
        model,
        observer=observer(model, samples),
    )

    bits = {int(what.split(" as ")[1].split("-")[0]): n for what, n in change.counts.items()}
    assert sum(bits.values()) == 2 and len(bits) == 2
    assert sum(b * n for b, n in bits.items()) / 2 + 0.5 <= 4.5 + 0.02


def test_mixed_bits_stay_within_the_error() -> None:
    model, samples = linear("y = MatMul(x, w)", w=(96, 64)), correlated()
    before = model.clone()

    apply_pass(
        QuantizeWeights(bits=0, error=0.05, block=32), model, observer=observer(model, samples)
    )

    wanted = run(before, samples[0], Reference.AS_WRITTEN)
    assert relative(run(model, samples[0], Reference.AS_WRITTEN), wanted) < 0.1
    assert is_packed(next(n for n in model.graph if n.op_type == "MatMul").inputs[1])


def test_scales_in_eight_bits_take_half_the_bytes() -> None:
    def bytes_of_scales(one: QuantizeWeights) -> int:
        model = linear("y = MatMul(x, w)", w=(96, 64))
        apply_pass(one, model)
        Session(model).run(correlated()[0])
        tensors = [v.const_value for v in model.graph.initializers.values()]
        return sum(t.nbytes for t in tensors if t is not None and t.size == 6 * 64)

    wide = QuantizeWeights(bits=4, block=16)

    assert bytes_of_scales(wide) == 2 * 6 * 64
    assert bytes_of_scales(replace(wide, scales="float8")) == 6 * 64


def test_a_tied_head_is_rounded_once_for_the_head_and_stays_shared() -> None:
    model = parse(
        "agraph (int64[N,S] ids, float[160,32] table) => (float[N,S,V] y) {"
        " e = Gather(table, ids) t = Transpose<perm = [1,0]>(table) y = MatMul(e, t) }",
        table=numbers(160, 32),
    )
    samples = [{"ids": np.random.default_rng(i).integers(0, 9, (2, 16))} for i in range(8)]
    errors = []
    for method in ("hqq", "gptq"):
        packed = model.clone()
        change = apply_pass(
            QuantizeWeights(bits=3, block=16, method=method),  # type: ignore[arg-type]
            packed,
            observer=observer(model, samples),
        )
        assert change.counts.total() == 1
        gather = next(n for n in packed.graph if n.op_type == "Gather" and n.outputs[0].name == "e")
        turned = next(n for n in packed.graph if n.op_type == "Transpose")
        assert gather.inputs[0] is turned.inputs[0] and is_packed(gather.inputs[0])
        sample = samples[0]
        errors.append(
            relative(
                run(packed, sample, Reference.AS_WRITTEN), run(model, sample, Reference.AS_WRITTEN)
            )
        )

    assert errors[1] < 0.9 * errors[0]


# ------------------------------------------------------------------ the kernel


PRODUCTS = {
    "MatMul": ("y = MatMul(x, w)", {"w": (96, 64)}),
    "MatMul and Add": ("c = MatMul(x, w) y = Add(c, b)", {"w": (96, 64), "b": (64,)}),
    "Gemm": ("y = Gemm(x, w, b)", {"w": (96, 64), "b": (64,)}),
    "Gemm transposed": ("y = Gemm<transB = 1>(x, w, b)", {"w": (64, 96), "b": (64,)}),
    "Gemm without bias": ("y = Gemm<transB = 1>(x, w)", {"w": (64, 96)}),
    "two": ("c = MatMul(x, w) y = MatMul(c, v)", {"w": (96, 40), "v": (40, 50)}),
}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("level", [0, 1, 4])
@pytest.mark.parametrize("name", PRODUCTS)
def test_the_kernel_runs_and_does_what_is_written(
    name: str, level: int, bits: int, tmp_path: Path
) -> None:
    body, shapes = PRODUCTS[name]
    model = linear(body, **shapes)
    before, sample = model.clone(), correlated()[0]
    one = replace(KERNEL, bits=bits, accuracy_level=level)  # type: ignore[arg-type]

    apply_pass(one, model)

    count = len(shapes) - ("b" in shapes)
    assert kernels(model, tmp_path)["MatMulNBits"] == count
    assert kernels(model, tmp_path)["DequantizeLinear"] == 0
    wanted = run(before, sample, Reference.AS_WRITTEN)
    written = run(model, sample, Reference.AS_WRITTEN)
    deployed = run(model, sample, Reference.AS_DEPLOYED)
    assert relative(written, wanted) < (0.2 if bits == 4 else 0.02)
    assert relative(deployed, written) < (1e-5 if level == 1 else 2e-2)
    if not level:
        assert relative(deployed, written) > 1e-4


def test_standard_form_and_kernel_form_hold_the_same_numbers() -> None:
    model, sample = linear("y = MatMul(x, w)", w=(96, 64)), correlated()[0]
    found = []
    for level in (0, 1):
        packed = model.clone()
        apply_pass(replace(KERNEL, accuracy_level=level), packed)
        found.append(run(packed, sample, Reference.AS_WRITTEN))

    assert relative(found[1], found[0]) < 1e-5


def test_two_bits_in_the_kernel(tmp_path: Path) -> None:
    model = linear("y = MatMul(x, w)", opset=25, w=(96, 64))
    sample = correlated()[0]

    apply_pass(replace(KERNEL, bits=2), model)

    assert kernels(model, tmp_path)["MatMulNBits"] == 1
    (codes,) = (v.const_value for v in model.graph.initializers.values() if v.name == "w_codes")
    assert codes is not None and codes.nbytes == 96 * 64 // 4
    written = run(model, sample, Reference.AS_WRITTEN)
    assert relative(run(model, sample, Reference.AS_DEPLOYED), written) < 2e-2


def test_a_row_that_blocks_do_not_divide(tmp_path: Path) -> None:
    model = linear("c = MatMul(x, w) y = MatMul(c, v)", w=(96, 43), v=(43, 50))
    sample = correlated()[0]

    apply_pass(KERNEL, model)

    assert kernels(model, tmp_path)["MatMulNBits"] == 2
    written = run(model, sample, Reference.AS_WRITTEN)
    assert relative(run(model, sample, Reference.AS_DEPLOYED), written) < 2e-2


def test_codes_of_the_kernel_take_half_a_byte() -> None:
    model = linear("y = MatMul(x, w)", w=(96, 64))

    apply_pass(KERNEL, model)

    bytes_of = {v.name: v.const_value.nbytes for v in model.graph.initializers.values()}  # type: ignore[union-attr]
    assert bytes_of["w_codes"] == 96 * 64 // 2
    assert bytes_of["w_scales"] == 4 * 3 * 64


def test_what_no_kernel_reads_is_widened_at_load(tmp_path: Path) -> None:
    model = parse(
        "agraph (int64[N,S] ids, float[160,32] table, float[32,48] w) => (float[N,S,V] y) {"
        " e = Gather(table, ids) y = MatMul(e, w) }",
        table=numbers(160, 32),
        w=numbers(32, 48),
    )

    apply_pass(KERNEL, model)

    assert dict(kernels(model, tmp_path)) == {"Gather": 1, "MatMulNBits": 1}


@pytest.mark.parametrize(
    ("options", "opset", "reason"),
    [
        ({}, 17, "4 bits in blocks need opset 21: raise-opset{opset=21}"),
        ({"bits": 2}, 21, "2 bits in blocks need opset 25: raise-opset{opset=25}"),
        ({"bits": 0}, 20, "4 bits in blocks need opset 21: raise-opset{opset=21}"),
        ({"bits": 3}, 21, "no kernel multiplies with 3 bits; form=load stores them"),
        ({"block": 0}, 21, "the kernel takes blocks of 16, 32, 64, 128 inputs, not of 0"),
        ({"block": 48}, 21, "the kernel takes blocks of 16, 32, 64, 128 inputs, not of 48"),
        ({"form": "load", "accuracy_level": 4}, 21, "accuracy-level is that of a kernel"),
        ({"accuracy_level": 4}, 17, None),
    ],
)
def test_what_is_refused(options: dict[str, object], opset: int, reason: str | None) -> None:
    model = linear("y = MatMul(x, w)", opset=opset, w=(96, 64))

    found = replace(KERNEL, **options).refuse(model, Context(lambda: model))  # type: ignore[arg-type]

    assert found is None if reason is None else reason in (found or "")


@pytest.mark.parametrize("one", [FEW, KERNEL, replace(KERNEL, accuracy_level=4)])
def test_a_second_time_finds_nothing(one: QuantizeWeights) -> None:
    model = linear("c = Gemm<transB = 1>(x, w) y = MatMul(c, v)", w=(64, 96), v=(64, 50))
    apply_pass(one, model)
    assert_unchanged(one, model)


def test_narrowing_few_bits_takes_more() -> None:
    def steps(one: QuantizeWeights) -> list[int | float]:
        found: list[int | float] = []
        step = one.narrow()
        while step is not None and step.min_channels == one.min_channels:
            found.append(step.bits or step.average_bits)
            step = step.narrow()
        return found

    assert steps(replace(FEW, bits=2)) == [3, 4, 5, 6, 8]
    assert steps(replace(KERNEL, bits=2)) == [4, 8]
    assert steps(replace(FEW, bits=0, average_bits=6.5)) == [7.5, 8.0]
    assert QuantizeWeights(bits=0, error=0.1).narrow() == QuantizeWeights(bits=0, error=0.05)


BEFORE_CLIP = {
    "c = MatMul(x, w) d = Relu(c) y = MatMul(d, v)": True,
    "c = MatMul(x, w) a = Add(c, b) d = Relu(a) y = MatMul(d, v)": True,
    "c = Gemm(x, w, b) d = Clip(c) y = Softmax(d) z = MatMul(d, v)": True,
    "c = Gemm(x, w, b) d = LeakyRelu(c) y = MatMul(d, v)": False,
    "c = MatMul(x, w) d = Reshape(c, s) y = MatMul(d, v)": False,
}


@pytest.mark.parametrize(("body", "folded"), BEFORE_CLIP.items())
def test_before_relu_onnxruntime_makes_no_kernel_of_standard_nodes(
    body: str, folded: bool, tmp_path: Path
) -> None:
    body = f"s = Constant<value_ints = [4, 64]>() {body}"
    model = linear(body, w=(96, 64), v=(64, 80), b=(64,))
    written = model.clone()

    change = apply_pass(KERNEL, model)
    apply_pass(replace(KERNEL, accuracy_level=4), written)

    used = kernels(model, tmp_path)
    assert (used["MatMulNBits"], used["DequantizeLinear"]) == (1 if folded else 2, 0)
    assert bool(change.notes) == folded
    assert kernels(written, tmp_path)["MatMulNBits"] == 2


def test_the_recipe_int4(tmp_path: Path) -> None:
    body = "c = MatMul(x, w) r = Tanh(c) y = MatMul(r, v)"
    model = linear(body, opset=17, w=(96, 64), v=(64, 80))

    run_ = graphopt.optimize(model, recipe="int4", samples=correlated(), benchmark=False)

    assert kernels(run_.model, tmp_path)["MatMulNBits"] == 2

"""Signs and scales: how well they are found, and that the file holds them and nothing else."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

import graphopt
from graphopt.encoding import NODES_BYTES
from graphopt.errors import SpecError
from graphopt.packing import is_packed, packed_weights
from graphopt.registry import parse_passes
from graphopt.testing import apply_pass, assert_unchanged, parse
from graphopt_passes.quantize.bases import (
    SIGNS,
    greedy_signs,
    joint_scales,
    lattice_of,
    nearest_signs,
    sum_of_signs,
    ternary,
)
from graphopt_passes.quantize.codebooks import Rounded, damped, squared_error
from graphopt_passes.quantize.quantize_binary import QuantizeBinary

ALL = QuantizeBinary(layers="all")
EVEN = np.ones((1, 1), np.float32)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def gram_of(inputs: int, rows: int = 200, seed: int = 1) -> np.ndarray:
    """Of inputs that hang together."""
    mixed = normal(rows, inputs, seed=seed) @ normal(inputs, inputs, seed=seed + 1)
    return np.asarray(mixed.T @ mixed / rows, np.float32)


def summed(parts: tuple[Rounded, ...]) -> np.ndarray:
    return np.asarray(sum(part.numbers() for part in parts))


def numbers_of(signs: np.ndarray, scales: np.ndarray) -> np.ndarray:
    width = signs.shape[2] // scales.shape[2]
    return np.asarray((signs * np.repeat(scales, width, axis=2)).sum(axis=0))


# ------------------------------------------------------------------ solving


@pytest.mark.parametrize("blocks", [1, 4])
def test_one_basis_is_the_sign_and_the_mean_magnitude(blocks: int) -> None:
    weight = normal(6, 32)

    (part,) = sum_of_signs(weight, 1, blocks, EVEN, None)

    means = np.abs(weight).reshape(6, blocks, -1).mean(axis=2)
    np.testing.assert_array_equal(SIGNS[part.codes], np.sign(weight))
    np.testing.assert_allclose(part.scales.astype(np.float32), means, rtol=1e-3)


def test_two_bases_of_few_numbers_are_the_best_there_are() -> None:
    # The lattice of two bases is any two numbers and their negatives, so that the best is two means
    # of the magnitudes.
    for seed in range(20):
        weight = normal(1, 6, seed=seed)
        best = min(
            sum(
                float(np.square(part - part.mean()).sum())
                for part in (np.abs(weight[0])[list(chosen)], np.abs(weight[0])[~np.array(chosen)])
                if part.size
            )
            for chosen in (np.array(bits, bool) for bits in product((0, 1), repeat=6))
        )
        signs, scales = nearest_signs(weight, 2, 1, EVEN)
        found = squared_error(weight, numbers_of(signs, scales), None)
        assert found == pytest.approx(best, rel=1e-4)


def test_ternary_numbers_are_the_best_there_are() -> None:
    for seed in range(20):
        weight = normal(1, 6, seed=seed)
        best = np.inf
        for codes in product((-1.0, 0.0, 1.0), repeat=6):
            power = float(np.dot(codes, codes))
            scale = float(np.dot(codes, weight[0])) / power if power else 0.0
            best = min(best, float(np.square(weight[0] - scale * np.array(codes)).sum()))
        found = squared_error(weight, ternary(weight, 1, EVEN, None).numbers(), None)
        assert found <= 1.001 * best + 1e-6


@pytest.mark.parametrize("bases", [1, 2, 3])
def test_signs_of_few_inputs_come_near_the_best_for_the_outputs(bases: int) -> None:
    weight, gram = normal(8, 6), gram_of(6)
    found = squared_error(weight, summed(sum_of_signs(weight, bases, 1, EVEN, gram)), gram)

    scales = np.stack([p.scales for p in sum_of_signs(weight, bases, 1, EVEN, gram)])
    levels = lattice_of(scales.astype(np.float64)).levels[:, 0]
    every = np.array(list(product(range(2**bases), repeat=6)))
    best = 0.0
    for row, own in zip(weight, levels, strict=True):
        change = own[every] - row
        best += float(np.einsum("nk,kj,nj->n", change, gram, change).min())
    nearest = squared_error(weight, summed(sum_of_signs(weight, bases, 1, EVEN, None)), gram)
    assert found <= nearest
    assert found <= 1.5 * best


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("bases", [1, 2, 3])
def test_joint_scales_are_never_worse_than_greedy_ones(bases: int, blocks: int) -> None:
    weight, gram = normal(10, 24), damped(gram_of(24))
    assert gram is not None
    signs, scales = greedy_signs(weight, bases, blocks, EVEN)

    turned, better = joint_scales(weight, signs, scales, gram)

    assert (better >= 0).all()
    before = squared_error(weight, numbers_of(signs, scales), gram)
    assert squared_error(weight, numbers_of(turned, better), gram) < before


@pytest.mark.parametrize("gram", [None, gram_of(40)], ids=["alone", "gram"])
def test_each_basis_more_is_better(gram: np.ndarray | None) -> None:
    weight = normal(16, 40)
    errors = [
        squared_error(weight, summed(sum_of_signs(weight, bases, 1, EVEN, gram)), gram)
        for bases in (1, 2, 3)
    ]
    assert errors[0] > 2 * errors[1] > 4 * errors[2] > 0


def test_refitting_is_never_worse_than_greedy() -> None:
    weight = normal(16, 40)
    for bases in (1, 2, 3):
        greedy = numbers_of(*greedy_signs(weight, bases, 2, EVEN))
        found = numbers_of(*nearest_signs(weight, bases, 2, EVEN))
        assert squared_error(weight, found, None) <= squared_error(weight, greedy, None) * 1.000001


def test_numbers_that_count_more_are_closer() -> None:
    weight, counted = normal(4, 32), np.ones((1, 32), np.float32)
    counted[:, 5] = 1e4
    heavy = summed(sum_of_signs(weight, 1, 1, counted, None))
    even = summed(sum_of_signs(weight, 1, 1, EVEN, None))
    assert (np.abs(heavy - weight)[:, 5] < np.abs(even - weight)[:, 5] + 1e-3).all()


@pytest.mark.parametrize("bases", [1, 2, 3])
def test_codes_and_signs_of_a_lattice_belong_together(bases: int) -> None:
    lattice = lattice_of(np.abs(normal(bases, 3, 2)).astype(np.float64))
    codes = np.random.default_rng(0).integers(0, 2**bases, (3, 10)).astype(np.uint8)

    signs = lattice.signs(codes)

    np.testing.assert_array_equal(lattice.codes(signs), codes)
    np.testing.assert_allclose(
        lattice.rounded(codes).numbers(), numbers_of(signs, lattice.scales), rtol=1e-5, atol=1e-6
    )
    assert (np.diff(lattice.levels, axis=2) >= 0).all()


@pytest.mark.parametrize("weight", [np.zeros((2, 8)), np.full((2, 8), -3.0), np.eye(2, 8)])
def test_degenerate_rows_are_finite(weight: np.ndarray) -> None:
    weight = weight.astype(np.float32)
    for gram in (None, np.zeros((8, 8), np.float32), np.ones((8, 8), np.float32)):
        for bases in (1, 2, 3):
            parts = sum_of_signs(weight, bases, 1, EVEN, gram)
            assert np.isfinite(summed(parts)).all()
        assert np.isfinite(ternary(weight, 1, EVEN, gram).numbers()).all()
    if not weight.any():
        assert not summed(sum_of_signs(weight, 2, 1, EVEN, None)).any()


# ------------------------------------------------------------------ models


def gemm(inputs: int = 64, outputs: int = 48) -> ir.Model:
    return parse(
        f"agraph (float[N,{inputs}] x, float[{outputs},{inputs}] w, float[{outputs}] b)"
        f" => (float[N,{outputs}] y) {{ y = Gemm <transB = 1> (x, w, b) }}",
        w=normal(outputs, inputs),
        b=normal(outputs, seed=1),
    )


def two_layers(sensitive: float = 1.0) -> ir.Model:
    """A layer that hardly counts beside one that does."""
    return parse(
        "agraph (float[N,64] x, float[64,64] w, float[64,64] v) => (float[N,64] y)"
        "{ a = MatMul(x, w) b = MatMul(x, v) y = Add(a, b) }",
        w=sensitive * normal(64, 64),
        v=0.02 * normal(64, 64, seed=1),
    )


def samples(count: int = 24, inputs: int = 64) -> list[dict[str, np.ndarray]]:
    return [{"x": normal(4, inputs, seed=100 + i)} for i in range(count)]


def deployed(model: ir.Model, folder: Path, x: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """What onnxruntime makes of it, and the operators that are left at run time."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    (output,) = session.run(None, {"x": x})
    return output, [n.op_type for n in onnx.load(folder / "optimized.onnx").graph.node]


@pytest.mark.parametrize(
    "tested",
    [
        ALL,
        QuantizeBinary(layers="all", bases=2),
        QuantizeBinary(layers="all", bases=3, block=16),
        QuantizeBinary(layers="all", ternary=True),
    ],
    ids=str,
)
def test_weights_are_packed_and_folded_to_what_they_stand_for(
    tested: QuantizeBinary, tmp_path: Path
) -> None:
    model, x = gemm(), normal(3, 64, seed=9)
    change = apply_pass(tested, model)

    assert change.counts.total() == 1
    (weight,) = packed_weights(model.graph)
    assert weight.name == "w" and is_packed(weight)
    output, operators = deployed(model, tmp_path, x)
    assert operators == ["Gemm"]
    plain = gemm()
    bases = tested.bases or 1
    matrix = plain.graph.initializers["w"].const_value.numpy()  # type: ignore[union-attr]
    blocks = 64 // tested.block if tested.block else 1
    if tested.ternary:
        numbers = ternary(matrix, 1, EVEN, None).numbers()
    else:
        numbers = summed(sum_of_signs(matrix, bases, blocks, EVEN, None))
    bias = plain.graph.initializers["b"].const_value.numpy()  # type: ignore[union-attr]
    np.testing.assert_allclose(output, x @ numbers.T + bias, rtol=1e-4, atol=1e-4)


def test_one_basis_takes_a_bit_and_a_scale_for_each_row() -> None:
    model = gemm(1024, 1024)
    before = len(ir.to_proto(model).SerializeToString())
    apply_pass(ALL, model)
    after = len(ir.to_proto(model).SerializeToString())

    ideal = before / 32 + 2 * 1024 + 4 * 1024
    assert after <= 1.02 * ideal + NODES_BYTES


@pytest.mark.parametrize("operator", ["Conv", "MatMul", "ConvTranspose"])
def test_layers_of_all_kinds(operator: str, tmp_path: Path) -> None:
    shape = {"Conv": (32, 8, 3, 3), "MatMul": (8, 256), "ConvTranspose": (8, 32, 3, 3)}[operator]
    out = {"Conv": "1,32,6,6", "MatMul": "1,8,8,256", "ConvTranspose": "1,32,10,10"}[operator]
    dims = ",".join(map(str, shape))
    model = parse(
        f"agraph (float[1,8,8,8] x, float[{dims}] w) => (float[{out}] y){{ y = {operator}(x, w) }}",
        w=normal(*shape),
    )
    apply_pass(QuantizeBinary(layers="all", bases=2), model)
    assert deployed(model, tmp_path, normal(1, 8, 8, 8))[1] == [operator]


def test_only_layers_that_stand_it_become_binary() -> None:
    run = graphopt.optimize(
        two_layers(),
        samples=samples(),
        passes="quantize-binary{error=0.03}",
        benchmark=False,
        max_error="0.1",
    )
    (step,) = run.steps
    assert step.kept
    assert sum(step.changes.values()) == 1
    assert [skip.node for skip in step.skips] == ["w"]
    (note,) = step.notes
    assert "estimated" in note and "measured" in note


def test_the_estimate_is_what_is_measured() -> None:
    run = graphopt.optimize(
        two_layers(0.1),
        samples=samples(),
        passes="quantize-binary{layers=all,bases=2}",
        benchmark=False,
        max_error="1",
    )
    (step,) = run.steps
    (note,) = step.notes
    estimated, measured = (float(part.split()[-1]) for part in note.split(";"))
    assert 0.8 < measured / estimated < 1.25
    taken = int(note.split(" -> ")[1].split()[0].replace(",", ""))
    # The digits of every byte are stored once for all weights.
    added = step.bytes_after - step.bytes_before + 2 * 64 * 64 * 4
    assert abs(added - taken - 256 * 8) < 300


def test_what_stands_less_becomes_clusters_on_request() -> None:
    run = graphopt.optimize(
        two_layers(),
        samples=samples(),
        passes="quantize-binary{error=0.03,others=clusters}",
        benchmark=False,
        max_error="0.1",
    )
    (step,) = run.steps
    assert step.kept and sum(step.changes.values()) == 2
    assert any("clusters" in what for what in step.changes)


def test_nothing_becomes_binary_where_nothing_stands_it() -> None:
    run = graphopt.optimize(
        gemm(), samples=samples(), passes="quantize-binary{error=0.001}", benchmark=False
    )
    assert not run.steps[0].kept


def test_without_samples_it_works_on_the_numbers_alone() -> None:
    run = graphopt.optimize(
        gemm(), passes="quantize-binary{layers=all,bases=3}", benchmark=False, max_error="0.5"
    )
    assert run.steps[0].kept
    assert any("not verified on real data" in note for note in run.notes)


def test_what_is_packed_stays() -> None:
    model = gemm()
    apply_pass(ALL, model)
    assert_unchanged(ALL, model)


def test_old_opsets_are_refused() -> None:
    model = gemm()
    model.graph.opset_imports[""] = 12
    reason = ALL.refuse(model, None)  # type: ignore[arg-type]
    assert reason is not None and "13" in reason


def test_options_read_back() -> None:
    text = "quantize-binary{bases=2,layers=all,others=clusters,block=64,error=0.05}"
    (one,) = parse_passes(text)
    assert one == QuantizeBinary(bases=2, layers="all", others="clusters", block=64, error=0.05)
    assert list(parse_passes(str(one))) == [one]


def test_bases_and_ternary_exclude_each_other() -> None:
    with pytest.raises(SpecError, match="not both"):
        QuantizeBinary(bases=2, ternary=True)


def test_a_milder_form() -> None:
    milder = QuantizeBinary(layers="all", bases=1).narrow()
    assert milder == QuantizeBinary(bases=1)
    assert QuantizeBinary(error=0.1).narrow() == QuantizeBinary(error=0.05)
    assert QuantizeBinary(error=0.005).narrow() is None

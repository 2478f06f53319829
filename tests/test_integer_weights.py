"""Integers of few bits: scales and codes against brute force, sizes, and onnxruntime's kernel."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest

from graphopt.contract import Change
from graphopt.encoding import SCALES_BYTES
from graphopt.skeleton import infer_shapes
from graphopt.testing import parse
from graphopt_passes.quantize.codebooks import nearest, squared_error
from graphopt_passes.quantize.integer_weights import (
    SHARES,
    Integers,
    block_of,
    estimates_of_integers,
    largest_scales,
    searched_scales,
    stored_scales,
)
from graphopt_passes.quantize.kernel_nodes import packed_blocks
from graphopt_passes.quantize.kernel_weights import KernelIntegers, why_no_kernel
from graphopt_passes.quantize.narrow_weights import Target, targets_of
from graphopt_passes.quantize.narrowing import Problem


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def target_of(weight: np.ndarray) -> Target:
    """The weight of a MatMul, from its matrix [rows, inputs]."""
    rows, inputs = weight.shape
    model = parse(
        f"agraph (float[2,{inputs}] x, float[{inputs},{rows}] w) => (float[N,M] y)"
        "{ y = MatMul(x, w) }",
        w=np.ascontiguousarray(weight.T),
    )
    infer_shapes(model)
    (target,) = targets_of(model, 1, Change())
    return target


def problem_of(weight: np.ndarray, gram: np.ndarray | None = None) -> Problem:
    return Problem(target_of(weight), weight, gram, None)


def gram_of(inputs: int, seed: int = 1) -> np.ndarray:
    """Of inputs that go together, and of which some are large."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((400, inputs)) @ rng.standard_normal((inputs, inputs))
    rows *= np.exp(rng.standard_normal(inputs))
    return (rows.T @ rows / 400).astype(np.float32)


# ------------------------------------------------------------------ scales


@pytest.mark.parametrize(("inputs", "block", "found"), [(64, 32, 32), (172, 32, 43), (7, 4, 7)])
def test_blocks_divide_the_row(inputs: int, block: int, found: int) -> None:
    assert block_of(inputs, block) == found
    assert block_of(inputs, 0) == 0
    assert block_of(inputs, 1000) == inputs


def test_the_largest_number_gets_the_lowest_integer_whatever_its_sign() -> None:
    rows = np.float32([[1, -4, 2], [1, 4, 2], [0, 0, 0]])

    scales = largest_scales(rows, np.arange(-2, 2, dtype=np.float32))

    assert scales.tolist() == [[2.0], [-2.0], [1.0]]


def test_searched_scales_are_the_best_that_are_tried() -> None:
    rows, counted = numbers(5, 6), np.abs(numbers(5, 6, seed=1))
    levels = Integers(2).levels
    whole = largest_scales(rows, levels)

    found = searched_scales(rows, levels, whole, counted)

    def error(row: int, scale: float) -> float:
        change = levels[nearest(rows[row] / scale, levels)] * scale - rows[row]
        return float(counted[row] @ np.square(change))

    for row in range(5):
        tried = [s * share * float(whole[row, 0]) for share in SHARES for s in (1, -1)]
        best = min(error(row, scale) for scale in tried)
        assert error(row, float(found[row, 0])) == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("kind", [np.float16, np.float32, ml_dtypes.float8_e4m3fn])
def test_stored_scales_are_near_and_never_zero(kind: type) -> None:
    scales = np.float32([[0.01, -0.02], [1e-3, 1e-12]])

    stored, factor = stored_scales(scales, kind)

    wide = stored.astype(np.float32) * factor
    assert stored.dtype == kind
    assert np.all(np.sign(wide) == np.sign(scales)) and np.isfinite(wide).all()
    assert np.allclose(wide[0], scales[0], rtol=0.0625)


# ------------------------------------------------------------------ codes


def test_nearest_is_what_a_loop_would_do() -> None:
    weight = numbers(3, 8)
    form = Integers(3, 4, "nearest", np.float32)

    found = form.rounded(problem_of(weight))

    for row, block in itertools.product(range(3), range(2)):
        part = weight[row, 4 * block : 4 * block + 4]
        largest = max(part, key=abs)
        scale = np.float32(largest / -4)
        for at, number in enumerate(part):
            best = min(abs(number - scale * i) for i in range(-4, 4))
            assert abs(found.numbers()[row, 4 * block + at] - number) == pytest.approx(best, 1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("block", [0, 16, 48])
def test_the_fit_beats_nearest_by_the_gram(bits: int, block: int) -> None:
    weight, gram = numbers(24, 96), gram_of(96)
    problem = problem_of(weight, gram)

    errors = {
        method: problem.error(Integers(bits, block, method).solve(problem))
        for method in ("nearest", "hqq", "gptq", "auto")
    }

    assert errors["gptq"] < 0.6 * errors["nearest"]
    assert errors["gptq"] == errors["auto"] < errors["hqq"]


def test_the_fit_is_near_the_best_of_all_codes() -> None:
    weight, gram = numbers(4, 5, seed=3), gram_of(5)
    problem = problem_of(weight, gram)
    found = Integers(2, 0, "gptq", np.float32).rounded(problem)
    levels = found.levels

    for row in range(4):
        scale = found.scales[row, 0]
        every = np.array(list(itertools.product(levels * scale, repeat=5)), np.float32)
        change = every - weight[row]
        best = np.einsum("nk,kj,nj->n", change, gram, change).min()
        got = squared_error(weight[row : row + 1], found.numbers()[row : row + 1], gram)
        assert got <= 1.3 * best + 1e-6


def test_without_samples_a_fit_is_half_quadratic() -> None:
    problem = problem_of(numbers(8, 32))

    codes = {m: Integers(4, 16, m).rounded(problem).codes for m in ("auto", "gptq", "hqq")}

    assert np.array_equal(codes["auto"], codes["hqq"])
    assert np.array_equal(codes["gptq"], codes["hqq"])


@pytest.mark.parametrize("method", ["nearest", "hqq", "gptq"])
def test_a_last_block_of_fewer_inputs(method: str) -> None:
    weight, gram = numbers(6, 43), gram_of(43)
    form = Integers(8, 16, method, np.float32, pads=True)  # type: ignore[arg-type]

    found = form.rounded(problem_of(weight, gram))

    assert found.codes.shape == (6, 43) and found.scales.shape == (6, 3)
    spread = np.repeat(found.scales, 16, axis=1)[:, :43]
    error = squared_error(weight, found.levels[found.codes] * spread, gram)
    assert error < 1e-4 * squared_error(weight, np.zeros_like(weight), gram)


def test_scales_in_eight_bits_have_codes_that_make_good_for_them() -> None:
    problem = problem_of(numbers(16, 64), gram_of(64))

    wide, narrow = (
        problem.error(Integers(4, 16, "gptq", kind).solve(problem))
        for kind in (np.float16, ml_dtypes.float8_e4m3fn)
    )

    assert narrow < 1.25 * wide


def test_zeros_and_one_number() -> None:
    weight = np.zeros((4, 32), np.float32)
    weight[1, 3] = 5.0

    for method in ("nearest", "hqq", "gptq"):
        found = Integers(4, 16, method).rounded(problem_of(weight))  # type: ignore[arg-type]

        assert np.allclose(found.numbers(), weight, atol=2e-3)


def test_more_bits_are_estimated_to_be_closer() -> None:
    forms = [Integers(bits, 16) for bits in (2, 3, 4, 5, 6, 8)]

    found = estimates_of_integers(problem_of(numbers(16, 64), gram_of(64)), forms)

    assert sorted(found, reverse=True) == found


# ------------------------------------------------------------------ sizes


@pytest.mark.parametrize(
    ("form", "stored_bytes"),
    [
        (Integers(4, 32), 64 * 128 // 2 + 64 + 64 * 4 * 2 + SCALES_BYTES),
        (Integers(3, 32), 64 * 128 * 3 // 8 + 32 + 64 * 4 * 2 + SCALES_BYTES),
        (Integers(2, 0), 64 * 128 // 4 + 16 + 64 * 2 + SCALES_BYTES),
        (
            Integers(4, 16, scale_type=ml_dtypes.float8_e4m3fn),
            64 * 128 // 2 + 64 + 64 * 8 + SCALES_BYTES,
        ),
        (KernelIntegers(4, 32), 64 * 128 // 2 + 64 * 4 * 4),
        (KernelIntegers(2, 128), 64 * 128 // 4 + 64 * 4),
    ],
)
def test_stored_bytes(form: Integers, stored_bytes: int) -> None:
    assert form.stored_bytes(target_of(numbers(64, 128))) == stored_bytes


# ------------------------------------------------------------------ the kernel


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_bytes_of_the_kernel_are_those_of_a_loop(bits: int) -> None:
    codes = np.random.default_rng(0).integers(0, 1 << bits, (3, 21)).astype(np.uint8)

    packed = packed_blocks(codes, bits, 16)

    assert packed.shape == (3, 2, 16 * bits // 8)
    for row, at in itertools.product(range(3), range(32)):
        bit = at % 16 * bits
        byte = int(packed[row, at // 16, bit // 8])
        code = byte >> bit % 8 & ((1 << bits) - 1)
        assert code == (codes[row, at] if at < 21 else 1 << bits - 1)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("y = Gemm(x, w)", None),
        ("y = Gemm<transB = 1>(x, w)", None),
        ("y = Gemm(x, w, b)", None),
        ("y = Gemm(x, w, r)", "its bias has more than one dimension"),
        ("y = Gemm<alpha = 2.0>(x, w)", "its Gemm has transA, alpha or beta"),
        ("y = MatMul(x, w)", None),
        ("z = MatMul(x, w) u = MatMul(x, w) y = Add(z, u)", "no product alone reads it"),
    ],
)
def test_what_the_kernel_reads(line: str, reason: str | None) -> None:
    model = parse(
        "agraph (float[32,32] x, float[32,32] w, float[32] b, float[1,32] r) => (float[N,M] y)"
        f"{{ {line} }}",
        w=numbers(32, 32),
        b=numbers(32),
        r=numbers(1, 32),
    )
    infer_shapes(model)
    (target,) = (t for t in targets_of(model, 1000, Change()) if t.name == "w")

    assert why_no_kernel(target) == reason

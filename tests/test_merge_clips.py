from __future__ import annotations

import itertools

import numpy as np
import onnx_ir as ir
import pytest
from becomes import WILD, assert_becomes

from graphopt.contract import Effect
from graphopt.testing import apply_pass, assert_equivalent, assert_unchanged, parse
from graphopt_passes.simplify.merge_clips import MergeClips

STEPS = {
    "Clip(A, zero, six)": "zero six",
    "Clip(A, minus, zero)": "minus zero",
    'Clip(A, "", half)': "half",
    "Clip(A, none, six)": "none six",
    "Clip(A, half)": "half",
    "Relu(A)": "",
    "Min(A, half)": "half",
    "Max(minus, A)": "minus",
    "Max(A, half)": "half",
    "Min(six, A)": "six",
}
NOT_MERGED = (
    ("Relu(A)", "Relu(A)"),
    ("Clip(A, half)", "Clip(A, minus, zero)"),
    ("Max(A, half)", "Clip(A, minus, zero)"),
)
NUMBERS = {"zero": 0.0, "none": -0.0, "six": 6.0, "half": 0.5, "minus": -1.0}


@pytest.mark.parametrize("dtype", ["float", "double", "float16"])
def test_two_become_one_bit_for_bit(dtype: str) -> None:
    pairs = [p for p in itertools.product(STEPS, STEPS) if p not in NOT_MERGED]
    array_type = {"float": np.float32, "double": np.float64, "float16": np.float16}[dtype]
    body = "".join(
        f" a{i} = {one.replace('A', 'x')} y{i} = {two.replace('A', f'a{i}')}"
        for i, (one, two) in enumerate(pairs)
    ).replace('""', "")
    outputs = ", ".join(f"{dtype}[37] y{i}" for i in range(len(pairs)))
    inputs = "".join(f", {dtype} {name}" for name in NUMBERS)
    model = parse(
        f"agraph ({dtype}[37] x{inputs}) => ({outputs}) {{{body} }}",
        **{name: np.array(number, array_type) for name, number in NUMBERS.items()},
    )
    before = model.clone()

    apply_pass(MergeClips(), model)

    assert {n.op_type for n in model.graph} == {"Clip"}
    assert len(model.graph) == len(pairs)
    with np.errstate(over="ignore"):
        wild = np.resize(WILD, 37).astype(array_type)
    assert_equivalent(before, model, Effect.EXACT, [{"x": wild}, {"x": wild[::-1].copy()}])


@pytest.mark.parametrize(
    "dtype", [ir.DataType.INT32, ir.DataType.INT64, ir.DataType.UINT8], ids=str
)
def test_integers(dtype: ir.DataType) -> None:
    name, array_type = dtype.name.lower(), dtype.numpy()
    model = parse(
        f"agraph ({name}[37] x, {name} low, {name} high) => ({name}[37] y, {name}[37] z) {{"
        " a = Clip(x, low) y = Clip(a, , high) b = Clip(x, , high) z = Clip(b, low) }",
        low=np.array(3, array_type),
        high=np.array(90, array_type),
    )
    before = model.clone()

    apply_pass(MergeClips(), model)

    assert len(model.graph) == 2
    limits = np.iinfo(array_type)
    numbers = np.resize(np.array([limits.min, limits.max, 0, 3, 50, 90, 91], array_type), 37)
    assert_equivalent(before, model, Effect.EXACT, [{"x": numbers}])


def test_a_chain_of_many() -> None:
    assert_becomes(
        MergeClips(),
        "agraph (float[N] x) => (float[N] y) <float six = {6.0}, float one = {1.0}> {"
        " a = Relu(x) b = Min(a, six) y = Max(one, b) }",
        "agraph (float[N] x) => (float[N] y) <float six = {6.0}, float one = {1.0}> {"
        " y = Clip(x, one, six) }",
    )


def test_what_stays() -> None:
    """Min with 0, bounds that enlarge, bounds the wrong way round, a bound for each, and 0 only."""
    assert_unchanged(
        MergeClips(),
        "agraph (float[2] x, float[N] u, float c) => (float[2] a2, float[1, 2] b2, float[2] c2,"
        " float[2] d2, float[2] e2, float[2] f2) <float zero = {0.0}, float[1, 1] wide = {1.0},"
        " float one = {1.0}, float two = {2.0}, float[2] each = {1.0, 2.0}, float six = {6.0}> {"
        " a1 = Relu(x) a2 = Min(a1, zero) b1 = Relu(x) b2 = Min(b1, wide)"
        " c1 = Relu(x) c2 = Clip(c1, two, one) d1 = Relu(x) d2 = Max(d1, each)"
        " e1 = Relu(x) e2 = Clip(e1, c, six) f1 = Max(x, one) f2 = Clip(f1, , zero) }",
    )


def test_a_first_that_others_read_stays() -> None:
    assert_unchanged(
        MergeClips(),
        "agraph (float[2] x) => (float[2] y, float[2] a) <float one = {1.0}> {"
        " a = Relu(x) y = Min(a, one) }",
    )

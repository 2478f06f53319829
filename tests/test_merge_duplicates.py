from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from optimized import kernels

import graphopt
from graphopt import load
from graphopt.contract import Effect
from graphopt.saving import save, stored_bytes
from graphopt.testing import apply_pass, assert_equivalent, assert_rewrites, assert_unchanged, parse
from graphopt_passes.share.lost_fusions import BODY_CONV, WEIGHT_ONLY
from graphopt_passes.share.merge_duplicates import MergeDuplicates

TWO = """
agraph (float[{n}] x, float[{n}] a, float[{n}] b) => (float[{n}] y)
{{ s = Add(x, a)  y = Mul(s, b) }}
"""


def test_merges_equal_initializers() -> None:
    change = assert_rewrites(
        MergeDuplicates(),
        """
        agraph (float[2] x) => (float[2] y)
        <float[2] a = {1.0, 2.0}, float[2] b = {1.0, 2.0}, float[2] c = {1.0, 3.0}>
        { s = Add(x, a)  t = Mul(s, b)  y = Sub(t, c) }
        """,
        """
        agraph (float[2] x) => (float[2] y)
        <float[2] a = {1.0, 2.0}, float[2] c = {1.0, 3.0}>
        { s = Add(x, a)  t = Mul(s, a)  y = Sub(t, c) }
        """,
    )

    assert change.counts == {"duplicate initializer merged": 1}


def test_merges_tensors_of_any_size() -> None:
    big = np.random.default_rng(0).standard_normal(1 << 16).astype(np.float32)
    model = parse(TWO.format(n=big.size), a=big, b=big.copy())
    before = stored_bytes(model)

    apply_pass(MergeDuplicates(), model)

    assert before - stored_bytes(model) > big.nbytes


def test_keeps_apart_what_differs_in_type_shape_sign_of_zero_or_one_bit() -> None:
    assert_unchanged(
        MergeDuplicates(),
        """
        agraph (float[2] x) => (float[2] y, int32[2] z)
        <float[2] a = {0.0, 2.0}, float[2] b = {-0.0, 2.0}, float[1, 2] c = {0.0, 2.0},
         int32[2] i = {0, 1073741824}, int32[2] j = {0, 1073741825}>
        { s = Add(x, a)  t = Mul(s, b)  u = Add(t, c)  v = Neg(u)  y = Add(x, x)  z = Add(i, j) }
        """,
    )


def test_merges_nan_by_its_bits() -> None:
    nan = np.float32([np.nan, 1])
    model = parse(TWO.format(n=2), a=nan, b=nan.copy())

    assert apply_pass(MergeDuplicates(), model)


def test_merges_across_subgraphs_into_the_main_graph() -> None:
    model = parse(
        """
        agraph (bool c, float[2] x) => (float[2] y)
        {
            y = If(c) <
                then_branch = then () => (float[2] t) <float[2] w = {1.0, 2.0}> { t = Add(x, w) },
                else_branch = other () => (float[2] e) <float[2] w2 = {1.0, 2.0}> { e = Mul(x, w2) }
            >
        }
        """
    )
    before = model.clone()

    change = apply_pass(MergeDuplicates(), model)

    assert change.counts == {"duplicate initializer merged": 2}
    assert len(model.graph.initializers) == 1
    assert_equivalent(before, model)


def test_overridable_initializers_are_not_merged() -> None:
    model = parse(TWO.format(n=2), a=np.float32([1, 2]))
    value = next(v for v in model.graph.inputs if v.name == "b")
    value.const_value = ir.tensor(np.float32([1, 2]), name="b")
    model.graph.register_initializer(value)

    assert not apply_pass(MergeDuplicates(), model)


def test_an_initializer_that_is_an_output_stays() -> None:
    model = parse(TWO.format(n=2), a=np.float32([1, 2]), b=np.float32([1, 2]))
    model.graph.outputs.append(model.graph.initializers["b"])

    change = apply_pass(MergeDuplicates(), model)

    assert "b" in model.graph.initializers
    assert change.skips or "a" not in model.graph.initializers


def test_strings_are_compared_by_content() -> None:
    assert_rewrites(
        MergeDuplicates(),
        """
        agraph (string[2] x) => (bool[2] y)
        <string[2] a = {"p", "q"}, string[2] b = {"p", "q"}, string[2] c = {"p", "r"}>
        { s = Equal(x, a)  t = Equal(x, b)  u = Equal(x, c)  v = Or(s, t)  y = Or(v, u) }
        """,
        """
        agraph (string[2] x) => (bool[2] y)
        <string[2] a = {"p", "q"}, string[2] c = {"p", "r"}>
        { s = Equal(x, a)  t = Equal(x, a)  u = Equal(x, c)  v = Or(s, t)  y = Or(v, u) }
        """,
    )


def test_external_data_is_compared_on_disk(tmp_path: Path) -> None:
    """Equal at the three places that are probed first, and not everywhere."""
    first = np.random.default_rng(0).standard_normal(1 << 16).astype(np.float32)
    second = first.copy()
    second[20_000] += 1
    save(
        parse(TWO.format(n=first.size), a=first, b=second), tmp_path / "d.onnx", external_data=True
    )
    save(parse(TWO.format(n=first.size), a=first, b=first), tmp_path / "e.onnx", external_data=True)

    different, equal = load(tmp_path / "d.onnx"), load(tmp_path / "e.onnx")

    assert not apply_pass(MergeDuplicates(), different)
    assert apply_pass(MergeDuplicates(), equal)


# ------------------------------------------------------------------ what sharing costs at load


WEIGHT_ONLY_PAIR = """
agraph (float[2, 3, 64] x, float[2, 3, 64] z, int8[64, 64] w, int8[64, 64] w2, float[64] s,
        float[64] s2, int8[64] n, int8[64] n2) => (float[2, 3, 64] y, float[2, 3, 64] y2)
{
    a = DequantizeLinear<axis=1>(w, s, n)     y = MatMul(x, a)
    b = DequantizeLinear<axis=1>(w2, s2, n2)  y2 = MatMul(z, b)
}
"""
CODES = np.random.default_rng(0).integers(-99, 99, (64, 64)).astype(np.int8)
SCALES = np.linspace(0.01, 0.02, 64, dtype=np.float32)
ZEROS = np.zeros(64, np.int8)


def weight_only_pair() -> ir.Model:
    return parse(WEIGHT_ONLY_PAIR, w=CODES, w2=CODES, s=SCALES, s2=SCALES, n=ZEROS, n2=ZEROS.copy())


def test_weights_that_become_matmulnbits_stay_apart_and_zero_points_merge(tmp_path: Path) -> None:
    model = weight_only_pair()

    change = apply_pass(MergeDuplicates(), model)

    assert sorted(model.graph.initializers) == ["n", "s", "s2", "w", "w2"]
    assert {(skip.node, skip.reason) for skip in change.skips} == {
        (name, WEIGHT_ONLY) for name in ("w", "w2", "s", "s2")
    }
    assert kernels(model, tmp_path) == {"MatMulNBits": 2}


@pytest.mark.parametrize(("name", "other"), [("w", "w2"), ("s", "s2")])
def test_sharing_them_would_stop_the_fusion(name: str, other: str, tmp_path: Path) -> None:
    """What the runtime really does; where this fails, the rule can go."""
    model = weight_only_pair()
    model.graph.initializers[other].replace_all_uses_with(model.graph.initializers[name])

    assert "MatMulNBits" not in kernels(model, tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        # Integer activations: an integer kernel, shared weights or not.
        """
        agraph (float[2, 64] x, float[2, 64] z, int8[64, 64] w, int8[64, 64] w2, float[64] s)
            => (float[2, 64] y, float[2, 64] y2)
        <float k = {0.02}, uint8 m = {128}>
        {
            qx = QuantizeLinear(x, k, m) dx = DequantizeLinear(qx, k, m)
            qz = QuantizeLinear(z, k, m) dz = DequantizeLinear(qz, k, m)
            a = DequantizeLinear<axis=1>(w, s)   y = MatMul(dx, a)
            b = DequantizeLinear<axis=1>(w2, s)  y2 = MatMul(dz, b)
        }
        """,
        # A Gemm that transposes is not fused anyway.
        """
        agraph (float[2, 64] x, float[2, 64] z, int8[64, 64] w, int8[64, 64] w2, float[64] s)
            => (float[2, 64] y, float[2, 64] y2)
        {
            a = DequantizeLinear<axis=0>(w, s)   y = Gemm<transB=1>(x, a)
            b = DequantizeLinear<axis=0>(w2, s)  y2 = Gemm<transB=1>(z, b)
        }
        """,
        # Nor is a Conv.
        """
        agraph (float[1, 64, 4] x, float[1, 64, 4] z, int8[64, 64] w, int8[64, 64] w2, float[64] s)
            => (float[1, 64, 4] y, float[1, 64, 4] y2)
        <int64[1] e = {2}>
        {
            a = DequantizeLinear<axis=0>(w, s)   c = Unsqueeze(a, e)  y = Conv(x, c)
            b = DequantizeLinear<axis=0>(w2, s)  d = Unsqueeze(b, e)  y2 = Conv(z, d)
        }
        """,
    ],
)
def test_quantized_weights_merge_where_nothing_is_lost(text: str, tmp_path: Path) -> None:
    model = parse(text, w=CODES, w2=CODES.copy(), s=SCALES)
    before = kernels(model, tmp_path)

    assert apply_pass(MergeDuplicates(), model).counts == {"duplicate initializer merged": 1}
    assert kernels(model, tmp_path) == before


def test_weights_shared_before_have_nothing_to_lose() -> None:
    model = weight_only_pair()
    initializers = model.graph.initializers
    initializers["w2"].replace_all_uses_with(initializers["w"])
    del initializers["w2"]

    assert apply_pass(MergeDuplicates(), model).counts == {"duplicate initializer merged": 2}


CONV_BODIES = """
agraph (bool c, float[1, 16, 8, 8] x) => (float[1, 16, 6, 6] y)
{
    y = If(c) <
        then_branch = t () => (float[1, 16, 6, 6] p)
            <float[1] w = {1.0}, float[1] k = {0.5}> { q = Conv(x, w) r = Mul(q, k) p = Relu(r) },
        else_branch = e () => (float[1, 16, 6, 6] u)
            <float[1] v = {1.0}, float[1] m = {0.5}> { f = Conv(x, v) g = Mul(f, m) u = Tanh(g) }
    >
}
"""


def test_weights_of_convolutions_stay_in_their_bodies(tmp_path: Path) -> None:
    model = parse(CONV_BODIES)
    weight = np.random.default_rng(0).standard_normal((16, 16, 3, 3)).astype(np.float32)
    for body, name in (("then_branch", "w"), ("else_branch", "v")):
        value = model.graph[0].attributes[body].as_graph().initializers[name]
        value.const_value = ir.tensor(weight, name=name)
        value.shape = ir.Shape(weight.shape)
    before = kernels(model, tmp_path)

    change = apply_pass(MergeDuplicates(), model)

    assert change.counts == {"duplicate initializer merged": 2}
    assert {(skip.node, skip.reason) for skip in change.skips} == {
        ("w", BODY_CONV),
        ("v", BODY_CONV),
    }
    assert before["ReorderInput"] == 2
    assert kernels(model, tmp_path) == before


# ------------------------------------------------------------------ in the recipe


def test_basic_fuses_first_and_merges_what_is_equal_then() -> None:
    """Merged first, the weight would be shared, and two BatchNormalization would stay."""
    text = """
        agraph (float[1, 2, 4, 4] x, float[1, 2, 4, 4] z, float[2, 2, 3, 3] w, float[2, 2, 3, 3] v,
                float[2] k) => (float[1, 2, 2, 2] a, float[1, 2, 2, 2] b)
        {
            f = Conv(x, w)  a = BatchNormalization(f, k, k, k, k)
            g = Conv(z, v)  b = BatchNormalization(g, k, k, k, k)
        }
    """
    weight = np.random.default_rng(0).standard_normal((2, 2, 3, 3)).astype(np.float32)
    model = parse(text, w=weight, v=weight.copy(), k=np.float32([1.5, 2.5]))

    run = graphopt.optimize(model, recipe="basic", benchmark=False)

    assert [n.op_type for n in run.model.graph].count("BatchNormalization") == 0
    assert (
        sum(v.const_value.size == weight.size for v in run.model.graph.initializers.values()) == 1
    )


def test_basic_computes_once_what_is_equal_but_for_copies_of_weights() -> None:
    text = """
        agraph (float[1, 2, 4, 4] x, float[2, 2, 3, 3] w, float[2, 2, 3, 3] v, float[2] k)
            => (float[1, 2, 2, 2] y)
        {
            f = Conv(x, w)  a = BatchNormalization(f, k, k, k, k)  c = Relu(a)
            g = Conv(x, v)  b = BatchNormalization(g, k, k, k, k)  d = Relu(b)
            y = Sub(c, d)
        }
    """
    weight = np.random.default_rng(0).standard_normal((2, 2, 3, 3)).astype(np.float32)
    model = parse(text, w=weight, v=weight.copy(), k=np.float32([1.5, 2.5]))

    run = graphopt.optimize(model, recipe="basic", benchmark=False)

    assert sorted(n.op_type for n in run.model.graph) == ["Conv", "Relu", "Sub"]
    assert_equivalent(model, run.model, Effect.ROUNDING)

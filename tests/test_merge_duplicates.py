from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from graphopt import load
from graphopt.saving import save, stored_bytes
from graphopt.testing import apply_pass, assert_equivalent, assert_rewrites, assert_unchanged, parse
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

"""Packed weights stay packed, whatever lossless passes do around them.

The bytes of codes stay, the file does not grow, and the outputs are the same: for weights of every
form, for every reader, in the whole recipe `basic` and in each pass alone.
"""

from __future__ import annotations

from collections import Counter
from functools import cache

import generated_chains
import generated_fusions
import generated_views
import numpy as np
import onnx_ir as ir
import pytest
from generated import Step, generate, runs_as_written
from packed_models import (
    FORMS,
    INTEGERS,
    READERS,
    WEIGHTS_ONLY,
    Form,
    pack_all,
    packed_integers,
    packed_reader,
)

import graphopt
from graphopt.contract import Context, Effect, Sample
from graphopt.ledger import size_of
from graphopt.operators import all_graphs, opset_of
from graphopt.packing import packed_weights
from graphopt.registry import parse_passes, pass_class, pass_names
from graphopt.skeleton import infer_shapes, why_invalid
from graphopt.testing import assert_equivalent, canonical

LOSSLESS = [
    name
    for name in pass_names()
    if pass_class(name).effect is not Effect.LOSSY and name != "unpack-weights"
]

LEAST_CODES = 16
"""What nodes make of fewer codes takes no more bytes than the nodes."""

A_FEW_BYTES = 48
"""A pass may write a constant of a few numbers that saves no bytes but time."""

STAMP_BYTES = 200
"""What a run writes into the model about itself."""

VARIED = ["tied", "tied, Gemm", "If", "LSTM", "Conv, BatchNormalization", "Split, MatMul"]
"""Models on which every form is tried; all models are tried in two."""

TWO = ["8 levels", "blocks, float32"]


def codes(model: ir.Model) -> Counter[tuple[ir.DataType, bytes]]:
    """The narrow initializers of a model: codes, and tables of digits. Equal ones count once."""
    tensors = (v.const_value for g in all_graphs(model) for v in g.initializers.values())
    return Counter(
        {
            (t.dtype, t.tobytes())
            for t in tensors
            if t is not None and t.dtype in (ir.DataType.INT8, ir.DataType.UINT8)
            if t.size >= LEAST_CODES
        }
    )


def stored_bytes(model: ir.Model) -> int:
    return size_of(model, False).stored_bytes


def packed_count(model: ir.Model) -> int:
    return sum(1 for graph in all_graphs(model) for _ in packed_weights(graph))


def assert_still_packed(before: ir.Model, after: ir.Model, growth_bytes: int) -> None:
    text = f"{canonical(before)}\n->\n{canonical(after)}"
    assert not codes(before) - codes(after), text
    assert stored_bytes(after) <= stored_bytes(before) + growth_bytes, text
    # The same, but for a Transpose that a Gemm does instead.
    assert 0 < packed_count(after) <= packed_count(before), text
    assert not wide_weights(after), text


def wide_weights(model: ir.Model) -> list[str]:
    """Large constants of floating point, of which a packed model has none."""
    return [
        name
        for graph in all_graphs(model)
        for name, value in graph.initializers.items()
        if value.const_value is not None
        if value.const_value.dtype.is_floating_point() and value.const_value.size > 512
    ]


def check_basic(model: ir.Model) -> None:
    run = graphopt.optimize(model, recipe="basic", validate=False, benchmark=False)
    assert_still_packed(model, run.model, STAMP_BYTES)
    assert_equivalent(model, run.model)


@pytest.mark.parametrize("reader", READERS)
def test_basic_keeps_weights_of_every_reader(reader: str) -> None:
    for form in TWO:
        check_basic(packed_reader(reader, FORMS[form]))


@pytest.mark.parametrize("form", FORMS)
def test_basic_keeps_weights_of_every_form(form: str) -> None:
    for reader in VARIED:
        if not (FORMS[form].groups > 1 and reader == "LSTM"):
            check_basic(packed_reader(reader, FORMS[form]))


@pytest.mark.parametrize("levels", [2, 3, 8, 16, 64, 256])
@pytest.mark.parametrize("reader", [*INTEGERS, *WEIGHTS_ONLY])
def test_basic_keeps_weights_that_are_dequantized(reader: str, levels: int) -> None:
    check_basic(packed_integers(reader, levels))


@pytest.mark.parametrize("levels", [3, 16, 256])
def test_basic_keeps_weights_of_half_precision(levels: int) -> None:
    check_basic(packed_reader("MatMul, Mul, Add", Form(levels), ir.DataType.FLOAT16))


@pytest.mark.parametrize("name", ["fuse-batchnorm", "fuse-scale"])
def test_what_would_scale_a_packed_weight_leaves_it_with_a_reason(name: str) -> None:
    reader = "Conv, BatchNormalization" if name == "fuse-batchnorm" else "Conv, Mul, Add"
    model = packed_reader(reader, FORMS["16 levels"])
    run = graphopt.optimize(model, passes=name, validate=False, benchmark=False)
    assert {skip.reason for step in run.steps for skip in step.skips} == {"the weight is packed"}


@cache
def packed_models() -> dict[str, ir.Model]:
    """Each with its shapes inferred, as a pass is given it."""
    models = {reader: packed_reader(reader, FORMS["blocks"]) for reader in READERS}
    models |= {f"{reader}, int8": packed_integers(reader, 8) for reader in INTEGERS}
    models |= {f"{reader}, int8 alone": packed_integers(reader, 3) for reader in WEIGHTS_ONLY}
    for model in models.values():
        infer_shapes(model)
    return models


@pytest.mark.parametrize("name", LOSSLESS)
def test_every_lossless_pass_keeps_packed_weights(name: str) -> None:
    (one,) = parse_passes(name)
    for label, before in packed_models().items():
        model = before.clone()
        context = Context(lambda: before)  # noqa: B023
        if one.needs_samples or one.refuse(model, context) or not one.apply(model, context):
            continue
        assert why_invalid(model) is None, f"{label}: {why_invalid(model)}"
        assert_still_packed(before, model, A_FEW_BYTES)
        assert_equivalent(before, model, one.effect)


# ------------------------------------------------------------------ generated graphs


FOCUS: tuple[tuple[Step, ...], ...] = (
    (),
    *generated_chains.FOCUS.values(),
    *generated_fusions.FOCUS.values(),
    *generated_views.FOCUS.values(),
)

SEEDS, MANY_SEEDS = range(24), range(24, 524)


def check_generated(seed: int) -> bool:
    """Pack all constants of a graph that `basic` has made, and let it have another go."""
    written = generate(seed, FOCUS[seed % len(FOCUS)])
    run = graphopt.optimize(written, recipe="basic", validate=False, benchmark=False)
    model = run.model
    normal = np.random.default_rng(1).standard_normal((2, 4, 6, 6)).astype(np.float32)
    sample: Sample = {"x": normal}
    if opset_of(model) < 13 or not pack_all(model, Form(3, "none"), 6, 1):
        return False
    if not runs_as_written(model, sample):
        return False
    again = graphopt.optimize(model, recipe="basic", validate=False, benchmark=False).model
    text = f"seed {seed}\n{canonical(model)}\n->\n{canonical(again)}"
    assert not codes(model) - codes(again), text
    assert stored_bytes(again) <= stored_bytes(model) + STAMP_BYTES, text
    assert_equivalent(model, again, Effect.ROUNDING, [sample])
    return True


def test_basic_keeps_packed_constants_of_generated_graphs() -> None:
    assert sum(map(check_generated, SEEDS)) > len(SEEDS) / 3


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_basic_keeps_packed_constants_of_many_generated_graphs(part: int) -> None:
    seeds = MANY_SEEDS[part::4]

    assert sum(map(check_generated, seeds)) > len(seeds) / 3

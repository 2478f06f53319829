"""smooth-activations: an outlier channel moves from the activations into the weights."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.contract import Context, Effect
from graphopt.observe import Observer
from graphopt.recording import Feed
from graphopt.samples import read_samples
from graphopt.signature import signature
from graphopt.testing import apply_pass, assert_equivalent, parse
from graphopt_passes.quantize.smooth_activations import SmoothActivations

RANDOM = np.random.default_rng(0)


def model(gamma: np.ndarray) -> ir.Model:
    """Two products of one layer normalization."""
    return parse(
        "g (float[4,16] x, float[16] gamma, float[16] beta, float[16,16] q, float[16,16] k) =>"
        " (float[4,16] y, float[4,16] z) { n = LayerNormalization(x, gamma, beta)"
        " y = MatMul(n, q) z = MatMul(n, k) }",
        gamma=gamma.astype(np.float32),
        beta=RANDOM.standard_normal(16).astype(np.float32),
        q=RANDOM.standard_normal((16, 16)).astype(np.float32),
        k=RANDOM.standard_normal((16, 16)).astype(np.float32),
    )


def observer(of: ir.Model) -> Observer:
    x = [{"x": RANDOM.standard_normal((4, 16)).astype(np.float32)} for _ in range(8)]
    inputs = signature(of)
    return Observer(Feed(read_samples(x, inputs), inputs))


def outlier() -> np.ndarray:
    gamma = np.ones(16)
    gamma[5] = 100
    return gamma


def test_an_outlier_goes_and_the_outputs_stay() -> None:
    smoothed = model(outlier())
    before = smoothed.clone()

    assert apply_pass(SmoothActivations(), smoothed, observer=observer(before))
    assert_equivalent(before, smoothed, Effect.ROUNDING)
    node = next(n for n in smoothed.graph if n.op_type == "LayerNormalization")
    gamma = np.abs(node.inputs[1].const_value.numpy())  # type: ignore[union-attr]
    assert gamma.max() / np.median(gamma) < 50


def test_a_second_time_finds_nothing() -> None:
    smoothed = model(outlier())
    observed = observer(smoothed.clone())
    apply_pass(SmoothActivations(), smoothed, observer=observed)

    assert not apply_pass(SmoothActivations(), smoothed, observer=observed)


def test_it_refuses_without_samples() -> None:
    given = model(outlier())

    assert SmoothActivations().refuse(given, Context(lambda: given)) is not None

"""What only a GPU shows. Without one, all of this is skipped."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest

import graphopt
from graphopt.contract import Effect
from graphopt.ledger import Run
from graphopt.runtime import Reference, Session
from graphopt.testing import parse
from graphopt_models import DIGITS_CNN, DIGITS_CNN_SAMPLES

pytestmark = pytest.mark.skipif(
    "CUDAExecutionProvider" not in onnxruntime.get_available_providers(),
    reason="this onnxruntime has no CUDA",
)


def verdicts(run: Run) -> dict[str, str]:
    return {step.spec: step.verdict for step in run.steps}


def digits(**options: object) -> Run:
    return graphopt.optimize(
        DIGITS_CNN,
        samples=DIGITS_CNN_SAMPLES,
        provider="cuda",
        benchmark=False,
        **options,  # type: ignore[arg-type]
    )


def test_as_written_products_keep_all_bits_of_float32() -> None:
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal((64, 64)).astype(np.float32) for _ in range(2))
    model = parse("agraph (float[64,64] x, float[64,64] w) => (float[64,64] y) {y = MatMul(x, w)}")
    (found,) = Session(model, Reference.AS_WRITTEN, provider="cuda").run({"x": x, "w": w}).values()
    exact = x.astype(np.float64) @ w
    assert np.abs(found - exact).max() < 1e-5 * np.abs(exact).max()


def test_nothing_lossless_is_rolled_back() -> None:
    run = digits()
    assert any(step.effect is Effect.EXACT for step in run.steps)
    assert "rolled back" not in verdicts(run).values()
    assert run.optimized.nodes < run.original.nodes / 2


def test_float16_is_half_the_bytes_and_agrees() -> None:
    run = digits(recipe="fp16")
    assert verdicts(run)["convert-numbers"] == "kept"
    assert run.optimized.stored_bytes < 0.6 * run.original.stored_bytes
    assert max(output.rel_l2 for output in run.numerics["as deployed"]) < 5e-3


def test_bfloat16_runs_where_the_cpu_has_no_kernel() -> None:
    run = digits(
        passes="raise-opset,lift-constants,fuse-batchnorm,convert-numbers{format=bfloat16}"
    )
    assert "kept" in [v for spec, v in verdicts(run).items() if "bfloat16" in spec], verdicts(run)


@pytest.mark.parametrize("clusters", [3, 16, 48])
def test_codes_are_widened_at_load(clusters: int) -> None:
    run = digits(
        passes=f"raise-opset,lift-constants,cluster-weights{{clusters={clusters}}}", max_error=10.0
    )
    sample = {"image": np.load(DIGITS_CNN_SAMPLES)["image"][0]}
    here, there = (
        Session(run.model, Reference.AS_WRITTEN, provider=provider).run(sample)["logits"]
        for provider in ("cpu", "cuda")
    )
    np.testing.assert_allclose(there, here, rtol=1e-4, atol=1e-4)

"""Where rounded numbers would be, by the weights of the original."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from packed_models import FORMS, packed_reader  # noqa: E402

from graphopt.testing import parse  # noqa: E402
from graphopt.training.interpreter import Interpreter  # noqa: E402
from graphopt.training.original_weights import wanted_numbers  # noqa: E402
from graphopt.training.stored_weights import stored_weights  # noqa: E402
from graphopt.training.weight_forms import CodebookNumbers  # noqa: E402

FLOAT = "agraph (float[4,16] x, float[16,12] w) => (float[4,12] y) { y = MatMul(x, w) }"
TRANSPOSED = """
    agraph (float[4,16] x, float[12,16] w) => (float[4,12] y) { y = Gemm<transB = 1>(x, w) }
"""
GRID = """
    agraph (float[4,16] x, int8[16,12] q, float[12] s) => (float[4,12] y) {
        w = DequantizeLinear<axis = 1>(q, s)
        y = MatMul(x, w)
    }
"""
RNG = np.random.default_rng(0)
WEIGHT = RNG.normal(size=(16, 12)).astype(np.float32)
SCALES = (np.abs(WEIGHT).max(0) / 7).astype(np.float32)
CODES = np.clip((WEIGHT / SCALES).round(), -7, 7).astype(np.int8)


@pytest.mark.parametrize(
    ("original", "array"), [(FLOAT, WEIGHT), (TRANSPOSED, WEIGHT.T)], ids=["same", "transposed"]
)
def test_codes_of_a_grid(original: str, array: np.ndarray) -> None:
    model = parse(GRID, q=CODES, s=SCALES)

    (found,) = wanted_numbers(
        stored_weights(model.graph),
        Interpreter(model),
        parse(original, w=np.ascontiguousarray(array)),
    )

    np.testing.assert_allclose(found, WEIGHT / SCALES, rtol=1e-4, atol=1e-5)


def test_factors_that_were_folded_into_rows_are_found() -> None:
    factors = RNG.uniform(2, 3, 12).astype(np.float32)
    model = parse(GRID, q=CODES, s=SCALES)

    (found,) = wanted_numbers(
        stored_weights(model.graph), Interpreter(model), parse(FLOAT, w=WEIGHT * factors)
    )

    # The factors are fitted to rounded numbers, and so they are not exact; half a step would say
    # nothing.
    assert found is not None
    assert float((found - torch.from_numpy(WEIGHT / SCALES)).abs().max()) < 0.5


def test_numbers_of_a_codebook_with_scales_of_rows() -> None:
    model = packed_reader("Gemm, transB", FORMS["4 levels"])
    (weight,) = [w for w in stored_weights(model.graph) if isinstance(w, CodebookNumbers)]
    name = weight.operand.value.name or ""
    whole = Interpreter(model).run({}, [name])[name]
    noisy = whole + 0.1 * whole.std() * torch.randn(whole.shape)
    original = parse(
        f"agraph (float[4,{whole.shape[1]}] x, float[{whole.shape[0]},{whole.shape[1]}] w)"
        f" => (float[4,{whole.shape[0]}] y) {{ y = Gemm<transB = 1>(x, w) }}",
        w=noisy.numpy(),
    )

    (found,) = wanted_numbers([weight], Interpreter(model), original)

    assert found is not None
    made = Interpreter(model).run({weight.value.name or "": weight.fed(found)}, [name])[name]
    torch.testing.assert_close(made, noisy, rtol=1e-4, atol=1e-5)


def test_weights_of_old_models_are_inputs_too() -> None:
    original = parse(FLOAT, w=WEIGHT)
    original.graph.inputs.append(original.graph.initializers["w"])
    model = parse(GRID, q=CODES, s=SCALES)

    (found,) = wanted_numbers(stored_weights(model.graph), Interpreter(model), original)

    np.testing.assert_allclose(found, WEIGHT / SCALES, rtol=1e-4, atol=1e-5)


def test_other_weights_are_not_taken_for_it() -> None:
    model = parse(GRID, q=CODES, s=SCALES)
    other = RNG.normal(size=(16, 12)).astype(np.float32)

    assert wanted_numbers(
        stored_weights(model.graph), Interpreter(model), parse(FLOAT, w=other)
    ) == [None]


def test_what_is_not_rounded_has_nothing_to_be_rounded_from() -> None:
    model = parse(FLOAT, w=WEIGHT)

    assert wanted_numbers(stored_weights(model.graph), Interpreter(model), model) == [None]

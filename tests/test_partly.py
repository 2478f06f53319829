"""Weights of which some inputs are in few bits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from observed import observer
from on_codes import normal

import graphopt
from graphopt.contract import Change, Context, Sample
from graphopt.inspection import inspect_model
from graphopt.packing import packed_weights
from graphopt.runtime import Reference, Session
from graphopt.skeleton import infer_shapes
from graphopt.testing import parse
from graphopt_passes.quantize.cluster_weights import Clusters, estimates_of_clusters
from graphopt_passes.quantize.codebooks import damped, squared_error
from graphopt_passes.quantize.narrow_weights import Solution, targets_of
from graphopt_passes.quantize.narrowing import Narrowing, Problem, problem_of
from graphopt_passes.quantize.partly import Mixed, Partly
from graphopt_passes.quantize.quantize_binary import QuantizeBinary

HALF = Partly(Clusters(4), 0.5)

MODELS = {
    "Conv": (
        "agraph (float[1,12,9,9] x, float[10,12,3,3] w, float[10] b) => (float[N,C,H,W] y)"
        "{ y = Conv(x, w, b) }",
        (10, 12, 3, 3),
    ),
    "MatMul": (
        "agraph (float[64,24] x, float[24,40] w) => (float[N,M] y) { y = MatMul(x, w) }",
        (24, 40),
    ),
    "Gemm": (
        "agraph (float[64,24] x, float[40,24] w) => (float[N,M] y) { y = Gemm<transB = 1>(x, w) }",
        (40, 24),
    ),
}


def model_of(operator: str, channels: int | None = None) -> ir.Model:
    text, shape = MODELS[operator]
    if channels is not None:
        text = text.replace("24", str(channels))
        shape = tuple(channels if size == 24 else size for size in shape)
    weights = {"w": normal(0, *shape)}
    if operator == "Conv":
        weights["b"] = normal(1, 10)
    model = parse(text, **weights)
    infer_shapes(model)
    return model


def samples(model: ir.Model, count: int = 12, seed: int = 0) -> list[Sample]:
    """Channels of different size that have much in common."""
    rng = np.random.default_rng(seed)
    shape = [d for d in model.graph.inputs[0].shape or () if isinstance(d, int)]
    mix = np.random.default_rng(7).normal(size=(shape[1], shape[1])) + 2 * np.eye(shape[1])
    mix *= np.linspace(0.2, 2, shape[1])
    arrays = (np.moveaxis(rng.normal(size=shape), 1, -1) @ mix for _ in range(count))
    return [{"x": np.moveaxis(array, -1, 1).astype(np.float32) + 0.5} for array in arrays]


def context(model: ir.Model) -> Context:
    return Context(lambda: model, observer=observer(model, samples(model)))


def problem(operator: str) -> Problem:
    model = model_of(operator)
    (target,) = targets_of(model, 1, Change())
    return problem_of(target, context(model).observe(model, target.asked))


def written(operator: str, form: Partly = HALF) -> tuple[ir.Model, ir.Model, Change]:
    """The model, the same with the weight in that form, and what was told."""
    model, change = model_of(operator), Change()
    after = model.clone()
    targets = targets_of(after, 1, Change())
    narrowing = Narrowing(
        after, context(model), [form], Clusters(4), estimates_of_clusters, change, targets
    )
    narrowing.run(None)
    infer_shapes(after)
    return model, after, change


def mixed(solution: Solution) -> tuple[np.ndarray, np.ndarray]:
    assert isinstance(solution, Mixed) and solution.coded is not None and solution.kept is not None
    return solution.coded, solution.kept


@pytest.mark.parametrize("operator", sorted(MODELS))
def test_what_is_kept_is_the_best_for_the_codes(operator: str) -> None:
    """The oracle: least squares over the kept numbers, with a root of the Gram for rows."""
    given = problem(operator)
    solution = HALF.solve(given)
    coded, kept = mixed(solution)
    whole = damped(given.gram)
    assert whole is not None
    root = np.linalg.cholesky(whole.astype(np.float64)).T
    chosen = np.isin(np.arange(len(root)), coded)
    change = solution.numbers()[:, chosen] - given.weight[:, chosen]
    # min over D_k of |root_c D_c + root_k D_k|
    best, *_ = np.linalg.lstsq(root[:, ~chosen], -(root[:, chosen] @ change.T), rcond=None)

    np.testing.assert_allclose(kept, given.weight[:, ~chosen] + best.T, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("operator", sorted(MODELS))
def test_fewer_inputs_lose_less(operator: str) -> None:
    given = problem(operator)
    forms = [Clusters(4), *(Partly(Clusters(4), share) for share in (0.75, 0.5, 0.25))]
    errors = [
        squared_error(given.weight, form.solve(given).numbers(), given.gram) for form in forms
    ]
    assert errors == sorted(errors, reverse=True)
    # Half of the numbers, and those that count less: far below half of the error.
    assert errors[2] < 0.4 * errors[0]


def test_whole_channels_are_coded_and_those_of_least_effect() -> None:
    given = problem("Conv")
    coded, _ = mixed(HALF.solve(given))
    powers = (np.square(given.weight) * given.diagonal).reshape(10, 12, 9).sum((0, 2))

    channels = coded.reshape(-1, 9)[:, 0] // 9
    assert np.array_equal(coded, (channels[:, np.newaxis] * 9 + np.arange(9)).reshape(-1))
    assert set(channels) == set(np.argsort(powers)[:6])


@pytest.mark.parametrize("operator", sorted(MODELS))
def test_onnxruntime_makes_the_same_numbers(operator: str) -> None:
    model, after, change = written(operator)
    given = problem(operator)
    wanted = given.target.stored(HALF.solve(given).numbers())
    assert change.counts == {f"weight of {operator} stored as 4 clusters for 50% of its inputs": 1}
    probe = after.clone()
    (packed,) = packed_weights(probe.graph)
    assert packed.name == "w"
    probe.graph.outputs.append(packed)
    found = Session(probe, Reference.AS_WRITTEN).run(samples(model, 1)[0])["w"]

    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("operator", sorted(MODELS))
def test_later_passes_leave_it_and_unpacking_undoes_it(operator: str) -> None:
    model, after, _ = written(operator)
    (weight,) = inspect_model(after).packed
    assert weight.widened == "at load"
    assert 2 + 16 <= weight.bits_per_weight < 30
    options = {"samples": samples(model), "benchmark": False}
    basic = graphopt.optimize(after, recipe="basic", **options)  # type: ignore[arg-type]
    assert len(list(packed_weights(basic.model.graph))) == 1
    plain = graphopt.optimize(basic.model, passes="unpack-weights", **options)  # type: ignore[arg-type]

    tensor = plain.model.graph.initializers["w"].const_value
    assert tensor is not None and tensor.dtype == ir.DataType.FLOAT
    assert not list(packed_weights(plain.model.graph))


def test_few_channels_are_not_divided() -> None:
    model = model_of("MatMul", channels=6)
    (target,) = targets_of(model, 1, Change())
    given = problem_of(target, context(model).observe(model, target.asked))

    # So that it is never chosen.
    assert HALF.stored_bytes(target) > target.stored_bytes
    assert not isinstance(HALF.solve(given), Mixed)


def test_without_a_gram_what_is_kept_stays() -> None:
    given = replace(problem("Gemm"), gram=None, means=None)
    coded, kept = mixed(HALF.solve(given))

    chosen = np.isin(np.arange(given.weight.shape[1]), coded)
    np.testing.assert_array_equal(kept, given.weight[:, ~chosen])


def test_stored_bytes_are_near_those_of_the_file() -> None:
    model, after, _ = written("MatMul")
    (target,) = targets_of(model, 1, Change())
    tensors = [v.const_value for v in after.graph.initializers.values() if v.uses()]
    # But for the table of digits, which all weights share.
    stored = sum(t.nbytes for t in tensors if t is not None and t.shape.numpy() != (256, 4))

    assert stored <= HALF.stored_bytes(target) <= stored + 600


def test_quantize_binary_takes_it_where_all_inputs_would_be_too_many() -> None:
    model = model_of("Gemm")
    counts = []
    for error in (0.05, 0.15):
        after = model.clone()
        change = QuantizeBinary(error=error, min_elements=64).apply(after, context(model))
        counts.append([what for what in change.counts if "of its inputs" in what])
    assert any(counts), counts

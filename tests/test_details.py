from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

import graphopt
from graphopt.details import look_closely
from graphopt.recording import Feed
from graphopt.samples import read_samples
from graphopt.signature import signature
from graphopt.testing import parse

ort = pytest.importorskip("onnxruntime")

TEXT = """
    agraph (float[N, 4] x, float[4, 4] w) => (float[N, 4] y) {
        h = MatMul(x, w)
        same = Identity(h)
        y = Relu(same)
    }"""


def _model() -> ir.Model:
    return parse(TEXT, w=np.eye(4, dtype=np.float32))


def _feed(model: ir.Model, columns: int = 4) -> Feed:
    rows = [{"x": np.full((3, columns), n + 1, np.float32)} for n in range(3)]
    return Feed(read_samples(rows, signature(model)), signature(model))


def test_both_models_are_looked_at() -> None:
    model = _model()

    found = look_closely({"original": model, "optimized": model.clone()}, _feed(model))

    assert list(found.sizes) == ["original", "optimized"]
    assert [layer.name for layer in found.sizes["original"]] == ["h"]
    assert [e.error.identical for e in found.errors] == [True, True, True]
    assert [e.us_per_run > 0 for e in found.explanations.values()] == [True, True]
    assert found.notes == ()


def test_without_samples_sizes_are_all() -> None:
    model = _model()

    found = look_closely({"first": model, "second": model}, None)

    assert (found.errors, dict(found.explanations), found.notes) == ((), {}, ())
    assert found.sizes["second"]


def test_what_does_not_run_is_told_and_the_rest_is_kept() -> None:
    narrow = parse("agraph (float[N, M] x) => (float[N, M] y) { y = Relu(x) }")
    model = parse(TEXT.replace("float[N, 4] x", "float[N, M] x"), w=np.eye(4, dtype=np.float32))

    found = look_closely({"first": narrow, "second": model}, _feed(narrow, columns=3))

    first, second = found.notes
    assert first.startswith("errors by layer could not be measured: the model fails on a sample")
    assert second.startswith("the kernels of the second model could not be timed: ")
    assert list(found.explanations) == ["first"]


def test_where_nothing_can_be_compared_that_is_told() -> None:
    model = parse("agraph (float[N, 4] x) => (float[N, 4] y) { y = Relu(x) }")
    rows = [{"x": np.full((1, 4), np.nan, np.float32)}]
    feed = Feed(read_samples(rows, signature(model)), signature(model))

    found = look_closely({"first": model, "second": model}, feed, explains=False)

    assert (found.errors, found.notes) == ((), ("no value is known to be the same in both models",))


def test_a_run_has_them_only_when_asked() -> None:
    samples = [{"x": np.full((3, 4), n + 1, np.float32)} for n in range(3)]
    arguments = {"passes": "drop-identity", "samples": samples, "benchmark": False}

    plain = graphopt.optimize(_model(), **arguments)  # type: ignore[arg-type]
    detailed = graphopt.optimize(_model(), **arguments, details=True)  # type: ignore[arg-type]

    assert plain.details is None
    assert detailed.details is not None
    assert [e.error.name for e in detailed.details.errors] == ["h", "y"]
    assert detailed.details.explanations == {}, "nothing is timed without the benchmark"


def test_a_run_that_is_neither_judged_nor_timed_still_has_sizes() -> None:
    run = graphopt.optimize(
        _model(), passes="drop-identity", validate=False, benchmark=False, details=True
    )

    assert run.details is not None
    assert run.details.errors == ()
    assert [layer.name for layer in run.details.sizes["original"]] == ["h"]


def test_a_random_model_is_not_compared() -> None:
    text = "agraph (float[2, 4] x) => (float[2, 4] y) { n = RandomNormalLike(x) y = Add(x, n) }"

    run = graphopt.optimize(
        parse(text), passes="drop-identity", random_samples=2, benchmark=False, details=True
    )

    assert run.details is not None
    assert run.details.errors == ()


def test_a_comparison_of_two_models_has_errors_and_sizes() -> None:
    samples = [{"x": np.full((3, 4), n + 1, np.float32)} for n in range(3)]

    found = graphopt.validate(_model(), _model(), samples=samples, details=True)

    assert found.details is not None
    assert list(found.details.sizes) == ["first", "second"]
    assert len(found.details.errors) == 3
    assert graphopt.validate(_model(), _model(), samples=samples).details is None

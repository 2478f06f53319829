"""How often a model would decide otherwise, foreseen against counted."""

from __future__ import annotations

import numpy as np
import pytest
from on_codes import context_of, samples_of

from graphopt.skeleton import infer_shapes
from graphopt.testing import parse
from graphopt_passes.quantize.decisions import expected_changes, scores_asked, share_of_changes


def scores(samples: int, classes: int = 20) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((samples, classes)) * 3


def probabilities(logits: np.ndarray) -> np.ndarray:
    raised = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(raised / raised.sum(axis=1, keepdims=True))


@pytest.mark.parametrize("noise", [0.05, 0.2, 0.5])
def test_few_samples_foresee_what_many_show(noise: float) -> None:
    first = scores(40_000)
    second = first + noise * np.random.default_rng(2).standard_normal(first.shape)
    counted = float((first.argmax(1) != second.argmax(1)).mean())

    foreseen = [share_of_changes(first[n : n + 64], second[n : n + 64]) for n in range(0, 6400, 64)]

    # Rather too many: margins of these scores are not exponential, and the larger share is taken.
    assert 0.85 * counted < np.mean(foreseen) < 1.5 * counted
    assert np.std(foreseen) < 0.6 * counted


def test_probabilities_are_looked_at_as_logits_are() -> None:
    first = scores(64)
    second = first + 0.2 * np.random.default_rng(2).standard_normal(first.shape)

    shares = [
        share_of_changes(first, second),
        share_of_changes(probabilities(first), probabilities(second)),
    ]

    assert shares[0] == pytest.approx(shares[1], rel=1e-6)


def test_what_moves_all_classes_alike_changes_nothing() -> None:
    assert share_of_changes(scores(64), scores(64) + 5) < 1e-6
    assert share_of_changes(scores(64), scores(64)) == 0
    assert share_of_changes(np.zeros((0, 5)), np.zeros((0, 5))) == 0


def test_what_cannot_be_compared_counts_as_changed() -> None:
    broken = scores(4)
    broken[1, 2] = np.nan

    assert share_of_changes(scores(4), broken) == 1
    assert share_of_changes(scores(4), scores(3)) == 1


@pytest.mark.parametrize(
    ("shape", "has_classes"),
    [
        ("N, 10", True),
        ("1, 10, 1, 1", True),
        ("N, 10, 5, 5", False),
        ("N, 8, 10", False),
        ("N, 1", False),
        ("N, C", False),
        ("10", False),
    ],
)
def test_which_outputs_hold_scores(shape: str, has_classes: bool) -> None:
    model = parse(
        f"agraph (float[{shape}] x) => (float[{shape}] y, float[{shape}] x2) "
        "{ y = Relu(x) x2 = Neg(x) }"
    )

    assert [q.value for q in scores_asked(model)] == (["y", "x2"] if has_classes else [])


@pytest.mark.parametrize("places", ["", ", 1, 1"])
def test_models_are_compared_on_the_same_rows(places: str) -> None:
    dims = f"1, 6{places}"
    first, larger, turned = (
        parse(
            f"agraph (float[{dims}] x) => (float[{dims}] y) <float k = {{{k}}}> {{ y = Mul(x, k) }}"
        )
        for k in (1.0, 2.0, -1.0)
    )
    for model in (first, larger, turned):
        infer_shapes(model)
    samples = samples_of(1, 6, *([1, 1] if places else []), count=20)
    context = context_of(first, samples)
    asked = scores_asked(first)

    assert expected_changes(first, first, asked, context) == 0
    assert 0 < expected_changes(first, larger, asked, context) < 0.5
    assert expected_changes(first, turned, asked, context) > 0.2

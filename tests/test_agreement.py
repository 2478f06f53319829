"""What a model loses against the original, without labels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import graphopt.agreement
from graphopt.agreement import Agreement, learn_scales, sharpness_of
from graphopt.recording import Feed
from graphopt.runtime import Session
from graphopt.samples import read_samples
from graphopt.scores import Judge, Scores, drops
from graphopt.signature import signature
from graphopt.testing import parse

HALF_OF_TWO = math.log(3)
"""A logit that is so much above another one has a probability of 3/4 beside it."""


def _feed(model: ir.Model, samples: Iterable[Mapping[str, object]]) -> Feed:
    arrays = [{n: np.asarray(a, np.float32) for n, a in s.items()} for s in samples]
    inputs = signature(model)
    return Feed(read_samples(arrays, inputs), inputs)


def _judge(text: str, samples: Iterable[Mapping[str, object]]) -> Judge:
    model = parse(text)
    feed = _feed(model, samples)
    (judge,) = Agreement().judges(model, Session(model), feed, [feed])
    return judge


def _compare(
    original: str, other: str, samples: Iterable[Mapping[str, object]]
) -> tuple[list[float], Scores]:
    """The loss of each sample, and the scores."""
    scores = _judge(original, samples)(Session(parse(other)))
    assert scores.per_item is not None
    assert scores.value == pytest.approx(scores.per_item.mean())
    return list((100 - scores.per_item) / 100), scores


IDENTITY = "g (float[N, 2] x) => (float[N, 2] y) {y = Identity(x)}"
SWAPPED = """g (float[N, 2] x) => (float[N, 2] y) <int64[2] order = {1, 0}> {
    y = Gather <axis = 1> (x, order)
}"""


def test_the_original_loses_nothing() -> None:
    losses, scores = _compare(IDENTITY, IDENTITY, [{"x": [[1, 2]]}, {"x": [[3, 0]]}])

    assert losses == [0, 0]
    assert (scores.value, scores.low, scores.high, scores.unit) == (100, 0, 100, "%")
    assert scores.disagreement == 0
    assert scores.below_original


def test_a_changed_answer_costs_what_the_original_gave_more_for_it() -> None:
    samples = [{"x": [[HALF_OF_TWO, 0]]}, {"x": [[0, HALF_OF_TWO], [0, 0]]}]
    losses, scores = _compare(IDENTITY, SWAPPED, samples)

    # Of 3/4 and 1/4 half is lost; a row of two equal ones loses nothing, and is half of the second.
    assert losses == pytest.approx([0.5, 0.25], rel=1e-6)
    assert scores.disagreement == pytest.approx(2 / 3)


def test_probabilities_are_used_as_they_are() -> None:
    losses, _ = _compare(IDENTITY, SWAPPED, [{"x": [[0.9, 0.1]]}, {"x": [[0.5, 0.5]]}])

    assert losses == pytest.approx([0.8, 0], rel=1e-6)


def test_what_does_not_change_the_answer_costs_nothing() -> None:
    scaled = "g (float[N, 2] x) => (float[N, 2] y) {a = Sum(x, x) y = Sum(a, a)}"
    losses, scores = _compare(IDENTITY, scaled, [{"x": [[1, 5]]}, {"x": [[2, -1]]}])

    assert losses == [0, 0]
    assert scores.disagreement == 0


def test_it_is_what_a_calibrated_original_loses_in_accuracy() -> None:
    """Labels are drawn from the original's own probabilities: the oracle is counting hits."""
    generator = np.random.default_rng(0)
    logits = 2 * generator.standard_normal((4000, 10)).astype(np.float32)
    chances = np.exp(logits.astype(np.float64))
    chances /= chances.sum(1, keepdims=True)
    labels = (chances.cumsum(1) > generator.random((4000, 1))).argmax(1)
    noise = generator.standard_normal(10).astype(np.float32)
    rows = [{"x": part} for part in np.split(logits, 100)]
    original = "g (float[N, 10] x) => (float[N, 10] y) {y = Identity(x)}"
    noisy = original.replace("x) =>", "x, float[10] n) =>").replace("Identity(x)", "Add(x, n)")

    scores = _judge(original, rows)(Session(parse(noisy, n=noise)))

    true_drop = (logits.argmax(1) == labels).mean() - ((logits + noise).argmax(1) == labels).mean()
    assert true_drop > 0.05
    assert 1 - scores.value / 100 == pytest.approx(true_drop, rel=0.1)
    # Counting answers that changed would say more than twice as much.
    assert scores.disagreement is not None and scores.disagreement > 2 * true_drop


def test_what_matters_is_not_lost_in_a_mean_over_rows_where_nothing_is() -> None:
    rows = np.tile([0.9, 0.1], (100, 1))
    rows[:4] = [0.2, 0.8]
    missed = """g (float[N, 2] x) => (float[N, 2] y) <float[1, 2] b = {0.7, 0}> {y = Add(x, b)}"""

    losses, scores = _compare(IDENTITY, missed, [{"x": rows}, {"x": rows[2:]}])

    # All of the 4 and of the 2 rows in which something was are missed, by 0.6 each; 3 is the mean.
    assert losses == pytest.approx([4 * 0.6 / 3, 2 * 0.6 / 3], rel=1e-6)
    assert scores.disagreement == pytest.approx(6 / 198)


# ------------------------------------------------------------------ temperature


def test_scores_of_another_scale_are_sharpened_until_they_are_sure() -> None:
    rows = np.random.default_rng(0).standard_normal((200, 100)) * 0.01

    sharpness = sharpness_of([rows])

    exponents = np.exp(sharpness * rows)
    largest = (exponents / exponents.sum(1, keepdims=True)).max(1)
    assert largest.mean() == pytest.approx(0.5, abs=1e-6)
    assert sharpness_of([rows[:100], rows[100:]]) == sharpness


def test_logits_that_are_sure_are_left_alone() -> None:
    assert sharpness_of([10 * np.eye(4)]) == 1
    assert sharpness_of([]) == 1


def test_rows_that_can_never_be_sure_end_the_search() -> None:
    assert math.isfinite(sharpness_of([np.zeros((5, 10))]))


def test_losses_do_not_depend_on_the_scale_of_scores() -> None:
    generator = np.random.default_rng(1)
    wide = "g (float[N, 40] x) => (float[N, 40] y) {y = Identity(x)}"
    rolled = f"int64[40] order = {{{', '.join(map(str, [*range(1, 40), 0]))}}}"
    swapped = SWAPPED.replace("N, 2", "N, 40").replace("int64[2] order = {1, 0}", rolled)
    samples = [{"x": generator.standard_normal((3, 40))} for _ in range(8)]
    shrunk = [{"x": 1e-3 * s["x"]} for s in samples]

    losses, _ = _compare(wide, swapped, samples)
    same, _ = _compare(wide, swapped, shrunk)

    assert losses == pytest.approx(same, rel=1e-3)
    assert min(losses) > 0.1


def test_of_many_rows_a_bounded_number_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphopt.agreement, "KEPT_MAXIMUM", 400)
    generator = np.random.default_rng(0)
    model = parse("g (float[N, 10] x) => (float[N, 10] y) {y = Identity(x)}")
    steps = [{"y": 0.1 * generator.standard_normal((n % 3, 10))} for n in range(300)]

    few = learn_scales(model, steps)["y"].sharpness
    monkeypatch.undo()
    all_of_them = learn_scales(model, steps)["y"].sharpness

    assert few is not None and all_of_them is not None
    assert few != all_of_them
    assert few == pytest.approx(all_of_them, rel=0.2)


# ------------------------------------------------------------------ outputs that are not classes


def test_numbers_lose_the_share_of_their_variance() -> None:
    original = "g (float[N] x) => (float[N] y) {y = Identity(x)}"
    other = """g (float[N] x) => (float[N] y) <float half = {0.5}> {y = Add(x, half)}"""
    # The mean is 11, the variance 1: that all lie near 11 must not make the error small.
    losses, scores = _compare(original, other, [{"x": [10]}, {"x": [12]}])

    assert losses == pytest.approx([0.25, 0.25])
    assert scores.disagreement is None


def test_what_varies_by_less_than_noise_is_constant() -> None:
    original = "g (float[N] x) => (float[N] y) {y = Identity(x)}"
    other = """g (float[N] x) => (float[N] y) <float little = {0.001}> {y = Add(x, little)}"""

    losses, _ = _compare(original, other, [{"x": [1]}, {"x": [1]}])
    assert losses == pytest.approx([0.01, 0.01], rel=1e-3)
    losses, _ = _compare(original, other, [{"x": [0]}, {"x": [0]}])
    assert losses == [1, 1], "there is nothing to compare a difference with"


def test_an_image_has_no_classes() -> None:
    original = "g (float[1, 1, 2, 2] x) => (float[1, 1, 2, 2] y) {y = Identity(x)}"
    samples = [{"x": [[[[0, 1], [0.1, 0]]]]}, {"x": [[[[1, 0], [0, 0.1]]]]}]

    _, scores = _compare(original, original, samples)

    assert scores.disagreement is None


def test_scores_behind_a_sigmoid_and_what_else_is_said_of_their_rows_have_no_classes() -> None:
    original = """g (float[1, 5, 3] x) => (float[1, 5, 3] s, float[1, 5, 4] boxes, float[1, 3] c)
    <float[3, 4] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}, int64[1] axis = {1}> {
        s = Sigmoid(x)
        boxes = MatMul(x, w)
        c = ReduceMean <keepdims = 0> (x, axis)
    }"""
    model = parse(original)
    generator = np.random.default_rng(0)
    feed = _feed(model, [{"x": generator.standard_normal((1, 5, 3))} for _ in range(3)])

    scales = learn_scales(model, feed.run(Session(model)))

    assert {n: s.kind for n, s in scales.items()} == {
        "s": "numbers",
        "boxes": "numbers",
        "c": "classes",
    }


def test_integers_lose_the_share_of_those_that_differ() -> None:
    original = "g (float[4] x) => (int64[4] y) {y = Cast <to = 7> (x)}"
    other = "g (float[4] x) => (int64[4] y) {a = Relu (x) y = Cast <to = 7> (a)}"

    losses, _ = _compare(original, other, [{"x": [1, -1, 2, 3]}, {"x": [-1, -2, -3, 0]}])

    assert losses == [0.25, 0.75]


def test_codes_are_numbers() -> None:
    original = """g (float[1, 3] x) => (uint8[1, 3] y) <float s = {1}, uint8 z = {0}> {
        y = QuantizeLinear(x, s, z)
    }"""
    other = """g (float[1, 3] x) => (uint8[1, 3] y) <float s = {1}, uint8 z = {1}> {
        y = QuantizeLinear(x, s, z)
    }"""
    losses, _ = _compare(original, other, [{"x": [[0, 100, 200]]}])

    assert 0 < losses[0] < 1e-3


# ------------------------------------------------------------------ what cannot be compared


def test_nan_loses_everything_and_infinity_must_be_the_same() -> None:
    root = "g (float[1, 2] x) => (float[1, 2] y) {y = Sqrt(x)}"
    losses, _ = _compare(IDENTITY, root, [{"x": [[0, 1]]}, {"x": [[-1, 1]]}])
    assert losses == [0, 1]

    masked = "g (float[N] x) => (float[N] y) {y = Log(x)}"
    losses, _ = _compare(masked, masked, [{"x": [0, 1]}, {"x": [-1, 3]}])
    assert losses == [0, 0]
    other = "g (float[N] x) => (float[N] y) {y = Identity(x)}"
    losses, _ = _compare(masked, other, [{"x": [0, 1]}, {"x": [-1, 3]}])
    assert losses == [1, 1]


def test_minus_infinity_is_a_logit() -> None:
    masked = "g (float[N, 2] x) => (float[N, 2] y) {y = Log(x)}"

    losses, _ = _compare(masked, SWAPPED, [{"x": [[0, 2]]}])

    assert losses == [1]


def test_another_shape_loses_everything() -> None:
    longer = """g (float[N, 2] x) => (float[M, 2] y) {y = Concat <axis = 0> (x, x)}"""

    losses, scores = _compare(IDENTITY, longer, [{"x": [[1, 2]]}])

    assert losses == [1]
    assert scores.value == 0


# ------------------------------------------------------------------ outputs, parts, state


def test_a_sample_loses_the_mean_over_outputs_of_a_kind() -> None:
    original = "g (float[1, 2] x) => (float[1, 2] y, float[1, 2] z) {y = Identity(x) z = Neg(x)}"
    other = """g (float[1, 2] x) => (float[1, 2] y, float[1, 2] z)
    <float[1, 2] a = {1, 0}, float[1, 2] b = {0, 0}> {
        y = Add(x, a)
        t = Neg(x)
        z = Add(t, b)
    }"""
    samples = [{"x": [[0, 0.9]]}, {"x": [[0.9, 0]]}]
    lost = 2 / (1 + math.exp(-0.9)) - 1

    # y changes its answer in the first sample, z in the second.
    assert _compare(original, other, samples)[0] == pytest.approx([lost / 2, 0], rel=1e-5)
    worse = other.replace("{0, 0}", "{1, 0}")
    assert _compare(original, worse, samples)[0] == pytest.approx([lost / 2, lost / 2], rel=1e-5)


def test_of_two_kinds_a_sample_loses_what_the_worse_does() -> None:
    same = """g (float[1, 2] x) => (float[1, 2] y, float[1, 1, 2, 2] z)
    <int64[4] s = {1, 1, 2, 2}, float[1, 4] k = {1, 2, 3, 4}> {
        y = Identity(x)
        z = Reshape(k, s)
    }"""
    worse = same.replace("float[1, 4] k = {1, 2, 3, 4}", "float[1, 4] k = {4, 3, 2, 1}")

    assert _compare(same, worse, [{"x": [[0, 1]]}])[0] == [1]


def test_what_is_learnt_of_the_first_part_measures_all() -> None:
    text = "g (float[N] x) => (float[N] y) {y = Identity(x)}"
    model = parse(text)
    other = Session(parse("g (float[N] x) => (float[N] y) <float o = {1}> {y = Add(x, o)}"))
    feed = _feed(model, [{"x": [v]} for v in (0, 4, 100, 900)])
    parts = [Feed(feed.samples.select(which), feed.inputs) for which in ([0, 1], [2, 3])]

    first, second = Agreement().judges(model, Session(model), feed, parts)

    for scores in (first(other), second(other)):
        assert scores.per_item == pytest.approx([75, 75])


def test_many_models_are_judged_by_what_was_recorded_once() -> None:
    judge = _judge(IDENTITY, [{"x": [[1, 2]]}, {"x": [[2, 0]]}])

    for _ in range(2):
        assert judge(Session(parse(IDENTITY))).value == 100
        assert judge(Session(parse(SWAPPED))).value < 100


def test_an_item_of_a_stateful_model_is_a_sequence_and_state_is_no_output(tmp_path: Path) -> None:
    text = """g (float[1, 2] x, float[1, 2] s) => (float[1, 2] y, float[1, 2] t)
    <float[1, 2] bias = {0, 0}> {t = Add(x, s) y = Add(t, bias)}"""
    for folder, steps in {"a": [[1, 0], [1, 0]], "b": [[0, 1], [0, 1], [0, 1]]}.items():
        (tmp_path / folder).mkdir()
        for n, row in enumerate(steps):
            np.savez(tmp_path / folder / f"{n}.npz", x=np.array([row], np.float32))
    model = parse(text)
    state = (("t", "s"),)
    feed = Feed(read_samples(tmp_path, signature(model), state), signature(model), state)
    (judge,) = Agreement().judges(model, Session(model), feed, [feed])

    scores = judge(Session(parse(text.replace("{0, 0}", "{0, 1.5}"))))

    # Of a, the first step (1, 0) becomes (1, 1.5), and the second (2, 0) still answers 0.
    assert scores.per_item is not None
    chance = 1 / (1 + math.exp(-1))
    assert 1 - scores.per_item / 100 == pytest.approx([(2 * chance - 1) / 2, 0], rel=1e-5)
    only_state = "g (float[1, 2] x, float[1, 2] s) => (float[1, 2] t) {t = Add(x, s)}"
    assert set(learn_scales(parse(only_state), [{"t": np.ones((1, 2))}], {"t"})) == {"t"}


def test_drops_are_losses() -> None:
    judge = _judge(IDENTITY, [{"x": [[0.9, 0.1]]}, {"x": [[0.5, 0.5]]}])

    found = drops(judge(Session(parse(IDENTITY))), judge(Session(parse(SWAPPED))))

    assert (found.lower, found.upper) == (0, 100)
    assert found.values == pytest.approx([80, 0], rel=1e-6)


# ------------------------------------------------------------------ divergence, sureness, samples


def _known_sureness(sureness: float | None, rows: np.ndarray) -> float:
    """The mean of the largest probability that the original is taken to give."""
    model = parse("g (float[N, 4] x) => (float[N, 4] y) {y = Identity(x)}")
    (scale,) = learn_scales(model, iter([{"y": rows}]), sureness=sureness).values()
    assert scale.kind == "classes"
    return float(graphopt.agreement.probabilities(scale.rows(rows), scale.sharpness).max(-1).mean())


@pytest.mark.parametrize("sureness", [0.5, 0.8, 0.97])
def test_where_it_is_known_how_often_it_is_right_it_is_as_sure(sureness: float) -> None:
    logits = np.random.default_rng(0).standard_normal((200, 4)).astype(np.float32)
    chances = np.exp(5 * logits) / np.exp(5 * logits).sum(-1, keepdims=True)

    assert _known_sureness(sureness, logits) == pytest.approx(sureness, abs=1e-3)
    # Probabilities get a temperature, too, by their logarithms.
    assert _known_sureness(sureness, chances.astype(np.float32)) == pytest.approx(
        sureness, abs=1e-3
    )


def test_where_it_is_not_known_probabilities_stay() -> None:
    chances = np.array([[0.7, 0.1, 0.1, 0.1], [0.9, 0.1, 0.0, 0.0]], np.float32)

    assert _known_sureness(None, chances) == pytest.approx(0.8)


def test_a_change_that_leaves_answers_costs_nothing_and_diverges() -> None:
    other = "g (float[N, 2] x) => (float[N, 2] y) <float c = {0.9}> {y = Mul(x, c)}"

    losses, scores = _compare(IDENTITY, other, [{"x": [[1, 2]]}, {"x": [[3, 0]]}])

    assert losses == [0, 0]
    assert scores.divergence is not None and 0 < scores.divergence < 0.01
    _, same = _compare(IDENTITY, IDENTITY, [{"x": [[1, 2]]}])
    assert same.divergence == 0


def test_of_a_sequence_of_rows_the_probabilities_count() -> None:
    """A language model's: half of the relative entropy, though no answer is another one."""
    text = "g (float[1, 3, 4] x) => (float[1, 3, 4] y) {y = Identity(x)}"
    other = "g (float[1, 3, 4] x) => (float[1, 3, 4] y) <float c = {0.5}> {y = Mul(x, c)}"
    rows = [[[3, 1, 0, 0], [0, 2, 0, 1], [0, 1, 4, 0]]]

    losses, scores = _compare(text, other, [{"x": rows}])

    assert scores.disagreement == 0
    assert scores.divergence is not None and scores.divergence > 0.01
    assert losses == pytest.approx([scores.divergence / 2])


def test_outputs_that_are_no_numbers_any_more_are_infinitely_far() -> None:
    other = "g (float[N, 2] x) => (float[N, 2] y) <float c = {-1.0}> {h = Mul(x, c) y = Log(h)}"

    losses, scores = _compare(IDENTITY, other, [{"x": [[1, 2]]}])

    assert losses == [1]
    assert scores.divergence == math.inf

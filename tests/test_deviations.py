"""Where an error begins: told from what is inherited, from rounding, and from mistaken values."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.contract import Effect
from graphopt.deviations import Divergence, Tolerance, Values, largest_errors, locate
from graphopt.recording import Feed
from graphopt.runtime import Session
from graphopt.samples import read_samples
from graphopt.signature import signature
from graphopt.skeleton import infer_shapes
from graphopt.testing import parse

W = "<float[4] w = {1.0, 2.0, 3.0, 4.0}, float[4] v = {0.5, 0.25, 2.0, 1.0}>"

MODEL = f"""
agraph (float[2, 4] x) => (float[2, 4] y, float[2, 4] z) {W}
{{ a = Mul (x, w)  b = Sin (a)  c = Add (b, v)  y = Exp (c)  z = Neg (a) }}
"""


def model(text: str) -> ir.Model:
    parsed = parse(text)
    infer_shapes(parsed)
    return parsed


def samples(count: int = 3) -> list[dict[str, np.ndarray]]:
    generator = np.random.default_rng(0)
    return [
        {"x": (n + 1) * generator.standard_normal((2, 4)).astype(np.float32)} for n in range(count)
    ]


def located(before: str, after: str, wave_bytes: int = 1 << 20) -> Divergence:
    tolerance = Tolerance(Effect.ROUNDING)
    return locate(model(before), model(after), samples(), tolerance, "cpu", wave_bytes)


def test_what_is_inherited_is_told_from_what_begins() -> None:
    found = located(MODEL, MODEL.replace("Sin (a)", "Tanh (a)"))

    assert found.begins and found.culprit is not None
    assert found.culprit.pair.after == "b"
    rows = {one.pair.after: one for one in found.deviations}
    assert set(rows) == {"a", "b", "c", "y"}, "what leads to no wrong output is left out"
    assert rows["a"].total.identical
    assert not rows["y"].total.identical and rows["y"].own.identical


def test_own_errors_are_those_of_numpy() -> None:
    found = located(MODEL, MODEL.replace("Add (b, v)", "Sub (b, v)"))

    right, wrong = zip(
        *((np.sin(x * w) + v, np.sin(x * w) - v) for x, w, v in _operands()), strict=True
    )
    apart = np.linalg.norm(np.asarray(right) - np.asarray(wrong)) / np.linalg.norm(right)
    assert found.culprit is not None
    np.testing.assert_allclose(found.culprit.own.rel_l2, apart, rtol=1e-4)


def _operands() -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    w = np.asarray([1, 2, 3, 4], np.float32)
    v = np.asarray([0.5, 0.25, 2, 1], np.float32)
    return [(sample["x"], w, v) for sample in samples()]


def test_memory_for_one_value_at_a_time_finds_the_same() -> None:
    after = MODEL.replace("Sin (a)", "Tanh (a)")

    few, all_at_once = located(MODEL, after, wave_bytes=1), located(MODEL, after)

    assert few.deviations == all_at_once.deviations
    assert few.culprit == all_at_once.culprit


def test_the_first_of_two_faults_is_found() -> None:
    after = MODEL.replace("Sin (a)", "Tanh (a)").replace("Exp (c)", "Abs (c)")

    found = located(MODEL, after)

    assert found.culprit is not None and found.culprit.pair.after == "b"


def test_an_error_that_comes_to_nothing_is_not_blamed() -> None:
    before = f"""
    agraph (float[2, 4] x) => (float[2, 4] y) {W}
    {{ a = Mul (x, w)  tiny = Sub (a, a)  s = Add (tiny, v)  b = Sin (s)  y = Mul (b, a) }}
    """
    # 1e-9 beside 0 is all of the value, and nothing of what is made of it.
    after = before.replace("Sub (a, a)", "Mul (a, e)").replace(
        "v = {", "e = {1e-9}, float[4] v = {"
    )
    after = after.replace("float[4] e", "float[1] e").replace("Sin (s)", "Tanh (s)")

    found = located(before, after)

    assert found.culprit is not None and found.culprit.pair.after == "b"


def test_values_under_a_name_that_is_of_another_now_are_not_blamed() -> None:
    before = f"""
    agraph (float[2, 4] x) => (float[2, 4] y) {W}
    {{ a = Mul (x, w)  m = Sin (a)  n = Neg (m)  b = Abs (n)  c = Exp (b)  y = Sub (c, v) }}
    """
    after = f"""
    agraph (float[2, 4] x) => (float[2, 4] y) {W}
    {{ a = Mul (x, w)  k = Neg (a)  m = Sin (k)  b = Abs (m)  c = Cos (b)  y = Sub (c, v) }}
    """

    found = located(before, after)

    assert found.culprit is not None and found.culprit.pair.after == "c"


def test_errors_that_need_one_another_are_told_as_such() -> None:
    before = "agraph (float[2, 4] x) => (bool[2, 4] y) <float[1] h = {3.0}, float[1] one = {1.0}>"
    before += "{ a = Abs (x)  r = Mul (a, one)  s = Mul (r, one)  l = Clip (s)  y = Less (l, h) }"
    tolerance = Tolerance(Effect.ROUNDING)
    steps = [{"x": np.full((2, 4), 2.5, np.float32)}]
    after = before.replace("one = {1.0}", "one = {1.12}")

    found = locate(model(before), model(after), steps, tolerance, "cpu")

    assert not found.begins
    assert found.culprit is not None and found.culprit.pair.after in ("r", "s")


def test_the_worst_samples_come_first() -> None:
    first, second = model(MODEL), model(MODEL.replace("Exp (c)", "Abs (c)"))
    inputs = signature(first)
    feed = Feed(read_samples(samples(6), inputs), inputs)

    errors, steps = largest_errors(feed, Session(first), Session(second))

    assert [error.identical for error in errors] == [False, True]
    assert len(steps) == 2

    def error_of(sample: dict[str, np.ndarray]) -> float:
        right, wrong = (Session(m).run(sample)["y"].astype(float) for m in (first, second))
        return float(np.linalg.norm(right - wrong) / np.linalg.norm(right))

    ranked = sorted(samples(6), key=error_of, reverse=True)
    for step, sample in zip(steps, ranked, strict=False):
        np.testing.assert_array_equal(step["x"], sample["x"])


def test_arrays_come_back_from_the_disk_as_they_were() -> None:
    import ml_dtypes

    arrays = {
        "a/b": np.ones((2, 3), np.float32),
        "half": np.ones(3, ml_dtypes.bfloat16),
        "one": np.asarray(2, np.int64),
    }
    values = Values()
    values.add(arrays)
    values.add({"one": np.asarray(3)})

    assert set(values) == set(arrays)
    for name, array in arrays.items():
        assert values[name].dtype == array.dtype
        np.testing.assert_array_equal(values[name], array)

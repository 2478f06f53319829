import dataclasses
import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt.contract import Effect
from graphopt.errors import SpecError
from graphopt.validation import (
    ROUNDING_LIMITS,
    Budget,
    Comparison,
    OutputError,
    parse_budget,
    why_over,
)

EXACT, ROUNDING, LOSSY = Effect


def _compare(*pairs: tuple[object, object]) -> OutputError:
    """The result for one output over the given samples."""
    comparison = Comparison()
    for first, second in pairs:
        comparison.add({"y": np.asarray(first)}, {"y": np.asarray(second)})
    (output,) = comparison.outputs()
    return output


def _pair(
    seed: int, shape: tuple[int, ...] = (5, 7), dtype: type = np.float32
) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    first = generator.standard_normal(shape)
    return first.astype(dtype), (first + 0.1 * generator.standard_normal(shape)).astype(dtype)


# ------------------------------------------------------------------ numbers


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_the_figures_are_those_of_plain_numpy(dtype: type) -> None:
    a, b = _pair(1, dtype=dtype)
    output = _compare((a, b))

    x, y = a.astype(np.float64), b.astype(np.float64)
    ratio = np.linalg.norm(x - y) / np.linalg.norm(x)
    assert output.count == 35
    assert not output.identical
    assert output.max_abs == np.abs(x - y).max()
    assert output.mean_abs == pytest.approx(np.abs(x - y).mean(), rel=1e-12)
    assert output.max_magnitude == np.abs(x).max()
    assert output.rel_l2 == pytest.approx(ratio, rel=1e-12)
    assert output.sqnr_db == pytest.approx(-20 * np.log10(ratio), rel=1e-12)
    cosine = (x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y)
    assert output.cosine == pytest.approx(cosine, rel=1e-12)
    assert output.disagreement == (x.argmax(-1) != y.argmax(-1)).mean()
    assert output.mismatch is None


def test_float16_does_not_overflow_in_the_sums() -> None:
    output = _compare((np.full(1000, 60000, np.float16), np.full(1000, -60000, np.float16)))

    assert output.max_abs == 120000
    assert output.rel_l2 == pytest.approx(2)
    assert output.cosine == pytest.approx(-1)


def test_several_samples_count_as_one_long_one() -> None:
    pairs = [_pair(seed, (seed, 4)) for seed in range(1, 6)]
    joined = [np.concatenate([p[i] for p in pairs]) for i in range(2)]

    many, one = _compare(*pairs), _compare((joined[0], joined[1]))

    for name, value in dataclasses.asdict(one).items():
        expected = pytest.approx(value, rel=1e-12) if isinstance(value, float) else value
        assert getattr(many, name) == expected, name


def test_arrays_that_are_not_contiguous_are_compared_by_element() -> None:
    a = np.arange(24, dtype=np.float32).reshape(4, 6)

    assert _compare((a.T, np.ascontiguousarray(a.T))).identical
    assert _compare((a[:, ::2], a[:, ::2].copy())).identical
    assert _compare((a[:, ::2], a[:, 1::2])).max_abs == 1


@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 3), (3, 0), (2, 1)])
def test_shapes_without_classes_have_no_disagreement(shape: tuple[int, ...]) -> None:
    output = _compare((np.ones(shape, np.float32), np.ones(shape, np.float32)))

    assert output.disagreement is None
    assert output.identical
    assert (output.rel_l2, output.sqnr_db) == (0, math.inf)
    assert output.cosine == pytest.approx(1, rel=1e-15)


def test_whole_numbers_have_no_classes() -> None:
    assert _compare((np.eye(3, dtype=np.int64), np.eye(3, dtype=np.int64))).disagreement is None


def test_disagreement_is_over_all_rows_of_all_samples() -> None:
    a = np.eye(4, dtype=np.float32)

    assert _compare((a, a), (a, a[[1, 0, 2, 3]])).disagreement == 2 / 8
    assert _compare((a.reshape(2, 2, 4), a[::-1].reshape(2, 2, 4))).disagreement == 1


# ------------------------------------------------------------------ special values


def test_nan_equals_nan_of_any_payload_and_sign() -> None:
    quiet = np.array([0x7FC00000, 0x3F800000], np.uint32).view(np.float32)
    other = np.array([0xFFC00001, 0x3F800000], np.uint32).view(np.float32)
    output = _compare((quiet, other))

    assert output.identical
    assert output.mismatch is None
    assert output.rel_l2 == 0
    assert why_over(EXACT, [output]) is None


def test_infinity_equals_infinity_of_the_same_sign_in_the_same_place() -> None:
    values = np.array([1, np.inf, -np.inf, np.nan], np.float32)

    assert why_over(EXACT, [_compare((values, values.copy()))]) is None
    assert _compare((values, values.copy())).max_magnitude == 1


@pytest.mark.parametrize(
    "second",
    [
        [1, -np.inf, np.nan],
        [1, np.inf, 0],
        [1, 5, np.nan],
        [np.inf, np.inf, np.nan],
        [np.nan, np.inf, np.nan],
        [1, np.nan, np.inf],
    ],
)
@pytest.mark.parametrize("effect", Effect)
def test_other_special_values_are_over_every_tolerance(second: list[float], effect: Effect) -> None:
    output = _compare((np.float32([1, np.inf, np.nan]), np.float32(second)))

    reason = why_over(effect, [output], [Budget(1e9)])
    assert reason == "output 'y' has NaN or infinity in other places"


def test_special_values_are_left_out_of_the_sums() -> None:
    a, b = np.float32([3, 4, np.inf]), np.float32([3, 4.5, np.inf])

    assert _compare((a, b)).rel_l2 == pytest.approx(0.1)


def test_zeros_of_other_sign_are_not_exact_but_equal() -> None:
    output = _compare((np.float32([0.0, 1]), np.float32([-0.0, 1])))

    assert not output.identical
    assert why_over(EXACT, [output]) == ("output 'y' is not bit-identical (largest difference 0)")
    assert why_over(ROUNDING, [output]) is None
    assert why_over(LOSSY, [output], [Budget(0.0)]) is None


def test_an_output_of_norm_zero_is_judged_by_its_largest_difference() -> None:
    output = _compare((np.zeros(4, np.float32), np.float32([0, 0, 0, 0.5])))

    assert output.rel_l2 == math.inf
    assert output.sqnr_db == -math.inf
    assert output.cosine == 0
    assert why_over(LOSSY, [output], [Budget(0.5)]) is None
    assert why_over(LOSSY, [output], [Budget(0.4)]) == (
        "output 'y' has max-abs error 0.5, over the budget 0.4"
    )
    assert why_over(ROUNDING, [output]) is not None


def test_float64_whose_square_overflows_is_not_let_pass() -> None:
    output = _compare((np.array([1e200]), np.array([2e200])))

    assert why_over(ROUNDING, [output]) is not None
    assert why_over(LOSSY, [output], [Budget(0.1)]) is not None


# ------------------------------------------------------------------ other types


def test_whole_numbers_must_be_equal_even_beyond_the_precision_of_float64() -> None:
    first = np.array([2**60, 1], np.int64)
    output = _compare((first, first + np.array([1, 0])))

    assert why_over(EXACT, [output]) is not None
    assert why_over(ROUNDING, [output]) == "output 'y' has other values"
    assert why_over(ROUNDING, [_compare((first, first.copy()))]) is None


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.uint64, bool, ml_dtypes.int4])
def test_one_other_whole_number_or_boolean_is_not_rounding(dtype: type) -> None:
    output = _compare((np.array([0, 1], dtype), np.array([1, 1], dtype)))

    assert why_over(ROUNDING, [output]) == "output 'y' has other values"
    assert output.max_abs == 1


def test_unsigned_differences_do_not_wrap_around() -> None:
    assert _compare((np.uint8([0]), np.uint8([255]))).max_abs == 255


def test_strings_are_equal_or_not_whatever_holds_them() -> None:
    words = np.array(["a", "bc"], object)

    assert why_over(EXACT, [_compare((words, words.copy()))]) is None
    for effect in Effect:
        reason = why_over(effect, [_compare((words, words[::-1]))], [Budget(1e9)])
        assert reason == "output 'y' has other strings"


def test_another_shape_or_type_is_over_every_tolerance() -> None:
    a = np.ones((2, 3), np.float32)

    assert why_over(LOSSY, [_compare((a, a.T))], [Budget(9)]) == (
        "output 'y' is float32[3, 2], was float32[2, 3]"
    )
    assert why_over(LOSSY, [_compare((a, a.astype(np.float16)))], [Budget(9)]) == (
        "output 'y' is float16[2, 3], was float32[2, 3]"
    )


def test_what_is_wrong_once_stays_wrong() -> None:
    a = np.ones(3, np.float32)

    assert _compare((a, a[:2]), (a, a)).mismatch is not None


def test_an_output_too_few_or_too_many_is_over_every_tolerance() -> None:
    a = np.ones(3, np.float32)
    fewer, more = Comparison(), Comparison()
    fewer.add({"y[0]": a, "y[1]": a}, {"y[0]": a})
    more.add({"y[0]": a}, {"y[0]": a, "y[1]": a})

    assert why_over(EXACT, fewer.outputs()) == "output 'y[1]' is missing"
    assert why_over(EXACT, more.outputs()) == "output 'y[1]' was not there before"


# ------------------------------------------------------------------ edges of the tolerances


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("figure", ["rel_l2", "max_abs"])
def test_rounding_at_its_edge(dtype: str, figure: str) -> None:
    rel_l2, max_abs = ROUNDING_LIMITS[dtype]
    base = dataclasses.replace(
        _compare((np.float32([2]), np.float32([3]))), dtype=dtype, rel_l2=0.0, max_abs=0.0
    )
    limit = rel_l2 if figure == "rel_l2" else max_abs * base.max_magnitude
    under = dataclasses.replace(base, **{figure: math.nextafter(limit, 0)})
    over = dataclasses.replace(base, **{figure: math.nextafter(limit, 1)})

    assert why_over(ROUNDING, [under]) is None
    assert why_over(ROUNDING, [over]) is not None


def test_one_bit_is_over_exact() -> None:
    a = np.ones(1000, np.float32)
    b = a.copy()
    b[500] = np.nextafter(np.float32(1), np.float32(2))

    assert why_over(EXACT, [_compare((a, b))]) is not None
    assert why_over(ROUNDING, [_compare((a, b))]) is None


@pytest.mark.parametrize(
    ("metric", "limit"), [("rel-l2", 0.5), ("max-abs", 1.0), ("disagreement", 0.25)]
)
def test_a_budget_at_its_edge(metric: str, limit: float) -> None:
    a = np.float32([[2, 0], [0, 0], [0, 0], [0, 0]])
    b = np.float32([[2, 0], [0, 1], [0, 0], [0, 0]])
    output = _compare((a, b))
    assert (output.rel_l2, output.max_abs, output.disagreement) == (0.5, 1, 0.25)

    at, under = parse_budget(f"{limit}{metric}"), parse_budget(f"{limit * 0.999}{metric}")
    assert why_over(LOSSY, [output], [at]) is None
    assert why_over(LOSSY, [output], [under]) == (
        f"output 'y' has {metric} error {limit:.3g}, over the budget {under}"
    )


def test_the_worst_output_counts_and_its_own_budget_goes_before_the_general_one() -> None:
    comparison = Comparison()
    one = np.ones(4, np.float32)
    comparison.add({"a": one, "b": one}, {"a": one * 1.01, "b": one * 1.1})
    outputs = comparison.outputs()

    assert why_over(LOSSY, outputs, [Budget(0.2)]) is None
    assert "output 'b' has rel-l2 error 0.1" in str(why_over(LOSSY, outputs, [Budget(0.05)]))
    loose = [Budget(0.05), Budget(0.2, output="b")]
    assert why_over(LOSSY, outputs, loose) is None
    assert why_over(LOSSY, outputs, loose[::-1]) is None
    strict = [Budget(0.2), Budget(0.001, output="a")]
    assert "output 'a'" in str(why_over(LOSSY, outputs, strict))
    assert "max-abs" in str(why_over(LOSSY, outputs, [*loose, Budget(0.05, "max-abs", "b")]))


# ------------------------------------------------------------------ budgets


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("0.01", Budget(0.01)),
        (" .5 ", Budget(0.5)),
        ("1e-3", Budget(0.001)),
        ("0.01rel-l2", Budget(0.01)),
        ("0.02 max-abs", Budget(0.02, "max-abs")),
        ("logits:0.02max-abs", Budget(0.02, "max-abs", "logits")),
        ("0.01disagreement", Budget(0.01, "disagreement")),
        ("Identity:0:3e-2", Budget(0.03, "rel-l2", "Identity:0")),
        ("a b/c:1", Budget(1.0, "rel-l2", "a b/c")),
    ],
)
def test_parses_a_budget(text: str, budget: Budget) -> None:
    assert parse_budget(text) == budget


@given(
    st.floats(0, 1e300, allow_subnormal=False),
    st.sampled_from(["rel-l2", "max-abs", "disagreement"]),
    st.none() | st.sampled_from(["y", "a:0", "x y"]),
)
def test_the_text_of_a_budget_parses_back(limit: float, metric: str, output: str | None) -> None:
    budget = Budget(limit, metric, output)  # type: ignore[arg-type]

    assert parse_budget(str(budget)) == budget


def test_a_short_budget_is_printed_short() -> None:
    assert str(Budget(0.15)) == "0.15"
    assert str(Budget(1.0, "max-abs", "y")) == "y:1max-abs"


@pytest.mark.parametrize("text", ["", "y", "-1", "0.1maxabs", ":0.1", "nan", "inf", "1%", "y:"])
def test_refuses_what_is_no_budget(text: str) -> None:
    with pytest.raises(SpecError, match="is not an error budget; write"):
        parse_budget(text)


def test_a_budget_that_judges_nothing_is_not_passed() -> None:
    output = _compare((np.ones(3, np.float32), np.zeros(3, np.float32)))

    assert why_over(LOSSY, [output], [Budget(9, output="yy")]) == (
        "the budget yy:9 is for an output that is not there; did you mean 'y'?"
    )
    assert "has classes" in str(why_over(LOSSY, [output], [Budget(0.1, "disagreement")]))


def test_an_output_without_classes_beside_one_with_them_is_not_held_against_the_budget() -> None:
    classes = np.eye(3, dtype=np.float32)
    comparison = Comparison()
    comparison.add(
        {"score": np.float32([1]), "classes": classes},
        {"score": np.float32([2]), "classes": classes * 2},
    )

    assert why_over(LOSSY, comparison.outputs(), [Budget(0.0, "disagreement")]) is None

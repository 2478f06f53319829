"""Masks and how many entries each weight keeps: brute force on small sizes is the oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from graphopt.errors import SpecError
from graphopt_passes.prune.masks import (
    Blocks,
    OfEach,
    Pattern,
    Unstructured,
    erk,
    global_largest,
    lamp,
    pattern_of,
    uniform,
)

# Few different numbers, so that many are equal; sums of them are exact.
few = st.integers(0, 4).map(float)
matrices = arrays_of.arrays(
    np.float32, arrays_of.array_shapes(min_dims=2, max_dims=2, max_side=7), elements=few
)
several = st.lists(matrices, min_size=1, max_size=4)


def shares_of(total: int) -> st.SearchStrategy[int]:
    return st.integers(0, total) | st.sampled_from([0, total])


# ------------------------------------------------------------------ masks


@given(matrices, st.data())
def test_any_entries_are_the_largest_and_of_equal_ones_the_first(
    scores: np.ndarray, data: st.DataObject
) -> None:
    keep = data.draw(shares_of(scores.size))

    kept = Unstructured().largest(scores, keep, 1)

    flat = scores.reshape(-1)
    best = sorted(range(flat.size), key=lambda i: (-flat[i], i))[:keep]
    assert kept.shape == scores.shape and kept.dtype == bool
    assert sorted(best) == np.flatnonzero(kept).tolist()


@given(st.data())
def test_of_each_group_of_channels_at_a_tap_the_largest_stay(data: st.DataObject) -> None:
    kept, of = data.draw(st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 5), (7, 64)]))
    rows, groups, taps = (data.draw(st.integers(1, 3)) for _ in range(3))
    shape = (rows, groups * of * taps)
    scores = data.draw(arrays_of.arrays(np.float32, shape, elements=few))

    found = OfEach(kept, of).largest(scores, -1, taps)

    for row in range(rows):
        for group in range(groups):
            for tap in range(taps):
                places = [(group * of + c) * taps + tap for c in range(of)]
                best = sorted(places, key=lambda p: (-scores[row, p], p))[:kept]
                assert sorted(best) == [p for p in places if found[row, p]]
    assert np.count_nonzero(found) == scores.size * kept // of


def test_groups_run_along_channels_and_not_along_taps() -> None:
    # Channels 4, taps 2: the largest are channels 0 and 1 at tap 0, and 2 and 3 at tap 1.
    scores = np.array([[9, 1, 8, 2, 1, 8, 2, 9]], np.float32)

    assert OfEach(2, 4).largest(scores, 0, 2).astype(int).tolist() == [[1, 0, 1, 0, 0, 1, 0, 1]]


@given(matrices, st.integers(1, 4), st.integers(1, 4), st.data())
def test_blocks_are_the_largest_by_their_sums_and_as_many_as_come_nearest(
    scores: np.ndarray, height: int, width: int, data: st.DataObject
) -> None:
    keep = data.draw(shares_of(scores.size))

    kept = Blocks(height, width).largest(scores, keep, 1)

    blocks = [
        (slice(top, top + height), slice(left, left + width))
        for top in range(0, scores.shape[0], height)
        for left in range(0, scores.shape[1], width)
    ]
    order = sorted(range(len(blocks)), key=lambda b: (-scores[blocks[b]].sum(), b))
    masks = [np.zeros(scores.shape, bool)]
    for block in order:
        masks.append(masks[-1].copy())
        masks[-1][blocks[block]] = True
    nearest = min(masks, key=lambda mask: abs(np.count_nonzero(mask) - keep))
    np.testing.assert_array_equal(kept, nearest)


def test_blocks_at_the_border_are_smaller() -> None:
    scores = np.array([[1, 1, 1], [1, 1, 1], [1, 1, 9]], np.float32)

    kept = Blocks(2, 2).largest(scores, 5, 1)

    assert kept.astype(int).tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]


@pytest.mark.parametrize("pattern", [Unstructured(), OfEach(2, 4), Blocks(4, 1)])
def test_zeros_are_kept_like_other_equal_scores(pattern: Pattern) -> None:
    zeros = np.zeros((4, 8), np.float32)

    kept = pattern.largest(zeros, 16, 2)

    assert np.count_nonzero(kept) == 16
    np.testing.assert_array_equal(kept, pattern.largest(zeros + 1, 16, 2))


@pytest.mark.parametrize("pattern", [Unstructured(), OfEach(1, 2), Blocks(1, 2)])
def test_a_score_that_is_no_number_is_refused(pattern: Pattern) -> None:
    scores = np.array([[1, np.nan, 2, 3]], np.float32)

    with pytest.raises(ValueError, match="a score is no number"):
        pattern.largest(scores, 2, 1)


@pytest.mark.parametrize("pattern", [Unstructured(), OfEach(2, 4), Blocks(4, 1)])
def test_nothing_is_kept_of_nothing(pattern: Pattern) -> None:
    assert pattern.largest(np.zeros((0, 4), np.float32), 0, 1).shape == (0, 4)


def test_why_a_weight_cannot_have_a_pattern() -> None:
    assert Unstructured().why_not(1, 1, 1) is None
    assert OfEach(2, 4).why_not(1, 8, 9) is None
    # Eight inputs, but of two channels.
    assert OfEach(2, 4).why_not(1, 2, 4) == "its 2 input channels are no multiple of 4"
    assert Blocks(4, 1).why_not(4, 1, 1) is None
    assert Blocks(4, 1).why_not(5, 3, 1) is None
    assert Blocks(4, 1).why_not(3, 2, 9) == "it has 3x18 entries, less than a block of 4x1"


# ------------------------------------------------------------------ patterns as text


@pytest.mark.parametrize(
    ("text", "pattern", "density"),
    [
        ("unstructured", Unstructured(), None),
        ("2:4", OfEach(2, 4), 0.5),
        ("1:8", OfEach(1, 8), 0.125),
        ("4x1", Blocks(4, 1), None),
        ("1x16", Blocks(1, 16), None),
    ],
)
def test_a_pattern_is_read_and_written(text: str, pattern: Pattern, density: float | None) -> None:
    assert pattern_of(text) == pattern
    assert str(pattern) == pattern.label == text
    assert pattern.fixed_density == density


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "'' is no pattern; give 'unstructured', '2:4'"),
        ("2:4 ", "'2:4 ' is no pattern"),
        ("-2:4", "'-2:4' is no pattern"),
        ("2:4:8", "'2:4:8' is no pattern"),
        ("99999:100000", "is no pattern"),
        ("٢:٤", "is no pattern"),
        ("4:4", "pattern '4:4' keeps 4 of each 4 input channels; keep at least 1 and fewer"),
        ("0:4", "pattern '0:4' keeps 0 of each 4"),
        ("2:65", "pattern '2:65' has groups of 65 input channels; give at most 64, or 'unstr"),
        ("0:0", "pattern '0:0' keeps 0 of each 0"),
        ("4x0", "pattern '4x0' has blocks of 0 entries; give at least 2"),
        ("1x1", "pattern '1x1' has blocks of 1 entries; give at least 2.*or 'unstructured'"),
    ],
)
def test_what_is_no_pattern_is_refused_and_the_message_says_why(text: str, what: str) -> None:
    with pytest.raises(SpecError, match=what):
        pattern_of(text)


# ------------------------------------------------------------------ how many stay of each weight


def sizes_of(arrays: list[np.ndarray]) -> list[int]:
    return [array.size for array in arrays]


def assert_counts(counts: np.ndarray, sizes: list[int], keep: int) -> None:
    assert counts.dtype == np.int64 and counts.shape == (len(sizes),)
    assert counts.sum() == keep
    assert ((counts >= 0) & (counts <= sizes)).all()


@given(st.lists(st.integers(0, 10**9), max_size=8), st.data())
def test_a_uniform_share_is_less_than_one_entry_off(sizes: list[int], data: st.DataObject) -> None:
    keep = data.draw(shares_of(sum(sizes)))

    counts = uniform(sizes, keep)

    assert_counts(counts, sizes, keep)
    for size, count in zip(sizes, counts.tolist(), strict=True):
        assert abs(count * sum(sizes) - size * keep) < max(sum(sizes), 1)


@given(several, st.data())
def test_a_global_threshold_keeps_the_largest_of_all(
    scores: list[np.ndarray], data: st.DataObject
) -> None:
    keep = data.draw(shares_of(sum(sizes_of(scores))))

    counts = global_largest(scores, keep)

    assert_counts(counts, sizes_of(scores), keep)
    assert_between_threshold(scores, counts, keep)


def assert_between_threshold(scores: list[np.ndarray], counts: np.ndarray, keep: int) -> None:
    """All above the number at the rank stay, none below; those at it in proportion."""
    if not keep:
        return
    least = sorted(np.concatenate([s.reshape(-1) for s in scores]), reverse=True)[keep - 1]
    above = np.array([np.count_nonzero(s > least) for s in scores])
    ties = [int(np.count_nonzero(s == least)) for s in scores]
    np.testing.assert_array_equal(counts, above + uniform(ties, keep - int(above.sum())))


@given(st.integers(0, 2**31), st.sampled_from([np.float32, np.float64]), st.data())
def test_a_global_threshold_on_numbers_that_all_differ(
    seed: int, dtype: type[np.floating], data: st.DataObject
) -> None:
    generator = np.random.default_rng(seed)
    numbers = generator.permutation(200).astype(dtype) * np.asarray(0.1, dtype)
    scores = list(np.split(numbers, [3, 3, 120, 121]))
    keep = data.draw(st.integers(0, 200))

    counts = global_largest(scores, keep)

    kept = set(np.sort(numbers)[200 - keep :].tolist())
    assert counts.tolist() == [sum(x in kept for x in s.tolist()) for s in scores]


def test_equal_scores_in_all_weights_are_shared_in_proportion() -> None:
    counts = global_largest([np.ones((2, 4)), np.ones((4, 4)), np.zeros(8)], 12)

    assert counts.tolist() == [4, 8, 0]


def test_numbers_of_two_widths_are_compared_without_rounding() -> None:
    narrow, wide = np.array([0.1], np.float32), np.array([0.1])

    # As a float32, 0.1 is a little more.
    assert global_largest([wide, narrow], 1).tolist() == [0, 1]


def lamp_score(weight: np.ndarray, place: int) -> np.float32:
    """As in the article: of equal entries the later counts as the larger."""
    squares = weight.reshape(-1).astype(np.float64) ** 2
    larger = [s for i, s in enumerate(squares) if (s, i) >= (squares[place], place)]
    return np.float32(squares[place] / sum(larger)) if squares[place] else np.float32(0)


@given(several, st.data())
def test_lamp_is_a_threshold_on_the_scores_of_the_article(
    weights: list[np.ndarray], data: st.DataObject
) -> None:
    signed = [w * np.where(np.arange(w.size).reshape(w.shape) % 3, 1, -1) for w in weights]
    # With a power of two no division rounds otherwise than in the formula.
    for weight in signed:
        weight.reshape(-1)[0] = 4
    keep = data.draw(shares_of(sum(sizes_of(signed))))

    counts = lamp(signed, keep)

    assert_counts(counts, sizes_of(signed), keep)
    scores = [np.array([lamp_score(w, p) for p in range(w.size)]) for w in signed]
    assert_between_threshold(scores, counts, keep)


def test_lamp_leaves_something_of_each_weight_however_they_are_scaled() -> None:
    generator = np.random.default_rng(0)
    weights = [generator.standard_normal((8, 8)).astype(np.float32) for _ in range(3)]
    scaled = [weights[0] * np.float32(2.0**-60), weights[1], weights[2] * np.float32(2.0**60)]

    assert lamp(scaled, 3).tolist() == [1, 1, 1]
    assert global_largest([np.abs(w) for w in scaled], 3).tolist() == [0, 0, 3]
    for keep in (20, 96, 180):
        np.testing.assert_array_equal(lamp(scaled, keep), lamp(weights, keep))


def test_lamp_of_weights_that_are_zero() -> None:
    weights = [np.zeros((2, 4)), np.ones((2, 2)), np.zeros((4, 4))]

    assert lamp(weights, 4).tolist() == [0, 4, 0]
    assert lamp(weights, 16).tolist() == [4, 4, 8]


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_lamp_refuses_what_is_not_finite(number: float) -> None:
    with pytest.raises(ValueError, match="an entry is infinite or no number"):
        lamp([np.ones(3), np.array([1, number])], 2)


def test_a_global_threshold_refuses_what_is_no_number() -> None:
    with pytest.raises(ValueError, match="a score is no number"):
        global_largest([np.ones(3), np.array([1, np.nan])], 2)


shapes = st.lists(st.integers(1, 9), min_size=2, max_size=4)


@given(st.lists(shapes, min_size=1, max_size=5), st.data())
def test_erk_densities_are_those_of_the_article(
    shapes: list[list[int]], data: st.DataObject
) -> None:
    sizes = [int(np.prod(shape)) for shape in shapes]
    keep = data.draw(shares_of(sum(sizes)))

    counts = erk(shapes, keep)

    assert_counts(counts, sizes, keep)
    # Counts grow with eps: bisect it.
    low, high = 0.0, 1e6
    for _ in range(100):
        eps = (low + high) / 2
        densities = [min(1.0, eps * sum(shape) / np.prod(shape)) for shape in shapes]
        wanted = np.multiply(densities, sizes)
        low, high = (eps, high) if wanted.sum() < keep else (low, eps)
    assert (np.abs(counts - wanted) < 1 + 1e-6).all()


def test_erk_is_dense_where_a_weight_is_small() -> None:
    shapes = [(64, 64, 3, 3), (64, 3, 3, 3), (10, 64)]

    counts = erk(shapes, 5000)

    # 134, 73 and 74 of 281 would be 2384, 1299 and 1317: the last has 640 only.
    assert counts.tolist() == [2822, 1538, 640]


def test_a_total_that_cannot_be_is_refused() -> None:
    for keep in (-1, 7):
        with pytest.raises(ValueError, match=f"{keep} of 6 entries cannot stay"):
            uniform([2, 4], keep)
        with pytest.raises(ValueError, match=f"{keep} of 6 entries cannot stay"):
            erk([(1, 2), (2, 2)], keep)
        with pytest.raises(ValueError, match=f"{keep} of 6 entries cannot stay"):
            global_largest([np.ones(2), np.ones(4)], keep)
        with pytest.raises(ValueError, match=f"{keep} of 6 entries cannot stay"):
            lamp([np.ones(2), np.ones(4)], keep)


def test_numbers_of_numpy_do_not_overflow() -> None:
    many: Any = np.int64(2**40)

    assert uniform([many, many], 2**40).tolist() == [2**39, 2**39]
    assert erk([(many, 1), (many, 1)], 2**40).tolist() == [2**39, 2**39]


def test_no_weights_at_all() -> None:
    found = [uniform([], 0), erk([], 0), global_largest([], 0), lamp([], 0)]

    assert [counts.tolist() for counts in found] == [[], [], [], []]

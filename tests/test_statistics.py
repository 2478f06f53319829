"""Statistics of arrays against numpy on all of them at once, brute force and onnxruntime."""

from __future__ import annotations

import itertools
import math
import tracemalloc
from collections import Counter
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of
from scipy.special import chdtrc

from graphopt import statistics
from graphopt.runtime import Session
from graphopt.statistics import (
    HISTOGRAM_BINS,
    Gram,
    Histogram,
    Patches,
    Reservoir,
    Rows,
    Spread,
    rows_of,
    without_masks,
)

LOWEST = float(np.finfo(np.float32).min)

floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
vectors = arrays_of.arrays(np.float32, st.integers(1, 40), elements=floats)


def add_all(statistics: Any, arrays: Any) -> Any:
    for array in arrays:
        statistics.add(array)
    return statistics


def spread_of(*arrays: np.ndarray, axis: int | None = None) -> Spread:
    spread: Spread = add_all(Spread(axis), arrays)
    return spread


# ------------------------------------------------------------------ masks


@pytest.mark.parametrize("mask", [-math.inf, LOWEST, -1e9, -1e4])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 20.0])
def test_masks_are_kept_out_and_counted(mask: float, scale: float) -> None:
    generator = np.random.default_rng(0)
    scores = (scale * generator.standard_normal((2, 3, 8, 8))).astype(np.float32)
    hidden = generator.random(scores.shape) < 0.4
    added = scores + np.where(hidden, np.float32(mask), np.float32(0))

    values, left_out = without_masks(added)
    spread = spread_of(added)

    np.testing.assert_array_equal(np.sort(values), np.sort(scores[~hidden]))
    assert left_out == hidden.sum() == spread.left_out
    assert (spread.low, spread.high) == (scores[~hidden].min(), scores[~hidden].max())
    assert spread.elements == scores.size


@pytest.mark.parametrize("mask", [-1e4, -65504])
def test_masks_of_half_precision_too(mask: float) -> None:
    values, left_out = without_masks(np.float16([1.5, mask, -3, mask]))

    assert values.tolist() == [1.5, -3]
    assert left_out == 2


@pytest.mark.parametrize("mask", [LOWEST / 4, -1e9, -1e4])
def test_masks_that_were_added_twice_and_masks_of_two_sizes(mask: float) -> None:
    """Causal and padding, or a mask upon a mask: none of them may look like the range."""
    scores = np.float32([5, 3, -2, 0.5])
    twice = np.concatenate([scores, scores + np.float32(mask), scores + np.float32(2 * mask)])
    mixed = np.float32([1, -1e4, -1e9, LOWEST, -math.inf, math.nan, -2])

    assert without_masks(twice)[0].tolist() == scores.tolist()
    assert without_masks(mixed)[0].tolist() == [1, -2]


@pytest.mark.parametrize(
    "values",
    [
        [-1e4, 5000, 3],  # no gap
        [-20000, -9000, -500, 4],  # values all the way down
        [-5000, 1],  # not so far down
        [1e9, 1],  # masks lie below
        [-1e4, -1e4],  # nothing else to tell it by
    ],
)
def test_values_that_are_no_masks_stay(values: list[float]) -> None:
    kept, left_out = without_masks(np.float32(values))

    assert kept.tolist() == values
    assert left_out == 0


def test_what_is_no_number_is_counted_and_kept_out_of_everything() -> None:
    array = np.float32([[math.nan, 1, 2], [3, math.inf, -math.inf]])

    spread = spread_of(array, np.full(4, math.nan, np.float32), np.float32([-7]), axis=0)

    assert (spread.count, spread.left_out, spread.elements, spread.arrays) == (4, 7, 11, 3)
    assert (spread.low, spread.high) == (-7, 3)
    assert spread.histogram.counts.sum() == 4
    assert spread.channel_count == 1 and spread.channel_sum.tolist() == [-7]
    assert np.isfinite(add_all(Reservoir(), [array]).values).all()


# ------------------------------------------------------------------ histogram


def assert_counts_are_those_of(histogram: Histogram, values: np.ndarray) -> None:
    """As numpy counts into these edges; the edges are multiples of a power of two."""
    edges = histogram.edges()
    mantissa, _ = math.frexp(histogram.width)
    assert mantissa == 0.5
    np.testing.assert_array_equal(edges / histogram.width, np.rint(edges / histogram.width))
    counts, _ = np.histogram(values.astype(np.float64), edges)
    last = values == edges[-1]
    assert not last.any()
    np.testing.assert_array_equal(histogram.counts, counts)
    assert histogram.counts.sum() == values.size


@settings(deadline=None, max_examples=50)
@given(st.lists(vectors, min_size=1, max_size=8))
def test_the_histogram_is_that_of_numpy_however_the_data_grow(arrays: list[np.ndarray]) -> None:
    histogram, widths = Histogram(), []
    for number, array in enumerate(arrays):
        histogram.add(array.astype(np.float64), float(array.min()), float(array.max()))
        widths.append(histogram.width)
        assert_counts_are_those_of(histogram, np.concatenate(arrays[: number + 1]))

    assert all(math.log2(b / a).is_integer() and b >= a for a, b in itertools.pairwise(widths))


@settings(deadline=None, max_examples=50)
@given(st.lists(vectors, min_size=2, max_size=5), st.randoms(use_true_random=False))
def test_order_changes_nothing_but_the_width(arrays: list[np.ndarray], random: Any) -> None:
    mixed = random.sample(arrays, len(arrays))
    first, second = spread_of(*arrays), spread_of(*mixed)

    width = max(first.histogram.width, second.histogram.width)
    assert coarse(first.histogram, width) == coarse(second.histogram, width)
    assert (first.low, first.high, first.count) == (second.low, second.high, second.count)
    assert first.left_out == second.left_out


def coarse(histogram: Histogram, width: float) -> Counter[int]:
    """Counts by bin of a width that is a multiple of the histogram's own."""
    times = int(width / histogram.width)
    counts: Counter[int] = Counter()
    for place in np.flatnonzero(histogram.counts).tolist():
        counts[(histogram.first + place) // times] += int(histogram.counts[place])
    return counts


def test_bins_stay_narrow_as_the_data_grow() -> None:
    generator = np.random.default_rng(0)
    histogram = Histogram()
    for scale in (1.0, 3.0, 100.0, 7e4, 7e4):
        values = scale * generator.standard_normal(1000)
        histogram.add(values, values.min(), values.max())

    used = np.flatnonzero(histogram.counts)
    assert used[-1] - used[0] > HISTOGRAM_BINS // 4


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 1e-30, 1e30, LOWEST, -LOWEST, 1e-45, 65504.0])
def test_a_constant_lies_in_one_bin_and_others_can_follow(value: float) -> None:
    constant = np.full((3, 4), value, np.float32)

    histogram = spread_of(constant).histogram
    later = spread_of(constant, np.float32([-1, 0, 1]))

    (place,) = np.flatnonzero(histogram.counts)
    edges = histogram.edges()
    assert edges[place] <= np.float32(value) < edges[place + 1]
    assert histogram.counts[place] == 12
    assert later.histogram.counts.sum() == 15
    assert later.low == min(-1, np.float32(value)) and later.high == max(1, np.float32(value))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_all_that_a_type_can_hold_is_counted(dtype: type) -> None:
    """Huge values and subnormals; the span of the former is beyond a float64."""
    kind = np.finfo(dtype)
    tiniest = kind.smallest_subnormal
    array = np.array([kind.max, tiniest, 0, -tiniest, -kind.max], dtype)

    huge = spread_of(array, array[::-1])
    tiny = spread_of(array[1:4])

    assert (huge.low, huge.high) == (-float(kind.max), float(kind.max))
    assert np.isfinite(huge.histogram.width)
    assert huge.histogram.counts.sum() == huge.count == 10
    assert (tiny.low, tiny.high) == (-tiniest, tiniest)
    assert tiny.histogram.counts.sum() == 3


@pytest.mark.parametrize("channels", [2, 3, 64, 768])
def test_of_a_large_array_every_channel_is_binned_alike(
    channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that divides the number of channels would meet the same channels again and again."""
    monkeypatch.setattr(statistics, "BINNED_MAXIMUM", 10_000)
    array = np.broadcast_to(np.arange(channels, dtype=np.float32), (20_160, channels))
    array = array[: 1_000_000 // channels].copy()
    array[11, 1] = 1e3

    spread = spread_of(array)

    assert spread.high == 1e3 and spread.count == array.size
    binned = spread.histogram.counts.sum()
    assert 3_000 < binned <= 10_000
    places = np.searchsorted(spread.histogram.edges(), np.arange(channels), "right") - 1
    shares = np.bincount(places, minlength=HISTOGRAM_BINS) / channels
    found = spread.histogram.counts / binned
    np.testing.assert_allclose(found[places], shares[places], rtol=0.1, atol=1e-4)


# ------------------------------------------------------------------ by channel


@settings(deadline=None, max_examples=50)
@given(
    shape=arrays_of.array_shapes(min_dims=1, max_dims=4, max_side=5),
    count=st.integers(1, 4),
    data=st.data(),
)
def test_channels_are_those_of_numpy(
    shape: tuple[int, ...], count: int, data: st.DataObject
) -> None:
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    elements = st.floats(-1e4, 1e4, width=32)
    arrays = [
        data.draw(arrays_of.arrays(np.float32, shape, elements=elements)) for _ in range(count)
    ]
    arrays = [a for a in arrays if not without_masks(a)[1]]

    spread = spread_of(*arrays, axis=axis)

    rows = [np.moveaxis(a, axis, 0).reshape(shape[axis], -1).astype(np.float64) for a in arrays]
    if not rows:
        return
    together = np.concatenate(rows, axis=1)
    np.testing.assert_array_equal(spread.channel_low, together.min(1))
    np.testing.assert_array_equal(spread.channel_high, together.max(1))
    np.testing.assert_allclose(spread.channel_sum, together.sum(1), rtol=1e-12, atol=1e-9)
    np.testing.assert_allclose(spread.channel_square, (together**2).sum(1), rtol=1e-12)
    np.testing.assert_allclose(spread.channel_mean, together.mean(1), rtol=1e-12, atol=1e-9)
    assert spread.channel_count == together.shape[1]
    assert spread.count == together.size


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(np.float16, 0), (np.float32, 0), (np.float64, 1e-12)]
)
def test_moments_are_taken_in_double_precision(dtype: type, tolerance: float) -> None:
    array = np.full((2, 4096), 300.25, dtype)

    spread = spread_of(array, axis=0)

    np.testing.assert_allclose(spread.channel_sum, 300.25 * 4096, rtol=tolerance)
    np.testing.assert_allclose(spread.channel_square, 300.25**2 * 4096, rtol=tolerance)


def test_an_array_with_other_channels_is_kept_out_of_the_channels_alone() -> None:
    spread = spread_of(np.ones((3, 2), np.float32), np.full((4, 2), 5, np.float32), axis=0)

    assert spread.channel_count == 2
    assert spread.channel_mean.tolist() == [1, 1, 1]
    assert (spread.count, spread.high) == (14, 5)


@pytest.mark.parametrize("axis", [2, -3, 0])
def test_an_axis_that_an_array_does_not_have_gives_no_channels(axis: int) -> None:
    array = np.ones((2, 3), np.float32) if axis else np.array(4, np.float32)

    spread = spread_of(array, axis=axis)

    assert spread.channel_count == 0 and spread.channel_low.size == 0
    assert spread.count == array.size


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (3, 0), (1, 1, 1)])
def test_empty_arrays_and_scalars(shape: tuple[int, ...]) -> None:
    array = np.full(shape, 2.5, np.float32)

    for about in (Spread(), Spread(0), Gram(), Rows(), Reservoir()):
        add_all(about, [array, array])

    spread = spread_of(array, array)
    assert (spread.arrays, spread.count) == (2, 2 * array.size)
    assert spread.high == (2.5 if array.size else 0)
    assert add_all(Gram(), [array, array]).rows == (2 * array.size)
    assert add_all(Reservoir(), [array]).values.tolist() == [2.5] * array.size


# ------------------------------------------------------------------ patches


def brute_patches(array: np.ndarray, patches: Patches, pads: list[tuple[int, int]]) -> np.ndarray:
    """The rows, element by element: [group, batch * places, channels of the group * kernel]."""
    batch, channels, *sizes = array.shape
    per_group = channels // patches.group
    reach = [(k - 1) * d + 1 for k, d in zip(patches.kernel, patches.dilations, strict=True)]
    places = [
        (size + sum(pad) - r) // step + 1
        for size, pad, r, step in zip(sizes, pads, reach, patches.strides, strict=True)
    ]
    groups = []
    for group in range(patches.group):
        rows = []
        for item, *place in np.ndindex(batch, *places):
            row = []
            for channel, *tap in np.ndindex(per_group, *patches.kernel):
                index = [
                    p * s + t * d - pad[0]
                    for p, s, t, d, pad in zip(
                        place, patches.strides, tap, patches.dilations, pads, strict=True
                    )
                ]
                inside = all(0 <= i < size for i, size in zip(index, sizes, strict=True))
                at = (item, group * per_group + channel, *index)
                row.append(array[at] if inside else 0)
            rows.append(row)
        groups.append(rows)
    return np.array(groups, np.float32)


def all_rows(array: np.ndarray, patches: Patches) -> np.ndarray:
    windows = patches.cut(array)
    rank = len(patches.kernel)
    group, channels = windows.shape[0], windows.shape[2]
    apart = np.moveaxis(windows, 2, 2 + rank)
    return apart.reshape(group, -1, channels * math.prod(patches.kernel))


CONVOLUTIONS = [
    # shape, group, kernel, strides, dilations, pads
    ((2, 3, 9), 1, (3,), (1,), (1,), (0, 0)),
    ((1, 4, 11), 2, (3,), (2,), (2,), (3, 1)),
    ((2, 4, 7), 4, (4,), (3,), (1,), (0, 2)),
    ((2, 3, 6, 5), 1, (3, 3), (1, 1), (1, 1), (1, 1, 1, 1)),
    ((1, 3, 6, 5), 1, (1, 1), (1, 1), (1, 1), (0, 0, 0, 0)),
    ((1, 2, 8, 9), 1, (3, 2), (2, 1), (1, 3), (0, 2, 1, 0)),
    ((2, 6, 7, 7), 3, (2, 3), (2, 3), (2, 1), (1, 0, 0, 2)),
    ((1, 5, 6, 6), 5, (3, 3), (2, 2), (1, 1), (0, 1, 1, 0)),
    ((1, 2, 5, 4), 1, (5, 4), (1, 1), (1, 1), (0, 0, 0, 0)),
    ((1, 2, 4, 5, 3), 1, (2, 3, 2), (1, 2, 1), (1, 1, 2), (1, 0, 1, 0, 1, 0)),
    ((2, 4, 3, 4, 5), 2, (2, 2, 2), (2, 1, 2), (1, 2, 1), (0, 1, 0, 1, 0, 1)),
]


@pytest.mark.parametrize(("shape", "group", "kernel", "strides", "dilations", "pads"), CONVOLUTIONS)
def test_windows_are_those_of_loops(
    shape: tuple[int, ...],
    group: int,
    kernel: tuple[int, ...],
    strides: tuple[int, ...],
    dilations: tuple[int, ...],
    pads: tuple[int, ...],
) -> None:
    array = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    patches = Patches(kernel, strides, dilations, pads, group)
    rank = len(kernel)
    pairs = [(pads[axis], pads[axis + rank]) for axis in range(rank)]

    expected = brute_patches(array, patches, pairs)

    np.testing.assert_array_equal(all_rows(array, patches), expected)
    few = rows_of(array, patches, 0)
    if expected.shape[1] <= 64:
        np.testing.assert_array_equal(few, expected)
    assert few.shape[::2] == expected.shape[::2]


def convolve(
    array: np.ndarray, weight: np.ndarray, patches: Patches, name: str = "pads"
) -> np.ndarray:
    """What onnxruntime makes of an array."""
    padding = {"pads": patches.pads} if patches.auto_pad in ("NOTSET", "") else {}
    node = onnx.helper.make_node(
        "Conv",
        ["x", "w"],
        ["y"],
        strides=patches.strides,
        dilations=patches.dilations,
        group=patches.group,
        auto_pad=patches.auto_pad or "NOTSET",
        **padding,
    )
    infos = [
        onnx.helper.make_tensor_value_info(n, 1, a.shape) for n, a in (("x", array), ("w", weight))
    ]
    graph = onnx.helper.make_graph(
        [node], "g", infos, [onnx.helper.make_tensor_value_info("y", 1, None)]
    )
    imports = [onnx.helper.make_opsetid("", 21)]
    model = onnx.helper.make_model(graph, opset_imports=imports, ir_version=10)
    return Session(ir.from_proto(model)).run({"x": array, "w": weight})["y"]


@pytest.mark.parametrize("auto_pad", ["NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"])
@pytest.mark.parametrize(("shape", "group", "kernel", "strides", "dilations", "pads"), CONVOLUTIONS)
def test_rows_times_the_weight_are_what_onnxruntime_computes(
    shape: tuple[int, ...],
    group: int,
    kernel: tuple[int, ...],
    strides: tuple[int, ...],
    dilations: tuple[int, ...],
    pads: tuple[int, ...],
    auto_pad: str,
) -> None:
    if auto_pad.startswith("SAME") and max(dilations) > 1:
        dilations = tuple(1 for _ in dilations)
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    if auto_pad == "VALID" and any(r > s for r, s in zip(reach, shape[2:], strict=True)):
        pytest.skip("the window is larger than the array")
    generator = np.random.default_rng(0)
    array = generator.integers(-9, 9, shape).astype(np.float32)
    patches = Patches(kernel, strides, dilations, pads, group, auto_pad)
    # Small integers: sums are exact in any order.
    weight = generator.integers(-9, 9, (2 * group, shape[1] // group, *kernel)).astype(np.float32)

    computed = convolve(array, weight, patches)

    rows = all_rows(array, patches)
    matrix = weight.reshape(group, 2, -1)
    products = np.einsum("grk,gnk->gnr", rows, matrix)
    apart = products.reshape(group * 2, shape[0], *computed.shape[2:])
    np.testing.assert_array_equal(np.moveaxis(apart, 1, 0), computed)


@pytest.mark.parametrize("shape", [(1, 3, 64, 64), (4, 3, 32, 32)])
def test_rows_come_from_all_columns_of_an_image_alike(shape: tuple[int, ...]) -> None:
    """An even step over 64 x 64 places would see 4 columns, the padded border always among them."""
    batch, _, height, width = shape
    places = np.arange(batch * height * width, dtype=np.float32).reshape(batch, 1, height, width)
    patches = Patches((1, 1), (1, 1), (1, 1), (0, 0, 0, 0))
    seen: Counter[int] = Counter()
    for number in range(20):
        rows = rows_of(places, patches, number)[0, :, 0].astype(int)
        assert len(set(rows)) == len(rows) == 64
        assert (np.diff(rows) > 0).all()
        seen.update((rows % width).tolist())

    counts = [seen[column] for column in range(width)]
    # 20 to 40 are expected of each; six standard deviations around it.
    mean = 20 * 64 / width
    assert max(abs(c - mean) for c in counts) < 6 * math.sqrt(mean)


# ------------------------------------------------------------------ Gram and rows


@pytest.mark.parametrize("shape", [(5,), (30, 5), (2, 15, 5), (2, 3, 4, 5), (1, 1)])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_the_gram_is_the_sum_of_outer_products(shape: tuple[int, ...], dtype: type) -> None:
    generator = np.random.default_rng(0)
    arrays = [generator.standard_normal(shape).astype(dtype) for _ in range(4)]
    gram: Gram = add_all(Gram(), arrays)
    rows = np.concatenate([a.reshape(-1, shape[-1]).astype(np.float64) for a in arrays])

    assert gram.rows == len(rows)
    np.testing.assert_allclose(
        gram.total[0], sum(np.outer(r, r) for r in rows), rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(gram.sums[0], rows.sum(0), rtol=1e-5, atol=1e-5)
    sizes = np.abs(rows).mean(0)
    np.testing.assert_allclose(gram.mean_magnitudes[0], sizes, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gram.mean[0], rows.T @ rows / len(rows), rtol=1e-5, atol=1e-6)
    if len(rows) > 1:
        expected = np.cov(rows.T, bias=True).reshape(shape[-1], shape[-1])
        np.testing.assert_allclose(gram.covariance[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("group", [1, 2, 4])
def test_the_gram_of_a_convolution_is_by_group(group: int) -> None:
    generator = np.random.default_rng(0)
    arrays = [generator.standard_normal((1, 4, 6, 5)).astype(np.float32) for _ in range(3)]
    patches = Patches((3, 3), (1, 1), (1, 1), (1, 1, 1, 1), group)

    gram: Gram = add_all(Gram(patches), arrays)
    kept: Rows = add_all(Rows(patches), arrays)

    rows = np.concatenate([all_rows(a, patches) for a in arrays], axis=1).astype(np.float64)
    assert gram.rows == rows.shape[1] == 90
    assert gram.total.shape == (group, 36 // group, 36 // group)
    np.testing.assert_allclose(
        gram.total, np.einsum("gri,grj->gij", rows, rows), rtol=1e-5, atol=1e-4
    )
    np.testing.assert_array_equal(sorted(map(tuple, kept.values[0])), sorted(map(tuple, rows[0])))
    # Groups stay together: the same row of the array in each.
    expected = {tuple(r) for r in np.moveaxis(rows, 0, 1).reshape(90, -1)}
    assert {tuple(r) for r in np.moveaxis(kept.values, 0, 1).reshape(90, -1)} == expected


def test_of_many_rows_the_gram_takes_those_that_rows_takes() -> None:
    generator = np.random.default_rng(0)
    arrays = [generator.standard_normal((700, 100)).astype(np.float32) for _ in range(3)]

    gram: Gram = add_all(Gram(), arrays)
    kept: Rows = add_all(Rows(), arrays)

    assert gram.rows == kept.values.shape[1] == 300
    rows = kept.values[0].astype(np.float64)
    np.testing.assert_allclose(gram.total[0], rows.T @ rows, rtol=1e-4, atol=1e-4)


def test_rows_that_are_not_finite_or_too_large_to_square_are_left_out() -> None:
    array = np.float32([[1, 2], [math.nan, 1], [3, math.inf], [1e30, 0], [LOWEST, 1], [-4, 5]])

    gram: Gram = add_all(Gram(), [array, array.astype(np.float64) * 1e250])
    kept: Rows = add_all(Rows(), [array])

    assert gram.rows == 2
    assert gram.total[0].tolist() == [[17, -18], [-18, 29]]
    assert sorted(kept.values[0].tolist()) == [[-4, 5], [1, 2]]


def test_nothing_seen_is_nothing_kept() -> None:
    assert Gram().mean.shape == Gram().covariance.shape == (0, 0, 0)
    assert Rows().values.shape == (0, 0, 0)
    assert Spread(0).channel_mean.shape == (0,)


# ------------------------------------------------------------------ samples


def kept_counts(values: np.ndarray, parts: int, total: int) -> np.ndarray:
    """How many of the values, which are their own places, come from each part of the whole."""
    return np.bincount((values.astype(int) * parts) // total, minlength=parts)


def assert_uniform(counts: np.ndarray) -> None:
    """By a chi-square test that fails one time in 10 000 where it should not; seeds are fixed."""
    squares = ((counts - counts.mean()) ** 2).sum() / counts.mean()
    assert chdtrc(len(counts) - 1, squares) > 1e-4


@pytest.mark.parametrize("sizes", [[100_000], [1000] * 100, [5, 60_000, 20, 39_975]])
def test_the_reservoir_is_uniform(sizes: list[int]) -> None:
    places = np.arange(sum(sizes), dtype=np.float32)
    pieces = np.split(places, np.cumsum(sizes)[:-1])

    values = add_all(Reservoir(), pieces).values

    assert len(values) == len(set(values.tolist())) == 4096
    assert_uniform(kept_counts(values, 20, places.size))


def test_rows_are_uniform_over_arrays_and_within_them() -> None:
    """64 of each array's 1000 rows are looked at, and 1024 of those are kept."""
    kept = Rows()
    for number in range(100):
        within = np.arange(1000, dtype=np.float32)
        kept.add(np.stack([np.full(1000, number, np.float32), within], axis=1))

    values = kept.values[0]
    assert values.shape == (1024, 2) and len({tuple(v) for v in values.tolist()}) == 1024
    assert_uniform(kept_counts(values[:, 0], 20, 100))
    assert_uniform(kept_counts(values[:, 1], 20, 1000))
    assert_uniform(np.bincount(values[:, 1].astype(int) % 16, minlength=16) / [63, *[62.5] * 15])


@pytest.mark.parametrize("arrays", [10, 100])
def test_the_first_few_rows_are_a_sample_too(arrays: int) -> None:
    """Of all arrays, and not of the first ones: whoever needs fewer takes these."""
    kept = Rows()
    for number in range(arrays):
        kept.add(np.full((50, 1), number, np.float32))

    first = kept.values[0, :200, 0]

    assert kept.values.shape[1] == min(1024, 50 * arrays)
    assert_uniform(kept_counts(first, 10, arrays))


@pytest.mark.parametrize("start", [Reservoir, Rows, Gram])
def test_the_same_arrays_give_the_same_sample(start: Any) -> None:
    generator = np.random.default_rng(0)
    arrays = [generator.standard_normal((3000, 4)).astype(np.float32) for _ in range(5)]

    first, second = (add_all(start(), arrays) for _ in range(2))

    name = "total" if start is Gram else "values"
    np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


def test_two_models_are_looked_at_in_the_same_rows() -> None:
    """So that what a layer gets before and after a rewrite can be compared row by row."""
    generator = np.random.default_rng(0)
    arrays = [generator.standard_normal((3000, 4)).astype(np.float32) for _ in range(30)]

    before: Rows = add_all(Rows(), arrays)
    after: Rows = add_all(Rows(), [2 * a for a in arrays])

    np.testing.assert_array_equal(after.values, 2 * before.values)


@pytest.mark.parametrize("size", [1, 10, 4096])
def test_a_reservoir_keeps_all_while_there_is_room(size: int) -> None:
    values = np.random.default_rng(0).standard_normal(size).astype(np.float32)

    kept = add_all(Reservoir(), np.split(values, [size // 3])).values

    np.testing.assert_array_equal(np.sort(kept), np.sort(values))


# ------------------------------------------------------------------ memory


@pytest.mark.parametrize(
    "start",
    [Spread, lambda: Spread(1), Gram, Rows, Reservoir],
    ids=["spread", "channels", "gram", "rows", "reservoir"],
)
def test_memory_does_not_grow_with_the_number_of_arrays(start: Any) -> None:
    array = np.random.default_rng(0).standard_normal((600, 32)).astype(np.float32)

    def peak_bytes(count: int) -> int:
        about = start()
        tracemalloc.start()
        add_all(about, itertools.repeat(array, count))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    peak_bytes(512)  # Python and numpy allocate for themselves, once, over the first hundreds.
    assert peak_bytes(512) <= 1.1 * peak_bytes(32)

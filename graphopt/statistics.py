"""Statistics of arrays that come one at a time, in memory that does not grow with their number.

Floating point is accumulated in float64. What is not finite is counted and kept out of everything
else, and so is what masks a value out: see `without_masks`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

HISTOGRAM_BINS = 2048

BINNED_MAXIMUM = 1 << 20
"""Of a larger array, every n-th element goes into the histogram; its extremes are exact."""

MASK_MAGNITUDE_MINIMUM = 9e3
"""-1e4 plus a score is a mask too."""

MASK_GAP = 100
"""So many times as large as all else is a mask: what -1e4 is to scores before a softmax."""

MASK_CUT = 0.25
"""Where masks add up, one reaches a multiple of another: they lie within this factor."""


def without_masks(array: np.ndarray) -> tuple[np.ndarray, int]:
    """The finite elements that stand for a quantity, as a flat array, and how many do not.

    Attention masks out positions by adding minus infinity, the lowest float32, -1e9 or -1e4. Such a
    value says nothing of the range that matters: it lies near -1e4 or below, and is a hundred times
    as large as everything above a quarter of it. Where nothing else is there to tell, all stays.
    """
    flat = array.reshape(-1)
    if flat.size and not (np.isfinite(flat.min()) and np.isfinite(flat.max())):
        flat = flat[np.isfinite(flat)]
    # Again, as masks of different sizes may meet.
    while flat.size and (low := float(flat.min())) <= -MASK_MAGNITUDE_MINIMUM:
        others = flat[flat > low * MASK_CUT]
        if not others.size or float(np.abs(others).max()) * MASK_GAP > -low:
            break
        flat = others
    return flat, array.size - flat.size


@dataclass
class Histogram:
    """Counts of values in bins of one width, which doubles whenever a value falls outside.

    Bin `n` holds the values from `(first + n) * width` up to the next edge. Widths are powers of
    two and edges are multiples of them, so that two bins merge into one without sharing out.

    Attributes:
        counts: int64, of shape [HISTOGRAM_BINS].
        width: of a bin; 0 before the first value.
        first: index of the first bin, in bins from zero.
    """

    counts: np.ndarray = field(default_factory=lambda: np.zeros(HISTOGRAM_BINS, np.int64))
    width: float = 0.0
    first: int = 0

    def add(self, values: np.ndarray, low: float, high: float) -> None:
        """Count finite values.

        Args:
            values: flat.
            low: the smallest of them.
            high: the largest of them.
        """
        if not self.width:
            self._start(low, high)
        while not self._holds(low, high):
            self._widen(low, high)
        places = np.floor(values * (1 / self.width)).astype(np.int64) - self.first
        self.counts += np.bincount(np.clip(places, 0, HISTOGRAM_BINS - 1), minlength=HISTOGRAM_BINS)

    def edges(self) -> np.ndarray:
        """The edges of the bins, float64, of shape [HISTOGRAM_BINS + 1]."""
        return (self.first + np.arange(HISTOGRAM_BINS + 1)) * self.width

    def _start(self, low: float, high: float) -> None:
        # Half of the span: all of it may be more than a float64 holds.
        half = max(high / 2 - low / 2, abs(low) * 5e-7, abs(high) * 5e-7, 5e-31)
        self.width = float(2.0 ** np.ceil(np.log2(half / (HISTOGRAM_BINS / 4))))
        self.first = int(np.floor(low / self.width)) - HISTOGRAM_BINS // 8

    def _holds(self, low: float, high: float) -> bool:
        end = self.first + HISTOGRAM_BINS
        return math.floor(low / self.width) >= self.first and math.floor(high / self.width) < end

    def _widen(self, low: float, high: float) -> None:
        """Move the bins where they have room at the other end, else merge them by two."""
        used = np.flatnonzero(self.counts)
        start, end = self.first, self.first + HISTOGRAM_BINS
        if used.size:
            start, end = self.first + int(used[0]), self.first + int(used[-1]) + 1
        start = min(start, int(np.floor(low / self.width)))
        end = max(end, int(np.floor(high / self.width)) + 1)
        if end - start <= HISTOGRAM_BINS:
            self._move(start)
            return
        merged = np.zeros(HISTOGRAM_BINS, np.int64)
        first = self.first // 2
        places = (self.first + np.arange(HISTOGRAM_BINS)) // 2 - first
        np.add.at(merged, places, self.counts)
        self.counts, self.first, self.width = merged, first, 2 * self.width

    def _move(self, first: int) -> None:
        moved = np.zeros(HISTOGRAM_BINS, np.int64)
        used = np.flatnonzero(self.counts)
        moved[used + self.first - first] = self.counts[used]
        self.counts, self.first = moved, first


@dataclass
class Spread:
    """How the elements of a value are distributed.

    By channel, an array counts only where all of it is finite and no mask, and it has as many
    channels as those before.

    Attributes:
        axis: of the channels, or None for no statistics by channel.
        arrays: how many arrays there were.
        count: finite elements.
        left_out: elements that are masks, infinite or not a number.
        low: the smallest element; 0 before any.
        high: the largest element; 0 before any.
        histogram: of the elements.
        channel_low: the smallest by channel, float64 of shape [channels]; empty without an axis.
        channel_high: the largest by channel, the same.
        channel_sum: the sum by channel, the same.
        channel_square: the sum of squares by channel, the same.
        channel_count: elements in each channel that the statistics by channel are of.
    """

    axis: int | None = None
    arrays: int = 0
    count: int = 0
    left_out: int = 0
    low: float = 0.0
    high: float = 0.0
    histogram: Histogram = field(default_factory=Histogram)
    channel_low: np.ndarray = field(default_factory=lambda: np.zeros(0))
    channel_high: np.ndarray = field(default_factory=lambda: np.zeros(0))
    channel_sum: np.ndarray = field(default_factory=lambda: np.zeros(0))
    channel_square: np.ndarray = field(default_factory=lambda: np.zeros(0))
    channel_count: int = 0

    def add(self, array: np.ndarray) -> None:
        """Take in one array of floating point."""
        values, left_out = without_masks(array)
        self.left_out += left_out
        self.arrays += 1
        if not values.size:
            return
        low, high = float(values.min()), float(values.max())
        self.low = min(self.low, low) if self.count else low
        self.high = max(self.high, high) if self.count else high
        self.count += values.size
        step = _step(values.size)
        self.histogram.add(values[::step].astype(np.float64), low, high)
        if self.axis is not None and not left_out and -array.ndim <= self.axis < array.ndim:
            self._add_channels(np.moveaxis(array, self.axis, 0))

    def _add_channels(self, array: np.ndarray) -> None:
        rows = array.reshape(array.shape[0], -1)
        if self.channel_count and len(rows) != len(self.channel_low):
            return
        low, high = rows.min(1).astype(np.float64), rows.max(1).astype(np.float64)
        total = rows.sum(1, dtype=np.float64)
        square = np.einsum("ij,ij->i", rows, rows, dtype=np.float64)
        if not self.channel_count:
            self.channel_low, self.channel_high = low, high
            self.channel_sum, self.channel_square = total, square
        else:
            self.channel_low = np.minimum(self.channel_low, low)
            self.channel_high = np.maximum(self.channel_high, high)
            self.channel_sum = self.channel_sum + total
            self.channel_square = self.channel_square + square
        self.channel_count += rows.shape[1]

    @property
    def elements(self) -> int:
        """How many elements there were."""
        return self.count + self.left_out

    @property
    def channel_mean(self) -> np.ndarray:
        """The mean by channel, float64 of shape [channels]."""
        return self.channel_sum / max(self.channel_count, 1)


def _step(size: int) -> int:
    """The step that leaves not many less than BINNED_MAXIMUM elements of so many.

    It shares no factor with the size, hence with no dimension: all channels are met alike.
    """
    step = -(-size // BINNED_MAXIMUM)
    while math.gcd(step, size) > 1:
        step += 1
    return step


@dataclass(frozen=True)
class Patches:
    """Which elements a Conv multiplies with its weight: the geometry of its windows.

    Attributes:
        kernel: sizes of the window.
        strides: of the window, one for each axis.
        dilations: of its elements, one for each axis.
        pads: ONNX's begins, then ends; not looked at where `auto_pad` says them.
        group: the channels fall into so many groups.
        auto_pad: as in ONNX.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]
    group: int = 1
    auto_pad: str = "NOTSET"

    def cut(self, array: np.ndarray) -> np.ndarray:
        """Windows on an array [batch, channels, ...], a view.

        Returns:
            Of shape [group, batch, channels of the group, places..., kernel...].
        """
        padded = np.pad(array, [(0, 0), (0, 0), *self.padding(array.shape[2:])])
        reach = [(k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True)]
        axes = tuple(range(2, array.ndim))
        windows = np.lib.stride_tricks.sliding_window_view(padded, reach, axes)
        steps = (*self.strides, *self.dilations)
        windows = windows[(slice(None), slice(None), *(slice(None, None, s) for s in steps))]
        batch, channels = array.shape[:2]
        apart = windows.reshape(batch, self.group, channels // self.group, *windows.shape[2:])
        moved: np.ndarray = np.moveaxis(apart, 1, 0)
        return moved

    def places(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """How many windows there are along each axis of an image of these sizes."""
        padded = (size + sum(p) for size, p in zip(sizes, self.padding(sizes), strict=True))
        windows = zip(padded, self.kernel, self.strides, self.dilations, strict=True)
        return tuple((size - (k - 1) * d - 1) // step + 1 for size, k, step, d in windows)

    def padding(self, sizes: tuple[int, ...]) -> list[tuple[int, int]]:
        """What is added before and after along each axis of an image of these sizes."""
        rank = len(self.kernel)
        if self.auto_pad in ("NOTSET", ""):
            return [(self.pads[axis], self.pads[axis + rank]) for axis in range(rank)]
        if self.auto_pad == "VALID":
            return [(0, 0)] * rank
        found = []
        for axis, size in enumerate(sizes):
            reach = (self.kernel[axis] - 1) * self.dilations[axis] + 1
            places = -(-size // self.strides[axis])
            total = max(0, (places - 1) * self.strides[axis] + reach - size)
            less, more = total // 2, total - total // 2
            found.append((less, more) if self.auto_pad == "SAME_UPPER" else (more, less))
        return found


GRAM_ROWS_MINIMUM, GRAM_ROWS_MAXIMUM = 64, 256
"""Of one array, as many rows as the layer has inputs go into a Gram matrix, evenly spread, and not
fewer or more than these: over some tens of samples that is plenty."""

ROW_MAGNITUDE_MAXIMUM = 1e18
"""Sums of squares of what is larger are no float32 any more."""


def spread_evenly(count: int, inputs: int, number: int) -> np.ndarray:
    """Which of so many rows of array `number` go into the Gram matrix of so many inputs.

    One at random of each stretch: an even step would meet the same few columns of an image, or
    tokens of a sequence, again and again. It depends on nothing but the arguments, so that the rows
    of two models can be compared.
    """
    wanted = min(count, min(max(inputs, GRAM_ROWS_MINIMUM), GRAM_ROWS_MAXIMUM))
    ends = np.arange(wanted + 1) * count // max(wanted, 1)
    generator = np.random.default_rng((number, count))
    return np.asarray(generator.integers(ends[:-1], ends[1:]))


def rows_of(array: np.ndarray, patches: Patches | None, number: int) -> np.ndarray:
    """Rows of an array, evenly spread; those with elements too large to work with are left out.

    Args:
        array: [..., inputs]; for a Conv [batch, channels, ...].
        patches: geometry of a Conv; None for a product with the last axis.
        number: of the array among those of the value; others of the same shape give other rows.

    Returns:
        float32 of shape [group, rows, inputs].
    """
    with np.errstate(over="ignore"):
        rows = np.asarray(chosen_rows(array, patches, number), np.float32)
    with np.errstate(invalid="ignore"):
        usable = (np.abs(rows) <= ROW_MAGNITUDE_MAXIMUM).all(axis=(0, 2))
    return rows if usable.all() else rows[:, usable]


def chosen_rows(array: np.ndarray, patches: Patches | None, number: int) -> np.ndarray:
    """As `rows_of`, of any type of floating point, with all elements."""
    if patches is None:
        inputs = array.shape[-1] if array.ndim else 1
        rows = array.reshape(-1 if inputs else 0, inputs)
        return rows[np.newaxis, spread_evenly(len(rows), inputs, number)]
    windows = patches.cut(array)
    group, batch, channels = windows.shape[:3]
    rank = len(patches.kernel)
    places = windows.shape[3 : 3 + rank]
    inputs = channels * math.prod(patches.kernel)
    chosen = spread_evenly(batch * math.prod(places), inputs, number)
    first, *others = np.unravel_index(chosen, (batch, *places))
    index: tuple[Any, ...] = (first, slice(None), slice(None), *others)
    # Indexed axes come first: [rows, group, channels, kernel...].
    rows = np.moveaxis(windows, 1, 0)[index].reshape(len(chosen), group, inputs)
    return np.asarray(rows.transpose(1, 0, 2))


def _outer(rows: np.ndarray) -> np.ndarray:
    """The products of the columns of each group: [group, inputs, inputs]."""
    if len(rows) == 1:
        # In this form BLAS computes one triangle only.
        return np.asarray((rows[0].T @ rows[0])[np.newaxis])
    return np.asarray(np.matmul(rows.transpose(0, 2, 1), rows))


@dataclass
class Gram:
    """Second moments of the rows that a layer multiplies with its weight.

    Attributes:
        patches: geometry of a Conv; None for a product with the last axis.
        total: sum over rows of the outer product of each with itself, float64 of shape
            [group, inputs, inputs].
        sums: sum over rows, float64 of shape [group, inputs].
        magnitudes: sum over rows of the magnitudes, the same.
        rows: how many rows there were.
        arrays: how many arrays there were.
    """

    patches: Patches | None = None
    total: np.ndarray = field(default_factory=lambda: np.zeros((0, 0, 0)))
    sums: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    magnitudes: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    rows: int = 0
    arrays: int = 0

    def add(self, array: np.ndarray) -> None:
        """Take in one array of floating point; see `rows_of`."""
        rows = rows_of(array, self.patches, self.arrays)
        self.arrays += 1
        if not rows.shape[1]:
            return
        outer = _outer(rows).astype(np.float64)
        sums = rows.sum(1, dtype=np.float64)
        magnitudes = np.abs(rows).sum(1, dtype=np.float64)
        if self.rows:
            outer += self.total
            sums += self.sums
            magnitudes += self.magnitudes
        self.total, self.sums, self.magnitudes = outer, sums, magnitudes
        self.rows += rows.shape[1]

    @property
    def mean(self) -> np.ndarray:
        """The second moments, float64 of shape [group, inputs, inputs]."""
        return self.total / max(self.rows, 1)

    @property
    def means(self) -> np.ndarray:
        """The means, float64 of shape [group, inputs]."""
        return np.asarray(self.sums / max(self.rows, 1))

    @property
    def mean_magnitudes(self) -> np.ndarray:
        """The means of the magnitudes, float64 of shape [group, inputs]."""
        return np.asarray(self.magnitudes / max(self.rows, 1))

    @property
    def covariance(self) -> np.ndarray:
        """The second moments about the means."""
        outer = self.means[:, :, np.newaxis] * self.means[:, np.newaxis, :]
        return np.asarray(self.mean - outer)


ROWS_MAXIMUM = 1024


@dataclass
class Rows:
    """A uniform sample of the rows that a layer multiplies with its weight.

    Attributes:
        patches: geometry of a Conv; None for a product with the last axis.
        values: those kept, float32 of shape [group, rows, inputs]. Their order is random: the
            first few are a uniform sample too.
        arrays: how many arrays there were.
    """

    patches: Patches | None = None
    values: np.ndarray = field(default_factory=lambda: np.zeros((0, 0, 0), np.float32))
    arrays: int = 0
    _keys: np.ndarray = field(default_factory=lambda: np.zeros(0))
    _random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def add(self, array: np.ndarray) -> None:
        """Take in one array of floating point; see `rows_of`.

        Of all rows, those with the smallest random keys stay, so that each is as likely to.
        """
        rows = rows_of(array, self.patches, self.arrays)
        self.arrays += 1
        keys = np.asarray(self._random.random(rows.shape[1]))
        if self._keys.size:
            rows = np.concatenate([self.values, rows], axis=1)
            keys = np.concatenate([self._keys, keys])
        kept = np.argsort(keys)[:ROWS_MAXIMUM]
        self.values, self._keys = rows[:, kept], np.asarray(keys[kept])


@dataclass
class Reservoir:
    """A uniform sample of the elements seen so far (see `Rows`).

    Attributes:
        size: elements kept at most.
        values: those kept, in no order.
    """

    size: int = 4096
    values: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    _keys: np.ndarray = field(default_factory=lambda: np.zeros(0))
    _random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def add(self, array: np.ndarray) -> None:
        """Take in one array of floating point."""
        values, _ = without_masks(array)
        keys: np.ndarray = self._random.random(values.size)
        if len(self._keys) == self.size:
            better = keys < self._keys.max()
            values, keys = values[better], keys[better]
        values = np.concatenate([self.values, values.astype(np.float32)])
        keys = np.concatenate([self._keys, keys])
        if len(keys) > self.size:
            kept = np.argpartition(keys, self.size)[: self.size]
            values, keys = values[kept], keys[kept]
        self.values, self._keys = values, keys

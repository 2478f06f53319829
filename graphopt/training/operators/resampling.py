"""Operators that read between the numbers of a grid: Resize, Upsample, GridSample, AffineGrid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from graphopt.errors import ModelError
from graphopt.training.operators.arguments import along, floats, integers
from graphopt.training.operators.operator_types import Table

_CUBIC = -0.75


@dataclass(frozen=True)
class _Axis:
    """One axis that is resized.

    Attributes:
        size: of the input.
        count: of the output.
        scale: output over input, as it is stated.
        start: where the region of `tf_crop_and_resize` begins, as a share of the input.
        end: where it ends.
    """

    size: int
    count: int
    scale: float
    start: float
    end: float


@dataclass(frozen=True)
class _Sampling:
    """How places of the output are found on the input, and what is read there."""

    mode: str
    nearest_mode: str
    coordinates: str
    cubic: float
    antialias: bool
    exclude_outside: bool
    extrapolation: float


def _places(axis: _Axis, coordinates: str) -> Tensor:
    """Where on the input the places of the output lie: float64, of shape [count]."""
    x = torch.arange(axis.count, dtype=torch.float64)
    scale, size, count = axis.scale, axis.size, axis.count
    if coordinates == "half_pixel":
        return (x + 0.5) / scale - 0.5
    if coordinates == "asymmetric":
        return x / scale
    if coordinates == "align_corners":
        return x * (size - 1) / (count - 1) if count > 1 else torch.zeros_like(x)
    if coordinates == "pytorch_half_pixel":
        return (x + 0.5) / scale - 0.5 if count > 1 else torch.zeros_like(x)
    if coordinates == "half_pixel_symmetric":
        # What rounding to whole places moves is shared by both sides.
        adjusted = count / (scale * size)
        return size / 2 * (1 - adjusted) + (x + 0.5) / scale - 0.5
    if coordinates == "tf_half_pixel_for_nn":
        return (x + 0.5) / scale
    if coordinates == "tf_crop_and_resize":
        if count == 1:
            return torch.full_like(x, 0.5 * (axis.start + axis.end) * (size - 1))
        step = (axis.end - axis.start) * (size - 1) / (count - 1)
        return axis.start * (size - 1) + x * step
    raise ModelError(f"Resize by coordinates {coordinates!r} cannot be computed in torch")


def _nearest(places: Tensor, mode: str) -> Tensor:
    # A place that should be whole may be off by a rounding.
    places = torch.where((places - places.round()).abs() < 1e-6, places.round(), places)
    if mode == "round_prefer_floor":
        return torch.ceil(places - 0.5)
    if mode == "round_prefer_ceil":
        return torch.floor(places + 0.5)
    return torch.floor(places) if mode == "floor" else torch.ceil(places)


def _kernel(distance: Tensor, mode: str, cubic: float) -> Tensor:
    """What a number at a distance counts."""
    x = distance.abs()
    if mode == "linear":
        return (1 - x).clamp(min=0)
    near = ((cubic + 2) * x - (cubic + 3)) * x * x + 1
    far = ((cubic * x - 5 * cubic) * x + 8 * cubic) * x - 4 * cubic
    return torch.where(x <= 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def _taps(axis: _Axis, sampling: _Sampling) -> tuple[Tensor, Tensor]:
    """What each place of the output is a sum of: places on the input, and what they count.

    Both of shape [taps, count].
    """
    places = _places(axis, sampling.coordinates)
    if sampling.mode == "nearest":
        found = _nearest(places, sampling.nearest_mode).clamp(0, axis.size - 1)[None]
        return found.to(torch.int64), torch.ones_like(found)
    # With antialiasing, a smaller image is read by as much wider kernels.
    squeeze = min(axis.scale, 1.0) if sampling.antialias else 1.0
    reach = (1 if sampling.mode == "linear" else 2) / squeeze
    first = math.floor(-reach) + 1
    steps = torch.arange(first, first + 2 * math.ceil(reach), dtype=torch.float64)
    read = places.floor() + steps[:, None]
    weights = _kernel((read - places) * squeeze, sampling.mode, sampling.cubic)
    is_outside = (read < 0) | (read > axis.size - 1)
    if sampling.exclude_outside or (sampling.antialias and sampling.exclude_outside):
        weights = torch.where(is_outside, torch.zeros_like(weights), weights)
    weights = weights / weights.sum(0)
    return read.clamp(0, axis.size - 1).to(torch.int64), weights


def _resized(x: Tensor, axes: Sequence[int], sizes: Sequence[_Axis], how: _Sampling) -> Tensor:
    for place, axis in zip(axes, sizes, strict=True):
        if how.coordinates != "tf_crop_and_resize" and axis.size == axis.count and axis.scale == 1:
            continue
        read, weights = (part.to(x.device) for part in _taps(axis, how))
        if how.mode == "nearest":
            x = x.index_select(place, read[0])
        else:
            parts = zip(read, weights.to(_computed_in(x)), strict=True)
            terms = [x.index_select(place, r) * along(w, x.ndim, place) for r, w in parts]
            x = torch.stack(terms).sum(0).to(x.dtype)
        if how.coordinates == "tf_crop_and_resize":
            where = _places(axis, how.coordinates).to(x.device)
            is_outside = along((where < 0) | (where > axis.size - 1), x.ndim, place)
            x = torch.where(is_outside, torch.full_like(x, how.extrapolation), x)
    return x


def _computed_in(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _resize(
    x: Tensor,
    *rest: Tensor | None,
    opset: int,
    antialias: int = 0,
    axes: Sequence[int] | None = None,
    coordinate_transformation_mode: str = "half_pixel",
    cubic_coeff_a: float = _CUBIC,
    exclude_outside: int = 0,
    extrapolation_value: float = 0.0,
    keep_aspect_ratio_policy: str = "stretch",
    mode: str = "nearest",
    nearest_mode: str = "round_prefer_floor",
) -> Tensor:
    # Of opset 10 the scales are the only other input, before there were regions.
    region, scales, sizes = (*rest, None, None, None)[:3] if opset > 10 else (None, rest[0], None)
    if opset == 10:
        coordinate_transformation_mode, nearest_mode = "asymmetric", "floor"
    places = [axis % x.ndim for axis in axes] if axes else list(range(x.ndim))
    lengths = [x.shape[place] for place in places]
    if sizes is not None and sizes.numel():
        counts = integers(sizes)
        factors = [count / size for count, size in zip(counts, lengths, strict=True)]
        if keep_aspect_ratio_policy != "stretch":
            factor = min(factors) if keep_aspect_ratio_policy == "not_larger" else max(factors)
            factors = [factor] * len(factors)
            counts = [math.floor(factor * size + 0.5) for size in lengths]
    else:
        assert scales is not None
        factors = floats(scales)
        counts = [math.floor(f * size) for f, size in zip(factors, lengths, strict=True)]
    whole = [0.0] * len(places) + [1.0] * len(places)
    bounds = whole if region is None or not region.numel() else floats(region)
    described = [
        _Axis(size, count, factor, start, end)
        for size, count, factor, start, end in zip(
            lengths, counts, factors, bounds[: len(places)], bounds[len(places) :], strict=True
        )
    ]
    how = _Sampling(
        mode,
        nearest_mode,
        coordinate_transformation_mode,
        cubic_coeff_a,
        bool(antialias),
        bool(exclude_outside),
        extrapolation_value,
    )
    return _resized(x, places, described, how)


def _upsample(x: Tensor, scales: Tensor, *, mode: str = "nearest") -> Tensor:
    kind = "linear" if mode in ("linear", "bilinear") else mode
    return _resize(
        x,
        None,
        scales,
        opset=11,
        coordinate_transformation_mode="asymmetric",
        mode=kind,
        nearest_mode="floor",
    )


_GRID_MODES = {"linear": "bilinear", "cubic": "bicubic"}


def _grid_sample(
    x: Tensor,
    grid: Tensor,
    *,
    align_corners: int = 0,
    mode: str = "linear",
    padding_mode: str = "zeros",
) -> Tensor:
    kind = _GRID_MODES.get(mode, mode)
    return functional.grid_sample(x, grid.to(x.dtype), kind, padding_mode, bool(align_corners))


def _affine_grid(theta: Tensor, size: Tensor, *, align_corners: int = 0) -> Tensor:
    return functional.affine_grid(theta, integers(size), bool(align_corners))


OPERATORS: Table = {
    "AffineGrid": _affine_grid,
    "GridSample": _grid_sample,
    "Resize": _resize,
    "Upsample": _upsample,
}
"""Of the standard domain."""

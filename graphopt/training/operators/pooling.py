"""Poolings."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from graphopt.training.operators.arguments import integers
from graphopt.training.operators.operator_types import Table
from graphopt.training.operators.windows import Windows, contents, padded, windows_on

_MAXIMA: Sequence[Callable[..., Tensor]] = (
    functional.max_pool1d,
    functional.max_pool2d,
    functional.max_pool3d,
)
_MEANS: Sequence[Callable[..., Tensor]] = (
    functional.avg_pool1d,
    functional.avg_pool2d,
    functional.avg_pool3d,
)


def _has_kernel(windows: Windows, kernels: Sequence[Callable[..., Tensor]]) -> bool:
    """A kernel of torch does it: pads are the same on both sides and half a window at most."""
    rank = len(windows.sizes)
    halves = all(2 * pad <= size for pad, size in zip(windows.begins, windows.sizes, strict=True))
    return rank <= len(kernels) and windows.are_symmetric and halves


def _least(x: Tensor) -> float:
    return float("-inf") if x.is_floating_point() else torch.iinfo(x.dtype).min


def _max_pool(
    x: Tensor,
    *,
    kernel_shape: Sequence[int],
    output_count: int,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    storage_order: int = 0,
    strides: Sequence[int] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    windows = windows_on(
        x.shape[2:], kernel_shape, strides, dilations, pads, auto_pad, bool(ceil_mode)
    )
    if output_count == 1 and _has_kernel(windows, _MAXIMA):
        kernel = _MAXIMA[len(windows.sizes) - 1]
        return kernel(x, windows.sizes, windows.strides, windows.begins, windows.dilations)
    parts = contents(padded(x, windows, _least(x)), windows)
    if output_count == 1:
        return parts.amax(-1)
    values, best = parts.max(-1)
    return values, _places(x, windows, best, bool(storage_order))


def _places(x: Tensor, windows: Windows, best: Tensor, is_column_major: bool) -> Tensor:
    """Where in the whole input each maximum lies.

    Args:
        x: the input.
        windows: over it.
        best: which element of each window it is.
        is_column_major: the place counts the first axis behind the channels fastest.
    """
    rank, device = len(windows.sizes), x.device
    places, step = torch.zeros_like(best), 1
    coordinates, rest = [], best
    for axis in reversed(range(rank)):
        inner = rest % windows.sizes[axis] * windows.dilations[axis]
        rest = rest // windows.sizes[axis]
        starts = torch.arange(windows.counts[axis], device=device) * windows.strides[axis]
        shape = [1] * x.ndim
        shape[2 + axis] = -1
        coordinates.append(inner + starts.reshape(shape) - windows.begins[axis])
    sizes = list(reversed(x.shape[2:]))
    if is_column_major:
        coordinates.reverse()
        sizes.reverse()
    for coordinate, size in zip(coordinates, sizes, strict=True):
        places = places + coordinate * step
        step *= size
    maps = torch.arange(x.shape[0] * x.shape[1], device=device)
    return places + (maps * step).reshape(*x.shape[:2], *[1] * rank)


def average_pool(
    x: Tensor,
    *,
    kernel_shape: Sequence[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """The operator AveragePool.

    Args:
        x: of shape [batch, channels, ...].
        kernel_shape: as of ONNX, as are the others.
        auto_pad: where the windows lie; see `windows_on`.
        ceil_mode: a last window may reach over the end.
        count_include_pad: pads count as numbers.
        dilations: between elements of a window.
        pads: before all axes, then behind them.
        strides: from one window to the next.
    """
    shape, is_ceiled = x.shape[2:], bool(ceil_mode)
    windows = windows_on(shape, kernel_shape, strides, dilations, pads, auto_pad, is_ceiled)
    stated = windows_on(shape, kernel_shape, strides, dilations, pads, auto_pad)
    is_within = windows.ends == stated.ends
    if is_within and set(windows.dilations) == {1} and _has_kernel(windows, _MEANS):
        kernel, include = _MEANS[len(windows.sizes) - 1], bool(count_include_pad)
        return kernel(x, windows.sizes, windows.strides, windows.begins, count_include_pad=include)
    total = contents(padded(x, windows), windows).sum(-1)
    # A window counts what is in it of the input; with pads, of these too, not of what is beyond.
    counted = torch.ones((1, 1, *shape), dtype=x.dtype, device=x.device)
    if count_include_pad:
        beyond = [w - s for w, s in zip(windows.ends, stated.ends, strict=True)]
        sides = [side for pad in reversed(beyond) for side in (0, pad)]
        counted = functional.pad(padded(counted, stated, 1.0), sides)
    else:
        counted = padded(counted, windows)
    return total / contents(counted, windows).sum(-1)


def _lp_pool(
    x: Tensor,
    *,
    kernel_shape: Sequence[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Sequence[int] | None = None,
    p: int = 2,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    windows = windows_on(
        x.shape[2:], kernel_shape, strides, dilations, pads, auto_pad, bool(ceil_mode)
    )
    parts = contents(padded(x, windows), windows)
    norm: Tensor = torch.linalg.vector_norm(parts, p, dim=-1)
    return norm


def _global_average(x: Tensor) -> Tensor:
    return x.mean(list(range(2, x.ndim)), keepdim=True)


def _global_maximum(x: Tensor) -> Tensor:
    return x.amax(list(range(2, x.ndim)), keepdim=True)


def _global_lp(x: Tensor, *, p: int = 2) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, p, dim=list(range(2, x.ndim)), keepdim=True)
    return norm


def _max_unpool(
    x: Tensor,
    places: Tensor,
    output_shape: Tensor | None = None,
    *,
    kernel_shape: Sequence[int],
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    rank = len(kernel_shape)
    strides, pads = strides or [1] * rank, pads or [0] * (2 * rank)
    sizes = [
        (count - 1) * stride - pads[axis] - pads[rank + axis] + size
        for axis, (count, stride, size) in enumerate(
            zip(x.shape[2:], strides, kernel_shape, strict=True)
        )
    ]
    inner = torch.Size((*x.shape[:2], *sizes))
    flat = x.new_zeros(inner.numel()).scatter(0, places.reshape(-1), x.reshape(-1))
    out = flat.reshape(inner)
    if output_shape is None:
        return out
    outer = integers(output_shape)[2:]
    sides = [
        side
        for size, wanted in zip(reversed(sizes), reversed(outer), strict=True)
        for side in (0, wanted - size)
    ]
    return functional.pad(out, sides)


OPERATORS: Table = {
    "AveragePool": average_pool,
    "GlobalAveragePool": _global_average,
    "GlobalLpPool": _global_lp,
    "GlobalMaxPool": _global_maximum,
    "LpPool": _lp_pool,
    "MaxPool": _max_pool,
    "MaxUnpool": _max_unpool,
}
"""Of the standard domain."""

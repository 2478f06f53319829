"""Operators that move, pick, repeat and pad numbers, and compute none."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from graphopt.errors import ModelError
from graphopt.training.operators.arguments import (
    axes_of,
    counted_from_front,
    integer,
    integers,
    take,
    to_matrix,
)
from graphopt.training.operators.operator_types import Table


def _reshape(x: Tensor, shape: Tensor, *, allowzero: int = 0) -> Tensor:
    sizes = integers(shape)
    if not allowzero:
        sizes = [x.shape[axis] if size == 0 else size for axis, size in enumerate(sizes)]
    return x.reshape(sizes)


def _transpose(x: Tensor, *, perm: Sequence[int] | None = None) -> Tensor:
    return x.permute(list(reversed(range(x.ndim))) if perm is None else tuple(perm))


def _squeeze(x: Tensor, axes: Tensor | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(tuple(integers(axes)))


def _unsqueeze(x: Tensor, axes: Tensor) -> Tensor:
    rank = x.ndim + axes.numel()
    for axis in sorted(axes_of(axes, rank)):
        x = x.unsqueeze(axis)
    return x


def _flatten(x: Tensor, *, axis: int = 1) -> Tensor:
    return to_matrix(x, axis)


def _concat(*tensors: Tensor, axis: int) -> Tensor:
    return torch.cat(tensors, axis)


def _split(
    x: Tensor,
    sizes: Tensor | None = None,
    *,
    output_count: int,
    axis: int = 0,
    num_outputs: int | None = None,
) -> tuple[Tensor, ...]:
    if sizes is not None:
        return torch.split(x, integers(sizes), axis)
    count = output_count if num_outputs is None else num_outputs
    each, size = -(-x.shape[axis] // count), x.shape[axis]
    counts = [min(each, max(size - each * place, 0)) for place in range(count)]
    return torch.split(x, counts, axis)


def _slice(
    x: Tensor,
    starts: Tensor,
    ends: Tensor,
    axes: Tensor | None = None,
    steps: Tensor | None = None,
) -> Tensor:
    firsts, lasts = integers(starts), integers(ends)
    places = list(range(len(firsts))) if axes is None else axes_of(axes, x.ndim)
    jumps = [1] * len(firsts) if steps is None else integers(steps)
    cuts = [slice(None)] * x.ndim
    for axis, first, last, jump in zip(places, firsts, lasts, jumps, strict=True):
        size = x.shape[axis]
        if jump > 0:
            cuts[axis] = slice(first, last, jump)
        else:
            # torch has no negative steps, and -1 would mean the last place to Python.
            x = take(x, axis, range(size)[slice(first, last if last >= -size else None, jump)])
    return x[tuple(cuts)]


def gather(x: Tensor, index: Tensor, *, axis: int = 0) -> Tensor:
    """The parts of an axis at places, which may count from the end; the axis becomes theirs."""
    axis = axis % x.ndim
    places = counted_from_front(index, x.shape[axis])
    if places.ndim == 1:
        return x.index_select(axis, places)
    found = x.index_select(axis, places.reshape(-1))
    return found.reshape((*x.shape[:axis], *places.shape, *x.shape[axis + 1 :]))


def _gather_elements(x: Tensor, index: Tensor, *, axis: int = 0) -> Tensor:
    return x.gather(axis, counted_from_front(index, x.shape[axis]))


def _flat_places(shape: Sequence[int], index: Tensor) -> Tensor:
    """Where tuples of indices point to in axes that are one: the last axis of `index` goes."""
    places = torch.zeros(index.shape[:-1], dtype=torch.int64, device=index.device)
    for axis in range(index.shape[-1]):
        places = places * shape[axis] + counted_from_front(index[..., axis], shape[axis])
    return places


def _gather_nd(x: Tensor, index: Tensor, *, batch_dims: int = 0) -> Tensor:
    depth = index.shape[-1]
    batch, inner = x.shape[:batch_dims], x.shape[batch_dims : batch_dims + depth]
    rest = x.shape[batch_dims + depth :]
    count = math.prod(batch)
    places = _flat_places(inner, index).reshape(count, -1)
    rows = math.prod(inner)
    places = places + torch.arange(count, device=x.device)[:, None] * rows
    found = x.reshape(count * rows, *rest).index_select(0, places.reshape(-1))
    return found.reshape((*batch, *index.shape[batch_dims:-1], *rest))


_REDUCTIONS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def _scatter_elements(
    x: Tensor, index: Tensor, updates: Tensor, *, axis: int = 0, reduction: str = "none"
) -> Tensor:
    places = counted_from_front(index, x.shape[axis])
    if reduction == "none":
        return x.scatter(axis, places, updates)
    return x.scatter_reduce(axis, places, updates, _REDUCTIONS[reduction])


def _scatter_nd(x: Tensor, index: Tensor, updates: Tensor, *, reduction: str = "none") -> Tensor:
    depth = index.shape[-1]
    rest = x.shape[depth:]
    rows, width = math.prod(x.shape[:depth]), math.prod(rest)
    places = _flat_places(x.shape[:depth], index).reshape(-1, 1).expand(-1, width)
    flat, new = x.reshape(rows, width), updates.reshape(-1, width)
    return _scatter_elements(flat, places, new, reduction=reduction).reshape(x.shape)


def _pad(
    x: Tensor,
    pads: Tensor,
    value: Tensor | None = None,
    axes: Tensor | None = None,
    *,
    mode: str = "constant",
) -> Tensor:
    sides, places = integers(pads), axes_of(axes, x.ndim)
    for axis, before, behind in zip(
        places, sides[: len(places)], sides[len(places) :], strict=True
    ):
        if mode == "constant":
            continue
        cut = x.narrow(axis, max(-before, 0), x.shape[axis] - max(-before, 0) - max(-behind, 0))
        if before > 0 or behind > 0:
            cut = take(cut, axis, _beyond(cut.shape[axis], max(before, 0), max(behind, 0), mode))
        x = cut
    if mode != "constant":
        return x
    widths = [0] * (2 * x.ndim)
    for place, axis in enumerate(places):
        # torch wants the last axis first.
        at = 2 * (x.ndim - 1 - axis)
        widths[at], widths[at + 1] = sides[place], sides[len(places) + place]
    return _pad_with(x, widths, value)


def _pad_with(x: Tensor, widths: list[int], value: Tensor | None) -> Tensor:
    if value is None:
        return torch.constant_pad_nd(x, widths, 0)
    return torch.constant_pad_nd(x, widths, value.reshape(-1).tolist()[0])


def _beyond(size: int, before: int, behind: int, mode: str) -> list[int]:
    """The places on an axis of `size` that stand for those from `-before` to `size + behind`."""
    places = range(-before, size + behind)
    if mode == "edge":
        return [min(max(place, 0), size - 1) for place in places]
    if mode == "wrap":
        return [place % size for place in places]
    if mode == "reflect":
        period = max(2 * (size - 1), 1)
        turned = (place % period for place in places)
        return [min(place, period - place) if size > 1 else 0 for place in turned]
    raise ModelError(f"Pad in mode {mode!r} cannot be computed in torch")


def _tile(x: Tensor, repeats: Tensor) -> Tensor:
    return x.repeat(integers(repeats))


def _expand(x: Tensor, shape: Tensor) -> Tensor:
    sizes = integers(shape)
    own = [*[1] * (len(sizes) - x.ndim), *x.shape]
    wanted = [*[1] * (x.ndim - len(sizes)), *sizes]
    return x.expand([w if o == 1 else o for o, w in zip(own, wanted, strict=True)])


def _depth_to_space(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    batch, channels, height, width = x.shape
    few = channels // blocksize**2
    if mode == "DCR":
        parts = x.reshape(batch, blocksize, blocksize, few, height, width)
        parts = parts.permute(0, 3, 4, 1, 5, 2)
    else:
        parts = x.reshape(batch, few, blocksize, blocksize, height, width)
        parts = parts.permute(0, 1, 4, 2, 5, 3)
    return parts.reshape(batch, few, height * blocksize, width * blocksize)


def _space_to_depth(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    batch, channels, height, width = x.shape
    high, wide = height // blocksize, width // blocksize
    parts = x.reshape(batch, channels, high, blocksize, wide, blocksize)
    order = (0, 3, 5, 1, 2, 4) if mode == "DCR" else (0, 1, 3, 5, 2, 4)
    return parts.permute(order).reshape(batch, channels * blocksize**2, high, wide)


def _reverse_sequence(
    x: Tensor, lengths: Tensor, *, batch_axis: int = 1, time_axis: int = 0
) -> Tensor:
    return reversed_within(x.movedim((time_axis, batch_axis), (0, 1)), lengths).movedim(
        (0, 1), (time_axis, batch_axis)
    )


def reversed_within(x: Tensor, lengths: Tensor) -> Tensor:
    """Sequences from their end to their start; what is behind the end stays.

    Args:
        x: of shape [steps, batch, ...].
        lengths: of shape [batch].
    """
    steps = torch.arange(x.shape[0], device=x.device)[:, None]
    turned = torch.where(steps < lengths, lengths - 1 - steps, steps)
    turned = turned.reshape(*turned.shape, *[1] * (x.ndim - 2)).expand(x.shape)
    return x.gather(0, turned)


def _trilu(x: Tensor, k: Tensor | None = None, *, upper: int = 1) -> Tensor:
    diagonal = 0 if k is None else integer(k)
    return torch.triu(x, diagonal) if upper else torch.tril(x, diagonal)


def _one_hot(index: Tensor, depth: Tensor, values: Tensor, *, axis: int = -1) -> Tensor:
    count = integer(depth)
    axis = axis % (index.ndim + 1)
    shape = [1] * (index.ndim + 1)
    shape[axis] = count
    places = torch.arange(count, device=index.device).reshape(shape)
    is_hot = counted_from_front(index, count).unsqueeze(axis) == places
    return torch.where(is_hot, values[1], values[0])


def _compress(x: Tensor, condition: Tensor, *, axis: int | None = None) -> Tensor:
    places = [place for place, is_kept in enumerate(condition.tolist()) if is_kept]
    return take(x.reshape(-1), 0, places) if axis is None else take(x, axis, places)


def _non_zero(x: Tensor) -> Tensor:
    return torch.nonzero(x).T


def _shape(x: Tensor, *, device: torch.device, start: int = 0, end: int | None = None) -> Tensor:
    return torch.tensor(tuple(x.shape)[start:end], dtype=torch.int64, device=device)


def _size(x: Tensor, *, device: torch.device) -> Tensor:
    return torch.tensor(x.numel(), dtype=torch.int64, device=device)


def _center_crop_pad(x: Tensor, shape: Tensor, *, axes: Sequence[int] | None = None) -> Tensor:
    places = range(x.ndim) if axes is None else axes
    widths = [0] * (2 * x.ndim)
    for axis, size in zip(places, integers(shape), strict=True):
        axis = axis % x.ndim
        missing = size - x.shape[axis]
        # Half of it before, rounded down, whether it is to be added or to be cut.
        before = missing // 2 if missing > 0 else -(-missing // 2)
        at = 2 * (x.ndim - 1 - axis)
        widths[at], widths[at + 1] = before, missing - before
    return _pad_with(x, widths, None)


def _tensor_scatter(
    cache: Tensor,
    update: Tensor,
    starts: Tensor | None = None,
    *,
    axis: int = -2,
    mode: str = "linear",
) -> Tensor:
    axis = axis % cache.ndim
    steps = torch.arange(update.shape[axis], device=cache.device)
    if starts is None:
        starts = torch.zeros(cache.shape[0], dtype=torch.int64, device=cache.device)
    places = starts[:, None] + steps
    if mode == "circular":
        places = places % cache.shape[axis]
    shape = [1] * cache.ndim
    shape[0], shape[axis] = places.shape
    return cache.scatter(axis, places.reshape(shape).expand(update.shape), update)


OPERATORS: Table = {
    "CenterCropPad": _center_crop_pad,
    "Compress": _compress,
    "Concat": _concat,
    "DepthToSpace": _depth_to_space,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "NonZero": _non_zero,
    "OneHot": _one_hot,
    "Pad": _pad,
    "Reshape": _reshape,
    "ReverseSequence": _reverse_sequence,
    "Scatter": _scatter_elements,
    "ScatterElements": _scatter_elements,
    "ScatterND": _scatter_nd,
    "Shape": _shape,
    "Size": _size,
    "Slice": _slice,
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "Squeeze": _squeeze,
    "TensorScatter": _tensor_scatter,
    "Tile": _tile,
    "Transpose": _transpose,
    "Trilu": _trilu,
    "Unsqueeze": _unsqueeze,
}
"""Of the standard domain."""

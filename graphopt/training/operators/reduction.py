"""Operators that take many numbers to one, and those that order them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from graphopt.training.operators.arguments import axes_of, integer
from graphopt.training.operators.operator_types import Operator, Table

_Reduction = Callable[[Tensor, list[int], bool], Tensor]
"""From a tensor, axes and whether they stay with a size of 1."""


def _total(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return x.sum(axes, keepdim=keep).to(x.dtype)


def _mean(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    if x.is_floating_point():
        return x.mean(axes, keepdim=keep)
    count = math.prod(x.shape[axis] for axis in axes)
    return torch.div(x.sum(axes, keepdim=keep), count, rounding_mode="trunc").to(x.dtype)


def _product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted(axes, reverse=True):
        x = x.prod(axis, keepdim=keep).to(x.dtype)
    return x


def _extreme(x: Tensor, axes: list[int], keep: bool, is_maximum: bool) -> Tensor:
    for axis in axes:
        if x.shape[axis] == 0:
            # Nothing is greater than the least number, which is what is left of no numbers.
            shape = list(x.shape)
            shape[axis] = 1
            x = x.new_full(shape, _limit(x.dtype, is_maximum))
    return x.amax(axes, keepdim=keep) if is_maximum else x.amin(axes, keepdim=keep)


def _limit(dtype: torch.dtype, is_least: bool) -> float:
    if dtype.is_floating_point:
        return float("-inf") if is_least else float("inf")
    if dtype == torch.bool:
        return 0 if is_least else 1
    limits = torch.iinfo(dtype)
    return limits.min if is_least else limits.max


def _maximum(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return _extreme(x, axes, keep, is_maximum=True)


def _minimum(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return _extreme(x, axes, keep, is_maximum=False)


def _l1(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return _total(x.abs(), axes, keep)


def _squares(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return _total(x * x, axes, keep)


def _l2(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    if x.is_floating_point():
        norm: Tensor = torch.linalg.vector_norm(x, dim=axes, keepdim=keep)
        return norm
    return _squares(x.to(torch.float64), axes, keep).sqrt().to(x.dtype)


def _log(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return torch.log(_total(x, axes, keep)).to(x.dtype)


def _log_exp(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return torch.logsumexp(x if x.is_floating_point() else x.double(), axes, keep).to(x.dtype)


def _reducing(reduction: _Reduction) -> Operator:
    """The operator of a reduction."""

    def reduce(
        x: Tensor,
        axes: Tensor | None = None,
        *,
        keepdims: int = 1,
        noop_with_empty_axes: int = 0,
    ) -> Tensor:
        if axes is None or axes.numel() == 0:
            # Of each number alone: that leaves it, but for the squares, sizes and logarithms.
            places = [] if noop_with_empty_axes else list(range(x.ndim))
        else:
            places = axes_of(axes, x.ndim)
        if places:
            return reduction(x, places, bool(keepdims))
        # Over a new axis of size 1, as no axes stand for all of them in torch.
        return reduction(x.unsqueeze(0), [0], False)

    return reduce


def _arg_extreme(
    x: Tensor, axis: int, keepdims: int, select_last_index: int, is_maximum: bool
) -> Tensor:
    # Of equal ones torch takes the first.
    turned = x.flip(axis) if select_last_index else x
    best = torch.argmax if is_maximum else torch.argmin
    first = best(turned, axis, keepdim=bool(keepdims))
    return x.shape[axis] - 1 - first if select_last_index else first


def _arg_max(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    return _arg_extreme(x, axis, keepdims, select_last_index, is_maximum=True)


def _arg_min(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    return _arg_extreme(x, axis, keepdims, select_last_index, is_maximum=False)


def _top_k(
    x: Tensor, k: Tensor, *, axis: int = -1, largest: int = 1, sorted: int = 1
) -> tuple[Tensor, Tensor]:
    # Of equal ones the lower index comes first, which `torch.topk` does not promise.
    count = integer(k)
    values, places = torch.sort(x, dim=axis, descending=bool(largest), stable=True)
    return values.narrow(axis, 0, count), places.narrow(axis, 0, count)


def _unique(
    x: Tensor, *, axis: int | None = None, sorted: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    flat = x.reshape(-1) if axis is None else x
    along = 0 if axis is None else axis % x.ndim
    _, inverse, counts = torch.unique(
        flat.detach(), return_inverse=True, return_counts=True, dim=along
    )
    places = torch.arange(flat.shape[along], device=x.device)
    first = torch.full_like(counts, flat.shape[along]).scatter_reduce(0, inverse, places, "amin")
    if not sorted:
        order = first.argsort()
        first, counts, inverse = first[order], counts[order], order.argsort()[inverse]
    # The first of equal ones stands for all of them, and its gradient too.
    return flat.index_select(along, first), first, inverse, counts


OPERATORS: Table = {
    "ArgMax": _arg_max,
    "ArgMin": _arg_min,
    "ReduceL1": _reducing(_l1),
    "ReduceL2": _reducing(_l2),
    "ReduceLogSum": _reducing(_log),
    "ReduceLogSumExp": _reducing(_log_exp),
    "ReduceMax": _reducing(_maximum),
    "ReduceMean": _reducing(_mean),
    "ReduceMin": _reducing(_minimum),
    "ReduceProd": _reducing(_product),
    "ReduceSum": _reducing(_total),
    "ReduceSumSquare": _reducing(_squares),
    "TopK": _top_k,
    "Unique": _unique,
}
"""Of the standard domain."""

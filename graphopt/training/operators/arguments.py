"""What operators read of their tensors as plain numbers: shapes, axes, places, counts.

These hang on no number of a batch, so that an operator works under `torch.func.vmap` too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def integers(tensor: Tensor) -> list[int]:
    """The numbers of a tensor, in order."""
    return [int(number) for number in tensor.reshape(-1).tolist()]


def floats(tensor: Tensor) -> list[float]:
    """The numbers of a tensor, in order."""
    return [float(number) for number in tensor.reshape(-1).tolist()]


def integer(tensor: Tensor) -> int:
    """The number of a tensor that has one."""
    (number,) = integers(tensor)
    return number


def axes_of(axes: Tensor | None, rank: int) -> list[int]:
    """Axes counted from the front; all of them where none are given."""
    if axes is None:
        return list(range(rank))
    return [axis % rank for axis in integers(axes)]


def counted_from_front(index: Tensor, size: int) -> Tensor:
    """Indices as int64, those below 0 counted from the end of an axis of this size."""
    index = index.to(torch.int64)
    return torch.where(index < 0, index + size, index)


def to_matrix(x: Tensor, axis: int) -> Tensor:
    """The axes before `axis` as rows, and those from it on as columns."""
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


def along(x: Tensor, rank: int, axis: int) -> Tensor:
    """A vector of numbers for the places of one axis, in a shape that broadcasts over the others.

    Args:
        x: of shape [size].
        rank: of what it is to broadcast with.
        axis: of that, counted from the front.
    """
    shape = [1] * rank
    shape[axis] = -1
    return x.reshape(shape)


def take(x: Tensor, axis: int, places: Sequence[int]) -> Tensor:
    """The parts of an axis at these places, in their order."""
    index = torch.tensor(list(places), dtype=torch.int64, device=x.device)
    return x.index_select(axis, index)

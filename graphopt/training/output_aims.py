"""What healing asks of an output: near the original's numbers, its distribution, or both.

Errors are shares: 0 for an output like the original's, 1 for one that says nothing but the mean.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SUM_TOLERANCE = 1e-3
"""A distribution sums up to 1, but for rounding in float16."""

CLASSES_MINIMUM = 2

SCORES_MINIMUM = 3
"""Numbers along the last axis that may be scores of classes: two are as often something else."""

TOLD_MINIMUM = 0.5
"""Nats that the softmax of scores tells beyond its mean; that of small numbers tells less."""

SPREAD_MAXIMUM = 8.0
"""Of scores of a row, the standard deviation; what has a larger one is not made for a softmax, and
is divided by a temperature: else it would leave no doubt, and count without measure."""

FLOOR = 1e-12


class Aim(ABC):
    """What is asked of one output."""

    @abstractmethod
    def error(self, found: Tensor, wanted: Tensor) -> Tensor:
        """A scalar, 0 where the output is as wanted."""


@dataclass(frozen=True)
class Near(Aim):
    """The same numbers: squared difference on average, as a share of the variance.

    Attributes:
        variance: of the original's numbers.
    """

    variance: float

    def error(self, found: Tensor, wanted: Tensor) -> Tensor:
        """The share."""
        return squares(found, wanted) / self.variance


@dataclass(frozen=True)
class Likely(Aim):
    """The same distribution: what it tells less, as a share of what the original's tells.

    In nats, as the divergence of Kullback and Leibler (1951); the original's beyond its mean.

    Attributes:
        axis: along which the numbers sum up to 1, counted from the end.
        information: nats that the original's tells beyond its mean.
    """

    axis: int
    information: float

    def error(self, found: Tensor, wanted: Tensor) -> Tensor:
        """The share."""
        if found.shape != wanted.shape:
            return torch.ones((), device=wanted.device)
        return divergence(found, wanted, self.axis).mean() / self.information


@dataclass(frozen=True)
class Scored(Aim):
    """Scores of classes: the same numbers, and the same distribution that softmax makes of them.

    Numbers alone would count each score alike, and the classes between which it is close no more.

    Attributes:
        near: of the scores.
        likely: of their softmax.
        temperature: by which scores are divided before.
    """

    near: Near
    likely: Likely
    temperature: float

    def error(self, found: Tensor, wanted: Tensor) -> Tensor:
        """The mean of both shares."""
        distributions = ((s.float() / self.temperature).softmax(-1) for s in (found, wanted))
        return (self.near.error(found, wanted) + self.likely.error(*distributions)) / 2


def aim_of(seen: Sequence[Tensor]) -> Aim:
    """What is asked of an output, by what the original gives for a few samples.

    Args:
        seen: the output for each sample.
    """
    axis = _axis_of_distribution(seen)
    if axis is not None:
        return _likely(_rows(seen, axis), axis)
    numbers = torch.cat([one.reshape(-1).double() for one in seen])
    numbers = numbers[numbers.isfinite()]
    near = Near(max(float(numbers.var(correction=0)) if numbers.numel() else 0.0, FLOOR))
    return _scored(near, seen) or near


def _rows(seen: Sequence[Tensor], axis: int) -> Tensor:
    """What is along an axis: float32 [rows, size of the axis]."""
    return torch.cat([one.float().movedim(axis, -1).reshape(-1, one.shape[axis]) for one in seen])


def _likely(rows: Tensor, axis: int) -> Likely:
    information = float(divergence(rows.mean(0).expand_as(rows), rows, -1).mean())
    return Likely(axis, max(information, FLOOR))


def _scored(near: Near, seen: Sequence[Tensor]) -> Scored | None:
    """What is asked of scores of classes along the last axis, if they look like that."""
    sizes = {one.shape[-1] if one.ndim > 1 else 0 for one in seen}
    if len(sizes) > 1 or sizes.pop() < SCORES_MINIMUM:
        return None
    rows = _rows(seen, -1)
    if not rows.numel() or not bool(rows.isfinite().all()):
        return None
    temperature = max(1.0, float(rows.std(-1).mean()) / SPREAD_MAXIMUM)
    likely = _likely((rows / temperature).softmax(-1), -1)
    return Scored(near, likely, temperature) if likely.information >= TOLD_MINIMUM else None


def _axis_of_distribution(seen: Sequence[Tensor]) -> int | None:
    """The axis along which all outputs sum up to 1, counted from the end; None if there is none."""
    rank = min(one.ndim for one in seen)
    for axis in range(-1, -rank - 1, -1):
        if all(_sums_to_one(one, axis) for one in seen):
            return axis
    return None


def _sums_to_one(one: Tensor, axis: int) -> bool:
    if one.shape[axis] < CLASSES_MINIMUM or not one.numel() or bool((one < 0).any()):
        return False
    return bool(((one.float().sum(axis) - 1).abs() <= SUM_TOLERANCE).all())


def divergence(found: Tensor, wanted: Tensor, axis: int) -> Tensor:
    """Of one distribution from another, in nats, without the axis."""
    found, wanted = found.float().clamp_min(FLOOR), wanted.float()
    return (torch.xlogy(wanted, wanted) - wanted * found.log()).sum(axis)


def squares(found: Tensor, wanted: Tensor) -> Tensor:
    """The mean squared difference; where the original is not finite, there is nothing to learn.

    Of other shapes, by which rows go with which is not known, it is that from zero.
    """
    if not wanted.numel():
        return torch.zeros((), device=wanted.device)
    if found.shape != wanted.shape:
        found = torch.zeros_like(wanted)
    difference = torch.where(wanted.isfinite(), found.to(wanted.dtype) - wanted, 0)
    return difference.float().square().mean()

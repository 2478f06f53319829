"""Zeros that stay: masks of weights, fixed ones and ones that grow in training.

They are for `pack-zeros`, which stores weights without their zeros.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from graphopt.contract import Bounds
from graphopt.errors import ConfigError
from graphopt.training.prepared_weights import Form, Placed, WeightOptions

Scope = Literal["layer", "global"]
Share = Annotated[float, Bounds(0.0, 1.0)]


class Mask(Form):
    """A weight with zeros where it has no say; they stay zero whatever an optimizer does.

    Args:
        kept: bool, in the shape of the weight.
    """

    kept: Tensor

    def __init__(self, kept: Tensor) -> None:
        super().__init__()
        self.register_buffer("kept", kept)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight, with exact zeros; -0.0 would be a number like any other."""
        return torch.where(self.kept, weight, torch.zeros_like(weight))


@dataclass(frozen=True)
class Masks(WeightOptions):
    """Zeros that are there from the start stay.

    Attributes:
        sparsity: the smallest weights become zero, so large a share; None keeps the zeros that the
            factory's module has.
        pattern: "2:4" keeps the two largest of each four inputs in a row, likewise others.
        scope: the sparsity is that of each layer, or of all together.

    Raises:
        ConfigError: both sparsity and pattern are given, or the pattern is none.
    """

    sparsity: Annotated[float | None, Bounds(0.0, 1.0)] = None
    pattern: str | None = None
    scope: Scope = "layer"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sparsity is not None and self.pattern is not None:
            raise ConfigError("[[prepare]] 'masks' takes sparsity or pattern, not both")
        if self.pattern is not None:
            _pattern(self.pattern)

    def forms(self, weights: Mapping[str, Tensor]) -> Mapping[str, Form]:
        """See `WeightOptions`."""
        return dict(zip(weights, map(Mask, self._kept(weights)), strict=True))

    def _kept(self, weights: Mapping[str, Tensor]) -> list[Tensor]:
        if self.pattern is not None:
            count, group = _pattern(self.pattern)
            return [largest_of_groups(name, w, count, group) for name, w in weights.items()]
        if self.sparsity is not None:
            return largest(tuple(weights.values()), self.sparsity, self.scope)
        kept = [weight != 0 for weight in weights.values()]
        if all(bool(mask.all()) for mask in kept):
            raise ConfigError(
                "[[prepare]] 'masks' keeps zeros, and the chosen weights have none; give sparsity "
                "or pattern, or a model.factory that loads pruned weights"
            )
        return kept


@dataclass(frozen=True)
class Sparsity(WeightOptions):
    """Weights become zero little by little, the smallest first, and stay so.

    The share of zeros grows from 0 to s as s (1 - (1 - p)^3), p being how much of the time between
    begin and end is over: fast at first, while there is much to spare, then ever more slowly. Zhu
    and Gupta 2017, To prune, or not to prune (arXiv:1710.01878).

    Attributes:
        sparsity: s.
        scope: it is that of each layer, or of all together.
        begin: when the first become zero, as a share of all steps.
        end: when the last do.
        every_steps: steps from one choice to the next.

    Raises:
        ConfigError: the end is before the beginning.
    """

    sparsity: Share = 0.5
    scope: Scope = "layer"
    begin: Share = 0.0
    end: Share = 0.7
    every_steps: Annotated[int, Bounds(1)] = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.begin > self.end:
            raise ConfigError(
                f"prepare.begin is {self.begin} and prepare.end is {self.end}; the end comes after"
            )

    @property
    def sees_all_weights(self) -> bool:
        """See `WeightOptions`."""
        return self.scope == "global"

    def forms(self, weights: Mapping[str, Tensor]) -> Mapping[str, Form]:
        """See `WeightOptions`."""
        return {name: Mask(torch.ones_like(w, dtype=torch.bool)) for name, w in weights.items()}

    def advance(self, placed: Sequence[Placed], step: int, steps: int) -> None:
        """Choose the zeros anew, those that are there among them."""
        first, last = self._steps(steps)
        if not first <= step <= last or ((step - first) % self.every_steps and step != last):
            return
        masks = [one.form for one in placed if isinstance(one.form, Mask)]
        weights = [one.form(one.trained()) for one in placed]
        kept = largest(weights, self.share(step, steps), self.scope)
        for mask, new in zip(masks, kept, strict=True):
            mask.kept.copy_(new & mask.kept)

    def share(self, step: int, steps: int) -> float:
        """Of zeros, in a step of so many."""
        first, last = self._steps(steps)
        done = 1.0 if step >= last else max(step - first, 0) / (last - first)
        return self.sparsity * (1 - (1 - done) ** 3)

    def is_settled(self, step: int, steps: int) -> bool:
        """The last choice was made before one of these steps."""
        return step > self._steps(steps)[1]

    def _steps(self, steps: int) -> tuple[int, int]:
        """The first and the last step before which zeros are chosen."""
        return round(self.begin * (steps - 1)), round(self.end * (steps - 1))


def largest(weights: Sequence[Tensor], sparsity: float, scope: Scope) -> list[Tensor]:
    """Where the largest magnitudes are, for each weight.

    Args:
        weights: of any shapes.
        sparsity: share of the others, rounded to whole numbers.
        scope: of each weight, or of all together.

    Returns:
        bool in the shapes of the weights. Among magnitudes that are alike, the first are the small
        ones.
    """
    if scope == "layer":
        return [_largest(weight.flatten(), sparsity).view_as(weight) for weight in weights]
    kept = _largest(torch.cat([weight.flatten() for weight in weights]), sparsity)
    parts = torch.split(kept, [weight.numel() for weight in weights])
    return [part.view_as(weight) for part, weight in zip(parts, weights, strict=True)]


def _largest(weights: Tensor, sparsity: float) -> Tensor:
    order = weights.abs().argsort(stable=True)
    kept = torch.ones_like(weights, dtype=torch.bool)
    kept[order[: round(sparsity * len(weights))]] = False
    return kept


def largest_of_groups(name: str, weight: Tensor, count: int, group: int) -> Tensor:
    """Where so many largest magnitudes of each group of inputs are.

    Args:
        name: of the layer, for messages.
        weight: [outputs, inputs, ...]; groups lie along the inputs.
        count: that are kept, of each group.
        group: inputs of one.

    Raises:
        ConfigError: the inputs are no whole number of groups.
    """
    if weight.shape[1] % group:
        raise ConfigError(
            f"[[prepare]] 'masks': {name!r} has {weight.shape[1]} inputs, which are no groups of "
            f"{group}; name it in skip"
        )
    groups = weight.abs().movedim(1, -1)
    groups = groups.reshape(*groups.shape[:-1], -1, group)
    places = groups.argsort(dim=-1, descending=True, stable=True)[..., :count]
    kept = torch.zeros_like(groups, dtype=torch.bool).scatter(-1, places, True)
    return kept.flatten(-2).movedim(-1, 1).contiguous()


def _pattern(text: str) -> tuple[int, int]:
    """Of "N:M": N, and M."""
    found = re.fullmatch(r"(\d+):(\d+)", text)
    count, group = map(int, found.groups()) if found else (0, 0)
    if not 0 < count < group:
        raise ConfigError(
            f"prepare.pattern is {text!r}; it must be N:M, N numbers of each M inputs, as 2:4"
        )
    return count, group

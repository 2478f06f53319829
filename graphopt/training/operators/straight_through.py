"""Rounding that gradients pass as if it were not there.

The straight-through estimator of Bengio, Léonard and Courville, "Estimating or propagating
gradients through stochastic neurons" (arXiv 1308.3432, 2013), section 4.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Through(torch.autograd.Function):
    """The value of the second operand with the gradient of the first."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, rounded: Tensor) -> Tensor:
        return rounded.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        """Nothing is kept for the way back."""

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def through(x: Tensor, rounded: Tensor) -> Tensor:
    """The numbers of `rounded`; their gradient goes to `x` unchanged.

    Args:
        x: what was rounded, floating.
        rounded: of the same shape and type. Unlike `x + (rounded - x)`, its numbers stay the same
            to the last bit, infinite ones too.
    """
    passed: Tensor = _Through.apply(x, rounded.detach())  # type: ignore[no-untyped-call]
    return passed

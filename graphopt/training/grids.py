"""Weights on the grids of `quantize-weights`: integers of few bits times a scale for each block.

The integers are those of two's complement, as that pass has them. Scales are numbers of float16, so
that the products are exact in float32, and the pass finds integers and scales again in them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from graphopt.contract import Bounds
from graphopt.training.prepared_weights import Form, WeightOptions, in_half, straight_through

Bits = Literal[8, 6, 5, 4, 3, 2]

SHARES = tuple(1.1 - 0.05 * step for step in range(16))
"""Of the scale at which the largest number of a block gets the lowest integer: 1.1 to 0.35."""


class Grid(Form):
    """A weight rounded to integers times scales.

    Args:
        weight: to begin with, [outputs, ...].
        bits: of an integer.
        block: inputs that share a scale; 0 for all of an output.
        learns: scales are trained beside the weight, as learned step sizes; else they follow it,
            so that the largest number of a block is the lowest integer.
    """

    start: Tensor

    def __init__(self, weight: Tensor, bits: int, block: int, learns: bool) -> None:
        super().__init__()
        # 8 bits are symmetric: integer kernels have it so.
        self.lowest, self.highest = (-127 if bits == 8 else -(1 << bits - 1)), (1 << bits - 1) - 1
        self.width = _width(weight, block)
        self.learns = learns
        if learns:
            rows = self._blocks(weight)
            self.register_buffer("start", closest_scales(rows, self.lowest, self.highest))
            # The scale is start * exp(growth): it keeps its sign, moves by shares of its size, and
            # weight decay draws it to where it began.
            self.growth = nn.Parameter(torch.zeros_like(self.start))

    def forward(self, weight: Tensor) -> Tensor:
        """The rounded weight."""
        rows = self._blocks(weight)
        scales = self.scales(rows)
        if self.learns and scales.requires_grad:
            factor = gradient_factor(rows.shape[1], self.highest)
            scales = straight_through(scales, scales * factor)
        return rounded(rows, in_half(scales), self.lowest, self.highest).view_as(weight)

    def scales(self, rows: Tensor) -> Tensor:
        """Of each block of the weight, [blocks, 1]; before they are rounded to float16."""
        if self.learns:
            return self.start * self.growth.exp()
        return largest_scales(rows.detach(), self.lowest)

    def _blocks(self, weight: Tensor) -> Tensor:
        """The weight as [blocks, width]."""
        return weight.reshape(-1, self.width)


@dataclass(frozen=True)
class Quantized(WeightOptions):
    """Weights are rounded to few bits while they are trained.

    Attributes:
        bits: of each number.
        block: inputs that share a scale, for weights of two axes; 0 for one scale for each output.
            What does not divide them becomes the next larger number that does.
        scales: learned, or those of the largest numbers.
        activations: bits of what Linear and Conv read, whatever the size of their weights; None
            leaves activations as they are. See `graphopt.training.activations`.
    """

    bits: Bits = 8
    block: Annotated[int, Bounds(0)] = 0
    scales: Literal["learned", "largest"] = "learned"
    activations: Bits | None = None

    def forms(self, weights: Mapping[str, Tensor]) -> Mapping[str, Form]:
        """See `WeightOptions`."""
        learns = self.scales == "learned"
        return {name: Grid(w, self.bits, self.block, learns) for name, w in weights.items()}


def rounded(rows: Tensor, scales: Tensor, lowest: int, highest: int) -> Tensor:
    """Numbers on a grid, with the gradients of a learned step size.

    With v = w / s, the numbers are s * round(clip(v)); the gradient to w passes where nothing was
    clipped, and that to s is round(v) - v there, and the bound where something was. Esser et al.
    2020, Learned step size quantization (arXiv:1902.08153).

    Args:
        rows: w, float32 [blocks, numbers].
        scales: s, of any sign, [blocks, 1].
        lowest: integer.
        highest: integer.
    """
    exact = (rows / scales).clamp(lowest, highest)
    return straight_through(exact.round(), exact) * scales


def gradient_factor(numbers: int, highest: int) -> float:
    """1 / sqrt(N Q), by which LSQ's gradients to a step size are balanced with those to weights.

    Args:
        numbers: N, that share the step size.
        highest: Q, the highest integer.
    """
    return float((numbers * highest) ** -0.5)


def largest_scales(rows: Tensor, lowest: int) -> Tensor:
    """The scales, [blocks, 1], at which the largest magnitude of each block is the lowest integer.

    Scales have signs, since there is one integer more below zero; 1 for zeros.
    """
    places = rows.abs().argmax(1, keepdim=True)
    scales = rows.gather(1, places) / lowest
    return torch.where(scales != 0, scales, torch.ones_like(scales))


def closest_scales(rows: Tensor, lowest: int, highest: int) -> Tensor:
    """The scales, of a few, at which rounding changes each block least; [blocks, 1]."""
    whole = largest_scales(rows, lowest)
    tried = [in_half(whole * (sign * share)) for sign in (1, -1) for share in SHARES]
    errors = [(rounded(rows, s, lowest, highest) - rows).square().sum(1) for s in tried]
    best = torch.stack(errors).argmin(0)
    return torch.stack(tried)[best, torch.arange(len(rows), device=rows.device)]


def _width(weight: Tensor, block: int) -> int:
    """Numbers that share a scale."""
    inputs = weight.numel() // len(weight)
    if not block or weight.ndim != 2:
        return inputs
    return next(size for size in range(min(block, inputs), inputs + 1) if inputs % size == 0)

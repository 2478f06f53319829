"""Weights of two numbers for each output, -a and a, as `quantize-binary` stores them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.training.prepared_weights import Form, WeightOptions, in_half, straight_through

CLIP = 1.0
"""Beyond it, numbers get no gradient by their sign: they will not change it soon."""


class Signs(Form):
    """The signs of a weight, times the mean magnitude of each output."""

    def forward(self, weight: Tensor) -> Tensor:
        """The weight in signs."""
        rows = weight.flatten(1)
        scales = in_half(rows.abs().mean(1, keepdim=True))
        signs = torch.where(rows < 0, -1.0, 1.0)
        return (straight_through(signs, rows.clamp(-CLIP, CLIP)) * scales).view_as(weight)


@dataclass(frozen=True)
class Binary(WeightOptions):
    """Weights are signs and scales while they are trained.

    A weight becomes sign(W) times the mean of |W| of each output, which is the closest of that form
    (Rastegari et al. 2016, XNOR-Net, arXiv:1603.05279); the gradient of the sign is that of the
    number where it is within -1 and 1 (Courbariaux et al. 2015, BinaryConnect, arXiv:1511.00363).
    """

    def forms(self, weights: Mapping[str, Tensor]) -> Mapping[str, Form]:
        """See `WeightOptions`."""
        return {name: Signs() for name in weights}

"""Codes come to rest: layer by layer, at what each was most of the time.

A number that is pushed to the border between two codes goes to and fro across it to the end, so
that the last moment decides which code it is (Nagel et al. 2022, "Overcoming Oscillations in
Quantization-Aware Training"). Rates that become small do not help, as the border is where it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from graphopt.training.weight_forms import StoredWeight

SETTLED_FROM, SETTLED_TO = 0.4, 0.9
"""Of the time: when the first layer rests, and after which all do. What comes behind a layer learns
on, with its codes as they are going to be."""

MEMORY = 0.97
"""Of each step, what the mean of the rounded numbers keeps of what it was."""


@dataclass
class Settling:
    """Lets weights rest, in the order of the layers.

    Attributes:
        weights: all that learn.
        places: of those that are to rest.
    """

    weights: Sequence[StoredWeight]
    places: Sequence[int]
    _means: dict[int, Tensor] = field(default_factory=dict)
    _rested: int = 0

    @torch.no_grad()
    def watch(self, share: float, latent: Sequence[Tensor], rounded: list[Tensor]) -> None:
        """Look at what learns, and let rest what is due: it asks for no gradient from then on.

        Args:
            share: of the time that is over.
            latent: what learns of each weight; modified where it comes to rest.
            rounded: the same as it can be stored; exchanged where it comes to rest.
        """
        for i in self.places[self._rested :]:
            self._means[i] = self._means.get(i, rounded[i]).lerp(rounded[i], 1 - MEMORY)
        while self._rested < len(self.places) and share >= self._due(self._rested):
            i = self.places[self._rested]
            rounded[i] = self.weights[i].nearest(self._means.pop(i))
            latent[i].copy_(rounded[i])
            latent[i].requires_grad_(False)
            latent[i].grad = None
            self._rested += 1

    def _due(self, order: int) -> float:
        return SETTLED_FROM + (SETTLED_TO - SETTLED_FROM) * order / len(self.places)

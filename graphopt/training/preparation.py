"""Training that makes a module ready for what a pass will do to it."""

from __future__ import annotations

from typing import Protocol

from torch import nn


class Preparation(Protocol):
    """Trains a module towards what a pass will do to it."""

    def attach(self, module: nn.Module) -> None:
        """Register torch parametrizations, before the strategy wraps the module."""

    def advance(self, step: int, steps: int) -> None:
        """Called before the optimizer step of this number, from 0, of so many."""

    def gather(self) -> None:
        """Called when all processes have computed their shares of the batch of a step."""

    def is_settled(self, step: int, steps: int) -> bool:
        """After so many steps, the module is validated as it will be in the end.

        Only then can an epoch be the best one.
        """

    def finish(self, module: nn.Module) -> None:
        """Remove the parametrizations: the weights are then exactly the trained numbers.

        Args:
            module: the whole module with trained values, a copy of the one given to `attach`.
        """

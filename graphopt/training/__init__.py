"""The training side: what runs in PyTorch, before export and after. It needs graphopt[train]."""

from graphopt.training.heal import Healed, heal

__all__ = ["Healed", "heal"]
